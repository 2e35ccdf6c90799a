"""The one loop over blocks: collect statistics, prune, write, hand the pruned outputs to the next block.

One block's weights are in memory at a time. A finished block is a shard in the output folder, and that shard is all
that is needed to go on after an interruption: its block is run again from the shard, which gives the same bits.
"""

import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import starmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.calibration.statistics import InputStatistics
from secateur.checkpoint.bitmask import PackedWeight
from secateur.checkpoint.dense import DenseWeight
from secateur.checkpoint.shards import read_shard, write_block_shard
from secateur.config import Recipe
from secateur.errors import CheckpointError, ModelError
from secateur.models.structure import Block
from secateur.models.weights import WeightReader, drop_parameters, set_parameters
from secateur.pruning.activations import Activations
from secateur.pruning.allotment import Allotment
from secateur.pruning.equalise import Inputs, Source, find_source
from secateur.pruning.masks import Target
from secateur.pruning.methods import METHODS
from secateur.pruning.passes import Feed, NoPasses, Passes, StagedPasses, WholePasses, in_stages
from secateur.pruning.weight import prune_weight
from secateur.resources import release_freed_memory

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BlockRun:
    """Everything the loop needs; of it only `sources` is filled by and by.

    Attributes
    ----------
    allotment
        Sparsity and encoding of each weight.
    future
        The same of weights as they will be stored at last: not rounded yet where they are to learn.
    shard
        Gives the file of a block's shard.
    activations
        None when the method needs no statistics.
    waiting_batches
        For how many batches there is memory while their passes wait in a block.
    sources
        What produces the input that linears share, by the type of the block and their names.
    """

    model: PreTrainedModel
    blocks: tuple[Block, ...]
    reader: WeightReader
    recipe: Recipe
    allotment: Allotment
    future: Allotment
    shard: Callable[[Block], Path]
    activations: Activations | None
    device: torch.device
    waiting_batches: int
    sources: dict[tuple[Any, ...], Source | None] = field(default_factory=dict)


def prune_blocks(run: BlockRun, progress: Progress, timings: dict[str, float]) -> None:
    """Prune and write every block that has no shard yet; `timings` receives seconds by stage."""
    timer = _Timer(timings)
    for block in run.blocks:
        progress("prune", block.index, len(run.blocks))
        path = run.shard(block)
        if path.exists():
            try:
                _restore(run, block, path, timer)
                continue
            except CheckpointError:  # a shard that the disk has damaged is made again
                path.unlink()
        _prune_block(run, block, path, timer)
    progress("prune", len(run.blocks), len(run.blocks))


def _prune_block(run: BlockRun, block: Block, path: Path, timer: "_Timer") -> None:
    module = run.model.get_submodule(block.name)
    with timer("read"):
        originals = _load_block(run, block, module)
    packed: dict[str, PackedWeight | DenseWeight] = {}
    others = {name: one for name, one in originals.items() if name not in map(block.weight_name, block.prunable)}
    with timer("collect"), _naming(block):
        passes = _passes(run, block, module, originals)
    with passes:
        for number, stage in enumerate(passes.stages()):
            with timer("collect"), _naming(block):
                statistics = passes.collect(number)
            with timer("prune"):
                inputs = _shared_inputs(run, block, module, stage, statistics)
                packed |= _prune_weights(run, block, module, inputs, originals)
                for shared in inputs:
                    shared.quieten_source(block, module, packed, others)
                    if shared.exponents is not None:
                        passes.quieten(shared.exponents)
            del statistics, inputs, shared  # Gram matrices are large
        with timer("write"):
            write_block_shard(path, packed, others)
        with timer("propagate"), _naming(block):
            passes.finish()
    drop_parameters(module)
    release_freed_memory()


def _load_block(run: BlockRun, block: Block, module: nn.Module) -> dict[str, Tensor]:
    """Put the block's weights in place, in the precision of its first linear; return them as stored, by full name."""
    with run.reader as reader:
        originals = {
            f"{block.name}.{name}": reader.read(f"{block.name}.{name}") for name, _ in module.named_parameters()
        }
    dtype = originals[block.weight_name(block.prunable[0])].dtype
    prefix = len(block.name) + 1
    set_parameters(module, {name[prefix:]: tensor.to(run.device, dtype) for name, tensor in originals.items()})
    return originals


def _feed(run: BlockRun, block: Block, module: nn.Module) -> Feed:
    assert run.activations is not None  # noqa: S101 - there are statistics, or a block to be run again
    return Feed(
        module,
        block.prunable,
        run.activations,
        block.index,
        run.device,
        METHODS.get(run.recipe.method).needs_gram,
        run.recipe.first_token_weight,
        block.index == len(run.blocks) - 1,
    )


def _passes(run: BlockRun, block: Block, module: nn.Module, originals: Mapping[str, Tensor]) -> Passes:
    """Return how the calibration set runs through a block; stage by stage where methods change what they keep."""
    if run.activations is None:
        return NoPasses(block.prunable)
    feed = _feed(run, block, module)
    if not in_stages(run.recipe):
        return WholePasses(feed, propagate=run.recipe.propagate)
    dense = {}
    if feed.activations.parent is not None:
        dtype = module.get_parameter(f"{block.prunable[0]}.weight").dtype
        dense = {name.removeprefix(f"{block.name}."): one.to(run.device, dtype) for name, one in originals.items()}
    return StagedPasses(feed, dense, waiting=run.waiting_batches)


@contextmanager
def _naming(block: Block) -> Iterator[None]:
    """Put the name of the block before what is wrong in it."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{block.name}: {error}") from None


def _shared_inputs(
    run: BlockRun,
    block: Block,
    module: nn.Module,
    linears: tuple[str, ...],
    statistics: Mapping[str, InputStatistics],
) -> tuple[Inputs, ...]:
    """Return the inputs of some linears, made equally loud where their weights become integers."""
    if not METHODS.get(run.recipe.method).needs_gram or not run.future.encoding.bits:
        return tuple(Inputs((linear,), statistics.get(linear)) for linear in linears)
    groups = {
        id(shared): tuple(linear for linear in linears if statistics[linear] is shared)
        for shared in map(statistics.__getitem__, linears)
    }

    found, probe = [], _feed(run, block, module).probe
    for group in groups.values():
        key = (type(module), group)
        if key not in run.sources:
            run.sources[key] = find_source(module, group, probe)
        shared = Inputs(group, statistics[group[0]])
        sparsity = run.allotment.sparsity[block.weight_name(group[0])]
        group_size = max(run.future.encoding_of(block.weight_name(linear)).group_size for linear in group)
        found.append(shared.equalised(module, run.sources[key], group_size, sparsity))
    return tuple(found)


def _prune_weights(
    run: BlockRun, block: Block, module: nn.Module, inputs: tuple[Inputs, ...], originals: Mapping[str, Tensor]
) -> dict[str, PackedWeight | DenseWeight]:
    """Prune weights of the block in place, side by side in threads, and return them packed."""
    method = METHODS.get(run.recipe.method)

    def prune(linear: str, shared: Inputs) -> tuple[str, PackedWeight | DenseWeight]:
        name = block.weight_name(linear)
        weight = module.get_parameter(f"{linear}.weight")
        # crc32 is a stable way to give each weight its own random numbers; nothing depends on it being strong.
        seed = run.recipe.seed ^ zlib.crc32(name.encode())
        target = Target(run.allotment.sparsity[name], run.recipe.granularity, seed, run.recipe.correction)
        original = shared.louder(originals[name]).to(run.device)
        encoding, statistics = run.allotment.encoding_of(name), shared.statistics
        packed, kept = prune_weight(method, target, encoding, name, original, statistics, weight.dtype)
        # A parameter of its own: the old one is the original, which the parent is still run with.
        set_parameters(module, {f"{linear}.weight": kept.to(run.device, weight.dtype)})
        return name, packed

    work = [(linear, shared) for shared in inputs for linear in shared.linears]
    if method.needs_gram:  # products and factorisations, which use all threads by themselves
        return dict(starmap(prune, work))
    with ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads())) as pool:
        return dict(pool.map(prune, *zip(*work, strict=True)))


def _restore(run: BlockRun, block: Block, path: Path, timer: "_Timer") -> None:
    """Check a finished shard and run its block, so that the next one sees the inputs it would have seen."""
    module = run.model.get_submodule(block.name)
    with timer("restore"):
        shapes = {block.weight_name(n): tuple(module.get_parameter(f"{n}.weight").shape) for n in block.prunable}
        with run.reader as reader:
            dtype = reader.mapped(block.weight_name(block.prunable[0])).dtype
        tensors = read_shard(path, run.allotment.stored(shapes), dtype)
        if run.activations is None:
            return
        feed = _feed(run, block, module)
        if run.activations.parent is not None and not feed.is_last:
            _load_block(run, block, module)
            feed.propagate_parent()
        if run.recipe.propagate:
            prefix = len(block.name) + 1
            set_parameters(module, {name[prefix:]: t.to(run.device, dtype) for name, t in tensors.items()})
        else:
            _load_block(run, block, module)
        feed.propagate()
    drop_parameters(module)


class _Timer:
    """Adds the seconds of `with timer(stage)` to a dictionary."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - start
