"""How the calibration set runs through a block: passes that wait, passes that are run again, and what both hold."""

import gc

import pytest
import torch
from torch import nn

from secateur.config import make_recipe
from secateur.models.replay import BlockInputs, Call, record_inputs
from secateur.models.source import ModelFolder
from secateur.models.stepping import Stepper
from secateur.models.structure import find_blocks
from secateur.pruning import loop, passes
from secateur.pruning.activations import Activations
from secateur.pruning.base import Base
from secateur.pruning.demand import Demand
from secateur.pruning.forecast import MEMORY_SHARE
from secateur.pruning.job import forecast_job
from tests.pruning.tiny_derivation import Interrupt, contents, derive_tiny
from tests.tiny import FAMILIES, OTHER_FAMILIES, save_tiny, tiny_model

CPU = torch.device("cpu")
TOKENS, BLOCKS, STAGES, STREAMS = 5 * 48, 3, 4, 2


def forecast(base, tmp_path, device=CPU, **options):
    recipe = make_recipe({"for": "python", "method": "admm", "sequence_length": 48, **options})
    opened = Base.open(ModelFolder(base, "tiny"))
    return forecast_job(opened, recipe, TOKENS, None, 1, tmp_path / "none", device=device)


def leave_room(monkeypatch, found, share):
    """Leave memory for everything but a share of the passes that could wait."""
    n_bytes = found.working_memory + found.activations + share * found.waiting
    monkeypatch.setattr("secateur.pruning.forecast.available_memory", lambda: int(n_bytes / MEMORY_SHARE) + 1)


def begun_passes(monkeypatch, derive):
    begun = []
    begin = Stepper.begin
    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "begin", lambda self, run: begun.append(1) or begin(self, run))
        derive()
    return len(begun)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
def test_passes_that_wait_give_the_same_bytes_as_those_that_are_run_again(tmp_path, monkeypatch, family):
    monkeypatch.setattr("secateur.pruning.job.TOKENS_PER_BATCH", 2 * 48)  # three batches
    base = save_tiny(tmp_path / "base", family)
    found = forecast(base, tmp_path, values="int4")
    begun = {}
    for name, share in (("waiting", 1.0), ("some", 0.5), ("again", 0.0)):
        leave_room(monkeypatch, found, share)
        begun[name] = begun_passes(
            monkeypatch, lambda name=name: derive_tiny(base, tmp_path / name, method="admm", values="int4")
        )
    assert begun["waiting"] == BLOCKS * STREAMS * 3
    assert begun["waiting"] < begun["some"] < begun["again"]
    assert contents(tmp_path / "waiting") == contents(tmp_path / "some") == contents(tmp_path / "again")


def test_passes_that_wait_run_nothing_twice(tmp_path, monkeypatch):
    """Each linear sees each token once in the parent and once in the sub-model, not counting the probe of stages."""
    monkeypatch.setattr("secateur.pruning.job.TOKENS_PER_BATCH", 48)  # five batches of one sequence
    base = save_tiny(tmp_path / "base")
    tokens = {}

    class Counted(passes.StagedPasses):
        def __init__(self, feed, dense, *, waiting):
            super().__init__(feed, dense, waiting=waiting)
            for linear in feed.linears:
                feed.module.get_submodule(linear).register_forward_hook(
                    lambda _, arguments, __, linear=linear: tokens.__setitem__(
                        linear, tokens.get(linear, 0) + arguments[0].shape[:-1].numel()
                    )
                )

    monkeypatch.setattr(loop, "StagedPasses", Counted)
    derive_tiny(base, tmp_path / "waiting", method="admm")
    # In the last block neither the parent nor the sub-model goes on behind the last stage.
    behind = {linear: BLOCKS - (linear == "mlp.down_proj") for linear in tokens}
    assert tokens == {linear: STREAMS * TOKENS * blocks for linear, blocks in behind.items()}
    tokens.clear()
    leave_room(monkeypatch, forecast(base, tmp_path), 0.0)
    derive_tiny(base, tmp_path / "again", method="admm")
    assert tokens["self_attn.q_proj"] > 3 * STREAMS * TOKENS * BLOCKS
    assert contents(tmp_path / "waiting") == contents(tmp_path / "again")


def test_room_for_passes_is_forecast(tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "base")
    monkeypatch.setattr("secateur.pruning.job.TOKENS_PER_BATCH", 48)
    found = forecast(base, tmp_path)
    assert found.waiting_batches == 5
    assert "and to be quick" in found.describe()
    assert forecast(base, tmp_path, correction=0.0).waiting == found.waiting // 2
    for options in ({"method": "wanda"}, {"propagate": False}, {"device": torch.device("cuda")}):
        none = forecast(base, tmp_path, **options)
        assert (none.waiting, none.waiting_batches) == (0, 0)
        assert "and to be quick" not in none.describe()
    leave_room(monkeypatch, found, 0.5)
    some = forecast(base, tmp_path)
    assert (some.waiting_batches, some.waiting) == (2, 2 * found.waiting // 5)
    assert not some.map_activations


def storages():
    """Bytes by address of all tensors that something refers to."""
    found = {}
    for one in gc.get_objects():
        if type(one) is torch.Tensor and one.device.type == "cpu":
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return found


@pytest.mark.parametrize(
    ("family", "changes"),
    [(family, {}) for family in (*FAMILIES, *OTHER_FAMILIES)]
    + [("qwen3", {"head_dim": 32, "num_key_value_heads": 4}), ("phi3", {"num_key_value_heads": 4})],
)
def test_the_forecast_covers_what_a_waiting_pass_holds(family, changes):
    model = tiny_model(family, dtype=torch.float32, **changes).eval()
    blocks, rows = find_blocks(model), []
    token_ids = torch.randint(0, 256, (2, 48))
    with torch.inference_mode():
        calls = record_inputs(model, blocks, token_ids, 2, lambda _, hidden: rows.append(hidden), CPU)
        module = model.get_submodule(blocks[0].name)
        feed = passes.Feed(module, blocks[0].prunable, Activations(rows[0], None, calls, 2), 0, CPU, True, 1.0, False)
        with passes.StagedPasses(feed, {}, waiting=1) as staged, Stepper(module, staged.stages()) as stepper:
            gc.collect()
            before, held = storages(), []
            waiting = stepper.begin(lambda: feed.forward(rows[0], 0))
            for stage in range(len(staged.stages())):
                waiting.advance(stage)
                held.append(sum(size for place, size in storages().items() if place not in before))
            waiting.abandon()
    demand = Demand(model, blocks, 96, 4, 96, 0.5, 1, 0, 0, gram=True, waiting_length=48)
    assert max(held) <= demand.waiting() <= 1.8 * max(held)


class Fails(nn.Module):
    """A block whose second linear is never reached after the first pass."""

    def __init__(self, error):
        super().__init__()
        self.first, self.second, self.calls, self.error = nn.Linear(8, 8), nn.Linear(8, 8), 0, error

    def forward(self, x):
        self.calls += 1
        hidden = self.first(x)
        if self.calls > 1:
            raise self.error
        return self.second(hidden)


@pytest.mark.parametrize("error", [RuntimeError("broken"), Interrupt()], ids=["error", "interrupt"])
def test_an_error_within_a_pass_leaves_no_hooks_and_no_passes(error):
    inputs = BlockInputs(1)
    for _ in range(2):
        inputs.add(0, Call((), {}))
    block, hidden = Fails(error), torch.randn(2, 4, 8)
    feed = passes.Feed(block, ("first", "second"), Activations(hidden, None, inputs, 1), 0, CPU, True, 1.0, False)
    with pytest.raises(type(error)), passes.StagedPasses(feed, {}, waiting=2) as staged:
        assert staged.stages() == (("first",), ("second",))
        assert staged.collect(0)["first"].n_tokens == 8
        assert len(staged._ours) == 2
        staged.collect(1)
    assert not any(module._forward_pre_hooks for module in block.modules())
    assert not staged._ours


@pytest.mark.parametrize("where", ["a pass of the parent", "between stages"])
def test_interrupted_within_a_block_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch, where):
    base = save_tiny(tmp_path / "base")
    derive_tiny(base, tmp_path / "whole", method="admm")
    calls, prune_weight = [], loop.prune_weight

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 7 + 4:  # in the second block, behind queries, keys, values and o_proj
            raise Interrupt
        return prune_weight(*arguments)

    def in_a_pass(self, batch, parent):
        calls.append(1)
        if len(calls) == 2:
            raise Interrupt
        return finish(self, batch, parent)

    finish = passes.StagedPasses._finish_parent
    with monkeypatch.context() as patch:
        if where == "between stages":
            patch.setattr(loop, "prune_weight", interrupted)
        else:
            patch.setattr(passes.StagedPasses, "_finish_parent", in_a_pass)
        with pytest.raises(Interrupt):
            derive_tiny(base, tmp_path / "out", method="admm")
    assert len(list((tmp_path / "out.partial").glob("*.safetensors"))) == 1
    derive_tiny(base, tmp_path / "out", method="admm", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_without_a_parent_its_weights_are_not_copied(tmp_path, monkeypatch):
    seen = []

    class Seen(passes.StagedPasses):
        def __init__(self, feed, dense, *, waiting):
            seen.append(len(dense))
            super().__init__(feed, dense, waiting=waiting)

    monkeypatch.setattr(loop, "StagedPasses", Seen)
    base = save_tiny(tmp_path / "base")
    derive_tiny(base, tmp_path / "alone", method="admm", correction=0.0)
    assert seen == [0] * BLOCKS
    derive_tiny(base, tmp_path / "beside", method="admm")
    assert all(seen[BLOCKS:])
