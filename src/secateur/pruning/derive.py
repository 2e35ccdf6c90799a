"""The main verb: from a model and a calibration set to a sub-model on disk."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from secateur.calibration.mixture import Mixture, domain_items, parse_mixture
from secateur.calibration.packing import (
    CalibrationSet,
    TooLittleTextError,
    build_calibration_set,
    token_ids_hash,
)
from secateur.calibration.shortlist import TokenChoice, choose_tokens
from secateur.checkpoint.format import MANIFEST, read_json
from secateur.config import Recipe, make_recipe
from secateur.errors import ConfigError, CorpusError
from secateur.files import check_writable, sha256_file
from secateur.models.device import checked_device, limited_threads
from secateur.models.source import ModelFolder, load_tokenizer, resolve_model
from secateur.models.weights import load_skeleton
from secateur.pruning.base import Base
from secateur.pruning.budgets import BUDGETS
from secateur.pruning.divergence import TOKENS
from secateur.pruning.duration import describe_seconds, expected_seconds
from secateur.pruning.execution import Execution
from secateur.pruning.job import Job, forecast_job
from secateur.pruning.loop import Progress
from secateur.pruning.methods import METHODS
from secateur.pruning.quality import Judge, unseen_text
from secateur.pruning.search import Search
from secateur.pruning.size import Footprint, check_eight_bits
from secateur.pruning.sizing import best_way, sized_recipes
from secateur.pruning.texts import Texts, check_length
from secateur.pruning.trials import check_kept, check_search, clear, open_trials, search_folder, searched
from secateur.pruning.vocabulary import with_vocabulary
from secateur.pruning.vocabulary_size import fitting_vocabulary
from secateur.pruning.workspace import check_finished, check_output, open_workspace, partial_folder, tidy


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
    sparsity: float | None = None,
    target_size: int | str | None = None,
    keep_quality: float | None = None,
    preset: str | None = None,
    method: str | None = None,
    budget: str | None = None,
    granularity: str = "per_output",
    propagate: bool = True,
    values: str | None = None,
    group_size: int | None = None,
    embedding_values: str | None = None,
    eight_bits: float | None = None,
    trim_vocabulary: bool = False,
    recovery: CalibrationSet | None = None,
    correction: float | None = None,
    first_token_weight: float | None = None,
    data: str | Path | None = None,
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
        A Hugging Face folder, a GGUF file, a hub id, `demo`, or a resolved folder, which
        `secateur.pruning.vocabulary.with_vocabulary` may have given fewer tokens.
    calibration
        Token ids [samples, sequence_length] of the base model's tokenizer, and where they come from.
    output
        The folder to write; it must not exist.
    preset
        A name in `secateur.config.PRESETS`; `balanced` without it and without a method.
    sparsity, target_size, keep_quality, method, budget, granularity, propagate, values, group_size, embedding_values,
    eight_bits, trim_vocabulary, correction, first_token_weight
        See `secateur.config.Recipe`.
    recovery
        Token ids [sequences, length] that the pruned model learns from beside its parent; None: it does not.
    data
        The folder with text that the calibration set was drawn from, if there was one; only `trim_vocabulary` and
        `keep_quality` read it.
    device
        Where blocks run, as torch names it.
    threads
        Number of CPU threads; torch's own choice when None.
    resume
        Go on with an interrupted run of the same recipe; start afresh when there is none.
    progress
        Called with (stage, done, total).
    announce
        Called with lines on what the text has of benchmarks, and on the memory, disk and time that will be needed,
        before work begins.

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
            "for": domain_items(calibration.mixture),
            "sparsity": sparsity,
            "target_size": target_size,
            "keep_quality": keep_quality,
            "preset": preset,
            "method": method,
            "budget": budget,
            "granularity": granularity,
            "samples": calibration.samples,
            "sequence_length": calibration.sequence_length,
            "seed": calibration.seed,
            "propagate": propagate,
            "values": values,
            "group_size": group_size,
            "embedding_values": embedding_values,
            "eight_bits": eight_bits,
            "trim_vocabulary": trim_vocabulary,
            "vocabulary": None if folder.trimming is None else folder.trimming.record["tokens"],
            "correction": correction,
            "first_token_weight": first_token_weight,
            "recover": 0 if recovery is None else recovery.token_ids.size,
            "recover_for": _other_domains(calibration, recovery),
        }
    )
    execution = Execution(output, device, threads, resume, progress, announce, None if data is None else Path(data))
    base = Base.open(folder)
    texts = Texts(calibration, recovery)
    texts.warn(execution.say)
    return _carry_out(base, best_way(base, recipe, sized_recipes(base, recipe), texts, execution), texts, execution)


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
    learnt = parse_mixture(recipe.recover_for) if recipe.recover_for else mixture
    if dict(learnt) == dict(mixture):
        recipe = recipe.model_copy(update={"recover_for": ()})
    if 0 < recipe.recover < recipe.sequence_length:
        raise ConfigError(
            f"recovery from {recipe.recover} tokens is less than one sequence of {recipe.sequence_length}: "
            "give --recover more, or leave it out"
        )
    checked_device(device)
    if not resume:
        check_output(Path(os.path.normpath(output)))
        if recipe.keep_quality is not None:
            check_search(Path(os.path.normpath(output)), resume=False)
    check_writable(Path(output))
    folder = resolve_model(recipe.model)
    execution = Execution(output, device, threads, resume, progress, announce, data)

    def draw(samples: int, mixture: Mixture = mixture) -> CalibrationSet:
        length, seed, tokenizer = recipe.sequence_length, recipe.seed, load_tokenizer(folder)
        return build_calibration_set(mixture, tokenizer, samples=samples, sequence_length=length, seed=seed, data=data)

    finds_tokens = recipe.vocabulary == "auto"
    if recipe.vocabulary is not None:
        check_length(Base.open(folder).model, recipe.sequence_length)  # before a smaller model is written
        if finds_tokens:
            few = Texts(draw(-(-TOKENS // recipe.sequence_length)), None)
            found = fitting_vocabulary(folder, mixture, recipe, few, execution)
            recipe = recipe.model_copy(update={"vocabulary": found})
        progress("tokens", 0, 1)
        if isinstance(recipe.vocabulary, int):
            folder = with_vocabulary(folder, mixture, recipe.vocabulary, seed=recipe.seed, data=data)
        progress("tokens", 1, 1)
    base = Base.open(folder)
    sized = sized_recipes(base, recipe)
    check_length(base.model, recipe.sequence_length)
    texts = Texts(draw(recipe.samples), _learnt(recipe, lambda samples: draw(samples, learnt)))
    if texts.recovery is not None:
        sized = tuple(one.model_copy(update={"recover": texts.recovery.token_ids.size}) for one in sized)
    texts.warn(execution.say)
    best = best_way(base, recipe, sized, texts, execution, advise=not finds_tokens)
    return _carry_out(base, best, texts, execution)


def _learnt(recipe: Recipe, draw: Callable[[int], CalibrationSet]) -> CalibrationSet | None:
    """Draw the text of a recovery, if there is one."""
    if not recipe.recover:
        return None
    try:
        return draw(recipe.recover // recipe.sequence_length)
    except TooLittleTextError as error:
        raise CorpusError(f"{error} (--recover counts as samples here: give it less)") from None


def _other_domains(calibration: CalibrationSet, recovery: CalibrationSet | None) -> list[str]:
    """Return the domains of the text that is learnt from, where they are not those of the calibration set."""
    if recovery is None or dict(recovery.mixture) == dict(calibration.mixture):
        return []
    return domain_items(recovery.mixture)


def _carry_out(base: Base, recipe: Recipe, texts: Texts, execution: Execution) -> SubModel:
    """Derive once, or as often as a quality that is to be kept asks for."""
    output, quality = execution.target, recipe.keep_quality
    if quality is None:
        return _derive(base, recipe, texts, execution)
    if execution.resume and os.path.lexists(output):
        finished = _derive(base, check_kept(output, recipe, quality), texts, execution)
        clear(search_folder(output))  # left there by a run that was killed at its very end
        return finished
    device, threads = execution.torch_device, execution.n_threads
    texts.check(base.model)
    tokens, folder = texts.calibration.token_ids.size, search_folder(output)
    forecast_job(base, recipe, tokens, texts.recovery, threads, folder, device=device)
    unseen = unseen_text(texts, load_tokenizer(base.folder), execution.data)
    plan = _plan(base, recipe, texts, None, execution)
    asked = {key: one for key, one in plan.items() if not key.startswith("run_")} | {
        "recipe": plan["recipe"] | dict.fromkeys(searched(recipe)),
        "unseen": token_ids_hash(unseen),
    }
    judge = Judge(base, unseen, device, lambda done, total: execution.progress("measure", done, total))

    def one(recipe: Recipe, place: Path) -> None:
        # A base of its own: a derivation leaves the model behind without weights, and its head no longer tied.
        _derive(Base.open(base.folder), recipe, texts, replace(execution, output=place, resume=True))

    with open_trials(output, asked, resume=execution.resume) as trials:
        with limited_threads(threads):
            footprint, say = Footprint.of(base, base.stored_names()), execution.say
            search = Search(trials, recipe, quality=quality, judge=judge, footprint=footprint, derive=one, say=say)
            best = search.run()
        log = trials.publish(best)
    return SubModel(output, read_json(output / MANIFEST), log)


def _derive(base: Base, recipe: Recipe, texts: Texts, execution: Execution) -> SubModel:
    METHODS.get(recipe.method)
    BUDGETS.get(recipe.budget)
    target, device = execution.target, execution.torch_device
    texts.check(base.model)
    check_eight_bits(base, recipe)
    finished = execution.resume and os.path.lexists(target)
    if not finished:
        check_output(target, resume=execution.resume)
    shortlist = _shortlist(base, texts.calibration, execution) if recipe.trim_vocabulary else None
    if finished:
        check_finished(target, _plan(base, recipe, texts, shortlist, execution))
        tidy(target)
        return SubModel(target, read_json(target / MANIFEST), {})
    tokens, threads = texts.calibration.token_ids.size, execution.n_threads
    forecast = forecast_job(base, recipe, tokens, texts.recovery, threads, partial_folder(target), device=device)
    if execution.announce is not None:
        recovering = 0 if texts.recovery is None else texts.recovery.token_ids.size
        execution.announce(forecast.describe())
        if device.type == "cpu":  # what an accelerator does has not been held against what is reckoned
            seconds = expected_seconds(base, recipe, tokens=tokens, recovering=recovering, threads=threads)
            execution.announce(f"takes {describe_seconds(seconds)}, with the machine as busy as now")
    plan = _plan(base, recipe, texts, shortlist, execution)
    with open_workspace(target, resume=execution.resume) as workspace:
        plan = workspace.start(plan)
        with limited_threads(plan["run_threads"]):
            job = Job(base, recipe, texts.calibration, shortlist, texts.recovery, forecast, device, workspace, plan)
            log = job.run(execution.progress)
    return SubModel(target, read_json(target / MANIFEST), log)


def _shortlist(base: Base, calibration: CalibrationSet, execution: Execution) -> TokenChoice:
    """Choose the tokens of a trimmed head from the text that the calibration set was drawn from."""
    execution.progress("tokens", 0, 1)
    choice = choose_tokens(
        calibration.mixture,
        load_tokenizer(base.folder),
        base.head_rows(),
        always=base.named_tokens(),
        seed=calibration.seed,
        data=execution.data,
    )
    if choice.provenance != calibration.provenance:
        raise ConfigError(
            "the text that is found for the vocabulary is not that of the calibration set: "
            "name the data folder that it was drawn from"
        )
    execution.progress("tokens", 1, 1)
    return choice


def _plan(
    base: Base,
    recipe: Recipe,
    texts: Texts,
    shortlist: TokenChoice | None,
    execution: Execution,
) -> dict[str, Any]:
    """Everything that decides the bytes of the result, as plain JSON."""
    folder = base.folder.whole()
    names = ("config.json", "model.safetensors.index.json")
    files = [*folder.weight_files(), *(folder.path / name for name in names if (folder.path / name).exists())]
    hashes = {}
    for number, path in enumerate(files):
        execution.progress("hash", number, len(files))
        hashes[path.name] = sha256_file(path)
    execution.progress("hash", len(files), len(files))
    plan = {
        "recipe": recipe.to_dict(),
        "base_model": {
            "name": folder.name,
            "parameters": sum(parameter.numel() for parameter in _whole_model(base).parameters()),
            "files": hashes,
        },
        **texts.described(),
        "versions": {name: version(name) for name in ("secateur", "torch", "transformers")},
        "device": torch.device(execution.device).type,
        "run_threads": execution.n_threads,
    }
    if shortlist is not None:
        plan["shortlist"] = shortlist.to_dict()
    if base.folder.trimming is not None:
        plan["vocabulary"] = dict(base.folder.trimming.record)
    return plan


def _whole_model(base: Base) -> PreTrainedModel:
    """Return the skeleton of the model that the user has named."""
    return base.model if base.folder.trimming is None else load_skeleton(base.folder.whole())
