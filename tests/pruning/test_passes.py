"""How the calibration set runs through a block: passes that wait, passes that are run again, and what both cost."""

import pytest
import torch
from torch import nn

from secateur.config import make_recipe
from secateur.models import stepping
from secateur.models.source import ModelFolder
from secateur.pruning import passes
from secateur.pruning.base import Base
from secateur.pruning.job import forecast_job
from tests.pruning.tiny_derivation import contents, derive_tiny
from tests.tiny import FAMILIES, OTHER_FAMILIES, save_tiny


def forecast(base, tmp_path, **options):
    recipe = make_recipe({"for": "python", "method": "admm", "sequence_length": 48, **options})
    return forecast_job(Base.open(ModelFolder(base, "tiny")), recipe, 5 * 48, None, 1, tmp_path / "none")


def little_memory(monkeypatch, found):
    """Leave memory for everything but passes that wait."""
    n_bytes = found.working_memory + found.activations + found.passes // 2
    monkeypatch.setattr("secateur.pruning.forecast.available_memory", lambda: int(n_bytes / 0.85))


def counting(monkeypatch, tmp_path, base, name, **options):
    """Derive, and return how many tokens went through a linear of the blocks, by its name."""
    tokens = {}

    class Counted(passes.StagedPasses):
        def __init__(self, course, dense, *, keep):
            super().__init__(course, dense, keep=keep)
            for linear in course.linears:
                course.module.get_submodule(linear).register_forward_hook(
                    lambda _, arguments, __, linear=linear: tokens.__setitem__(
                        linear, tokens.get(linear, 0) + arguments[0].shape[:-1].numel()
                    )
                )

    monkeypatch.setattr("secateur.pruning.loop.StagedPasses", Counted)
    derive_tiny(base, tmp_path / name, method="admm", **options)
    return tokens


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
def test_passes_that_wait_give_the_same_bytes_as_those_that_are_run_again(tmp_path, monkeypatch, family):
    base = save_tiny(tmp_path / "base", family)
    options = {"method": "admm", "values": "int4", "threads": 1}
    derive_tiny(base, tmp_path / "waiting", **options)
    little_memory(monkeypatch, forecast(base, tmp_path, values="int4"))
    begun = []
    begin = stepping.Stepper.begin
    monkeypatch.setattr(stepping.Stepper, "begin", lambda self, run: begun.append(1) or begin(self, run))
    derive_tiny(base, tmp_path / "again", **options)
    assert len(begun) > 3 * 2 * 2  # blocks, streams and stages, of one batch
    assert contents(tmp_path / "waiting") == contents(tmp_path / "again")


def test_passes_that_wait_run_nothing_twice(tmp_path, monkeypatch):
    """Each linear sees each token once in the parent and once in the sub-model, not counting the probe of stages."""
    monkeypatch.setattr("secateur.pruning.job.TOKENS_PER_BATCH", 48)  # five batches of one sequence
    base = save_tiny(tmp_path / "base")
    waiting = counting(monkeypatch, tmp_path, base, "waiting")
    tokens, blocks = 5 * 48, 3
    behind = blocks * 2 * tokens
    # In the last block neither the parent nor the sub-model goes on behind the last stage.
    assert waiting == {linear: behind - (2 * tokens if linear == "mlp.down_proj" else 0) for linear in waiting}
    little_memory(monkeypatch, forecast(base, tmp_path))
    again = counting(monkeypatch, tmp_path, base, "again")
    assert again["self_attn.q_proj"] > 3 * waiting["self_attn.q_proj"]
    assert contents(tmp_path / "waiting") == contents(tmp_path / "again")


def test_room_for_passes_is_forecast(tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "base")
    found = forecast(base, tmp_path)
    assert found.keep_passes
    assert found.passes == 2 * 5 * 48 * (3 * 64 + 3 * 64) * 2  # streams, tokens, features, bytes
    assert forecast(base, tmp_path, correction=0.0).passes == found.passes // 2
    assert forecast(base, tmp_path, method="wanda").passes == 0
    assert forecast(base, tmp_path, propagate=False).passes == 0
    with_them = found.describe()
    little_memory(monkeypatch, found)
    without = forecast(base, tmp_path)
    assert not without.keep_passes
    assert not without.map_activations
    assert with_them != without.describe()


def test_probabilities_of_eager_attention_wait_too(tmp_path):
    """They are heads x sequence_length for each token."""
    eager, lean = (forecast(save_tiny(tmp_path / one, one), tmp_path) for one in ("gemma2", "qwen2"))
    assert eager.passes - lean.passes == 2 * 5 * 48 * 48 * 4 * 2


def test_an_error_within_a_pass_leaves_no_hooks(tmp_path):
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.calls = nn.Linear(8, 8), nn.Linear(8, 8), 0

        def forward(self, x):
            self.calls += 1
            hidden = self.first(x)
            if self.calls > 1:
                raise RuntimeError("broken")
            return self.second(hidden)

    from secateur.models.replay import BlockInputs, Call
    from secateur.pruning.activations import Activations

    inputs = BlockInputs(1)
    for _ in range(2):
        inputs.add(0, Call((), {}))
    block, hidden = Fails(), torch.randn(2, 4, 8)
    course = passes.Course(
        block, ("first", "second"), Activations(hidden, None, inputs, 1), 0, torch.device("cpu"), True, 1.0, False
    )
    dense = {name: one.data for name, one in block.named_parameters()}
    with pytest.raises(RuntimeError, match="broken"), passes.StagedPasses(course, dense, keep=True) as staged:
        assert staged.stages() == (("first",), ("second",))
        assert staged.collect(0)["first"].n_tokens == 8
        staged.collect(1)
    assert not any(module._forward_pre_hooks for module in block.modules())
