"""Passes that stand still where linears receive an input."""

import weakref

import pytest
import torch

from secateur.errors import ModelError
from secateur.models.stepping import Stepper, groups_by_input
from tests.feedforward import LINEARS, Feedforward

GROUPS = (("gate", "up"), ("down",))


class Residual(Feedforward):
    def forward(self, x):
        return x + super().forward(x)


def batch(seed=0):
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


def test_linears_are_grouped_by_the_tensor_that_they_receive():
    block = Feedforward()
    assert groups_by_input(block, LINEARS, lambda: block(batch())) == GROUPS
    assert groups_by_input(block, ("down", "up"), lambda: block(batch())) == (("up",), ("down",))
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_equal_inputs_that_are_other_tensors_are_not_one():
    class Copies(Feedforward):
        def forward(self, x):
            return self.down(self.gate(x).relu() * self.up(x.clone()))

    block = Copies()
    assert groups_by_input(block, LINEARS, lambda: block(batch())) == (("gate",), ("up",), ("down",))


def test_a_linear_that_is_never_reached_is_an_error():
    block = Feedforward()
    with pytest.raises(ModelError, match="unused received no input"):
        groups_by_input(block, (*LINEARS, "unused"), lambda: block(batch()))


def test_passes_that_wait_compute_each_linear_once_and_the_same():
    block, inputs = Residual(), [batch(seed) for seed in range(3)]
    wanted = [block(x) for x in inputs]
    block.runs.clear()
    with Stepper(block, GROUPS) as stepper:
        passes = [stepper.begin(lambda x=x: block(x)) for x in inputs]
        assert block.runs == []
        assert all(one.advance(0) is x for one, x in zip(passes, inputs, strict=True))
        assert block.runs == []
        hidden = [one.advance(1) for one in passes]
        assert block.runs == ["gate", "up"] * 3
        assert all(torch.equal(h, block.gate(x).relu() * block.up(x)) for h, x in zip(hidden, inputs, strict=True))
        block.runs.clear()
        outputs = [one.finish() for one in passes]
        assert block.runs == ["down"] * 3
    assert all(map(torch.equal, outputs, wanted))
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_a_pass_can_go_to_a_later_stage_and_to_the_end_at_once():
    block, x = Residual(), batch()
    with Stepper(block, GROUPS) as stepper:
        assert torch.equal(stepper.begin(lambda: block(x)).finish(), block(x))
        late = stepper.begin(lambda: block(x))
        assert late.advance(1).shape == (2, 5, 20)
        late.abandon()


def test_a_pass_goes_on_with_the_weights_of_that_moment():
    block, x = Residual(), batch()
    with Stepper(block, GROUPS) as stepper:
        waiting = stepper.begin(lambda: block(x))
        waiting.advance(0)
        block.gate.weight.mul_(2)
        assert torch.equal(waiting.advance(1), block.gate(x).relu() * block.up(x))
        block.down.weight.zero_()
        assert torch.equal(waiting.finish(), x + block.down.bias)


def test_a_factor_reaches_all_linears_of_the_stage_and_nothing_else():
    block, x = Residual(), batch()
    factor = 2.0 ** torch.arange(-4, 4)
    wanted = block.gate(x * factor).relu() * block.up(x * factor)
    with Stepper(block, GROUPS) as stepper:
        waiting = stepper.begin(lambda: block(x))
        waiting.advance(0)
        hidden = waiting.advance(1, factor)
        assert torch.equal(hidden, wanted)
        assert torch.equal(waiting.finish(), x + block.down(wanted))  # the residual has no factor, nor has this stage


def test_other_passes_run_through_while_one_waits():
    block, x = Feedforward(), batch()
    wanted = block(x)
    with Stepper(block, GROUPS) as stepper:
        waiting = stepper.begin(lambda: block(x))
        waiting.advance(1)
        assert torch.equal(block(x), wanted)
        assert torch.equal(waiting.finish(), wanted)


def test_what_a_pass_raises_is_raised_where_it_is_advanced():
    class Broken(Feedforward):
        def forward(self, x):
            self.gate(x)
            raise ZeroDivisionError

    block = Broken()
    with Stepper(block, GROUPS) as stepper:
        waiting = stepper.begin(lambda: block(batch()))
        waiting.advance(0)
        with pytest.raises(ZeroDivisionError):
            waiting.advance(1)
        waiting.abandon()  # which has ended already


def test_an_abandoned_pass_lets_go_of_its_tensors():
    block = Feedforward()
    with Stepper(block, GROUPS) as stepper:
        waiting = stepper.begin(lambda: block(batch()))
        hidden = weakref.ref(waiting.advance(1))
        assert hidden() is not None
        waiting.abandon()
        del waiting
        assert hidden() is None


def test_passes_that_differ_are_an_error():
    class Moody(Feedforward):
        mood = ""

        def forward(self, x):
            if self.mood == "swapped":
                return self.up(x) * self.gate(x)
            if self.mood == "short":
                return self.gate(x)
            return self.down(self.gate(x) * self.up(x.clone() if self.mood == "parted" else x))

    block = Moody()
    assert groups_by_input(block, LINEARS, lambda: block(batch())) == GROUPS
    messages = {
        "swapped": "up is reached in another order in one batch than in another",
        "short": "down received an input in one batch but not in another",
        "parted": "up shared its input with gate in one batch but not in another",
    }
    with Stepper(block, GROUPS) as stepper:
        for block.mood, message in messages.items():
            with pytest.raises(ModelError, match=message):
                stepper.begin(lambda: block(batch())).advance(1)


def test_a_linear_that_is_called_again_with_another_input_ends_its_group():
    class Again(Feedforward):
        def forward(self, x):
            y = self.gate(x).relu()[..., :8]
            return self.down(self.gate(y) * self.up(y))

    block, x = Again(), batch()
    groups = groups_by_input(block, LINEARS, lambda: block(x))
    assert groups == (("gate",), ("up",), ("down",))
    with Stepper(block, groups) as stepper:
        waiting = stepper.begin(lambda: block(x))
        assert [tuple(waiting.advance(stage).shape) for stage in range(3)] == [(2, 5, 8), (2, 5, 8), (2, 5, 20)]
        assert torch.equal(waiting.finish(), block(x))


def test_a_pass_does_not_go_back():
    block, x = Feedforward(), batch()
    with Stepper(block, GROUPS) as stepper:
        waiting = stepper.begin(lambda: block(x))
        waiting.advance(0)
        with pytest.raises(AssertionError):
            waiting.advance(0)
        waiting.abandon()


def test_a_mode_that_a_block_opens_is_refused_and_closed():
    class Careful(Feedforward):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    block = Careful()
    with Stepper(block, GROUPS) as stepper:
        waiting = stepper.begin(lambda: block(batch()))
        with pytest.raises(ModelError, match="gate runs in a mode of torch, such as autocast, that its block opens"):
            waiting.advance(0)
        waiting.abandon()
    assert not torch.is_autocast_enabled("cpu")


def test_an_input_by_keyword_is_an_error():
    class Keyword(Feedforward):
        def forward(self, x):
            return self.gate(input=x)

    block = Keyword()
    with pytest.raises(ModelError, match="gate receives its input by keyword"):
        groups_by_input(block, LINEARS, lambda: block(batch()))


def test_a_linear_that_is_used_again_stops_nothing():
    class Twice(Feedforward):
        def forward(self, x):
            return self.up(self.down(self.gate(x).relu() * self.up(x)))

    block, x = Twice(), batch()
    assert groups_by_input(block, LINEARS, lambda: block(x)) == GROUPS
    with Stepper(block, GROUPS) as stepper:
        waiting = stepper.begin(lambda: block(x))
        waiting.advance(1)
        assert torch.equal(waiting.finish(), block(x))
