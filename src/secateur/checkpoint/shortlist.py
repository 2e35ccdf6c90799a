"""The shortlist of a trimmed head: the tokens whose logits it computes, and where the rows of the others lie.

Rows are reordered so that those of the shortlist lie together at the beginning; token ids stay what they are. Needs
neither torch nor transformers.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secateur.errors import CheckpointError

SUFFIX = "shortlist"


@dataclass(frozen=True, eq=False)
class Shortlist:
    """Some tokens of a vocabulary.

    Attributes
    ----------
    tokens
        int32 [K], K at least 1: their ids, strictly ascending.
    vocabulary
        Number of rows of the matrix; all ids are below it.
    """

    tokens: NDArray[np.int32]
    vocabulary: int

    def order(self) -> NDArray[np.int64]:
        """Return int64 [vocabulary]: the token of each stored row; a permutation, whatever the tokens are."""
        others = np.ones(self.vocabulary, dtype=np.bool_)
        others[self.tokens] = False
        return np.concatenate([self.tokens.astype(np.int64), np.flatnonzero(others)])

    def rows(self) -> NDArray[np.int64]:
        """Return int64 [vocabulary]: the stored row of each token."""
        rows = np.empty(self.vocabulary, dtype=np.int64)
        rows[self.order()] = np.arange(self.vocabulary)
        return rows

    def spread(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits [n, vocabulary] from those of the shortlist [n, K]; minus infinity for all other tokens."""
        spread = np.full((len(logits), self.vocabulary), -np.inf, dtype=np.float32)
        for row, values in zip(spread, logits, strict=True):
            row[self.tokens] = values
        return spread


def checked_shortlist(tokens: NDArray[np.generic], count: int, vocabulary: int, name: str) -> Shortlist:
    """Return the shortlist of the matrix `name` as a file holds it.

    Parameters
    ----------
    tokens
        What the file holds; untrusted.
    count, vocabulary
        Tokens of the shortlist and rows of the matrix, as the config says.

    Raises
    ------
    CheckpointError
        When these are not `count` ids of the vocabulary, strictly ascending.
    """
    problem = None
    if tokens.dtype != np.int32 or tokens.shape != (count,):
        problem = f"is {tokens.dtype} {list(tokens.shape)}, expected int32 [{count}]"
    elif int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        problem = f"names tokens outside of the vocabulary of {vocabulary}"
    elif (np.diff(tokens.astype(np.int64)) <= 0).any():
        problem = "is not in ascending order"
    if problem:
        raise CheckpointError(f"the shortlist of {name!r} {problem}; derive or fetch the sub-model again")
    return Shortlist(tokens.astype(np.int32), vocabulary)
