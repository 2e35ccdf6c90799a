"""Models that can be timed: ours, natively or through torch, and llama.cpp, behind one interface.

A runner lives in a process of its own (see speed_worker), so that memory is its own and nobody's threads disturb it.
Tokens are counted as emitted; text is not decoded.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from secateur.errors import ConfigError, SecateurError
from secateur.runtime.architecture import NotNativeError

CONTEXT = 4096  # tokens that llama.cpp makes room for


class Runner(Protocol):
    """A loaded model; `kind` is what runs it."""

    kind: str
    vocabulary: int
    max_positions: int | None  # tokens of the longest text that it knows; None where nothing is known

    def prefill(self, prompt: Sequence[int]) -> float:
        """Read a prompt into an empty context; return the seconds until the logits after it are there."""

    def decode(self, prompts: Sequence[Sequence[int]], count: int) -> float:
        """Read the prompts, one for each sequence, then return the seconds that `count` greedy tokens of each take."""

    def limits(self, bytes_per_second: float) -> dict[str, float]:
        """Return what bounds decoding, where that is known: `read_mb`, `unpacking_ms` and `bound_ms` of a token."""
        return {}


class NativeRunner(Runner):
    """The native engine."""

    kind = "native"

    def __init__(self, path: str, threads: int) -> None:
        from secateur.models.source import resolve_model
        from secateur.runtime.engine import open_native

        self.model = open_native(resolve_model(path), threads=threads).model
        self.vocabulary = self.model.architecture.vocabulary
        self.max_positions = self.model.architecture.max_positions

    def prefill(self, prompt: Sequence[int]) -> float:
        """See `Runner`."""
        from secateur.runtime.native_model import NativeSequence

        start = time.perf_counter()
        self._read(NativeSequence(self.model, len(prompt)), prompt)
        return time.perf_counter() - start

    def decode(self, prompts: Sequence[Sequence[int]], count: int) -> float:
        """See `Runner`."""
        from secateur.runtime.native_model import NativeSequence
        from secateur.runtime.options import GenerationOptions
        from secateur.runtime.sampling import Sampler

        sampler = Sampler(GenerationOptions())
        sequences = [NativeSequence(self.model, len(prompt) + count) for prompt in prompts]
        tokens = [
            sampler.choose(self._read(sequence, prompt)) for sequence, prompt in zip(sequences, prompts, strict=True)
        ]
        wants = [True] * len(prompts)
        start = time.perf_counter()
        for _ in range(count):
            logits = self.model.forward(tokens, sequences, wants)
            tokens = [sampler.choose(row) for row in logits]
        return time.perf_counter() - start

    def limits(self, bytes_per_second: float) -> dict[str, float]:
        """See `Runner`."""
        from secateur.runtime.kernels import Pool
        from secateur.runtime.limits import measure_limits

        limits = measure_limits(self.model.products, Pool(self.model.threads), bytes_per_second)
        return {"read_mb": limits.read / 1e6, "unpacking_ms": limits.unpacking * 1e3, "bound_ms": limits.both * 1e3}

    def _read(self, sequence: Any, prompt: Sequence[int]) -> Any:
        wants = [False] * (len(prompt) - 1) + [True]
        return self.model.forward(prompt, [sequence] * len(prompt), wants)[0]


class TorchRunner(Runner):
    """transformers and torch: as stored, a sub-model packed, or with linears in int8 (dynamic quantisation)."""

    def __init__(self, path: str, threads: int, *, int8: bool = False) -> None:
        from secateur.runtime.loading import load

        model: Any = load(path, engine="torch", threads=threads).model
        if int8:
            import torch
            from torch.ao import quantization

            quantize_dynamic: Any = quantization.quantize_dynamic
            model = quantize_dynamic(model.float(), {torch.nn.Linear}, dtype=torch.qint8)
        self.kind = "torch-int8" if int8 else "torch"
        self.model = model
        self.vocabulary = int(model.config.vocab_size)
        self.max_positions = getattr(model.config, "max_position_embeddings", None)

    def prefill(self, prompt: Sequence[int]) -> float:
        """See `Runner`."""
        start = time.perf_counter()
        self._step([prompt], None)
        return time.perf_counter() - start

    def decode(self, prompts: Sequence[Sequence[int]], count: int) -> float:
        """See `Runner`."""
        tokens, cache = self._step(prompts, None)
        start = time.perf_counter()
        for _ in range(count):
            tokens, cache = self._step(tokens, cache)
        return time.perf_counter() - start

    def _step(self, tokens: Sequence[Sequence[int]], cache: Any) -> tuple[list[list[int]], Any]:
        import torch

        with torch.inference_mode():
            output = self.model(input_ids=torch.tensor(tokens), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1, keepdim=True).tolist(), output.past_key_values


class LlamaCppRunner(Runner):
    """llama.cpp through llama-cpp-python, an extra; `path` is a GGUF file."""

    kind = "llama.cpp"

    def __init__(self, path: str, threads: int) -> None:
        try:
            import llama_cpp
        except ImportError:
            raise ConfigError(
                "llama.cpp is compared through llama-cpp-python, which is not installed: pip install 'secateur[peers]'"
            ) from None
        self.model: Any = llama_cpp.Llama(
            path, n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False
        )
        self.vocabulary = int(self.model.n_vocab())
        self.max_positions = CONTEXT

    def prefill(self, prompt: Sequence[int]) -> float:
        """See `Runner`."""
        self.model.reset()
        start = time.perf_counter()
        self.model.eval(list(prompt))
        self._choose()
        return time.perf_counter() - start

    def decode(self, prompts: Sequence[Sequence[int]], count: int) -> float:
        """See `Runner`; one sequence only."""
        if len(prompts) != 1:
            raise ConfigError("llama.cpp is timed with one sequence at a time")
        self.prefill(prompts[0])
        start = time.perf_counter()
        for _ in range(count):
            self.model.eval([self._choose()])
        return time.perf_counter() - start

    def _choose(self) -> int:
        # Reading the logits ends the computation, which llama.cpp leaves running.
        import llama_cpp

        logits = llama_cpp.llama_get_logits(self.model._ctx.ctx)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())


def _run_natively_or_not(path: str, threads: int) -> Runner:
    try:
        return NativeRunner(path, threads)
    except NotNativeError:
        return TorchRunner(path, threads)


RUNNERS: dict[str, Callable[[str, int], Runner]] = {
    "auto": _run_natively_or_not,
    "native": NativeRunner,
    "torch": TorchRunner,
    "torch-int8": lambda path, threads: TorchRunner(path, threads, int8=True),
    "llama.cpp": LlamaCppRunner,
}


def open_runner(kind: str, path: str, threads: int) -> Runner:
    """Load a model; raises `SecateurError` when it cannot be had."""
    if kind not in RUNNERS:
        raise SecateurError(f"there is no engine {kind!r} to time: known are {', '.join(RUNNERS)}")
    return RUNNERS[kind](path, threads)
