"""Methods with a Gram matrix: against slow references, against the exact optimum, and in whole derivations."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from secateur.calibration.statistics import InputStatistics
from secateur.config import DEFAULT_CORRECTION
from secateur.errors import ModelError
from secateur.pruning.layer_problem import DAMPING, LayerProblem, damping_of, refit
from secateur.pruning.masks import Target, keep_top
from secateur.pruning.methods import METHODS
from secateur.pruning.weight import prune_weight
from tests.pruning.tiny_derivation import calibration, contents, derive_tiny, interrupt, masks_and_weights
from tests.tiny import save_tiny

GRAM_METHODS = [name for name in METHODS.names() if METHODS.get(name).needs_gram]


def layer(rows=24, width=48, tokens=400, seed=0):
    """A weight, and inputs that are correlated and of very different size, as those of language models are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    inputs = torch.randn(tokens, width, generator=generator) @ mixing * torch.rand(width, generator=generator) * 3
    return torch.randn(rows, width, generator=generator), inputs


def statistics(inputs):
    gram = inputs.T @ inputs
    return InputStatistics(gram.diagonal().clone(), len(inputs), gram)


def damped(inputs):
    """The Gram matrix that methods see: in its own scale, each diagonal entry larger by the damping."""
    gram = (inputs.T @ inputs).double()
    return gram + damping_of(statistics(inputs)) * torch.diag(gram.diagonal())


def error(found, weight, gram):
    difference = (found - weight).double()
    return float((difference @ gram * difference).sum() / (weight.double() @ gram * weight.double()).sum())


def exact(weight, mask, gram):
    """The best values for a mask, row by row, by solving the normal equations."""
    found = torch.zeros_like(weight, dtype=torch.float64)
    for row in range(len(weight)):
        kept = mask[row].nonzero().flatten()
        found[row, kept] = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ weight[row].double())
    return found


def prune(name, weight, inputs, sparsity=0.5, granularity="per_output"):
    pruned = METHODS.get(name).function(weight, statistics(inputs), Target(sparsity, granularity))
    return pruned.weight * pruned.mask, pruned.mask


def test_refit_finds_the_best_values_for_a_mask():
    weight, inputs = layer()
    gram, mask = damped(inputs), keep_top(weight.abs(), Target(0.5))
    problem = LayerProblem.of(weight, statistics(inputs))
    errors = [error(problem.restored(refit(problem, problem.dense, mask, n), weight), weight, gram) for n in range(60)]
    assert errors[0] == pytest.approx(error(weight * mask, weight, gram), rel=1e-4)
    assert all(after <= before * (1 + 1e-4) for before, after in pairwise(errors))
    assert errors[-1] == pytest.approx(error(exact(weight, mask, gram), weight, gram), rel=1e-3)


@pytest.mark.parametrize("of_outputs", [False, True])
@pytest.mark.parametrize("correction", [0.0, 0.25, DEFAULT_CORRECTION, 1.0])
def test_a_weight_makes_up_for_a_part_of_the_drift_of_its_inputs(correction, of_outputs):
    """Least squares of W X against the products of the dense weight with inputs on the way from X to the parent's."""
    weight, parents = layer()
    inputs = parents @ (torch.eye(48) + 0.1 * torch.randn(48, 48, generator=torch.Generator().manual_seed(1)))
    known = {"parent_outputs": weight @ parents.T @ inputs} if of_outputs else {"cross": parents.T @ inputs}
    found = replace(statistics(inputs), **known)
    problem = LayerProblem.of(weight, found, correction)
    mask = keep_top(weight.abs(), Target(0.5))
    ours = problem.restored(refit(problem, problem.dense, mask, 100), weight)
    gram, mixed = damped(inputs), ((1 - correction) * inputs + correction * parents).double()
    damping = damping_of(found) * torch.diag(found.gram.diagonal()).double()
    wanted = weight.double() @ (mixed.T @ inputs.double() + damping)
    for row in range(len(weight)):
        kept = mask[row].nonzero().flatten()
        expected = torch.linalg.solve(gram[kept][:, kept], wanted[row, kept])
        torch.testing.assert_close(ours[row, kept].double(), expected, rtol=1e-2, atol=1e-2)


def test_refit_leaves_alone_what_cannot_be_better():
    weight, inputs = layer()
    problem = LayerProblem.of(weight, statistics(inputs))
    everything = torch.ones_like(weight, dtype=torch.bool)
    torch.testing.assert_close(refit(problem, problem.dense, everything, 20), problem.dense)
    assert refit(problem, problem.dense, ~everything, 20).count_nonzero() == 0


@pytest.mark.parametrize("granularity", ["per_output", "per_layer"])
def test_sparsegpt_is_the_elimination_of_one_column_after_the_other(granularity):
    """Written plainly: the inverse of what is left of the matrix is computed anew for every column."""
    weight, inputs = layer(rows=7, width=200)
    gram, sparsity = damped(inputs), 0.6
    current, kept, removed = weight.double().clone(), torch.ones_like(weight, dtype=torch.bool), 0
    inverses = [torch.linalg.inv(gram[j:, j:]) for j in range(200)]
    for begin, end in ((0, 128), (128, 200)):
        here = round(sparsity * end * (7 if granularity == "per_layer" else 1)) - removed
        removed += here
        saliency = torch.stack([current[:, j] ** 2 / inverses[j][0, 0] for j in range(begin, end)], dim=1)
        groups = saliency.flatten()[None] if granularity == "per_layer" else saliency
        gone = torch.zeros_like(groups, dtype=torch.bool).scatter(1, groups.argsort(dim=1)[:, :here], True)
        kept[:, begin:end] = ~gone.view_as(saliency)
        for j in range(begin, end):
            inverse = inverses[j]
            error_ = torch.where(kept[:, j], 0.0, current[:, j] / inverse[0, 0])
            current[:, j:] -= error_[:, None] * inverse[0]
    found, mask = prune("sparsegpt", weight, inputs, sparsity, granularity)
    assert torch.equal(mask, kept)
    torch.testing.assert_close(found.double(), current * kept, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("seed", range(4))
def test_beside_the_exact_optimum(seed):
    """All masks of a row of eight are tried; a method finds none better, and admm one that is nearly as good."""
    weight, inputs = layer(rows=16, width=8, seed=seed)
    gram = damped(inputs)
    masks = [
        torch.zeros(8, dtype=torch.bool).index_fill(0, torch.tensor(kept), True) for kept in combinations(range(8), 4)
    ]

    def loss(found, row):
        difference = found - weight[row].double()
        return float(difference @ gram @ difference)

    rows = range(len(weight))
    best = [min(loss(exact(weight[row : row + 1], mask[None], gram)[0], row) for mask in masks) for row in rows]
    for name in GRAM_METHODS:
        found, _ = prune(name, weight, inputs)
        losses = [loss(found[row].double(), row) for row in rows]
        assert all(one >= least * (1 - 1e-3) for one, least in zip(losses, best, strict=True))
        if name == "admm":
            assert sum(losses) < 2 * sum(best)


@pytest.mark.parametrize("granularity", ["per_output", "per_layer"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_errors_are_ordered_as_the_papers_have_them(sparsity, granularity):
    """Magnitude, Wanda, SparseGPT, ADMM: each leaves less of the error than the one before."""
    weight, inputs = layer(rows=96, width=256, tokens=2000)
    gram = damped(inputs)
    names = ("magnitude", "wanda", "sparsegpt", "admm")
    errors = [error(prune(name, weight, inputs, sparsity, granularity)[0], weight, gram) for name in names]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.8 * errors[2]


@pytest.mark.parametrize("name", GRAM_METHODS)
@pytest.mark.parametrize("granularity", ["per_output", "per_layer"])
@pytest.mark.parametrize("sparsity", [0.01, 0.37, 0.9])
def test_as_many_weights_go_as_were_asked_for(name, granularity, sparsity):
    weight, inputs = layer(rows=10, width=150)
    _, mask = prune(name, weight, inputs, sparsity, granularity)
    if granularity == "per_output":
        assert {int(row.sum()) for row in mask} == {150 - round(sparsity * 150)}
    else:
        assert int(mask.sum()) == 1500 - round(sparsity * 1500)


@pytest.mark.parametrize("name", GRAM_METHODS)
def test_inputs_that_were_always_zero_go_first_and_what_is_kept_of_them_is_not_touched(name):
    weight, inputs = layer()
    inputs[:, [3, 17]] = 0
    found, mask = prune(name, weight, inputs)
    assert not mask[:, [3, 17]].any()
    assert torch.isfinite(found).all()
    few, mask = prune(name, weight, inputs, sparsity=0.02)  # one of 48
    assert (mask[:, [3, 17]].sum(1) == 1).all()
    assert torch.equal(few[:, [3, 17]], weight[:, [3, 17]] * mask[:, [3, 17]])


@pytest.mark.parametrize("name", GRAM_METHODS)
def test_fewer_tokens_than_inputs(name):
    """The Gram matrix has no inverse then, but for its damping."""
    weight, inputs = layer(tokens=5)
    found, _ = prune(name, weight, inputs)
    assert torch.isfinite(found).all()
    assert error(found, weight, damped(inputs)) < error(prune("wanda", weight, inputs)[0], weight, damped(inputs))


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
@pytest.mark.parametrize("name", GRAM_METHODS)
def test_a_derivation_is_nearer_to_its_parent_than_wandas(tmp_path, family, name):
    base = save_tiny(tmp_path / "base", family)
    for method in ("wanda", name):
        derive_tiny(base, tmp_path / method, method=method, calibration=calibration(samples=20))
    ours, theirs = (masks_and_weights(tmp_path / method) for method in (name, "wanda"))
    assert ours.keys() == theirs.keys()
    for weight, (mask, values) in ours.items():
        assert mask.sum() == theirs[weight][0].sum()
        assert not values[~mask].any()
        assert not torch.equal(values[mask & theirs[weight][0]], theirs[weight][1][mask & theirs[weight][0]])


@pytest.mark.parametrize("name", GRAM_METHODS)
def test_what_loses_nothing_stays_as_it_is_to_the_bit(tmp_path, name):
    base = save_tiny(tmp_path / "base")
    for method in ("wanda", name):
        derive_tiny(base, tmp_path / method, method=method, sparsity=0)
    ours, theirs = (masks_and_weights(tmp_path / method) for method in (name, "wanda"))
    assert all(torch.equal(values, theirs[weight][1]) for weight, (_, values) in ours.items())


@pytest.mark.parametrize("name", GRAM_METHODS)
@pytest.mark.parametrize("values", ["base", "int4", "nl4"])
def test_an_interrupted_derivation_goes_on_to_the_same_bytes(tmp_path, name, values):
    base = save_tiny(tmp_path / "base")
    derive_tiny(base, tmp_path / "whole", method=name, values=values)
    interrupt(base, tmp_path / "out", method=name, values=values)
    derive_tiny(base, tmp_path / "out", method=name, values=values, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def inputs_of(folder, token_ids, names):
    """What each weight of a whole model receives, float64 [tokens, in_features], seen by plain hooks."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen = {}
    for name in names:
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(
            lambda _, given, name=name: seen.__setitem__(name, given[0].flatten(0, 1).double())
        )
    with torch.inference_mode():
        model(torch.from_numpy(token_ids))
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_statistics_are_those_of_parent_and_sub_model(tmp_path, monkeypatch, family):
    """Every weight sees what pruned ones before it put out, in the same block too, beside what the parent has there.

    The first token of each sequence counts as a hundred there.
    """
    seen = {}

    def noting(method, target, encoding, name, weight, statistics, dtype):
        seen[name] = statistics
        return prune_weight(method, target, encoding, name, weight, statistics, dtype)

    monkeypatch.setattr("secateur.pruning.loop.prune_weight", noting)
    base = save_tiny(tmp_path / "base", family, dtype=torch.float32)
    derive_tiny(base, tmp_path / "sub", method="admm")
    token_ids = calibration().token_ids
    parents, inputs = (inputs_of(folder, token_ids, seen) for folder in (base, tmp_path / "sub"))
    stored = load_file(base / "model.safetensors")
    times = torch.ones(token_ids.shape, dtype=torch.float64)
    times[:, 0] = 100
    times = times.flatten()[:, None]
    for name, statistics in seen.items():
        counted, scale = inputs[name] * times, float((inputs[name].square() * times).sum())
        torch.testing.assert_close(statistics.gram.double(), inputs[name].T @ counted, rtol=0, atol=1e-5 * scale)
        weight = stored[name].double()
        alone = ("o_proj" in name or "down_proj" in name) and 2 * weight.shape[0] <= weight.shape[1]
        assert (statistics.cross is None, statistics.parent_outputs is not None) == (alone, alone)
        if alone:
            cross, theirs = statistics.parent_outputs, parents[name] @ weight.T
            scale *= float(weight.norm())
        else:
            cross, theirs = statistics.cross, parents[name]
        torch.testing.assert_close(cross.double(), theirs.T @ counted, rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(statistics.sum_squares, inputs[name].square().sum(0).float(), rtol=1e-4, atol=1e-4)
    drifts = [float((one.cross - one.gram).norm() / one.gram.norm()) for one in seen.values() if one.cross is not None]
    assert min(drifts) < 1e-6 < 1e-2 < max(drifts)
    # Without a correction the parent is not run.
    derive_tiny(base, tmp_path / "alone", method="admm", correction=0.0)
    assert all(one.cross is None and one.parent_outputs is None for one in seen.values())


def test_the_damping_grows_with_the_features_for_each_token():
    weight, inputs = layer(tokens=400)
    for tokens, expected in ((400, 48 / 400), (60, 48 / 60), (10, 1.0)):
        found = statistics(inputs[:tokens])
        assert damping_of(found) == expected
        assert LayerProblem.of(weight, found).gram.diagonal().tolist() == pytest.approx([1 + expected] * 48)
    assert damping_of(replace(statistics(inputs), n_tokens=100_000)) == DAMPING


@pytest.mark.parametrize("name", GRAM_METHODS)
def test_first_tokens_are_kept_the_better_the_more_they_count(tmp_path, name):
    base = save_tiny(tmp_path / "base", dtype=torch.float32)
    parent = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, output_hidden_states=True)
    text, errors = torch.from_numpy(calibration(samples=20).token_ids), {}
    with torch.inference_mode():
        wanted = parent(text).hidden_states[-2]
        for weight in (1.0, 1000.0):
            folder = tmp_path / str(weight)
            options = {"method": name, "first_token_weight": weight, "calibration": calibration(samples=20)}
            derive_tiny(base, folder, **options)
            found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_hidden_states=True)
            errors[weight] = (found(text).hidden_states[-2] - wanted).norm(dim=-1)
    assert errors[1000.0][:, 0].mean() < 0.9 * errors[1.0][:, 0].mean()
    assert errors[1000.0][:, 1:].mean() > errors[1.0][:, 1:].mean()


def test_wanda_does_not_count_first_tokens_twice(tmp_path):
    base = save_tiny(tmp_path / "base")
    for weight in (1.0, 1000.0):
        derive_tiny(base, tmp_path / str(weight), first_token_weight=weight)
    once, often = (masks_and_weights(tmp_path / str(weight)) for weight in (1.0, 1000.0))
    assert all(torch.equal(one, two) for name in once for one, two in zip(once[name], often[name], strict=True))


def test_another_correction_gives_other_weights(tmp_path):
    """By the method, and by the rounding of what another method has pruned."""
    base = save_tiny(tmp_path / "base")
    weights = {}
    for correction in (0.0, 0.5, 1.0):
        folder = tmp_path / str(correction)
        derive_tiny(base, folder, method="admm", values="int4", correction=correction)
        weights[correction] = masks_and_weights(folder)
    for one, other in pairwise(weights.values()):
        assert any(not torch.equal(one[name][1], other[name][1]) for name in one)


def test_an_indefinite_gram_matrix_gets_more_damping_and_a_warning(caplog):
    weight, inputs = layer()
    problem = LayerProblem.of(weight, statistics(inputs))
    assert torch.isfinite(problem.factor()).all()
    assert not caplog.records
    lowest, direction = torch.linalg.eigh(problem.gram.double())
    shift = (lowest[0] + 0.03) * torch.outer(direction[:, 0], direction[:, 0])
    indefinite = replace(problem, gram=(problem.gram.double() - shift).float())
    assert torch.linalg.eigvalsh(indefinite.gram.double())[0] < -0.02
    upper = indefinite.factor().double()
    raised = indefinite.gram.double() + 0.1 * torch.eye(len(upper))
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(raised), rtol=1e-3, atol=1e-3)
    assert "0.1 of its diagonal was added" in caplog.text
    hopeless = replace(problem, gram=-problem.gram)
    with pytest.raises(ModelError, match="cannot be inverted"):
        hopeless.factor()


def plain_admm(weight, statistics, sparsity):
    """Algorithm 1 of Meng et al. 2024 as it is written, a system solved in each step, and the best values at last."""
    problem = LayerProblem.of(weight, statistics)
    gram, aim = problem.gram.double(), problem.aim.double()
    dense = torch.linalg.solve(gram, aim.T).T
    dual, kept = torch.zeros_like(dense), round((1 - sparsity) * weight.shape[1])

    def largest(values):
        mask = torch.zeros_like(values, dtype=torch.bool)
        return mask.scatter_(1, values.abs().topk(kept, dim=1).indices, True)

    previous = None
    for level in range(5):
        penalty = 0.1 * 2.275**level
        dual *= 1 if previous is None else previous / penalty
        previous, raised = penalty, gram + penalty * torch.eye(len(gram))
        for _ in range(6):
            sparse = (dense + dual) * largest(dense + dual)
            dense = torch.linalg.solve(raised, (aim + penalty * (sparse - dual)).T).T
            dual += dense - sparse
    mask = largest(dense + dual)
    found = torch.zeros_like(dense)
    for row in range(len(weight)):
        support = mask[row].nonzero().flatten()
        found[row, support] = torch.linalg.solve(gram[support][:, support], aim[row, support])
    return found / problem.norms, mask


def test_admm_is_what_its_paper_has():
    weight, inputs = layer()
    found, mask = prune("admm", weight, inputs)
    wanted, its_mask = plain_admm(weight, statistics(inputs), 0.5)
    assert (mask == its_mask).float().mean() > 0.99
    ours, theirs = (error(one, weight, damped(inputs)) for one in (found, wanted))
    assert ours == pytest.approx(theirs, rel=0.02)
