"""A model that is ready to generate: any base model, or a sub-model, opened through transformers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import CheckpointError, ModelError, SecateurError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from secateur.models.source import ModelFolder


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with its tokenizer.

    Attributes
    ----------
    path
        The Hugging Face folder that it was read from.
    model, tokenizer
        The transformers objects; the model is in evaluation mode.
    """

    path: Path
    model: "PreTrainedModel" = field(repr=False)
    tokenizer: "PreTrainedTokenizerBase" = field(repr=False)

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> str:
        """Return the text that follows `prompt`, without the prompt.

        Parameters
        ----------
        prompt
            Text, special tokens included where the model uses them; no chat template is applied.
        max_new_tokens, temperature, top_k, top_p, seed, stop, ignore_eos
            See `secateur.runtime.generation.GenerationOptions`. The default takes the most likely token each time.

        Raises
        ------
        ConfigError
            When an option cannot be used, the prompt is empty or too long for the model.
        """
        options = {"top_k": top_k, "top_p": top_p, "seed": seed, "stop": stop, "ignore_eos": ignore_eos}
        return "".join(self.stream(prompt, max_new_tokens, temperature, **options))  # type: ignore[arg-type]

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Iterator[str]:
        """Return an iterator over the pieces of what `generate` returns, each as soon as it is certain.

        Pieces are whole characters and never empty. Takes and raises what `generate` does, before the first piece.
        """
        from secateur.runtime import generation

        options = generation.GenerationOptions(max_new_tokens, temperature, top_k, top_p, seed, stop, ignore_eos)
        prompt_ids = generation.encode_prompt(prompt, self.model, self.tokenizer, max_new_tokens)
        end_ids = generation.end_of_sequence_ids(self.model, self.tokenizer)
        token_ids = generation.generate_token_ids(self.model, prompt_ids, options, end_ids)
        return generation.cut_at_stop(generation.decode_pieces(token_ids, self.tokenizer, prompt_ids), options.stop)


def load(path: str | Path, *, threads: int | None = None, device: str = "cpu") -> LoadedModel:
    """Open a sub-model or a base model for generation.

    Parameters
    ----------
    path
        A folder, or any name that `resolve_model` accepts.
    threads
        Threads that torch may use in this process; None leaves the setting as it is.
    device
        Where the weights are put, as torch names it.

    Raises
    ------
    ModelError
        When the model cannot be found or read.
    CheckpointError
        When weights of the model are missing from its files, or have another shape than its config says.
    ConfigError
        When `threads` or `device` cannot be used.
    """
    from secateur.models.device import checked_device, set_threads
    from secateur.models.source import load_tokenizer, resolve_model

    checked_device(device)
    if threads is not None:
        set_threads(threads)
    folder = resolve_model(str(path))
    return LoadedModel(folder.path, open_model(folder, device=device), load_tokenizer(folder))


def open_model(folder: "ModelFolder", *, device: str = "cpu") -> "PreTrainedModel":
    """Return the transformers model of a folder in its stored precision, every weight accounted for.

    Raises
    ------
    ModelError, CheckpointError
        As `load`; which of the two depends on whether the folder holds a base model or a sub-model.
    """
    from transformers import AutoModelForCausalLM

    import secateur.checkpoint.hook  # noqa: F401  (registers the checkpoint format)
    from secateur.models.source import first_line

    try:
        # Remote code stays off, else transformers asks about it on the terminal.
        model, report = AutoModelForCausalLM.from_pretrained(
            folder.path,
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

    shapes = check_quantization_config(read_json(folder.path / "config.json").get("quantization_config"))
    for shard in folder.weight_files():
        read_shard(shard, shapes)


def _check_report(folder: "ModelFolder", report: dict[str, Any]) -> None:
    """Refuse a model that transformers opened with a mere warning although weights are random or still packed."""
    from secateur.checkpoint.bitmask import SUFFIXES

    mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in report.get("mismatched_keys", ())]
    # A pruned weight that nothing unpacked is left over under the names of its parts.
    packed = [name for name in report.get("unexpected_keys", ()) if name.rpartition(".")[2] in SUFFIXES]
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
