"""Batches: the texts that each prompt would give alone, computed together."""

import pytest

from secateur.errors import ConfigError, ResourceError
from secateur.runtime import batch
from secateur.runtime.engine import TokenizersCodec
from secateur.runtime.loading import load
from secateur.runtime.options import GenerationOptions

PROMPTS = ["def f(x):", "def g(", "class A:", "def f(x):", "d"]


@pytest.fixture(params=["native", "torch"])
def loaded(folders, request):
    return load(folders["llama"], engine=request.param)


@pytest.fixture
def steps(folders, monkeypatch):
    """A native model, and how many tokens each of its steps had."""
    loaded, sizes = load(folders["llama"], engine="native"), []
    forward = loaded.backend.model.forward

    def counting(ids, *arguments):
        sizes.append(len(ids))
        return forward(ids, *arguments)

    monkeypatch.setattr(loaded.backend.model, "forward", counting)
    return loaded, sizes


def test_texts_are_those_of_each_prompt_alone(loaded):
    alone = [loaded.generate(prompt, 24, ignore_eos=True) for prompt in PROMPTS]
    assert loaded.generate_batch(PROMPTS, 24, ignore_eos=True) == alone
    assert loaded.generate_batch(PROMPTS[:1], 24, ignore_eos=True) == alone[:1]
    assert loaded.generate_batch([], 24) == []


def test_each_text_draws_with_a_seed_of_its_own(loaded):
    options = {"max_new_tokens": 16, "temperature": 1.5, "ignore_eos": True}
    alone = [loaded.generate("def f", seed=5 + i, **options) for i in range(3)]
    assert loaded.generate_batch(["def f"] * 3, seed=5, **options) == alone
    assert len(set(alone)) == 3


def test_seeds_go_round_at_the_end():
    assert GenerationOptions(seed=2**64 - 1).of_text(1).seed == 0
    assert GenerationOptions().of_text(1).seed is None


def test_a_common_beginning_is_computed_once(steps):
    loaded, sizes = steps
    loaded.generate_batch(["a" * 100 + end for end in ("xx", "yyy", "z")], 4, ignore_eos=True)
    assert sizes == [100, 2 + 3 + 1, 3, 3, 3]
    sizes.clear()
    loaded.generate_batch(["a" * 100 + end for end in ("v", "w")], 1, ignore_eos=True)
    assert sizes == [100, 2], "what was answered before makes no difference"


def test_streams_that_are_closed_leave_the_batch(steps):
    loaded, sizes = steps
    streams = loaded.backend.generate_batch([[1, 2, 3], [4, 5], [6]], GenerationOptions(8, ignore_eos=True))
    for _ in range(3):
        for stream in streams:
            next(stream)
    streams.pop(1).close()
    assert [len(list(stream)) for stream in streams] == [5, 5]
    assert sizes == [6, 3, 3, 2, 2, 2, 2, 2]


class Printable(TokenizersCodec):
    """Decodes each token at once, to one letter."""

    def decode(self, token_ids):
        return "".join(chr(0x4E00 + token_id) for token_id in token_ids)


def test_a_text_with_its_stop_string_leaves_the_batch(steps):
    loaded, sizes = steps
    loaded.backend.codec = Printable(loaded.tokenizer, None)
    prompts = ["def f(x):", "class A:", "import"]
    whole = [loaded.generate(prompt, 20, ignore_eos=True) for prompt in prompts]
    stop = next(letter for letter in whole[1][4:] if letter not in whole[0] + whole[2])
    at = whole[1].index(stop)
    sizes.clear()
    assert loaded.generate_batch(prompts, 20, ignore_eos=True, stop=stop) == [whole[0], whole[1][:at], whole[2]]
    assert sizes[1:] == [3] * at + [2] * (19 - at)


def test_a_stop_string_ends_one_text(loaded):
    prompts = ["def f(x):", "class A:", "import"]
    whole = [loaded.generate(prompt, 20, ignore_eos=True) for prompt in prompts]
    stop = next(letter for letter in whole[1][4:] if letter not in whole[0] + whole[2])
    found = loaded.generate_batch(prompts, 20, ignore_eos=True, stop=stop)
    assert found == [whole[0], whole[1][: whole[1].index(stop)], whole[2]]


def test_ends_of_texts_count(steps):
    loaded, sizes = steps
    backend = loaded.backend
    prompts = [[1, 2, 3], [4, 5]]
    endless = [list(backend.generate(prompt, GenerationOptions(20, ignore_eos=True))) for prompt in prompts]
    backend.end_ids = frozenset({endless[0][6]})
    sizes.clear()
    streams = backend.generate_batch(prompts, GenerationOptions(20))
    expected = [ids[: ids.index(endless[0][6])] if endless[0][6] in ids else ids for ids in endless]
    assert [list(stream) for stream in streams] == expected
    assert sizes[-1] == 1


def test_a_batch_can_be_cancelled(loaded):
    whole = loaded.generate_batch(PROMPTS, 30, ignore_eos=True)
    asked = []

    def cancelled():
        asked.append(None)
        return len(asked) > 12

    cut = loaded.generate_batch(PROMPTS, 30, ignore_eos=True, cancelled=cancelled)
    assert all(text.startswith(part) for text, part in zip(whole, cut, strict=True))
    assert sum(map(len, cut)) < sum(map(len, whole))


def test_batches_that_are_too_large(loaded, monkeypatch):
    with pytest.raises(ConfigError, match="a batch of 65 prompts is too large; give at most 64"):
        loaded.generate_batch(["a"] * 65)
    with pytest.raises(ConfigError, match="prompts is the text 'abc'"):
        loaded.generate_batch("abc")
    with pytest.raises(ConfigError, match="256 positions"):
        loaded.generate_batch(["a", "a" * 300])


def test_batches_need_memory(folders, monkeypatch):
    loaded = load(folders["llama"], engine="native")
    # Keys and values: 3 blocks, 2 heads of 16 entries, 2 bytes each, for 10 + 1 and 5 + 1 tokens.
    needed = 2 * 3 * 2 * 16 * 2 * (11 + 6)
    monkeypatch.setattr(batch, "available_memory", lambda: needed)
    loaded.generate_batch(["a" * 10, "a" * 5], 1)
    monkeypatch.setattr(batch, "available_memory", lambda: needed - 1)
    with pytest.raises(ResourceError, match=r"keys and values of 2 texts.*fewer prompts"):
        loaded.generate_batch(["a" * 10, "a" * 5], 1)
