"""Masks against a straightforward reference, written from the Wanda paper for whole models in memory.

It shares no code with the package: transformers loads the model and runs it whole, plain hooks see the inputs of every
`nn.Linear` of a block, and a stable sort tells which weights go.
"""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from secateur.errors import ModelError
from secateur.models.products import fast_products
from tests.pruning.tiny_derivation import calibration, derive_tiny, masks_and_weights
from tests.tiny import save_tiny

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"]
SPARSITY = 0.55  # 0.55 * 64 = 35.2 and 0.55 * 160 = 88: one of them has to be rounded
SEQUENCES = 2  # in a batch
SMALL = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 384, "max_position_embeddings": 256,
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip
OTHERS = {
    "phi3": {},  # q, k and v are one weight, gate and up another
    "phi": {},  # attention and feed-forward run side by side, so fc1 reads what q does, but not right after it
    "olmo2": {},
    "starcoder2": {"sliding_window": 32},
    "granite": {},
    "cohere": {},
    "stablelm": {},
    "glm": {"head_dim": 16},
    "opt": {"ffn_dim": 160, "word_embed_proj_dim": 64},
}
REFUSED = {
    "gpt2": "blocks of GPT2LMHeadModel were not understood: expected one list of 3 blocks with nn.Linear",  # Conv1D
    "falcon": r"transformer\.h\.0\.self_attention\.query_key_value \(FalconLinear\)",
    "mixtral": r"model\.layers\.0\.mlp\.\S+ \(Mixtral\w+\).*has shape",
    "gpt_neox": r"no weight 'lm_head\.weight' in its files",  # stored as embed_out, which transformers renames
    "gptj": "GPTJForCausalLM expects more than hidden states from a block",
    "bloom": "BloomForCausalLM expects more than hidden states from a block",
}


def reference_masks(
    model, token_ids, *, propagate, granularity, sparsity=SPARSITY, blocks="model.layers", written=None
):
    """Prune `model` in place, block after block, and return the masks by weight name.

    written: called with the name of a pruned weight, its mask and the sums of squares of its inputs; returns what is in
    its place from then on.
    """
    masks = {}
    sums = {}

    def hook(name):
        def add(_, arguments):
            rows = arguments[0].detach().reshape(-1, arguments[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + (rows**2).sum(0)

        return add

    names = [[n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(f"{blocks}.{i}.")]
             for i in range(len(model.get_submodule(blocks)))]  # fmt: skip
    groups = names if propagate else [[name for block in names for name in block]]
    for group in groups:
        sums.clear()
        handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in group]
        # Of half precision only the same products, of as many rows, have the same bits.
        with torch.no_grad(), fast_products():
            for part in token_ids.split(SEQUENCES):
                model(part, use_cache=False)
        for handle in handles:
            handle.remove()
        for name in group:
            weight = model.get_submodule(name).weight
            # Wanda, equation 1: S_ij = |W_ij| * ||X_j||_2. The norm is rounded to float32, as weights are.
            score = weight.detach().double().abs() * sums[name].float().sqrt().double()
            mask = stable_sort_mask(score, sparsity, granularity)
            masks[f"{name}.weight"] = mask
            weight.data[~mask] = 0
            if written is not None:
                weight.data.copy_(written(f"{name}.weight", mask, sums[name].float()))
    return masks


def stable_sort_mask(score, sparsity, granularity):
    groups = score if granularity == "per_output" else score.reshape(1, -1)
    order = torch.sort(groups, dim=1, stable=True).indices[:, : round(sparsity * groups.shape[1])]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(1, order, False).reshape(score.shape)


def assert_equals_reference(base, output, blocks="model.layers", **options):
    tokens = calibration()
    derive_tiny(base, output, calibration=tokens, sparsity=SPARSITY, **options)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"propagate": True, "granularity": "per_output", **options}
    wanted = reference_masks(model, torch.from_numpy(tokens.token_ids), blocks=blocks, **options)
    found = masks_and_weights(output)
    assert found.keys() == wanted.keys()
    for name, mask in wanted.items():
        assert torch.equal(found[name][0], mask), name
        assert torch.equal(found[name][1][mask], dense[name][mask]), name


@pytest.fixture(autouse=True)
def _two_sequences_in_a_batch(monkeypatch):
    """So that the five sequences are no whole number of batches."""
    monkeypatch.setattr("secateur.pruning.job.TOKENS_PER_BATCH", SEQUENCES * 48 + 4)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {family: save_tiny(folder / family, family, dtype=torch.float32) for family in FAMILIES}


@pytest.mark.parametrize("propagate", [True, False])
@pytest.mark.parametrize("granularity", ["per_output", "per_layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_equal_the_reference(bases, tmp_path, family, granularity, propagate):
    assert_equals_reference(bases[family], tmp_path / "out", granularity=granularity, propagate=propagate)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_equal_the_reference_in_half_precision(tmp_path, dtype):
    assert_equals_reference(save_tiny(tmp_path / "base", "llama", dtype=dtype), tmp_path / "out")


def save_untouched(folder, family):
    """Save a model of a family that `tests.tiny` does not build."""
    own = {"num_local_experts": 4} if family == "mixtral" else OTHERS.get(family, {})
    config = AutoConfig.for_model(family, **{**SMALL, **own})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", OTHERS)
def test_masks_of_other_architectures_equal_the_reference(tmp_path, family):
    blocks = "model.decoder.layers" if family == "opt" else "model.layers"
    assert_equals_reference(save_untouched(tmp_path / "base", family), tmp_path / "out", blocks=blocks)


@pytest.mark.parametrize("family", REFUSED)
def test_an_architecture_that_is_not_understood_is_refused_by_name(tmp_path, family):
    base = save_untouched(tmp_path / "base", family)
    with pytest.raises(ModelError, match=REFUSED[family]):
        derive_tiny(base, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
