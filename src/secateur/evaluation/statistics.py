"""Ratios over documents and how sure they are.

A perplexity is a ratio of two sums over documents (nats over tokens). Tokens of one document are alike, so documents,
not tokens, are what is independent: errors are those of a ratio estimator with documents as clusters (Cochran,
Sampling Techniques, 3rd ed., 1977, eq. 6.13, without the finite-population correction).
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A difference with what is known about its error.

    Attributes
    ----------
    value
        The difference.
    standard_error
        Its standard error; None with fewer than two documents.
    low, high
        Ends of the 95% interval (Student's t, documents - 1 degrees of freedom); None with fewer than two documents.
    """

    value: float
    standard_error: float | None
    low: float | None
    high: float | None


def ratio(numerators: ArrayLike, denominators: ArrayLike) -> tuple[float, float | None]:
    """Return sum(numerators) / sum(denominators) and its standard error.

    Parameters
    ----------
    numerators, denominators
        Float [documents], in the same order. The denominators sum to more than 0.

    Returns
    -------
    tuple
        The ratio, and its standard error or None with fewer than two documents.
    """
    value, residuals = _linearised(numerators, denominators)
    return value, _standard_error(residuals)


def ratio_difference(
    numerators: ArrayLike, denominators: ArrayLike, other_numerators: ArrayLike, other_denominators: ArrayLike
) -> Difference:
    """Return ratio minus other ratio, both measured on the same documents in the same order.

    The error is that of the difference inside each document, so what makes a document hard for both cancels.
    """
    value, residuals = _linearised(numerators, denominators)
    other_value, other_residuals = _linearised(other_numerators, other_denominators)
    difference = value - other_value
    error = _standard_error(residuals - other_residuals)
    if error is None:
        return Difference(difference, None, None, None)
    reach = student_quantile((1 + CONFIDENCE) / 2, len(residuals) - 1) * error
    return Difference(difference, error, difference - reach, difference + reach)


def _linearised(numerators: ArrayLike, denominators: ArrayLike) -> tuple[float, NDArray[np.float64]]:
    """Return the ratio, and by how much each document moves it to first order [documents]; these sum to 0."""
    above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if above.shape != below.shape or above.ndim != 1:
        raise ValueError(f"one numerator for each denominator is needed, not {above.shape} for {below.shape}")
    total = float(below.sum())
    value = float(above.sum()) / total
    return value, (above - value * below) / total


def _standard_error(residuals: NDArray[np.float64]) -> float | None:
    count = len(residuals)
    if count < 2:
        return None
    return float(np.sqrt(count / (count - 1) * np.sum(residuals**2)))


def student_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t distribution, to about three digits.

    Exact for one and two degrees of freedom; else the expansion of Abramowitz and Stegun, 1964, eq. 26.7.5.
    """
    if degrees < 1:
        raise ValueError(f"a t distribution needs at least 1 degree of freedom, not {degrees}")
    if degrees == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees == 2:
        centred = 2 * probability - 1
        return float(centred * math.sqrt(2 / (1 - centred**2)))
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / degrees**power for power, term in enumerate(terms, start=1)))
