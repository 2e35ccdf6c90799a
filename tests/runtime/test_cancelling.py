"""Texts that nobody wants any more, and interrupts: both take effect while a long prompt is read."""

import _thread
import signal
import threading

import pytest

from secateur.runtime.cancelling import Cancelled
from secateur.runtime.loading import load
from secateur.runtime.native_model import NativeSequence
from tests.runtime.native_models import close, native, reference_logits, tokens
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "long", "llama", max_position_embeddings=1024)


def after(times):
    """Return a function that says True from the call after so many on."""
    asked = []

    def cancelled():
        asked.append(None)
        return len(asked) > times

    return cancelled


def test_a_step_is_given_up_between_two_blocks(folder):
    model = native(folder).model
    token_ids = tokens(200)
    sequence = NativeSequence(model, 300)
    model.forward(token_ids[:50], [sequence] * 50, [False] * 50)
    for times in range(model.architecture.blocks):
        with pytest.raises(Cancelled):
            model.forward(tokens(150, 9), [sequence] * 150, [False] * 150, after(times))
        assert len(sequence) == 50
    found = model.forward(token_ids[50:], [sequence] * 150, [True] * 150, lambda: False)
    assert close(found, reference_logits(folder, token_ids)[50:])


def test_short_steps_are_asked_about_once(folder):
    model = native(folder).model
    sequence = NativeSequence(model, 10)
    with pytest.raises(Cancelled):
        model.forward([1], [sequence], [True], after(0))
    assert len(sequence) == 0
    model.forward([1], [sequence], [True], after(1))
    assert len(sequence) == 1


def test_a_step_within_a_step_is_noticed(folder):
    model = native(folder).model
    sequence, other = NativeSequence(model, 50), NativeSequence(model, 50)

    def meddling():
        model.forward([1], [other], [True])
        return False

    with pytest.raises(RuntimeError, match="another step"):
        model.forward(tokens(40), [sequence] * 40, [False] * 40, meddling)
    assert len(sequence) == 0


def test_parts_of_a_prompt_that_were_read_stay(folder):
    loaded = load(folder, engine="native")
    blocks = loaded.backend.model.architecture.blocks
    assert loaded.generate("a" * 700, 4, ignore_eos=True, cancelled=after(blocks + 1)) == ""
    context = loaded.backend.contexts.take(tokens(1), 1)
    assert len(context.tokens) == 0
    loaded.generate("a" * 700, 4, ignore_eos=True, cancelled=after(2 * blocks + 1))
    idle = loaded.backend.contexts._idle
    assert len(idle.tokens) == len(idle.sequence) == 700 * 2 // 3
    fresh = load(folder, engine="native")
    assert loaded.generate("a" * 700, 4, ignore_eos=True) == fresh.generate("a" * 700, 4, ignore_eos=True)


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_a_text_ends_where_it_is(folder, engine):
    loaded = load(folder, engine=engine)
    whole = loaded.generate("def f", 40, ignore_eos=True)
    event = threading.Event()
    text = ""
    for piece in loaded.stream("def f", 40, ignore_eos=True, cancelled=event.is_set):
        text += piece
        if len(text) > 5:
            event.set()
    assert text
    assert len(text) < len(whole)
    assert whole.startswith(text)
    assert loaded.generate("def f", 40, ignore_eos=True, cancelled=event.is_set) == ""
    assert loaded.generate("def f", 40, ignore_eos=True, cancelled=lambda: False) == whole


def test_torch_gives_up_within_a_step(folder):
    asked = []
    loaded = load(folder, engine="torch")
    loaded.generate("a" * 300, 1, ignore_eos=True, cancelled=lambda: bool(asked.append(None)))
    steps = len(asked)
    assert steps > 20
    asked.clear()
    assert loaded.generate("a" * 300, 1, cancelled=lambda: asked.append(None) or len(asked) == steps // 2) == ""
    assert len(asked) == steps // 2


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_an_interrupt_leaves_the_model_usable(folder, engine, monkeypatch):
    loaded = load(folder, engine=engine)
    expected = load(folder, engine=engine).generate("a" * 700, 4, ignore_eos=True)

    def interrupted():
        _thread.interrupt_main()
        return False

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            loaded.generate("a" * 700, 4, ignore_eos=True, cancelled=interrupted)
    finally:
        signal.signal(signal.SIGINT, before)
    assert loaded.generate("a" * 700, 4, ignore_eos=True) == expected
