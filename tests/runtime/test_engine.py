"""Generation by the native engine: streams, the reuse of prefixes, sampling, processes."""

import gc
import json
import os
import threading
from itertools import zip_longest

import numpy as np
import pytest

from secateur.runtime.contexts import READ_ANEW
from secateur.runtime.loaded import LoadedModel
from secateur.runtime.loading import load
from secateur.runtime.native_model import CHUNK
from secateur.runtime.options import GenerationOptions
from tests.runtime.native_models import (
    NATIVE,
    native,
    reference_logits,
)
from tests.tiny import EOS, save_tiny


@pytest.mark.parametrize("family", NATIVE)
def test_generates_what_torch_does(folders, family):
    loaded = {engine: load(folders[family], engine=engine) for engine in ("native", "torch", "auto")}
    assert {name: one.backend.name for name, one in loaded.items()} == {
        "native": "native",
        "torch": "torch",
        "auto": "native",
    }
    prompt = loaded["native"].tokenizer.encode("def f(x):").ids
    assert prompt == loaded["torch"].tokenizer("def f(x):")["input_ids"]
    found = list(loaded["native"].backend.generate(prompt, GenerationOptions(max_new_tokens=12, ignore_eos=True)))
    logits = reference_logits(folders[family], prompt + found)[len(prompt) - 1 : -1]
    chosen = logits[range(12), found]
    assert (chosen > logits.max(axis=1) - 0.02 * np.abs(logits).max()).all()  # the best, or as good as it
    assert (chosen == logits.max(axis=1)).sum() >= 9


def test_prefix_is_not_computed_again(folders, monkeypatch):
    backend = native(folders["llama"])
    loaded = LoadedModel(folders["llama"], backend)
    computed = []
    forward = backend.model.forward

    def counting(ids, sequences, wants, cancelled):
        computed.append(len(ids))
        return forward(ids, sequences, wants, cancelled)

    monkeypatch.setattr(backend.model, "forward", counting)
    first = loaded.generate("a" * 50, 4, ignore_eos=True)
    assert sum(computed) == 50 + 3
    few = READ_ANEW
    for prompt, needed in (("a" * 50 + "b" * 5, few), ("a" * 50 + "b" * 30, 30), ("a" * 20, few), ("b", 1)):
        computed.clear()
        again = loaded.generate(prompt, 4, ignore_eos=True)
        assert sum(computed) <= needed + 3
        assert again == LoadedModel(folders["llama"], native(folders["llama"])).generate(prompt, 4, ignore_eos=True)
    assert loaded.generate("a" * 50, 4, ignore_eos=True) == first


def read(contexts, prompt):
    """Return the logits after a prompt, of which nothing is computed that is known."""
    context = contexts.take(prompt, 1000)
    rest = prompt[len(context.tokens) :]
    logits = contexts.prefill(rest, [context] * len(rest), [False] * (len(rest) - 1) + [True])
    contexts.give_back(context)
    return logits[-1]


@pytest.mark.parametrize("length", [5, 40, CHUNK + 2, 2 * CHUNK + 100])
def test_a_prompt_that_is_read_again_gives_the_same_logits_to_the_bit(tmp_path, length):
    """So a seed gives one text, whatever the text before was."""
    backend = native(save_tiny(tmp_path / "long", "llama", max_position_embeddings=4096))
    prompt = np.random.default_rng(0).integers(0, 200, length).tolist()
    found = [read(backend.contexts, prompt)]
    for before in (prompt, prompt[: length // 2] + [201] * 9, [*prompt[:-1], 201]):
        read(backend.contexts, before)
        found.append(read(backend.contexts, prompt))
    assert all(np.array_equal(one, found[0]) for one in found)


def test_prefix_is_kept_when_a_text_outgrows_its_room(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "long", "llama", max_position_embeddings=4096)
    loaded = load(folder, engine="native")
    loaded.generate("a" * 1500, 1)
    computed = []
    forward = loaded.backend.model.forward

    def counting(ids, *arguments):
        logits = forward(ids, *arguments)
        computed.extend(ids)
        return logits

    monkeypatch.setattr(loaded.backend.model, "forward", counting)
    found = loaded.generate("a" * 1500 + "b" * 9, 1000, ignore_eos=True, cancelled=lambda: len(computed) > 27)
    assert len(computed) == READ_ANEW + 12
    fresh = load(folder, engine="native")
    assert fresh.generate("a" * 1500 + "b" * 9, 13, ignore_eos=True) == found


def test_two_streams_at_once_do_not_mix(folders):
    loaded = load(folders["llama"], engine="native")
    prompts = ("def f(x):", "class A:")
    alone = [loaded.generate(prompt, 20, ignore_eos=True) for prompt in prompts]
    streams = [loaded.stream(prompt, 20, ignore_eos=True) for prompt in prompts]
    texts = ["", ""]
    for pieces in zip_longest(*streams, fillvalue=""):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    assert texts == alone


def test_a_closed_stream_leaves_the_model_usable(folders):
    loaded = load(folders["llama"], engine="native")
    stream = loaded.stream("def f(x):", 20, ignore_eos=True)
    next(stream)
    stream.close()
    fresh = load(folders["llama"], engine="native")
    assert loaded.generate("def g", 10, ignore_eos=True) == fresh.generate("def g", 10, ignore_eos=True)


def test_end_of_sequence_ends_the_text(folders):
    backend = native(folders["llama"])
    endless = list(backend.generate([1, 2, 3], GenerationOptions(max_new_tokens=30, ignore_eos=True)))
    assert len(endless) == 30
    backend.end_ids = frozenset({endless[10]})
    first = endless.index(endless[10])
    assert list(backend.generate([1, 2, 3], GenerationOptions(max_new_tokens=30))) == endless[:first]
    assert EOS in native(folders["llama"]).end_ids


def test_seed_repeats_a_draw(folders):
    backend = native(folders["llama"])

    def draw(seed):
        options = GenerationOptions(max_new_tokens=20, temperature=1.0, top_p=0.95, seed=seed, ignore_eos=True)
        return list(backend.generate([1, 2, 3], options))

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


def test_a_forked_process_goes_on(folders):
    backend = native(folders["llama"])
    options = GenerationOptions(max_new_tokens=8, ignore_eos=True)
    expected = list(backend.generate([1, 2, 3], options))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(list(backend.generate([1, 2, 3], options))).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert json.loads(pipe.read()) == expected
    os.waitpid(child, 0)


def test_a_stream_closed_by_the_garbage_collector_does_not_block(folders, monkeypatch):
    backend = native(folders["llama"])
    options = GenerationOptions(max_new_tokens=5, ignore_eos=True)
    given_up = backend.generate([1, 2, 3], options)
    next(given_up)
    cycle = [given_up]
    cycle.append(cycle)
    del given_up, cycle
    forward = backend.model.forward

    def collecting(*arguments):
        gc.collect()
        return forward(*arguments)

    monkeypatch.setattr(backend.model, "forward", collecting)
    found = []
    thread = threading.Thread(target=lambda: found.extend(backend.generate([4, 5], options)), daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert len(found) == 5
