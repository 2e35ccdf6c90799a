import numpy as np
import pytest
import torch

import secateur
from secateur.errors import ConfigError
from secateur.models.likelihood import token_log_likelihood
from secateur.runtime.loading import open_model
from tests.tiny import save_tiny

TEXT = [1, *(5 + (7 * n) % 40 for n in range(600))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "base", "llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def expected(folder):
    from secateur.models.source import resolve_model

    model = open_model(resolve_model(str(folder))).float()
    return token_log_likelihood(model, torch.tensor([TEXT]))[0].double().numpy()


# Natively the inputs of products are rounded to bfloat16, in torch all is.
@pytest.mark.parametrize(("engine", "error"), [("native", 0.1), ("torch", 0.2)])
@pytest.mark.parametrize(("begin", "end"), [(1, 2), (1, 601), (40, 44), (590, 601), (255, 300), (3, 3)])
def test_both_engines_give_the_likelihood_of_each_token(folder, expected, engine, error, begin, end):
    model = secateur.load(folder, engine=engine)
    values, likeliest = model.backend.log_likelihood(TEXT[:end], begin)
    assert values.shape == likeliest.shape == (end - begin,)
    assert values == pytest.approx(expected[begin - 1 : end - 1], abs=error)


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_the_likeliest_token_is_the_one_that_is_generated(folder, engine):
    model = secateur.load(folder, engine=engine)
    options = secateur.runtime.options.GenerationOptions(max_new_tokens=8, ignore_eos=True)
    new = list(model.backend.generate(TEXT[:50], options))
    _, likeliest = model.backend.log_likelihood([*TEXT[:50], *new], 50)
    assert likeliest.all()
    other = [*TEXT[:50], *new[:-1], (new[-1] + 1) % 40]
    assert model.backend.log_likelihood(other, 50)[1].tolist() == [True] * 7 + [False]


def test_what_was_scored_before_changes_nothing(folder):
    """Natively a known beginning is not computed again."""
    fresh = secateur.load(folder, engine="native").backend.log_likelihood(TEXT[:100], 60)[0]
    model = secateur.load(folder, engine="native")
    model.backend.log_likelihood([*TEXT[:60], 9, 8, 7], 60)
    again = model.backend.log_likelihood(TEXT[:100], 60)[0]
    assert np.array_equal(fresh, again)
    assert len(model.backend.contexts.take(TEXT[:100], 100).tokens) > 0


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize(("count", "begin"), [(10, 0), (10, 11), (0, 1), (1026, 3)])
def test_what_has_no_likelihood_is_refused(folder, engine, count, begin):
    model = secateur.load(folder, engine=engine)
    with pytest.raises(ConfigError, match=r"likelihood from token|exceeds the 1024 positions"):
        model.backend.log_likelihood([5] * count, begin)


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("token", [-1, 384])
def test_a_token_of_another_vocabulary_is_refused(folder, engine, token):
    with pytest.raises(ConfigError, match="outside of the vocabulary of 384"):
        secateur.load(folder, engine=engine).backend.log_likelihood([5, 6, token], 2)


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_as_many_tokens_as_there_are_positions_and_one_that_is_only_told(folder, engine):
    values, _ = secateur.load(folder, engine=engine).backend.log_likelihood([5] * 1025, 1020)
    assert np.isfinite(values).all()
