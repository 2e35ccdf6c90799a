"""What a derivation takes of memory and disk, in bytes, computed from the config before any weight is read.

Upper estimates of what comes on top of the imports; what the machine has is not looked at here.
"""

from dataclasses import dataclass

from transformers import PreTrainedModel

from secateur.models.structure import Block, embedding_weights
from secateur.pruning.divergence import POSITIONS, TOKENS, parts
from secateur.pruning.likely_tokens import compared
from secateur.pruning.recovery import sequences_together

# Activations inside one block, in multiples of one batch of [tokens, intermediate_size] and [tokens, hidden_size].
INTERMEDIATE_COPIES, HIDDEN_COPIES = 4, 8
# Of a pass that stands still in a block, in multiples of [tokens, hidden_size]: residual, norm and attention's output.
WAITING_HIDDEN = 3
# Of a layer's problem, in multiples of its Gram matrix and of its weight in float32; the factors are in float64.
GRAM_COPIES, WEIGHT_COPIES, FLOAT_BYTES = 12, 8, 4
# Of logits, in multiples of those that are compared: the parent's, two of the pruned model, and what is in float32.
MEASURED_LOGITS = 4
# Of recovery: weights and two moments in float32; what a block keeps for its gradients; logits, parent's and gradients.
STATE_BYTES, KEPT_INTERMEDIATE, KEPT_HIDDEN, LOGITS_COPIES = 12, 6, 16, 4


@dataclass(frozen=True)
class Demand:
    """A derivation, as far as it decides what is needed.

    Attributes
    ----------
    model
        The skeleton (parameters on the meta device).
    blocks
        Its decoder blocks.
    tokens
        Tokens in the calibration set, 0 when the method needs no statistics.
    itemsize
        Bytes of one value in the model's precision.
    batch_tokens
        Tokens in one forward pass.
    sparsity
        Fraction of the prunable weights that is removed at least.
    threads
        Number of CPU threads, and so of weights that are pruned side by side.
    written
        Bytes of the finished folder.
    outer
        Bytes of embedding and head in it.
    rounded
        Whether embedding and head become integers.
    trimmed
        Whether the rows of the head are reordered.
    gram
        Whether the method needs the Gram matrices of the inputs.
    streams
        2 when the calibration set runs through the dense model too.
    waiting_length
        Length of the sequences whose passes can stand still in a block at each stage of it; 0 where none do.
    recovering
        Length of the sequences that the pruned model learns from; 0 when it does not.
    measuring
        Whether a budget, a quality or the choice of weights in eight bits asks for runs of the whole model.
    sizing
        Whether a size does, which also measures another embedding.
    """

    model: PreTrainedModel
    blocks: tuple[Block, ...]
    tokens: int
    itemsize: int
    batch_tokens: int
    sparsity: float
    threads: int
    written: int
    outer: int
    rounded: bool = False
    trimmed: bool = False
    gram: bool = False
    streams: int = 1
    waiting_length: int = 0
    recovering: int = 0
    measuring: bool = False
    sizing: bool = False

    def activations(self) -> int:
        """Return the bytes of the inputs of one block for the whole calibration set."""
        return self.streams * self.tokens * self._widths()[0] * self.itemsize

    def pruning(self) -> int:
        """Return what is in memory at once beside them: one block, what it is pruned with, and one batch."""
        hidden, intermediate = self._widths()
        largest = max(self._entries(block) for block in self.blocks)
        side_by_side = sum(sorted(self._prunable(), reverse=True)[: self.threads])
        batch = min(self.batch_tokens, self.tokens) * self.itemsize
        # Dense weights and packed ones of a block; scores, their partition and positions of the weights pruned at once.
        working = 2 * largest * self.itemsize + 16 * side_by_side
        working += batch * (INTERMEDIATE_COPIES * intermediate + HIDDEN_COPIES * hidden)
        if self.gram:
            working += max(self._gram(block) for block in self.blocks)
        return max(working, self._reordering())

    def batches(self) -> int:
        """Return the number of passes through a block, of one stream."""
        return -(-self.tokens // self.batch_tokens) if self.tokens else 0

    def waiting(self) -> int:
        """Return what a batch's passes hold while they stand still at the widest stage of a block; 0 where none do."""
        if not self.waiting_length:
            return 0
        features = max(map(self._waiting_features, self.blocks))
        if self._is_eager():  # attention that gives its probabilities, which wait too
            config = self.model.config.get_text_config(decoder=True)
            features += self.waiting_length * config.num_attention_heads
        return self.streams * min(self.batch_tokens, self.tokens) * features * self.itemsize

    def recovery(self) -> int:
        """Return what the model, its parent, the optimiser and one step of recovery take; 0 without it."""
        if not self.recovering:
            return 0
        config, learning = self.model.config.get_text_config(decoder=True), self._learning()
        hidden, intermediate = self._widths()
        # The parent, what is not shared with it, gradients, and a byte for each entry of a mask.
        models = self.itemsize * (self._all() + 2 * learning + self._outer_matrices()) + learning
        size = compared(self.model)  # of the vocabulary
        tokens = self.recovering * sequences_together(self.recovering, size, self.itemsize)
        for_gradients = tokens * self.itemsize * (KEPT_INTERMEDIATE * intermediate + KEPT_HIDDEN * hidden)
        if self._is_eager():  # which keeps what belongs to all pairs of positions
            for_gradients += tokens * self.recovering * config.num_attention_heads * (self.itemsize + FLOAT_BYTES)
        # Of all tokens those of one sequence, before anything is learnt.
        logits = self.itemsize * max(LOGITS_COPIES * tokens * size, self.recovering * config.vocab_size)
        if size < config.vocab_size:
            models += 2 * self.itemsize * size * hidden
        return int(models + (STATE_BYTES + FLOAT_BYTES) * learning + len(self.blocks) * for_gradients + logits)

    def budget(self) -> int:
        """Return what the whole model takes while its divergence is measured; 0 where it is not."""
        if not (self.measuring or self.sizing):
            return 0
        hidden, intermediate = self._widths()
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        one_pass = TOKENS * (INTERMEDIATE_COPIES * intermediate + HIDDEN_COPIES * hidden)
        logits = MEASURED_LOGITS * POSITIONS * vocabulary
        # A small embedding is a copy, made from one byte for each of its entries.
        embedding = (self.itemsize + 1) * self._outer_matrices() if self.sizing else 0
        # Pruning a part takes what it does later, in float32.
        pruning = 4 * FLOAT_BYTES * max(self._prunable())
        return int(self.itemsize * (self._all() + one_pass + logits) + pruning + embedding)

    def disk(self) -> int:
        """Return what the folder that is worked in takes on disk, without mapped activations."""
        if not self.recovering:
            return self.written
        # Pruned shards, and the state beside the one that takes its place.
        prunable = sum(self._prunable())
        shards = int(prunable * (1 / 8 + (1 - self.sparsity) * self.itemsize))
        return self.written + shards + 2 * STATE_BYTES * self._learning()

    def _is_eager(self) -> bool:
        return bool(self.model.config._attn_implementation == "eager")

    def _widths(self) -> tuple[int, int]:
        config = self.model.config.get_text_config(decoder=True)
        return config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size

    def _all(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def _entries(self, block: Block) -> int:
        return sum(parameter.numel() for parameter in self.model.get_submodule(block.name).parameters())

    def _learning(self) -> int:
        """Return the number of weights that recovery changes: all inside the blocks."""
        return sum(map(self._entries, self.blocks))

    def _prunable(self) -> list[int]:
        names = (block.weight_name(linear) for block in self.blocks for linear in block.prunable)
        return [self.model.get_parameter(name).numel() for name in names]

    def _outer_matrices(self) -> int:
        """Return the entries of embedding and head, a tied one counted once."""
        matrices = map(self.model.get_parameter, embedding_weights(self.model))
        return sum({id(one): one.numel() for one in matrices}.values())

    def _waiting_features(self, block: Block) -> int:
        """Return how many values a token takes at the widest stage: before the last linear of attention or of the MLP.

        There are the input of that linear and what others have put out and is still referred to: queries, keys and
        values; outputs that are one tensor for several, which the parts keep whole.
        """
        hidden, _ = self._widths()
        attention, *others = parts(block)
        inputs, outputs, fused = self._widths_within(block, attention)
        widest = inputs + outputs + fused
        for linears in others or [attention]:
            inputs, _, fused = self._widths_within(block, linears)
            widest = max(widest, inputs + fused)
        return WAITING_HIDDEN * hidden + widest

    def _widths_within(self, block: Block, linears: tuple[str, ...]) -> tuple[int, int, int]:
        """Return the inputs of the last of some linears, and the outputs of the others, all and those of fused ones."""
        shapes = [self.model.get_parameter(block.weight_name(linear)).shape for linear in linears]
        inputs, before = shapes[-1][1], [shape[0] for shape in shapes[:-1]]
        return inputs, sum(before), sum(outputs for outputs in before if outputs > inputs)

    def _gram(self, block: Block) -> int:
        """Return what the Gram matrices of a block take, as if no weights shared one, and solving the largest."""
        shapes = [self.model.get_parameter(block.weight_name(linear)).shape for linear in block.prunable]
        grams = sum(shape[1] ** 2 for shape in shapes)
        solving = max(GRAM_COPIES * shape[1] ** 2 + WEIGHT_COPIES * shape.numel() for shape in shapes)
        return int(FLOAT_BYTES * (self.streams * grams + solving))

    def _reordering(self) -> int:
        """Return what making embedding and head takes: integers are a copy, and reordered rows are another."""
        return self.outer * (self.rounded + self.trimmed)
