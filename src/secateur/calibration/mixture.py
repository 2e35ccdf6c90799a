"""Weighted mixtures of domains, as the command line writes them: `python=0.8 general=0.2`, weights by tokens."""

import math
from collections.abc import Sequence

from secateur.calibration.corpora import DOMAINS, domain_path
from secateur.errors import ConfigError
from secateur.files import user_path

Mixture = tuple[tuple[str, float], ...]


def parse_mixture(items: Sequence[str]) -> Mixture:
    """Return (domain, weight) pairs whose weights sum to 1, in the order given.

    Parameters
    ----------
    items
        Each DOMAIN or DOMAIN=WEIGHT; a weight that is left out is 1. Whatever exists as a path is one as a whole, so
        `data/run=3` needs no escape if it is there. `code` becomes its four languages in equal parts.

    Raises
    ------
    ConfigError
        Without an item, for a weight that is not a positive finite number, and for a domain given twice.
    UnknownNameError
        For a domain that is neither a name nor an existing path.
    """
    return normalise_mixture([_parse_item(item) for item in items])


def normalise_mixture(mixture: Sequence[tuple[str, float]]) -> Mixture:
    """Check domains and weights, write domains that have parts as those, and scale the weights to sum 1.

    Raises as `parse_mixture`. Normalising twice changes nothing but rounding.
    """
    if not mixture:
        raise ConfigError("no domain is given: name at least one, for instance `--for python`")
    given: set[str] = set()
    weights: dict[str, float] = {}
    for domain, weight in mixture:
        if not (weight > 0 and math.isfinite(weight)):
            raise ConfigError(f"the weight of domain {domain!r} is {weight}: it has to be a positive number")
        identity = domain if domain in DOMAINS else f"path {domain_path(domain).resolve()}"
        if identity in given:
            raise ConfigError(f"domain {domain!r} is given twice: give it once, with the sum of the weights")
        given.add(identity)
        parts = (DOMAINS.get(domain).parts if domain in DOMAINS else ()) or (domain,)
        for part in parts:
            weights[part] = weights.get(part, 0.0) + weight / len(parts)
    total = math.fsum(weights.values())
    return tuple((domain, weight / total) for domain, weight in weights.items())


def domain_items(mixture: Mixture) -> list[str]:
    """Return a mixture as a person writes it, such that `parse_mixture` gives it back."""
    if len(mixture) == 1:
        return [mixture[0][0]]
    return [f"{domain}={weight!r}" for domain, weight in mixture]


def apportion(total: int, shares: Sequence[tuple[str, float]]) -> list[int]:
    """Divide `total` tokens by weight so that the parts add up (largest remainder; on a tie the first name gains).

    `shares` are (key, weight) with weights that sum to 1; the keys only settle ties.
    """
    exact = [total * weight for _, weight in shares]
    parts = [math.floor(value) for value in exact]
    order = sorted(range(len(shares)), key=lambda i: (parts[i] - exact[i], shares[i][0]))
    for i in order[: total - sum(parts)]:
        parts[i] += 1
    return parts


def _parse_item(item: str) -> tuple[str, float]:
    domain, sign, weight = item.rpartition("=")
    if not sign or item in DOMAINS or user_path(item).exists():
        return item, 1.0
    try:
        return domain, float(weight)
    except ValueError:
        if domain in DOMAINS:
            raise ConfigError(
                f"the weight of domain {domain!r} is {weight!r}: it has to be a positive number"
            ) from None
        return item, 1.0  # a path with a sign in it, that does not exist: reported as such
