"""How a derivation is run: what decides nothing about the result."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from secateur.models.device import checked_device
from secateur.pruning.loop import Progress


@dataclass(frozen=True)
class Execution:
    """How a derivation is run. The fields are parameters of `derive`."""

    output: str | Path
    device: str
    threads: int | None
    resume: bool
    progress: Progress
    announce: Callable[[str], None] | None
    data: Path | None

    def say(self, line: str) -> None:
        """Announce a line, if anybody listens."""
        if self.announce is not None:
            self.announce(line)

    @property
    def target(self) -> Path:
        """The output folder, without what a path may say twice."""
        return Path(os.path.normpath(self.output))

    @property
    def torch_device(self) -> torch.device:
        """The device; raises `ConfigError` when torch cannot use it."""
        return checked_device(self.device)

    @property
    def n_threads(self) -> int:
        """The number of threads: torch's choice where none is given."""
        return self.threads or torch.get_num_threads()
