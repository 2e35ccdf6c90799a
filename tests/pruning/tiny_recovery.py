"""What the tests of recovery share: text, a small base, and steps of two sequences."""

import torch

import secateur  # noqa: F401 - registers the format
from secateur.pruning import recovery
from tests.pruning.tiny_derivation import calibration
from tests.tiny import save_tiny

TEXT = calibration(samples=12, seed=7)


def save_base(path):
    return save_tiny(path, "llama", dtype=torch.float32)


def take_small_steps(monkeypatch):
    """Six steps of two sequences instead of a single one."""
    monkeypatch.setattr(recovery, "STEP_TOKENS", 96)
    monkeypatch.setattr(recovery, "LEARNING_RATE", 2e-2)
