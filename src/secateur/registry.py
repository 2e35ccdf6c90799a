"""Named things of one kind (methods, budgets, domains, tasks), looked up by exact name.

A registry is filled when its module is imported and only read after that.
"""

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from secateur.errors import UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """A mapping from names to entries that answers a wrong name with the nearest right one."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Register `entry` under `name`; a name is taken once."""
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._entries[name] = entry
        return entry

    def register(self, name: str) -> Callable[[T], T]:
        """Return `add` as a decorator."""
        return lambda entry: self.add(name, entry)

    def get(self, name: str) -> T:
        """Return the entry called `name`; raises `UnknownNameError` that names the nearest ones."""
        try:
            return self._entries[name]
        except KeyError:
            raise UnknownNameError(unknown_name(self.kind, name, self._entries)) from None

    def names(self) -> list[str]:
        """Return all names in the order of registration."""
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)


def unknown_name(kind: str, name: str, known: dict[str, T] | list[str]) -> str:
    """Return the message for a name that is not known."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown {kind} {name!r}: {hint}known are {', '.join(known)}"
