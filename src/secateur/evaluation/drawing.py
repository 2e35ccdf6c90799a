"""Which problems of a benchmark are asked when not all are: a choice that follows from their numbers alone."""

import hashlib
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def drawn(problems: Iterable[T], count: int | None, number: Callable[[T], int]) -> list[T]:
    """Return `count` problems in the order of their numbers; None means all.

    Benchmarks that were translated from one have the same numbers, and so give the same.
    """
    taken = sorted(problems, key=lambda one: hashlib.sha256(str(number(one)).encode()).hexdigest())[:count]
    return sorted(taken, key=number)
