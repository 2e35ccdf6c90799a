"""A model of the native engine: weights in mapped files, handed to csrc/engine.h, and its steps.

Needs neither torch nor transformers. Nothing of the files is copied but norms and biases.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.checkpoint.format import Stored
from secateur.checkpoint.shortlist import SUFFIX, Shortlist, checked_shortlist
from secateur.errors import CheckpointError, ConfigError, ModelError
from secateur.runtime.architecture import Architecture, NotNativeError
from secateur.runtime.cancelling import Cancelled, IsCancelled
from secateur.runtime.kernels import NativeWeight, WeightStruct, load_library
from secateur.runtime.mapped import MappedFile, MappedTensor

MAX_CAPACITY = 2**32  # that of sct_sequence_create
FLOATS = {"BF16": "bf16", "F16": "fp16"}
PROJECTIONS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
HEAD_NORMS = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}


CHUNK = 256  # tokens that the engine takes through a block together
WHOLE = 16  # up to so many tokens a step is too short to be given up in its midst


class _Shape(ctypes.Structure):
    """`sct_model_shape`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("blocks", "heads", "kv_heads", "head_dim", "hidden", "intermediate")),
        ("vocabulary", ctypes.c_int64),
        ("sliding_window", ctypes.c_int64),
        ("norm_epsilon", ctypes.c_float),
        ("rope_factor", ctypes.c_float),
        ("inverse_frequencies", ctypes.c_void_p),
    )


class _Block(ctypes.Structure):
    """`sct_block`."""

    _fields_ = (
        *((name, WeightStruct) for name in PROJECTIONS),
        *((f"{name}_bias", ctypes.c_void_p) for name in PROJECTIONS),
        *((name, ctypes.c_void_p) for name in (*NORMS, *HEAD_NORMS)),
    )


_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "sct_model_create": (_POINTER, [_POINTER] * 5 + [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]),
    "sct_model_destroy": (None, [_POINTER]),
    "sct_sequence_create": (_POINTER, [_POINTER, _COUNT]),
    "sct_sequence_destroy": (None, [_POINTER]),
    "sct_sequence_length": (_COUNT, [_POINTER]),
    "sct_sequence_truncate": (ctypes.c_int, [_POINTER, _COUNT]),
    "sct_sequence_copy": (ctypes.c_int, [_POINTER, _POINTER, _COUNT]),
    "sct_forward": (ctypes.c_int, [_POINTER, _COUNT, _POINTER, _POINTER, _POINTER, _POINTER]),
    "sct_forward_blocks": (ctypes.c_int, [_POINTER, _COUNT, _POINTER, _POINTER, _POINTER, _POINTER, _COUNT, _COUNT]),
}


@functools.cache
def _library() -> ctypes.CDLL:
    library = load_library()
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class NativeSequence:
    """The tokens that a model has seen of one text, and their keys and values.

    Attributes
    ----------
    capacity
        Tokens that it has room for.
    """

    def __init__(self, model: "NativeModel", capacity: int) -> None:
        if not 1 <= capacity <= MAX_CAPACITY:
            raise ConfigError(f"a sequence with room for {capacity} tokens; it must be 1 to {MAX_CAPACITY}")
        self._library, self._model = _library(), model  # the model has to outlive its sequences
        self.capacity = capacity
        self.handle = self._library.sct_sequence_create(model.handle, capacity)
        if not self.handle:
            raise MemoryError(f"no memory for the keys and values of {capacity} tokens")

    def __len__(self) -> int:
        return int(self._library.sct_sequence_length(self.handle))

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not 0 <= length <= len(self) or self._library.sct_sequence_truncate(self.handle, length) != 0:
            raise ValueError(f"a sequence of {len(self)} tokens cannot be cut to {length}")

    def copy(self, source: "NativeSequence", length: int) -> None:
        """Become the first `length` tokens of another sequence of the same model."""
        if self._library.sct_sequence_copy(self.handle, source.handle, length) != 0:
            raise ValueError(f"{length} of {len(source)} tokens cannot be copied to a sequence for {self.capacity}")

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._library.sct_sequence_destroy(self.handle)
            self.handle = None


class NativeModel:
    """A decoder that the engine computes; one step at a time, for one caller at a time.

    Parameters
    ----------
    architecture
        What the model is.
    files
        Its safetensors files.
    stored
        What the config of a sub-model says of its weights; None for a dense model.
    threads
        Threads that share a step, the caller's among them.

    Attributes
    ----------
    products
        The matrices that each decoded token is multiplied with, and how many of their rows.

    Raises
    ------
    CheckpointError
        When a weight is missing, damaged, or has another shape than the config says.
    NotNativeError
        When weights are stored in a precision that the kernels do not read.
    """

    def __init__(self, architecture: Architecture, files: Sequence[Path], stored: Stored | None, threads: int) -> None:
        self.architecture, self.threads = architecture, threads
        self._tensors = {name: tensor for file in files for name, tensor in MappedFile(file).tensors.items()}
        if stored:
            stored.refuse_twice(self._tensors)
        self._stored = stored
        self._kept: list[Any] = []  # what the engine points to
        a = architecture
        blocks = (_Block * a.blocks)(*(self._block(index) for index in range(a.blocks)))
        embedding = self._matrix("model.embed_tokens.weight", a.vocabulary, a.hidden)
        tied = a.tied and not {"lm_head.weight", "lm_head.weight.values"} & self._tensors.keys()
        head = embedding if tied else self._matrix("lm_head.weight", a.vocabulary, a.hidden)
        self._shortlist = self._read_shortlist(head)
        # Row of each token in the embedding; None where that is the token itself.
        self._rows = self._shortlist.rows().astype(np.int32) if self._shortlist and tied else None
        computed = WeightStruct.from_buffer_copy(head.struct)
        if self._shortlist:
            computed.rows = len(self._shortlist.tokens)
        self._logits = int(computed.rows)
        matrices = [one for one in self._kept if isinstance(one, NativeWeight) and one is not embedding]
        self.products = [(one, self._logits if one is head else one.shape[0]) for one in matrices]
        if tied:
            self.products.append((head, self._logits))
        norm = self._vector("model.norm.weight", a.hidden)
        shape = _Shape(
            a.blocks, a.heads, a.kv_heads, a.head_dim, a.hidden, a.intermediate, a.vocabulary, a.sliding_window,
            a.norm_epsilon, 1.0, a.inverse_frequencies.ctypes.data,
        )  # fmt: skip
        problem = ctypes.c_char_p()
        self._library = _library()  # a global name is gone when the interpreter ends
        self.handle = self._library.sct_model_create(
            ctypes.byref(shape), blocks, ctypes.byref(embedding.struct), ctypes.byref(computed), norm, threads,
            ctypes.byref(problem),
        )  # fmt: skip
        if not self.handle:
            raise ModelError(f"the native engine does not take the model: {(problem.value or b'').decode()}")

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._library.sct_model_destroy(self.handle)
            self.handle = None

    def forward(
        self,
        tokens: Sequence[int],
        sequences: Sequence[NativeSequence],
        wants: Sequence[bool],
        cancelled: IsCancelled | None = None,
    ) -> NDArray[np.float32]:
        """Append a token to each of `sequences`, and return the logits after those that are wanted.

        Parameters
        ----------
        tokens, sequences, wants
            Of one length: token `i` goes to sequence `i`. A prompt repeats its sequence, a batch has different ones.
        cancelled
            Asked before the step and, in one of up to `CHUNK` tokens, before each of its blocks.

        Returns
        -------
        float32 [number of wanted, vocabulary]; minus infinity for tokens that a trimmed head does not compute.

        Raises
        ------
        ConfigError
            When a token is not of the vocabulary or a sequence has no room; then no sequence has changed.
        Cancelled
            When `cancelled` says so; then no sequence has changed either. The same holds for an interrupt (Ctrl-C),
            which takes effect between two blocks.
        ValueError
            When the three differ in length, or a sequence was made for another model.
        """
        if not all(0 <= token < self.architecture.vocabulary for token in tokens):  # before 32 bits hide it
            raise ConfigError(
                f"a token is outside of the vocabulary of {self.architecture.vocabulary}; the tokenizer may belong to "
                "another model"
            )
        if any(sequence._model is not self for sequence in sequences):
            raise ValueError("a sequence belongs to the model that it was made for, and this is another")
        ids = np.ascontiguousarray(tokens, dtype=np.int32)
        if self._rows is not None:
            ids = self._rows[ids]
        flags = np.array([bool(wanted) for wanted in wants], dtype=np.uint8)
        handles = (ctypes.c_void_p * len(sequences))(*(sequence.handle for sequence in sequences))
        if not len(ids) == len(flags) == len(handles):
            raise ValueError(f"{len(ids)} tokens for {len(handles)} sequences and {len(flags)} wants")
        logits = np.empty((int(np.count_nonzero(flags)), self._logits), dtype=np.float32)
        arguments = (self.handle, len(ids), ids.ctypes.data, handles, flags.ctypes.data, logits.ctypes.data)
        status = self._run(arguments, len(ids), cancelled)
        if status == -1:
            raise MemoryError(f"no memory for a step of {len(ids)} tokens")
        if status == -3:
            raise ConfigError(f"a sequence has no room for {len(ids)} more tokens")
        if status != 0:
            raise RuntimeError("another step of the same model began before this one had ended")
        return self._shortlist.spread(logits) if self._shortlist else logits

    def _run(self, arguments: tuple[Any, ...], tokens: int, cancelled: IsCancelled | None) -> int:
        """Compute a step, block by block where it is long: Python hears of signals only between two native calls."""
        whole = not WHOLE < tokens <= CHUNK
        for block in range(1 if whole else self.architecture.blocks):
            if cancelled is not None and cancelled():
                raise Cancelled
            if whole:
                return int(_library().sct_forward(*arguments))
            if status := _library().sct_forward_blocks(*arguments, block, block + 1):
                return int(status)
        return 0

    def _read_shortlist(self, head: NativeWeight) -> Shortlist | None:
        trimmed = self._stored.shortlist if self._stored else None
        if trimmed is None:
            return None
        if trimmed.weight != head.name:
            raise CheckpointError(
                f"config.json has a shortlist of {trimmed.weight!r}, the head is {head.name!r}; "
                "derive or fetch the sub-model again"
            )
        tokens = self._tensor(f"{head.name}.{SUFFIX}").array
        return checked_shortlist(tokens, trimmed.tokens, head.shape[0], head.name)

    def _block(self, index: int) -> _Block:
        a = self.architecture
        q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
        shapes = {
            "query": (q, a.hidden), "key": (kv, a.hidden), "value": (kv, a.hidden), "output": (a.hidden, q),
            "gate": (a.intermediate, a.hidden), "up": (a.intermediate, a.hidden), "down": (a.hidden, a.intermediate),
        }  # fmt: skip
        prefix = f"model.layers.{index}."
        block = _Block()
        for part, name in PROJECTIONS.items():
            setattr(block, part, self._matrix(f"{prefix}{name}.weight", *shapes[part]).struct)
            if part in a.biases:
                setattr(block, f"{part}_bias", self._vector(f"{prefix}{name}.bias", shapes[part][0]))
        for part, name in NORMS.items():
            setattr(block, part, self._vector(f"{prefix}{name}.weight", a.hidden))
        for part, name in HEAD_NORMS.items() if a.head_norms else ():
            setattr(block, part, self._vector(f"{prefix}{name}.weight", a.head_dim))
        return block

    def _matrix(self, name: str, rows: int, cols: int) -> NativeWeight:
        """Return a weight as the kernels read it, however it is stored."""
        stored = self._stored.packed(name) if self._stored else None
        if stored is None:
            tensor = self._tensor(name, lambda tensor: tensor.array.shape == (rows, cols))
            weight = NativeWeight(self._float_kind(name, tensor), (rows, cols), tensor.array.reshape(-1), name=name)
        else:
            if stored.shapes[name] != (rows, cols):
                raise self._misfit(name, stored.shapes[name])
            values = self._tensor(f"{name}.values")
            encoding = stored.encoding
            kind = encoding.values if encoding.bits else self._float_kind(name, values)
            suffixes = () if self._stored and self._stored.whole(name) else ("bitmask", "row_offsets")
            parts = {suffix: self._tensor(f"{name}.{suffix}").array for suffix in suffixes}
            if encoding.bits:
                parts["scales"] = self._tensor(f"{name}.scales").array
            weight = NativeWeight(
                kind, (rows, cols), values.array.reshape(-1), **parts, group_size=encoding.group_size, name=name
            )
        self._kept.append(weight)
        return weight

    @staticmethod
    def _float_kind(name: str, tensor: MappedTensor) -> str:
        if tensor.dtype not in FLOATS:
            raise NotNativeError(f"weight {name!r} is stored as {tensor.dtype}, natively run are BF16 and F16")
        return FLOATS[tensor.dtype]

    def _vector(self, name: str, size: int) -> int:
        """Return the address of a float32 copy."""
        tensor = self._tensor(name, lambda tensor: tensor.array.shape == (size,))
        array = tensor.array
        if tensor.dtype == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        elif tensor.dtype == "F16":
            array = array.view(np.float16).astype(np.float32)
        array = np.ascontiguousarray(array, dtype=np.float32)
        if not np.isfinite(array).all():
            raise CheckpointError(f"{name!r} holds NaN or infinity; derive or fetch the model again")
        self._kept.append(array)
        return int(array.ctypes.data)

    def _tensor(self, name: str, fits: Callable[[MappedTensor], bool] = lambda _: True) -> MappedTensor:
        tensor = self._tensors.get(name)
        if tensor is None and self._stored is None:
            # transformers knows other names for the same weights, and says what is missing if they are not there.
            raise NotNativeError(f"the files hold no {name!r}")
        if tensor is None:
            raise CheckpointError(f"weights are missing from the files of the model: {name}; derive or fetch it again")
        if not fits(tensor):
            raise self._misfit(name, tensor.array.shape)
        return tensor

    @staticmethod
    def _misfit(name: str, shape: tuple[int, ...]) -> CheckpointError:
        return CheckpointError(
            f"{name!r} has shape {list(shape)}, which is not what config.json asks for; derive or fetch the model again"
        )
