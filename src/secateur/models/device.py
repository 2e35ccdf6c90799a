"""Where torch computes, and with how many threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from secateur.errors import ConfigError


def checked_device(device: str) -> torch.device:
    """Return the torch device called `device`; raises `ConfigError` when torch cannot put a tensor on it."""
    try:
        checked = torch.device(device)
        torch.empty(1, device=checked).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch asserts that it has the device's code
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"device {device!r} cannot be used here: {reason}; use cpu") from None
    return checked


def set_threads(threads: int) -> None:
    """Let torch use `threads` threads in this process; raises `ConfigError` below 1."""
    if threads < 1:
        raise ConfigError(f"threads is {threads}; it must be at least 1")
    torch.set_num_threads(threads)


@contextmanager
def limited_threads(threads: int) -> Iterator[None]:
    """Let torch use `threads` threads inside the block."""
    before = torch.get_num_threads()
    set_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
