"""What the tests of recovery share: a small base, steps of two sequences, and runs that are interrupted."""

import math

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

import secateur  # noqa: F401 - registers the format
from secateur.pruning import recovery
from tests.pruning.tiny_derivation import Interrupt, calibration, derive_tiny
from tests.tiny import save_tiny

TEXT = calibration(samples=12, seed=7)
VALUES = [{}, {"values": "int8"}, {"values": "int4", "method": "admm"}]


def save_base(path):
    return save_tiny(path, "llama", dtype=torch.float32)


def take_small_steps(monkeypatch):
    """Six steps of two sequences instead of a single one."""
    monkeypatch.setattr(recovery, "STEP_TOKENS", 96)
    monkeypatch.setattr(recovery, "LEARNING_RATE", 2e-2)


def opened(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def divergence(model, parent, token_ids):
    """KL(parent || model) in nats at the mean position."""
    ours, theirs = (one(input_ids=token_ids).logits.double().log_softmax(-1) for one in (model, parent))
    return functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean()


def save_always(monkeypatch):
    monkeypatch.setattr(recovery, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(recovery, "_SAVE_SHARE", math.inf)


def interrupted(base, out, moment, **options):
    def stop(stage, done, _):
        if (stage, done) == moment:
            raise Interrupt

    with pytest.raises(Interrupt):
        derive_tiny(base, out, recovery=TEXT, progress=stop, **options)
