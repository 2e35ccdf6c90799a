"""A base model with fewer tokens, chosen for the domains that a sub-model is for."""

from dataclasses import replace
from pathlib import Path

from secateur.calibration.mixture import Mixture
from secateur.calibration.vocabulary import more_tokens, rank_tokens
from secateur.models.source import ModelFolder, load_tokenizer
from secateur.models.vocabulary import check_vocabulary, choose_vocabulary, smaller_model
from secateur.pruning.base import named_tokens


def with_vocabulary(
    folder: ModelFolder, mixture: Mixture, count: int, *, seed: int = 0, data: Path | None = None
) -> ModelFolder:
    """Return a model with at most `count` tokens: those that every text needs, and those that the domains need most.

    Parameters
    ----------
    folder
        The whole model.
    mixture
        The domains and their weights.
    count
        Tokens, fewer than the model has.
    seed
        Decides which files are read of a large domain.
    data
        Data folder, as for `calibrate`.

    Raises
    ------
    CorpusError
        When a domain has no text.
    ConfigError
        When `count` is too small or too large.
    ModelError
        When the tokenizer is none of byte pairs.
    """
    check_vocabulary(folder, count)
    tokenizer = load_tokenizer(folder)
    ranking = rank_tokens(mixture, tokenizer, always=named_tokens(folder.path), seed=seed, data=data)
    vocabulary = choose_vocabulary(folder, ranking.needed, ranking.others, count)
    smaller = smaller_model(folder, vocabulary)
    assert smaller.trimming is not None  # noqa: S101 - this is what it is made for
    taken = more_tokens(mixture, tokenizer, load_tokenizer(smaller), seed=seed, data=data)
    record = {**smaller.trimming.record, "more_tokens": taken}
    return replace(smaller, trimming=replace(smaller.trimming, record=record))
