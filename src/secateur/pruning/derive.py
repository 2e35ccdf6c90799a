"""The main verb: from a model and a calibration set to a sub-model on disk."""

import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from secateur.calibration.packing import CalibrationSet
from secateur.checkpoint.format import ACTIVATIONS, LOG, MANIFEST, dump_json, read_json, shard_name
from secateur.checkpoint.shards import write_outer_shard
from secateur.checkpoint.submodel import Provenance, finish_submodel
from secateur.config import Recipe, make_recipe
from secateur.errors import ConfigError, ModelError
from secateur.files import atomic_write_bytes, sha256_file
from secateur.models.replay import record_inputs
from secateur.models.source import ModelFolder, resolve_model
from secateur.models.structure import Block, find_blocks
from secateur.models.weights import WeightReader, drop_parameters, load_skeleton, set_parameters
from secateur.pruning.budgets import BUDGETS
from secateur.pruning.forecast import TOKENS_PER_BATCH, Forecast, make_forecast
from secateur.pruning.loop import Activations, BlockRun, Progress, prune_blocks
from secateur.pruning.methods import METHODS
from secateur.pruning.workspace import Workspace, finished_as_planned, open_workspace

VALUE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class SubModel:
    """A finished sub-model.

    Attributes
    ----------
    path
        Its folder.
    manifest
        The content of its `secateur.json`.
    log
        Seconds by stage and peak memory of the derivation; empty when the sub-model was there already.
    """

    path: Path
    manifest: dict[str, Any]
    log: dict[str, Any]


def _silent(stage: str, done: int, total: int) -> None:
    """Show no progress."""


def derive(
    model: str | Path | ModelFolder,
    calibration: CalibrationSet,
    *,
    output: str | Path,
    sparsity: float = 0.5,
    method: str = "wanda",
    budget: str = "uniform",
    granularity: str = "per_output",
    propagate: bool = True,
    device: str = "cpu",
    threads: int | None = None,
    resume: bool = False,
    progress: Progress = _silent,
    announce: Any = None,
) -> SubModel:
    """Derive a sub-model and write it to `output`.

    Parameters
    ----------
    model
        A Hugging Face folder, a GGUF file, a hub id, `demo`, or a resolved folder.
    calibration
        Token ids [samples, sequence_length] of the base model's tokenizer, and where they come from.
    output
        The folder to write; it must not exist.
    sparsity, method, budget, granularity, propagate
        See `secateur.config.Recipe`.
    device
        Where blocks run, as torch names it.
    threads
        Number of CPU threads; torch's own choice when None.
    resume
        Go on with an interrupted run of the same recipe; start afresh when there is none.
    progress
        Called with (stage, done, total).
    announce
        Called with the `Forecast` before work begins.

    Returns
    -------
    SubModel

    Raises
    ------
    SecateurError
        For anything in model, calibration set, options, output, memory or disk that cannot be used.
    """
    folder = model if isinstance(model, ModelFolder) else resolve_model(model)
    recipe = make_recipe(
        {
            "model": folder.name,
            "for": [f"{name}={weight:g}" for name, weight in calibration.mixture],
            "sparsity": sparsity,
            "method": method,
            "budget": budget,
            "granularity": granularity,
            "samples": calibration.samples,
            "sequence_length": calibration.sequence_length,
            "seed": calibration.seed,
            "propagate": propagate,
        }
    )
    METHODS.get(recipe.method)
    BUDGETS.get(recipe.budget)
    target = Path(os.path.normpath(output))
    skeleton = load_skeleton(folder)
    blocks = find_blocks(skeleton)
    _check_calibration(skeleton, calibration)
    device_object = _checked_device(device)
    plan = _plan(folder, skeleton, recipe, calibration, threads)
    if resume and finished_as_planned(target, plan):
        return SubModel(target, read_json(target / MANIFEST), {})
    with open_workspace(target, resume=resume) as workspace:
        plan = workspace.start(plan)
        with _threads(plan["run_threads"]):
            log = _Derivation(folder, skeleton, blocks, recipe, calibration, device_object, workspace, plan).run(
                progress, announce
            )
    return SubModel(target, read_json(target / MANIFEST), log)


def _plan(
    folder: ModelFolder, model: PreTrainedModel, recipe: Recipe, calibration: CalibrationSet, threads: int | None
) -> dict[str, Any]:
    """Everything that decides the bytes of the result, as plain JSON."""
    names = {"model.safetensors.index.json", "config.json"}
    files = [*folder.weight_files(), *(folder.path / name for name in sorted(names) if (folder.path / name).exists())]
    return {
        "recipe": recipe.to_dict(),
        "base_model": {
            "name": folder.name,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "files": {path.name: sha256_file(path) for path in files},
        },
        "calibration": {
            "sha256": calibration.sha256,
            "samples": calibration.samples,
            "sequence_length": calibration.sequence_length,
            "provenance": [asdict(one) for one in calibration.provenance],
        },
        "versions": {name: version(name) for name in ("secateur", "torch", "transformers")},
        "run_threads": threads or torch.get_num_threads(),
    }


@dataclass(frozen=True)
class _Derivation:
    """One derivation into an open workspace."""

    folder: ModelFolder
    model: PreTrainedModel
    blocks: tuple[Block, ...]
    recipe: Recipe
    calibration: CalibrationSet
    device: torch.device
    workspace: Workspace
    plan: dict[str, Any]

    def run(self, progress: Progress, announce: Any) -> dict[str, Any]:
        started, timings = time.perf_counter(), dict[str, float]()
        sizes = {b.weight_name(n): self._shape(b, n)[0] * self._shape(b, n)[1] for b in self.blocks for n in b.prunable}
        reader = WeightReader(self.folder, self.model)
        needs_data = METHODS.get(self.recipe.method).needs != "nothing"
        dtype = self._dtype(reader)
        batch_size = max(1, TOKENS_PER_BATCH // self.recipe.sequence_length)
        forecast = make_forecast(
            self.model,
            self.blocks,
            self.calibration.token_ids.size if needs_data else 0,
            dtype.itemsize,
            batch_size * self.recipe.sequence_length,
            self.workspace.folder,
        )
        if announce is not None:
            announce(forecast)
        activations = self._embed(reader, forecast, dtype, batch_size, timings) if needs_data else None
        block_run = BlockRun(
            self.model,
            self.blocks,
            reader,
            self.recipe,
            BUDGETS.get(self.recipe.budget).function(sizes, self.recipe.sparsity),
            lambda block: self.workspace.folder / shard_name(block.index + 1, len(self.blocks) + 1),
            activations,
            self.device,
        )
        prune_blocks(block_run, progress, timings)
        finish_started = time.perf_counter()
        manifest = self._finish(reader, dtype)
        timings["finish"] = time.perf_counter() - finish_started
        log = self._log(time.perf_counter() - started, timings)
        atomic_write_bytes(self.workspace.folder / LOG, dump_json(log))
        atomic_write_bytes(self.workspace.folder / MANIFEST, dump_json(manifest))
        self.workspace.publish()
        return log

    def _shape(self, block: Block, linear: str) -> tuple[int, int]:
        out_features, in_features = self.model.get_submodule(f"{block.name}.{linear}").weight.shape
        return out_features, in_features

    def _dtype(self, reader: WeightReader) -> torch.dtype:
        with reader:
            return reader.mapped(self.blocks[0].weight_name(self.blocks[0].prunable[0])).dtype

    def _embed(
        self, reader: WeightReader, forecast: Forecast, dtype: torch.dtype, batch_size: int, timings: dict[str, float]
    ) -> Activations:
        """Run everything before the first block over the calibration set and record what each block receives."""
        started = time.perf_counter()
        config = self.model.config.get_text_config(decoder=True)
        shape = (*self.calibration.token_ids.shape, config.hidden_size)
        if forecast.map_activations:
            hidden_states = torch.from_file(
                str(self.workspace.folder / ACTIVATIONS), shared=True, size=shape[0] * shape[1] * shape[2], dtype=dtype
            ).view(shape)
        else:
            hidden_states = torch.empty(shape, dtype=dtype)
        decoder = self.model.get_decoder()
        prefix = next(name for name, module in self.model.named_modules() if module is decoder)
        inside = tuple(f"{block.name}." for block in self.blocks)
        with reader, torch.inference_mode():
            outer = [name for name, _ in self.model.named_parameters() if not name.startswith(inside)]
            outer = [name for name in outer if name.startswith(f"{prefix}.")]
            set_parameters(self.model, {name: reader.mapped(name).to(self.device, dtype) for name in outer})
            inputs = record_inputs(
                self.model,
                self.blocks,
                torch.from_numpy(self.calibration.token_ids),
                batch_size,
                lambda start, hidden: hidden_states[start : start + len(hidden)].copy_(hidden),
                self.device,
            )
            for name in outer:
                drop_parameters(self.model.get_submodule(name.rpartition(".")[0]))
        timings["embed"] = time.perf_counter() - started
        return Activations(hidden_states, inputs, batch_size)

    def _finish(self, reader: WeightReader, dtype: torch.dtype) -> dict[str, Any]:
        total = len(self.blocks) + 1
        inside = tuple(f"{block.name}." for block in self.blocks)
        tied = set(self.model.all_tied_weights_keys) if self.model.config.tie_word_embeddings else set()
        outer = [
            name
            for name, _ in self.model.named_parameters(remove_duplicate=False)
            if not name.startswith(inside) and (name in reader or name not in tied) and name not in tied
        ]
        path = self.workspace.folder / shard_name(total, total)
        if not path.exists():
            with reader:
                write_outer_shard(path, {n: (reader.shape(n), reader.mapped(n).dtype) for n in outer}, reader.checked)
        shapes = {b.weight_name(n): self._shape(b, n) for b in self.blocks for n in b.prunable}
        provenance = Provenance(
            self.plan["base_model"],
            self.plan["recipe"],
            self.plan["calibration"],
            self.plan["versions"],
            VALUE_NAMES[dtype],
        )
        shards = [shard_name(number, total) for number in range(1, total + 1)]
        return finish_submodel(self.workspace.folder, self.folder.path, shards, shapes, provenance)

    def _log(self, seconds: float, timings: dict[str, float]) -> dict[str, Any]:
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in kilobytes elsewhere
        return {
            "seconds": round(seconds, 3),
            "seconds_by_stage": {stage: round(value, 3) for stage, value in timings.items()},
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
            "threads": torch.get_num_threads(),
            "resumed": self.workspace.resumed,
            "machine": platform.platform(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }


def _check_calibration(model: PreTrainedModel, calibration: CalibrationSet) -> None:
    config = model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and calibration.sequence_length > longest:
        raise ConfigError(
            f"sequence length {calibration.sequence_length} is more than the {longest} tokens that the model takes: "
            "use a shorter --sequence-length"
        )
    highest = int(calibration.token_ids.max())
    if highest >= config.vocab_size:
        raise ModelError(
            f"the calibration set holds token {highest}, the model's vocabulary has {config.vocab_size}: "
            "it was made with another tokenizer"
        )


def _checked_device(device: str) -> torch.device:
    try:
        checked = torch.device(device)
        torch.empty(1, device=checked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"device {device!r} cannot be used: {first}; name another one, such as cpu") from None
    return checked


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
