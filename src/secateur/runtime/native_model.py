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

from secateur.checkpoint.format import Encoding, Stored, StoredWeights
from secateur.errors import CheckpointError, ConfigError, ModelError
from secateur.runtime.architecture import Architecture, NotNativeError
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
    "sct_forward": (ctypes.c_int, [_POINTER, _COUNT, _POINTER, _POINTER, _POINTER, _POINTER]),
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
        self._stored = stored
        self._pruned = stored.pruned if stored else StoredWeights(Encoding("none"))
        self._dense = stored.dense if stored else StoredWeights(Encoding("none"))
        self._kept: list[Any] = []  # what the engine points to
        a = architecture
        blocks = (_Block * a.blocks)(*(self._block(index) for index in range(a.blocks)))
        embedding = self._matrix("model.embed_tokens.weight", a.vocabulary, a.hidden)
        tied = a.tied and not {"lm_head.weight", "lm_head.weight.values"} & self._tensors.keys()
        head = embedding if tied else self._matrix("lm_head.weight", a.vocabulary, a.hidden)
        self.weight_bytes = self._count_bytes(embedding if not tied else None)
        norm = self._vector("model.norm.weight", a.hidden)
        shape = _Shape(
            a.blocks, a.heads, a.kv_heads, a.head_dim, a.hidden, a.intermediate, a.vocabulary, a.sliding_window,
            a.norm_epsilon, 1.0, a.inverse_frequencies.ctypes.data,
        )  # fmt: skip
        problem = ctypes.c_char_p()
        self.handle = _library().sct_model_create(
            ctypes.byref(shape), blocks, ctypes.byref(embedding.struct), ctypes.byref(head.struct), norm, threads,
            ctypes.byref(problem),
        )  # fmt: skip
        if not self.handle:
            raise ModelError(f"the native engine does not take the model: {(problem.value or b'').decode()}")

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            _library().sct_model_destroy(self.handle)
            self.handle = None

    def forward(
        self, tokens: Sequence[int], sequences: Sequence[NativeSequence], wants: Sequence[bool]
    ) -> NDArray[np.float32]:
        """Append a token to each of `sequences`, and return the logits after those that are wanted.

        Parameters
        ----------
        tokens, sequences, wants
            Of one length: token `i` goes to sequence `i`. A prompt repeats its sequence, a batch has different ones.

        Returns
        -------
        float32 [number of wanted, vocabulary].

        Raises
        ------
        ConfigError
            When a token is not of the vocabulary or a sequence has no room; then no sequence has changed.
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
        flags = np.array([bool(wanted) for wanted in wants], dtype=np.uint8)
        handles = (ctypes.c_void_p * len(sequences))(*(sequence.handle for sequence in sequences))
        if not len(ids) == len(flags) == len(handles):
            raise ValueError(f"{len(ids)} tokens for {len(handles)} sequences and {len(flags)} wants")
        logits = np.empty((int(np.count_nonzero(flags)), self.architecture.vocabulary), dtype=np.float32)
        status = _library().sct_forward(
            self.handle, len(ids), ids.ctypes.data, handles, flags.ctypes.data, logits.ctypes.data
        )
        if status == -1:
            raise MemoryError(f"no memory for a step of {len(ids)} tokens")
        if status != 0:
            raise ConfigError(f"a sequence has no room for {len(ids)} more tokens")
        return logits

    def _count_bytes(self, looked_up: NativeWeight | None) -> int:
        """Return the bytes that a decoded token reads: all weights but an embedding that only gives a row."""
        total = sum(tensor.array.nbytes for tensor in self._tensors.values())
        return total - (looked_up.values.nbytes if looked_up is not None else 0)

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
        stored = next((one for one in (self._pruned, self._dense) if name in one.shapes), None)
        if stored is None:
            tensor = self._tensor(name, lambda tensor: tensor.array.shape == (rows, cols))
            weight = NativeWeight(self._float_kind(name, tensor), (rows, cols), tensor.array.reshape(-1), name=name)
        else:
            if stored.shapes[name] != (rows, cols):
                raise self._misfit(name, stored.shapes[name])
            values = self._tensor(f"{name}.values")
            encoding = stored.encoding
            kind = encoding.values if encoding.bits else self._float_kind(name, values)
            suffixes = ("bitmask", "row_offsets") if stored is self._pruned else ()
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
