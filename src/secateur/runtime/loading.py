"""Opening a model to generate with: any base model, or a sub-model, run natively where that is possible."""

import functools
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import CheckpointError, ConfigError, ModelError, NativeCodeError, SecateurError
from secateur.runtime.loaded import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from secateur.models.source import ModelFolder

logger = logging.getLogger(__name__)

ENGINES = ("auto", "native", "torch")


def load(path: str | Path, *, threads: int | None = None, device: str = "cpu", engine: str = "auto") -> LoadedModel:
    """Open a sub-model or a base model for generation.

    Parameters
    ----------
    path
        A folder, or any name that `resolve_model` accepts.
    threads
        Threads that the model runs on; None means as many as this process may use.
    device
        Where the weights are put, as torch names it; anything but `cpu` is run by torch.
    engine
        `native` runs packed weights from the mapped file, for the families that it knows; `torch` runs them in a
        transformers model of any family, with packed modules in the places of its own; `auto` is `native` where it can
        be.

    Raises
    ------
    ModelError
        When the model cannot be found or read, or `native` was asked for and does not run it.
    CheckpointError
        When weights of the model are missing from its files, damaged, or have another shape than its config says.
    ConfigError
        When `threads`, `device` or `engine` cannot be used.
    """
    from secateur.models.source import resolve_model
    from secateur.runtime.architecture import NotNativeError

    if engine not in ENGINES:
        raise ConfigError(f"engine is {engine!r}; it must be one of {', '.join(ENGINES)}")
    if engine == "native" and device != "cpu":
        raise ConfigError(f"the native engine runs on the CPU, not on device {device!r}; use engine='torch'")
    folder = resolve_model(str(path))
    if engine != "torch" and device == "cpu":
        from secateur.runtime.engine import open_native

        try:
            return LoadedModel(folder.path, open_native(folder, threads=threads))
        except NotNativeError as error:
            if engine == "native":
                raise
            logger.info("%s: %s; torch runs it", folder.name, error)
    if device == "cpu" and (engine == "auto" or folder.is_submodel()):
        _warn_without_kernels()
    return _load_torch(folder, threads, device)


@functools.cache
def _warn_without_kernels() -> None:
    """Say once that the native code cannot be used: nothing else tells why generation is slow."""
    from secateur.runtime.kernels import load_library

    try:
        load_library()
    except NativeCodeError as error:
        warnings.warn(
            f"torch runs the model slowly, and a sub-model unpacked, in the memory of its parent: {error}",
            stacklevel=3,
        )


def _load_torch(folder: "ModelFolder", threads: int | None, device: str) -> LoadedModel:
    if folder.is_submodel():
        _let_idle_threads_sleep()
    from secateur.checkpoint.shards import read_shortlist
    from secateur.models.device import checked_device, set_threads
    from secateur.models.source import load_tokenizer
    from secateur.runtime.generation import TransformersBackend

    checked_device(device)
    if threads is not None:
        set_threads(threads)
    shortlist = read_shortlist(folder.path) if folder.is_submodel() else None
    model = open_model(folder, device=device, packed=_stays_packed(folder, device))
    return LoadedModel(folder.path, TransformersBackend(model, load_tokenizer(folder), shortlist))


def _stays_packed(folder: "ModelFolder", device: str) -> bool:
    """Return whether something multiplies with packed weights, or at least the memory of the device is dear.

    On the CPU unpacking a layer each time that it is used takes 20 times as long as the product.
    """
    from secateur.checkpoint.format import check_quantization_config, read_json
    from secateur.runtime.kernels import available

    if not folder.is_submodel():
        return False
    stored = check_quantization_config(read_json(folder.path / "config.json").get("quantization_config"))
    return device != "cpu" or (available() and stored.pruned.encoding.values != "fp32")


def _let_idle_threads_sleep() -> None:
    """Ask OpenMP for it, unless torch has loaded it: they would spin on processors that the kernels' threads need."""
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def open_model(folder: "ModelFolder", *, device: str = "cpu", packed: bool = False) -> "PreTrainedModel":
    """Return the transformers model of a folder in its stored precision, every weight accounted for.

    Parameters
    ----------
    folder
        A base model or a sub-model.
    device
        Where the weights are put.
    packed
        Whether a sub-model stays packed. Unpacked it is an ordinary model; packed its kernels round activations to
        8 bits where weights are integers, so nothing that is to be exact is measured on it.

    Raises
    ------
    ModelError, CheckpointError
        As `load`; which of the two depends on whether the folder holds a base model or a sub-model.
    """
    from transformers import AutoModelForCausalLM

    import secateur.checkpoint.hook  # noqa: F401  (registers the checkpoint format)
    from secateur.models.source import first_line

    options: dict[str, Any] = {}
    try:
        if packed and folder.is_submodel():
            from secateur.runtime.packed_model import packed_config

            options["config"] = packed_config(folder)
        # Remote code stays off, else transformers asks about it on the terminal.
        model, report = AutoModelForCausalLM.from_pretrained(
            folder.path,
            **options,
            dtype="auto",
            output_loading_info=True,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # the report names them, the error would not
        )
    except SecateurError:
        raise
    except Exception as error:  # transformers, safetensors and torch raise what they like on a damaged file
        if not folder.is_submodel():
            raise ModelError(f"model {folder.name!r} cannot be opened ({first_line(error)}); fetch it again") from error
        _find_damage(folder)
        raise CheckpointError(
            f"sub-model {folder.name!r} cannot be opened ({first_line(error)}); derive or fetch it again"
        ) from error
    _check_report(folder, report)
    return model.eval().to(device)


def _find_damage(folder: "ModelFolder") -> None:
    """Raise the `CheckpointError` of the first damaged weight: transformers only says that there is one."""
    from secateur.checkpoint.format import check_quantization_config, read_json
    from secateur.checkpoint.shards import read_shard

    stored = check_quantization_config(read_json(folder.path / "config.json").get("quantization_config"))
    for shard in folder.weight_files():
        read_shard(shard, stored)


def _check_report(folder: "ModelFolder", report: dict[str, Any]) -> None:
    """Refuse a model that transformers opened with a mere warning although weights are random or still packed."""
    from secateur.checkpoint.shards import PART_SUFFIXES

    mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in report.get("mismatched_keys", ())]
    # A pruned weight that nothing unpacked is left over under the names of its parts.
    packed = [name for name in report.get("unexpected_keys", ()) if name.rpartition(".")[2] in PART_SUFFIXES]
    problems = {
        "missing from its files": sorted(report.get("missing_keys", ())),
        "of another shape than its config says": sorted(mismatched),
        "left packed": sorted(packed) if folder.is_submodel() else [],
    }
    for problem, names in problems.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"weights of {folder.name!r} are {problem}: {names[0]}{more}; derive or download it again"
            )
    if errors := report.get("error_msgs"):
        raise CheckpointError(f"model {folder.name!r} was not read whole: {errors[0]}")
