import pytest
import torch
from torch import nn

from secateur.errors import ModelError
from secateur.models.replay import record_inputs, run_block
from secateur.models.structure import find_blocks
from tests.pruning.tiny_derivation import calibration
from tests.tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_run_one_by_one_give_what_the_whole_model_gives(family, dtype):
    model = tiny_model(family, dtype=dtype)
    token_ids = torch.from_numpy(calibration(5, 48).token_ids)
    wanted = {}
    for block in find_blocks(model):
        model.get_submodule(block.name).register_forward_hook(
            lambda _, __, output, name=block.name: wanted.setdefault(name, []).append(output)
        )
    with torch.no_grad():
        for batch in token_ids.split(2):
            model(batch, use_cache=False)
        recorded = {name: list(outputs) for name, outputs in wanted.items()}
        first = {}
        inputs = record_inputs(model, find_blocks(model), token_ids, 2, first.__setitem__, torch.device("cpu"))
        assert list(first) == [0, 2, 4]
        hidden = [first[start] for start in first]
        for block in find_blocks(model):
            for batch, x in enumerate(hidden):
                hidden[batch] = run_block(model.get_submodule(block.name), x, inputs.get(block.index, batch))
                assert torch.equal(hidden[batch], recorded[block.name][batch])


def test_sliding_and_full_layers_keep_their_own_masks():
    model = tiny_model("gemma3")
    token_ids = torch.from_numpy(calibration(2, 48).token_ids)
    with torch.no_grad():
        inputs = record_inputs(model, find_blocks(model), token_ids, 2, lambda *_: None, torch.device("cpu"))
    calls = [inputs.get(index, 0) for index in range(3)]
    assert calls[0] is calls[2]
    assert calls[0] is not calls[1]


def test_equal_calls_are_stored_once():
    model = tiny_model("llama")
    token_ids = torch.from_numpy(calibration(6, 48).token_ids)
    with torch.no_grad():
        inputs = record_inputs(model, find_blocks(model), token_ids, 2, lambda *_: None, torch.device("cpu"))
    assert len({id(inputs.get(index, batch)) for index in range(3) for batch in range(3)}) == 1


def test_the_blocks_are_put_back():
    model = tiny_model("llama")
    before = list(model.model.layers)
    token_ids = torch.from_numpy(calibration(2, 8).token_ids)
    with torch.no_grad():
        record_inputs(model, find_blocks(model), token_ids, 2, lambda *_: None, torch.device("cpu"))
    assert all(old is new for old, new in zip(before, model.model.layers, strict=True))
    blocks = find_blocks(model)
    with pytest.raises(RuntimeError, match="stop"), torch.no_grad():
        record_inputs(model, blocks, token_ids, 2, _stop, torch.device("cpu"))
    assert all(old is new for old, new in zip(before, model.model.layers, strict=True))


def _stop(*_):
    raise RuntimeError("stop")


def test_blocks_that_are_not_run_one_after_another_are_refused(monkeypatch):
    model = tiny_model("llama")
    forward = type(model.model).forward
    token_ids = torch.from_numpy(calibration(2, 8).token_ids)
    blocks = find_blocks(model)

    def twice(self, *arguments, **keywords):
        forward(self, *arguments, **keywords)
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(type(model.model), "forward", twice)
    with pytest.raises(ModelError, match="does not run its blocks one after another"), torch.no_grad():
        record_inputs(model, blocks, token_ids, 2, lambda *_: None, torch.device("cpu"))


def test_blocks_that_return_tuples_are_run():
    class Tuple(nn.Module):
        def forward(self, x, scale, shift=0):
            return x * scale + shift, None

    from secateur.models.replay import Call

    assert run_block(Tuple(), torch.ones(2), Call((3,), {"shift": 1})).tolist() == [4, 4]
