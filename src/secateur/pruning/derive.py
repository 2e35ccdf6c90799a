"""The main verb: from a model and a calibration set to a sub-model on disk."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from secateur.calibration.mixture import parse_mixture
from secateur.calibration.packing import CalibrationSet, build_calibration_set
from secateur.checkpoint.format import MANIFEST, read_json
from secateur.config import Recipe, make_recipe
from secateur.errors import ConfigError, ModelError
from secateur.files import sha256_file
from secateur.models.device import checked_device, limited_threads
from secateur.models.source import ModelFolder, load_tokenizer, resolve_model
from secateur.models.structure import find_blocks
from secateur.models.weights import load_skeleton
from secateur.pruning.budgets import BUDGETS
from secateur.pruning.job import Job
from secateur.pruning.loop import Progress
from secateur.pruning.methods import METHODS
from secateur.pruning.workspace import check_output, finished_as_planned, open_workspace


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

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {"path": str(self.path), "log": self.log, **self.manifest}

    def describe(self) -> str:
        """Return a text for people."""
        manifest = self.manifest
        lines = [
            f"sub-model of {manifest['base_model']['name']} for {', '.join(manifest['recipe']['for'])} in {self.path}",
            f"kept {manifest['kept_weights']:,} of {manifest['prunable_weights']:,} prunable weights "
            f"(sparsity {manifest['sparsity']:.4f}), {sum(f.stat().st_size for f in self.path.iterdir()) / 1e6:.0f} MB",
        ]
        if self.log:
            lines.append(
                f"took {self.log['seconds']:.1f} s and {self.log['peak_memory_bytes'] / 1e6:.0f} MB of memory at most, "
                f"{self.log['peak_memory_above_start_bytes'] / 1e6:.0f} MB above the bare program"
            )
        else:
            lines.append("it was finished already; nothing was done")
        return "\n".join(lines)


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
    announce: Callable[[str], None] | None = None,
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
        Called with one line on the memory and disk that will be needed, before work begins.

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
            "model": folder.name if isinstance(model, ModelFolder) else str(model),
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
    execution = Execution(output, device, threads, resume, progress, announce)
    return _derive(folder, recipe, calibration, execution)


def derive_recipe(
    recipe: Recipe,
    *,
    output: str | Path,
    data: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    resume: bool = False,
    progress: Progress = _silent,
    announce: Callable[[str], None] | None = None,
) -> SubModel:
    """Derive a sub-model from a recipe alone: fetch the model, draw the calibration set, and prune.

    Names and the output path are checked before anything is fetched. Parameters and errors are those of `derive`;
    `data` is a folder that is tried before all other sources of text.
    """
    METHODS.get(recipe.method)
    BUDGETS.get(recipe.budget)
    mixture = parse_mixture(recipe.domains)
    if not resume:
        check_output(Path(os.path.normpath(output)))
    folder = resolve_model(recipe.model)
    calibration = build_calibration_set(
        mixture,
        load_tokenizer(folder),
        samples=recipe.samples,
        sequence_length=recipe.sequence_length,
        seed=recipe.seed,
        data=data,
    )
    return _derive(folder, recipe, calibration, Execution(output, device, threads, resume, progress, announce))


@dataclass(frozen=True)
class Execution:
    """How a derivation is run: what decides nothing about the result. The fields are parameters of `derive`."""

    output: str | Path
    device: str
    threads: int | None
    resume: bool
    progress: Progress
    announce: Callable[[str], None] | None


def _derive(folder: ModelFolder, recipe: Recipe, calibration: CalibrationSet, execution: Execution) -> SubModel:
    METHODS.get(recipe.method)
    BUDGETS.get(recipe.budget)
    target = Path(os.path.normpath(execution.output))
    device = checked_device(execution.device)
    skeleton = load_skeleton(folder)
    blocks = find_blocks(skeleton)
    _check_calibration(skeleton, calibration)
    plan = _plan(folder, skeleton, recipe, calibration, execution.threads)
    if execution.resume and finished_as_planned(target, plan):
        return SubModel(target, read_json(target / MANIFEST), {})
    with open_workspace(target, resume=execution.resume) as workspace:
        plan = workspace.start(plan)
        with limited_threads(plan["run_threads"]):
            job = Job(folder, skeleton, blocks, recipe, calibration, device, workspace, plan)
            log = job.run(execution.progress, execution.announce)
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
