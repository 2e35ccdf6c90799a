"""What the tests of recovery share: text, a small base, and steps of two sequences."""

import pytest
import torch

import secateur  # noqa: F401 - registers the format
from secateur.pruning import recovery
from tests.pruning.tiny_derivation import calibration
from tests.tiny import save_tiny

TEXT = calibration(samples=12, seed=7)


@pytest.fixture(scope="module", name="base")
def recovery_base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("recovery") / "base", "llama", dtype=torch.float32)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Six steps of two sequences instead of a single one."""
    monkeypatch.setattr(recovery, "STEP_TOKENS", 96)
    monkeypatch.setattr(recovery, "LEARNING_RATE", 2e-2)
