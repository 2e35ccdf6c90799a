"""How long a derivation is said to take: what is counted, and in which order recipes come."""

from dataclasses import replace

import pytest
import torch

from secateur.config import make_recipe
from secateur.models.source import ModelFolder
from secateur.pruning import duration
from secateur.pruning.base import Base
from secateur.pruning.duration import Work, describe_seconds, expected_seconds, products_per_second, work_of
from tests.tiny import save_tiny


@pytest.fixture
def opened(tmp_path):
    """A tiny llama of three blocks: 64 wide, feed-forward 160, keys and values 32 wide, 384 tokens."""
    return Base.open(ModelFolder(save_tiny(tmp_path / "base", "llama"), "tiny"))


ATTENTION, FEED_FORWARD = 2 * 64 * 64 + 2 * 32 * 64, 3 * 160 * 64


def test_what_is_counted(opened, monkeypatch):
    settings = {"method": "wanda", "streams": 1, "gram": False, "rounded": False, "measuring": False, "recovering": 0}
    plain = work_of(opened.model, opened.blocks, tokens=100, **settings)
    weights = 3 * (ATTENTION + FEED_FORWARD)
    assert plain == Work(passes=2 * 100 * weights, grams=0, solving=0, measuring=0, learning=0)
    settings |= {"method": "admm", "streams": 2, "gram": True}
    solved = work_of(opened.model, opened.blocks, tokens=100, **settings)
    assert solved.passes == 3 * 100 * weights
    # Inputs of q, k and v; of o; of gate and up; of down.
    assert solved.grams == 3 * 100 * 2 * (3 * 64**2 + 160**2)
    products = 40 * (64 * (ATTENTION + 2 * 160 * 64) + 160 * 64 * 160)
    assert solved.solving == 3 * (products + 5 * (6 * 64**3 + 160**3))
    learnt = work_of(opened.model, opened.blocks, tokens=100, **settings | {"recovering": 1000})
    assert learnt == replace(solved, learning=4 * 1000 * (weights + 384 * 64))
    monkeypatch.setattr("secateur.pruning.likely_tokens.LIKELIEST", 40)  # which are found in text of as many tokens
    learnt = work_of(opened.model, opened.blocks, tokens=100, **settings | {"recovering": 10_000})
    assert learnt.learning == 4 * 10_000 * (weights + 40 * 64) + 4096 * (weights + 384 * 64)


def test_seconds_go_by_both_kinds_of_products():
    passes, solving = 1000 * duration._PASSES, 1000 * duration._SOLVING  # of products per second, at what is seen
    work = Work(passes=passes, grams=0.0, solving=solving, measuring=0.0, learning=0.0)
    assert work.seconds(in_models=1000.0, in_float32=100.0) == pytest.approx(1 + 10)


def test_what_costs_more_is_said_to_cost_more(opened, monkeypatch):
    monkeypatch.setattr(duration, "products_per_second", lambda *_: 1e9)

    def expected(tokens=100_000, recovering=0, **settings):
        recipe = make_recipe({"model": "tiny", "for": "python", **settings})
        return expected_seconds(opened, recipe, tokens=tokens, recovering=recovering, threads=1)

    ways = [
        expected(method="magnitude", preset="fast"),
        expected(preset="fast"),
        expected(preset="balanced"),
        expected(preset="balanced", values="nl4"),
        expected(preset="best", values="nl4"),
        expected(preset="best", values="nl4", recovering=100_000),
    ]
    assert ways == sorted(set(ways))
    assert ways[0] == 0
    assert expected(preset="fast", tokens=200_000) == 2 * ways[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_machine_is_tried_out_with_as_many_threads(dtype):
    before = torch.get_num_threads()
    assert 1e7 < products_per_second(dtype, 1) < 1e15
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (3, "less than a minute"),
        (60, "about 1 minute"),
        (200, "about 3 minutes"),
        (1516, "about 25 minutes"),
        (7000, "about 2 hours"),
    ],
)
def test_durations_are_said_roughly(seconds, said):
    assert describe_seconds(seconds) == said
