"""One derivation, from an open workspace to a published folder: check, embed, prune the blocks, finish."""

import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from secateur.calibration.packing import CalibrationSet
from secateur.calibration.shortlist import TokenChoice
from secateur.checkpoint.bitmask import PackedWeight
from secateur.checkpoint.dense import DenseWeight
from secateur.checkpoint.format import (
    ACTIVATIONS,
    FLOATS,
    LOG,
    MANIFEST,
    PARENT_ACTIVATIONS,
    PRUNED,
    PRUNED_WHOLE,
    RECOVERY,
    Encoding,
    Stored,
    StoredWeights,
    TrimmedHead,
    dump_json,
    shard_name,
)
from secateur.checkpoint.shards import check_shard, read_shard, write_block_shard, write_outer_shard
from secateur.checkpoint.shortlist import Shortlist
from secateur.checkpoint.submodel import Provenance, finish_submodel
from secateur.config import Recipe
from secateur.errors import CheckpointError, ModelError
from secateur.files import atomic_write_bytes
from secateur.models.products import fast_products
from secateur.models.replay import record_inputs
from secateur.models.structure import Block, embedding_weights
from secateur.models.weights import drop_parameters, set_parameters
from secateur.pruning.activations import Activations
from secateur.pruning.allotment import Allotment, allot, measures
from secateur.pruning.base import Base
from secateur.pruning.demand import Demand
from secateur.pruning.forecast import Forecast, make_forecast
from secateur.pruning.loop import BlockRun, Progress, prune_blocks
from secateur.pruning.method import Pruned
from secateur.pruning.methods import METHODS
from secateur.pruning.passes import in_stages
from secateur.pruning.pupil import open_pupil
from secateur.pruning.recovery import Pupil, recover
from secateur.pruning.size import Footprint
from secateur.pruning.weight import dense_encoding_of, encoding_of, pack_weight
from secateur.pruning.workspace import Workspace
from secateur.resources import peak_memory

TOKENS_PER_BATCH = 2048  # in one forward pass over the calibration set
VALUE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def forecast_job(  # noqa: PLR0917
    base: Base,
    recipe: Recipe,
    tokens: int,
    recovery: CalibrationSet | None,
    threads: int,
    workspace: Path,
    *,
    device: torch.device,
    sizing: bool = False,
) -> Forecast:
    """Forecast a derivation from headers alone; raises `ResourceError` when it cannot fit.

    With `sizing` the whole model is measured before, to choose between ways of making it smaller.
    """
    needs_data = METHODS.get(recipe.method).needs != "nothing"
    footprint = Footprint.of(base)
    demand = Demand(
        base.model,
        base.blocks,
        tokens=tokens if needs_data else 0,
        itemsize=base.dtype().itemsize,
        batch_tokens=_batch_size(recipe) * recipe.sequence_length,
        sparsity=0.0 if recipe.budget == "packed" else recipe.sparsity,
        threads=threads,
        written=footprint.folder(recipe),
        outer=footprint.outer(recipe),
        rounded=encoding_of(recipe).bits > 0,
        trimmed=recipe.trim_vocabulary,
        gram=METHODS.get(recipe.method).needs_gram,
        streams=2 if follows_parent(recipe) else 1,
        # What an accelerator has is not looked at: there passes are run again.
        waiting_length=recipe.sequence_length if in_stages(recipe) and device.type == "cpu" else 0,
        recovering=0 if recovery is None else recovery.sequence_length,
        measuring=measures(recipe) or recipe.keep_quality is not None,
        sizing=sizing,
    )
    return make_forecast(demand, workspace)


def follows_parent(recipe: Recipe) -> bool:
    """Return whether the calibration set runs through the dense model too, beside the pruned one."""
    return recipe.propagate and recipe.correction > 0 and METHODS.get(recipe.method).needs == "cross_gram"


def _batch_size(recipe: Recipe) -> int:
    return max(1, TOKENS_PER_BATCH // recipe.sequence_length)


@contextmanager
def _seconds(timings: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    timings[stage] = time.perf_counter() - started


@dataclass(frozen=True)
class Job:
    """One derivation into an open workspace.

    Attributes
    ----------
    base, recipe, calibration, forecast, workspace
        What is derived, from what, and where.
    tokens
        Those that a trimmed head computes; None when it is not trimmed.
    recovery
        The text that the pruned model learns from; None when it does not.
    device
        Where blocks run.
    plan
        Everything that decides the bytes of the result, as plain JSON.
    allotment
        What each prunable weight gets; of none until `run` has found it.
    """

    base: Base
    recipe: Recipe
    calibration: CalibrationSet
    tokens: TokenChoice | None
    recovery: CalibrationSet | None
    forecast: Forecast
    device: torch.device
    workspace: Workspace
    plan: dict[str, Any]
    allotment: Allotment = field(default_factory=lambda: Allotment(FLOATS))

    @fast_products()
    def run(self, progress: Progress) -> dict[str, Any]:
        """Do the work, publish the folder and return the log."""
        started, timings = time.perf_counter(), dict[str, float]()
        memory_before = psutil.Process().memory_info().rss
        self._check_weights(progress)
        timings["check"] = time.perf_counter() - started
        with _seconds(timings, "budget"):
            ready = replace(self, allotment=self._allotted(progress))
        ready._prune(progress, timings)
        with _seconds(timings, "finish"):
            manifest = ready._finish()
        log = self._log(time.perf_counter() - started, timings, memory_before)
        atomic_write_bytes(self.workspace.folder / LOG, dump_json(log))
        atomic_write_bytes(self.workspace.folder / MANIFEST, dump_json(manifest))
        self.workspace.publish()
        return log

    def _allotted(self, progress: Progress) -> Allotment:
        folder = self.workspace.folder
        return allot(
            self.base, self.recipe, self.calibration, folder, self.device, lambda done, n: progress("budget", done, n)
        )

    def _prune(self, progress: Progress, timings: dict[str, float]) -> None:
        """Write the shards of all blocks; with recovery, first those that it begins with."""
        folder = self.workspace.folder
        if self.recovery is None:
            prune_blocks(self._block_run(folder, self.allotment, timings), progress, timings)
            return
        if self._learnt_is_written():
            return
        pupil = self._pupil(folder / PRUNED, progress, timings)
        with _seconds(timings, "recover"):
            token_ids = torch.from_numpy(self.recovery.token_ids)
            recover(pupil, token_ids, folder / RECOVERY, lambda done, total: progress("recover", done, total))
        for block in self.base.blocks:
            self._write_learnt(block, pupil)

    def _pupil(self, folder: Path, progress: Progress, timings: dict[str, float]) -> Pupil:
        """Prune into a folder, unless that is done already, and return what is to learn."""
        folder.mkdir(exist_ok=True)
        shards = [self._shard(folder, block) for block in self.base.blocks]
        stored = Stored(StoredWeights(FLOATS, self.base.shapes()))
        whole = self.workspace.folder / PRUNED_WHOLE
        if whole.exists():
            with suppress(CheckpointError):  # a shard that the disk has damaged is made again
                return open_pupil(self.base, shards, stored, self._stored(), self.device)
        prune_blocks(self._block_run(folder, self.allotment.in_floats(), timings), progress, timings)
        whole.touch()
        return open_pupil(self.base, shards, stored, self._stored(), self.device)

    def _learnt_is_written(self) -> bool:
        """Return whether an interrupted run has finished all blocks."""
        try:
            for block in self.base.blocks:
                read_shard(self._shard(self.workspace.folder, block), self._stored())
        except CheckpointError:
            return False
        return True

    def _write_learnt(self, block: Block, pupil: Pupil) -> None:
        """Write what a pupil has learnt, in the base's precision or as integers."""
        path, allotment = self._shard(self.workspace.folder, block), self.allotment
        packed: dict[str, PackedWeight | DenseWeight] = {}
        others: dict[str, Tensor] = {}
        with self.base.reader as reader:
            for name, parameter in pupil.weights_of(block.name).items():
                weight = parameter.cpu().to(reader.mapped(name).dtype)
                if name not in pupil.masks:
                    others[name] = weight
                    continue
                pruned = Pruned(weight, pupil.masks[name].cpu())
                codes = pupil.grids[name].quantised(parameter) if name in pupil.grids else None
                encoding, whole = allotment.encoding_of(name), allotment.is_unmasked(name)
                packed[name], _ = pack_weight(encoding, name, pruned, codes, weight.dtype, unmasked=whole)
        write_block_shard(path, packed, others)

    def _block_run(self, folder: Path, allotment: Allotment, timings: dict[str, float]) -> BlockRun:
        needs_data = METHODS.get(self.recipe.method).needs != "nothing"
        return BlockRun(
            self.base.model,
            self.base.blocks,
            self.base.reader,
            self.recipe,
            allotment,
            self.allotment,
            lambda block: self._shard(folder, block),
            self._embed(timings) if needs_data else None,
            self.device,
            self.forecast.waiting_batches,
        )

    def _shard(self, folder: Path, block: Block) -> Path:
        return folder / shard_name(block.index + 1, len(self.base.blocks) + 1)

    def _check_weights(self, progress: Progress) -> None:
        """Raise `ModelError` for a weight that is missing, misshapen or not finite before hours of work, not after."""
        names = self.base.stored_names()
        for number, name in enumerate(names):
            with self.base.reader as reader:  # opened anew for each weight, so that no more than that is mapped
                received, expected = list(reader.checked(name).shape), list(self.base.model.get_parameter(name).shape)
            if received != expected:
                raise ModelError(
                    f"weight {name!r} of model {self.base.folder.name!r} has shape {received}, its config asks for "
                    f"{expected}; fetch the model again"
                )
            progress("check", number + 1, len(names))

    def _embed(self, timings: dict[str, float]) -> Activations:
        """Run everything before the first block over the calibration set and record what each block receives."""
        started = time.perf_counter()
        model, dtype, batch_size = self.base.model, self.base.dtype(), _batch_size(self.recipe)
        hidden_states = self._empty_activations(dtype)
        parent = self._empty_activations(dtype, PARENT_ACTIVATIONS) if follows_parent(self.recipe) else None
        decoder = model.get_decoder()
        prefix = next(name for name, module in model.named_modules() if module is decoder)
        outer = [name for name in self.base.outer_names() if name.startswith(f"{prefix}.")]
        with self.base.reader as reader, torch.inference_mode():
            set_parameters(model, {name: reader.mapped(name).to(self.device, dtype) for name in outer})
            inputs = record_inputs(
                model,
                self.base.blocks,
                torch.from_numpy(self.calibration.token_ids),
                batch_size,
                lambda start, hidden: hidden_states[start : start + len(hidden)].copy_(hidden),
                self.device,
            )
            for name in outer:
                drop_parameters(model.get_submodule(name.rpartition(".")[0]))
        if parent is not None:
            parent.copy_(hidden_states)
        timings["embed"] = time.perf_counter() - started
        return Activations(hidden_states, parent, inputs, batch_size)

    def _empty_activations(self, dtype: torch.dtype, name: str = ACTIVATIONS) -> Tensor:
        """Return [samples, sequence_length, hidden_size], in memory or in a mapped file as the forecast says."""
        shape = (*self.calibration.token_ids.shape, self.base.model.config.get_text_config(decoder=True).hidden_size)
        if not self.forecast.map_activations:
            return torch.empty(shape, dtype=dtype)
        path, size = self.workspace.folder / name, math.prod(shape)
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and not a crash when a page is touched
                os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)

    def _finish(self) -> dict[str, Any]:
        total = len(self.base.blocks) + 1
        path, reader, stored = self.workspace.folder / shard_name(total, total), self.base.reader, self._stored()
        if not _is_whole(path, stored):
            outer = self.base.outer_names()
            with reader:
                shapes = {name: (reader.shape(name), reader.mapped(name).dtype) for name in outer}
                chosen = self.tokens
                tokens = None if chosen is None else Shortlist(chosen.token_ids, chosen.vocabulary)
                write_outer_shard(path, shapes, reader.mapped, stored, tokens)
        provenance = Provenance(
            self.plan["base_model"],
            self.plan["recipe"],
            self.plan["calibration"],
            self.plan["versions"],
            str(self.base.dtype()).removeprefix("torch."),
            self.plan.get("shortlist"),
            self.plan.get("recovery"),
            self.plan.get("vocabulary"),
        )
        shards = [shard_name(number, total) for number in range(1, total + 1)]
        return finish_submodel(self.workspace.folder, self.base.folder.path, shards, stored, provenance)

    def _stored(self) -> Stored:
        """Say how the weights are stored: pruned ones as the recipe asks, embedding and head with them."""
        shapes, encoding = self.base.shapes(), encoding_of(self.recipe)
        head = None if self.tokens is None else TrimmedHead(self.base.head_name(), len(self.tokens.token_ids))
        if not encoding.bits:
            with self.base.reader as reader:
                dtypes = dict.fromkeys(VALUE_NAMES[reader.mapped(name).dtype] for name in shapes)
                pruned = StoredWeights(Encoding("+".join(dtypes)), shapes)
                if head is None:
                    return Stored(pruned)
                dense_encoding = Encoding(VALUE_NAMES[reader.mapped(head.weight).dtype])
            return Stored(pruned, StoredWeights(dense_encoding, self._outer_shapes((head.weight,))), shortlist=head)
        dense = StoredWeights(dense_encoding_of(self.recipe), self._outer_shapes(embedding_weights(self.base.model)))
        return replace(self.allotment.stored(shapes), dense=dense, shortlist=head)

    def _outer_shapes(self, wanted: tuple[str, ...]) -> dict[str, tuple[int, int]]:
        shapes = {n: self.base.model.get_parameter(n).shape for n in self.base.outer_names() if n in wanted}
        return {name: (shape[0], shape[1]) for name, shape in shapes.items()}

    def _log(self, seconds: float, timings: dict[str, float], memory_before: int) -> dict[str, Any]:
        peak = peak_memory()
        return {
            "seconds": round(seconds, 3),
            "seconds_by_stage": {stage: round(value, 3) for stage, value in timings.items()},
            "peak_memory_bytes": peak,
            "peak_memory_above_start_bytes": max(0, peak - memory_before),
            "threads": torch.get_num_threads(),
            "device": str(self.device),
            "resumed": self.workspace.resumed,
            "machine": platform.platform(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }


def _is_whole(path: Path, stored: Stored) -> bool:
    """Return whether a shard is there; one that cannot be read is deleted, to be made again."""
    if not path.exists():
        return False
    try:
        check_shard(path, stored)
    except CheckpointError:
        path.unlink()
        return False
    return True
