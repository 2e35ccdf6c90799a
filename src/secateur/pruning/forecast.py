"""What a derivation will need, computed from the config before any weight is read.

The forecast decides whether activations live in memory or in a mapped file, and refuses what cannot fit. It is an
upper estimate of what comes on top of the imports; it does not know what other processes will do.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from secateur.checkpoint.format import DENSE_ENCODING, FLOATS, PRUNED, RECOVERY, Encoding
from secateur.errors import ResourceError
from secateur.files import available_memory
from secateur.models.structure import Block, embedding_weights
from secateur.pruning.recovery import sequences_together

# Share of the memory that is free now which a derivation may plan with; the rest is for the machine.
MEMORY_SHARE = 0.85
# Activations inside one block, in multiples of one batch of [tokens, intermediate_size] and [tokens, hidden_size].
INTERMEDIATE_COPIES, HIDDEN_COPIES = 4, 8
TOKENS_PER_BATCH = 2048
# Of a layer's problem, in multiples of its Gram matrix and of its weight in float32; the factors are in float64.
GRAM_COPIES, WEIGHT_COPIES, FLOAT_BYTES = 10, 8, 4
# Of recovery: weights and two moments in float32; what a block keeps for its gradients; logits, parent's and gradients.
STATE_BYTES, KEPT_INTERMEDIATE, KEPT_HIDDEN, LOGITS_COPIES = 12, 6, 16, 4
# Tokenizer, offsets of rows, index and manifest.
SMALL_FILES = 32_000_000
SCALE_BYTES = 2


@dataclass(frozen=True)
class Forecast:
    """Bytes that a derivation needs.

    Attributes
    ----------
    activations
        The inputs of the current block for the whole calibration set.
    working_memory
        Everything else that is in memory at once: one block's weights, scores and packed values, and one batch.
    recovery
        What the pruned model, its parent and the optimiser take while it learns, after all of that; 0 if it does not.
    disk
        An upper bound of the output folder, with the activations when they are mapped.
    available_memory, available_disk
        What the machine has at this moment.
    map_activations
        Whether the activations go to a mapped file in the output folder.
    """

    activations: int
    working_memory: int
    recovery: int
    disk: int
    available_memory: int
    available_disk: int
    map_activations: bool

    def describe(self) -> str:
        """Return the forecast in one line."""
        where = "in a mapped file" if self.map_activations else "in memory"
        needed = max(self.working_memory + (0 if self.map_activations else self.activations), self.recovery)
        return (
            f"needs about {_size(needed)} of {_size(self.available_memory)} free memory "
            f"(activations {_size(self.activations)}, {where}) "
            f"and at most {_size(self.disk)} of {_size(self.available_disk)} free disk"
        )


def make_forecast(
    model: PreTrainedModel,
    blocks: tuple[Block, ...],
    *,
    tokens: int,
    itemsize: int,
    batch_tokens: int,
    sparsity: float,
    threads: int,
    output: Path,
    encoding: Encoding = FLOATS,
    trimmed: bool = False,
    gram: bool = False,
    streams: int = 1,
    recovering: int = 0,
) -> Forecast:
    """Forecast a derivation.

    Parameters
    ----------
    model
        The skeleton (parameters on the meta device).
    tokens
        Tokens in the calibration set, 0 when the method needs no statistics.
    itemsize
        Bytes of one value in the model's precision.
    batch_tokens
        Tokens in one forward pass.
    sparsity
        Fraction of the prunable weights that is removed.
    threads
        Number of CPU threads, and so of weights that are pruned side by side.
    output
        The folder that is worked in: its nearest existing parent tells the free disk, and shards that it has already
        are not counted again.
    encoding
        How kept weights are stored.
    trimmed
        Whether the rows of the head are reordered.
    gram
        Whether the method needs the Gram matrices of the inputs.
    streams
        2 when the calibration set runs through the dense model too.
    recovering
        Length of the sequences that the pruned model learns from; 0 when it does not.

    Raises
    ------
    ResourceError
        When memory or disk cannot hold what is needed even with mapped activations.
    """
    config = model.config.get_text_config(decoder=True)
    hidden = config.hidden_size
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    largest = max(sum(p.numel() for p in model.get_submodule(block.name).parameters()) for block in blocks)
    sizes = [model.get_parameter(b.weight_name(n)).numel() for b in blocks for n in b.prunable]
    side_by_side = sum(sorted(sizes, reverse=True)[:threads])
    activations = streams * tokens * hidden * itemsize
    batch = min(batch_tokens, tokens) * itemsize * (INTERMEDIATE_COPIES * intermediate + HIDDEN_COPIES * hidden)
    # Dense weights and packed ones of a block; scores, their partition and positions of the weights pruned at once.
    working = 2 * largest * itemsize + 16 * side_by_side + batch
    if gram:
        working += max(_gram_bytes(model, block, streams) for block in blocks)
    recovery = _recovery_bytes(model, blocks, itemsize, recovering) if recovering else 0
    outer = sum(parameter.numel() for parameter in model.parameters()) - sum(sizes)
    rounded = _rounded_entries(model) if encoding.bits else 0
    # Reordered rows are a second copy of what is written.
    rewritten = rounded * _bytes_per_entry(DENSE_ENCODING, itemsize) * (1 + trimmed)
    if trimmed and not encoding.bits:
        rewritten = _rounded_entries(model) * itemsize
    working = max(working, int(rewritten))
    disk = SMALL_FILES + int(
        sum(sizes) * (1 / 8 + _bytes_per_entry(encoding, itemsize, 1 - sparsity))
        + (outer - rounded) * itemsize
        + rounded * _bytes_per_entry(DENSE_ENCODING, itemsize)
    )
    if recovering:  # pruned shards, and the state beside the one that takes its place
        disk += int(sum(sizes) * (1 / 8 + (1 - sparsity) * itemsize)) + 2 * STATE_BYTES * _learning(model, blocks)
    written = [*output.glob("*.safetensors"), *(output / PRUNED).glob("*.safetensors"), *output.glob(RECOVERY)]
    disk -= sum(path.stat().st_size for path in written)
    memory, free_disk = available_memory(), shutil.disk_usage(_existing_parent(output)).free
    map_activations = activations + working > MEMORY_SHARE * memory
    if map_activations:
        disk += activations
    forecast = Forecast(activations, working, recovery, disk, memory, free_disk, map_activations)
    if recovery > MEMORY_SHARE * memory:
        raise ResourceError(
            f"recovery holds the whole model, its parent and their optimiser, about {_size(recovery)} of memory, and "
            f"{_size(memory)} are free: leave out --recover, shorten --sequence-length, or use a larger machine"
        )
    if working > MEMORY_SHARE * memory:
        raise ResourceError(
            f"one block of this model needs about {_size(working)} of memory and {_size(memory)} are free: "
            "close other programs or use a larger machine"
        )
    if forecast.disk > free_disk:
        fewer = ", or use fewer --samples (activations go to disk here)" if map_activations else ""
        raise ResourceError(
            f"the derivation may need {_size(forecast.disk)} of disk and {_size(free_disk)} are free at "
            f"{str(output.parent)!r}: make room or name another output{fewer}"
        )
    return forecast


def _gram_bytes(model: PreTrainedModel, block: Block, streams: int) -> int:
    """Return what the Gram matrices of a block take, as if no weights shared one, and solving the largest."""
    shapes = [model.get_parameter(block.weight_name(linear)).shape for linear in block.prunable]
    grams = sum(shape[1] ** 2 for shape in shapes)
    solving = max(GRAM_COPIES * shape[1] ** 2 + WEIGHT_COPIES * shape.numel() for shape in shapes)
    return int(FLOAT_BYTES * (streams * grams + solving))


def _learning(model: PreTrainedModel, blocks: tuple[Block, ...]) -> int:
    """Return the number of weights that recovery changes: all inside the blocks."""
    return sum(p.numel() for block in blocks for p in model.get_submodule(block.name).parameters())


def _recovery_bytes(model: PreTrainedModel, blocks: tuple[Block, ...], itemsize: int, length: int) -> int:
    """Return what the model, its parent, the optimiser and one step of recovery take."""
    config = model.config.get_text_config(decoder=True)
    learning = _learning(model, blocks)
    # The parent, what is not shared with it, gradients, and a byte for each entry of a mask.
    models = itemsize * (sum(parameter.numel() for parameter in model.parameters()) + 2 * learning) + learning
    models += itemsize * _rounded_entries(model)
    tokens = length * sequences_together(length, config.vocab_size, itemsize)
    hidden = config.hidden_size
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    kept = len(blocks) * tokens * itemsize * (KEPT_INTERMEDIATE * intermediate + KEPT_HIDDEN * hidden)
    if model.config._attn_implementation == "eager":  # which keeps the probabilities of all pairs of positions
        kept += len(blocks) * tokens * length * config.num_attention_heads * (itemsize + FLOAT_BYTES)
    logits = LOGITS_COPIES * tokens * config.vocab_size * itemsize
    return int(models + (STATE_BYTES + FLOAT_BYTES) * learning + kept + logits)


def _rounded_entries(model: PreTrainedModel) -> int:
    """Return the entries of embedding and head, a tied one counted once."""
    return sum({id(one): one.numel() for one in map(model.get_parameter, embedding_weights(model))}.values())


def _bytes_per_entry(encoding: Encoding, itemsize: int, kept: float = 1.0) -> float:
    """Return the bytes of values and scales for each entry of a weight of which the share `kept` is stored."""
    if not encoding.bits:
        return kept * itemsize
    return kept * encoding.bits / 8 + SCALE_BYTES / encoding.group_size


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"
