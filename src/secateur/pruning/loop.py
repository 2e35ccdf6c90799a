"""The one loop over blocks: collect statistics, prune, write, hand the pruned outputs to the next block.

One block's weights are in memory at a time. A finished block is a shard in the output folder, and that shard is all
that is needed to go on after an interruption: its block is run again from the shard, which gives the same bits.
"""

import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.calibration.statistics import InputStatistics, StatisticsCollector
from secateur.checkpoint.bitmask import PackedWeight, pack, pack_integers, unpack
from secateur.checkpoint.dense import DenseWeight, pack_dense, unpack_dense
from secateur.checkpoint.format import Encoding, Stored, StoredWeights
from secateur.checkpoint.quantise import Quantised, quantise
from secateur.checkpoint.shards import read_shard, write_block_shard
from secateur.config import Recipe
from secateur.errors import CheckpointError, ModelError
from secateur.files import release_freed_memory
from secateur.models.replay import BlockInputs, run_block
from secateur.models.structure import Block
from secateur.models.weights import WeightReader, drop_parameters, set_parameters
from secateur.pruning.layer_problem import LayerProblem
from secateur.pruning.masks import Target, zero_removed
from secateur.pruning.method import Method, Pruned
from secateur.pruning.methods import METHODS
from secateur.pruning.rounding import settle

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Activations:
    """The inputs of the current block for the whole calibration set, overwritten as the loop goes on.

    Attributes
    ----------
    hidden_states
        [samples, sequence_length, hidden_size] in the model's precision, in memory or mapped.
    inputs
        The other arguments of each block.
    batch_size
        Sequences in one forward pass.
    """

    hidden_states: Tensor
    inputs: BlockInputs
    batch_size: int

    def batches(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (batch number, view [batch, sequence_length, hidden_size])."""
        yield from enumerate(torch.split(self.hidden_states, self.batch_size))


@dataclass(frozen=True)
class BlockRun:
    """Everything the loop needs and does not change.

    Attributes
    ----------
    sparsity
        Target sparsity by weight name, from the budget.
    encoding
        How kept weights are stored.
    shard
        Gives the file of a block's shard.
    activations
        None when the method needs no statistics.
    """

    model: PreTrainedModel
    blocks: tuple[Block, ...]
    reader: WeightReader
    recipe: Recipe
    sparsity: Mapping[str, float]
    encoding: Encoding
    shard: Callable[[Block], Path]
    activations: Activations | None
    device: torch.device


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
    with timer("collect"):
        statistics = _collect(run, block, module)
    with timer("prune"):
        packed = _prune_weights(run, block, module, originals, statistics)
    with timer("write"):
        kept_whole = {name: tensor for name, tensor in originals.items() if name not in packed}
        write_block_shard(path, packed, kept_whole)
    if run.recipe.propagate:
        with timer("propagate"):
            _propagate(run, block, module)
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


def _collect(run: BlockRun, block: Block, module: nn.Module) -> Mapping[str, InputStatistics]:
    if run.activations is None:
        return {}
    propagate, gram = run.recipe.propagate, METHODS.get(run.recipe.method).needs == "gram"
    with StatisticsCollector(module, block.prunable, stop_early=propagate, gram=gram) as collector:
        for batch, hidden in run.activations.batches():
            call = run.activations.inputs.get(block.index, batch)
            output = collector.run(lambda: _forward(run, module, hidden, call))  # noqa: B023 - called at once
            if not propagate:
                hidden.copy_(output)
    try:
        return collector.results()
    except ModelError as error:
        raise ModelError(f"{block.name}: {error}") from None


def _prune_weights(
    run: BlockRun,
    block: Block,
    module: nn.Module,
    originals: Mapping[str, Tensor],
    statistics: Mapping[str, InputStatistics],
) -> dict[str, PackedWeight | DenseWeight]:
    """Prune the weights of the block in place, side by side in threads, and return them packed."""
    method = METHODS.get(run.recipe.method)

    def prune(linear: str) -> tuple[str, PackedWeight | DenseWeight]:
        name = block.weight_name(linear)
        weight = module.get_parameter(f"{linear}.weight")
        return name, _prune_weight(run, method, name, originals[name], weight, statistics.get(linear))

    # Methods with a Gram matrix are products and factorisations, which use all threads by themselves.
    workers = 1 if method.needs == "gram" else max(1, torch.get_num_threads())
    with ThreadPoolExecutor(max_workers=workers) as pool:
        return dict(pool.map(prune, block.prunable))


def _prune_weight(  # noqa: PLR0917
    run: BlockRun,
    method: Method,
    name: str,
    original: Tensor,
    parameter: Tensor,
    statistics: InputStatistics | None,
) -> PackedWeight | DenseWeight:
    """Prune a weight in its own precision, quantise it, and put the result in the place of the block's parameter."""
    # crc32 is a stable way to give each weight its own random numbers; nothing depends on it being strong.
    target = Target(run.sparsity[name], run.recipe.granularity, run.recipe.seed ^ zlib.crc32(name.encode()))
    with torch.inference_mode():
        weight = original.to(run.device)
        if target.sparsity == 0:  # what loses nothing stays as it is, to the bit
            pruned = Pruned(weight, torch.ones(weight.shape, dtype=torch.bool))
        else:
            pruned = method.function(weight, statistics, target)
        codes = _quantise(run.encoding, pruned, statistics, weight) if run.encoding.bits else None
        unmasked = is_unmasked(run.encoding, target.sparsity)
        packed, kept = _pack(run.encoding, name, pruned, codes, parameter.dtype, unmasked=unmasked)
        parameter.data.copy_(kept)
    return packed


def is_unmasked(encoding: Encoding, sparsity: float) -> bool:
    """Return whether a weight is stored without a bitmask: one that loses no entry, where values are integers."""
    return encoding.bits > 0 and sparsity == 0


def _quantise(encoding: Encoding, pruned: Pruned, statistics: InputStatistics | None, dense: Tensor) -> Quantised:
    """Return codes for what is kept; with a Gram matrix they make up for each other, and for what was removed."""
    bits, group_size = encoding.bits, encoding.group_size
    importance = None if statistics is None else statistics.sum_squares
    nearest = quantise(pruned.weight, pruned.mask, importance, bits=bits, group_size=group_size)
    if statistics is None or statistics.gram is None:
        return nearest
    return settle(LayerProblem.of(dense, statistics), nearest, pruned.mask, bits=bits, group_size=group_size)


def _pack(
    encoding: Encoding,
    name: str,
    pruned: Pruned,
    codes: Quantised | None,
    dtype: torch.dtype,
    *,
    unmasked: bool = False,
) -> tuple[PackedWeight | DenseWeight, Tensor]:
    """Return a pruned weight as it is stored, and what a reader will make of that."""
    if codes is None:
        return pack(pruned.weight, pruned.mask), zero_removed(pruned.weight, pruned.mask)
    shape = (pruned.mask.shape[0], pruned.mask.shape[1])
    if unmasked:
        dense = pack_dense(codes, encoding)
        return dense, unpack_dense(dense, shape, name, encoding, dtype)
    packed = pack_integers(codes, pruned.mask, encoding.bits)
    return packed, unpack(packed, shape, name, encoding, dtype)[0]


def _restore(run: BlockRun, block: Block, path: Path, timer: "_Timer") -> None:
    """Check a finished shard and run its block, so that the next one sees the inputs it would have seen."""
    module = run.model.get_submodule(block.name)
    with timer("restore"):
        shapes = {block.weight_name(n): tuple(module.get_parameter(f"{n}.weight").shape) for n in block.prunable}
        with run.reader as reader:
            dtype = reader.mapped(block.weight_name(block.prunable[0])).dtype
        unmasked = frozenset(name for name in shapes if is_unmasked(run.encoding, run.sparsity[name]))
        tensors = read_shard(path, Stored(StoredWeights(run.encoding, shapes), unmasked=unmasked), dtype)
        if run.activations is None:
            return
        if run.recipe.propagate:
            prefix = len(block.name) + 1
            set_parameters(module, {name[prefix:]: t.to(run.device, dtype) for name, t in tensors.items()})
        else:
            _load_block(run, block, module)
        _propagate(run, block, module)
    drop_parameters(module)


def _propagate(run: BlockRun, block: Block, module: nn.Module) -> None:
    """Replace the activations by the block's outputs; the outputs of the last block are of no use."""
    if run.activations is None or block.index == len(run.blocks) - 1:
        return
    for batch, hidden in run.activations.batches():
        hidden.copy_(_forward(run, module, hidden, run.activations.inputs.get(block.index, batch)))


def _forward(run: BlockRun, module: nn.Module, hidden: Tensor, call: object) -> Tensor:
    with torch.inference_mode():
        return run_block(module, hidden.to(run.device), call)  # type: ignore[arg-type]


class _Timer:
    """Adds the seconds of `with timer(stage)` to a dictionary."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._stage, self._start = "", 0.0

    def __call__(self, stage: str) -> "_Timer":
        self._stage = stage
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + time.perf_counter() - self._start
