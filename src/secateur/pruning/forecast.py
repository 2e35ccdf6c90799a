"""What a derivation will need beside what the machine has, before any weight is read.

The forecast decides whether activations live in memory or in a mapped file and whether passes can wait in a block, and
refuses what cannot fit. It does not know what other processes will do.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from secateur.checkpoint.format import PRUNED, RECOVERY
from secateur.errors import ResourceError
from secateur.pruning.demand import Demand
from secateur.resources import available_memory

# Share of the memory that is free now which a derivation may plan with; the rest is for the machine.
MEMORY_SHARE = 0.85


@dataclass(frozen=True)
class Forecast:
    """Bytes that a derivation needs.

    Attributes
    ----------
    activations
        The inputs of the current block for the whole calibration set.
    working_memory
        Everything else that is in memory at once: one block's weights, scores and packed values, and one batch.
    waiting
        What passes hold beside that while they stand still at the stages of a block, those of `waiting_batches`.
    budget
        What the whole model takes while a budget, a quality or a size is measured, before all of that; 0 if none is.
    recovery
        What the pruned model, its parent and the optimiser take while it learns, after all of that; 0 if it does not.
    disk
        An upper bound of the output folder, with the activations when they are mapped.
    available_memory, available_disk
        What the machine has at this moment.
    map_activations
        Whether the activations go to a mapped file in the output folder.
    waiting_batches
        For how many batches there is room then; the passes of the others are run again at each stage.
    """

    activations: int
    working_memory: int
    waiting: int
    budget: int
    recovery: int
    disk: int
    available_memory: int
    available_disk: int
    map_activations: bool
    waiting_batches: int

    def describe(self) -> str:
        """Return the forecast in one line."""
        where = "in a mapped file" if self.map_activations else "in memory"
        pruning = self.working_memory + (0 if self.map_activations else self.activations)
        needed = max(pruning, self.budget, self.recovery)
        more = f", and to be quick {_size(self.waiting)} more," if self.waiting else ""
        return (
            f"needs about {_size(needed)}{more} of {_size(self.available_memory)} free memory "
            f"(activations {_size(self.activations)}, {where}) "
            f"and at most {_size(self.disk)} of {_size(self.available_disk)} free disk"
        )


def make_forecast(demand: Demand, output: Path) -> Forecast:
    """Hold what a derivation takes against what there is.

    Parameters
    ----------
    demand
        The derivation.
    output
        The folder that is worked in: its nearest existing parent tells the free disk, and what it holds already is not
        counted again.

    Raises
    ------
    ResourceError
        When memory or disk cannot hold what is needed even with mapped activations.
    """
    activations, working, budget, recovery = demand.activations(), demand.pruning(), demand.budget(), demand.recovery()
    memory, free_disk = available_memory(), shutil.disk_usage(_existing_parent(output)).free
    map_activations = activations + working > MEMORY_SHARE * memory
    waiting = demand.waiting()
    room = MEMORY_SHARE * memory - activations - working
    waiting_batches = max(0, min(demand.batches(), int(room // waiting))) if waiting else 0
    written = [*output.glob("*.safetensors"), *(output / PRUNED).glob("*.safetensors"), *output.glob(RECOVERY)]
    disk = demand.disk() + map_activations * activations - sum(path.stat().st_size for path in written)
    if budget > MEMORY_SHARE * memory:
        raise ResourceError(
            f"measuring a budget, a quality, a size or which weights need eight bits holds the whole model, about "
            f"{_size(budget)} of memory, and {_size(memory)} are free: use --budget uniform, no --keep-quality, "
            "--values and --embedding-values beside --target-size, a number of --vocabulary, and --eight-bits 0, or a "
            "larger machine"
        )
    if recovery > MEMORY_SHARE * memory:
        raise ResourceError(
            f"recovery holds the whole model, its parent and their optimiser, about {_size(recovery)} of memory, and "
            f"{_size(memory)} are free: leave out --recover, shorten --sequence-length, or use a larger machine"
        )
    if working > MEMORY_SHARE * memory:
        raise ResourceError(
            f"one block of this model needs about {_size(working)} of memory and {_size(memory)} are free: "
            "close other programs or use a larger machine"
        )
    if disk > free_disk:
        fewer = ", or use fewer --samples (activations go to disk here)" if map_activations else ""
        raise ResourceError(
            f"the derivation may need {_size(disk)} of disk and {_size(free_disk)} are free at "
            f"{str(output.parent)!r}: make room or name another output{fewer}"
        )
    return Forecast(
        activations=activations,
        working_memory=working,
        waiting=waiting_batches * waiting,
        budget=budget,
        recovery=recovery,
        disk=disk,
        available_memory=memory,
        available_disk=free_disk,
        map_activations=map_activations,
        waiting_batches=waiting_batches,
    )


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"
