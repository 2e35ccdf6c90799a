"""The folder `OUT.partial/` in which a derivation works until it is renamed to OUT.

An error in a first run removes it. A kill, an interrupt, a full disk, an error in a resumed run, or one in recovery
leaves it, and `--resume` goes on from its finished shards.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from secateur.checkpoint.format import (
    ACTIVATIONS,
    BUDGET,
    LOCK,
    MANIFEST,
    PARENT_ACTIVATIONS,
    PRUNED,
    PRUNED_WHOLE,
    RECOVERY,
    STATE,
    describe_difference,
    dump_json,
    read_json,
)
from secateur.errors import CheckpointError, ConfigError, OutputError
from secateur.files import atomic_write_bytes, disk_is_full, make_parents, remove_empty

# Options that recipes did not have at first, and what was done then.
_LATER_OPTIONS: dict[str, Any] = {
    "values": "base",
    "group_size": None,
    "embedding_values": "int8",
    "eight_bits": 0.0,
    "trim_vocabulary": False,
    "vocabulary": None,
    "recover": 0,
    "recover_for": [],
    "correction": 0.5,
    "first_token_weight": 1.0,
}


@dataclass(frozen=True)
class Workspace:
    """A folder that is worked in, and where it will be moved.

    Attributes
    ----------
    output
        The final folder; it does not exist yet.
    folder
        `OUT.partial`, which exists and is locked for this process.
    resumed
        Whether shards of an interrupted run may be in it.
    """

    output: Path
    folder: Path
    resumed: bool

    def start(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Write down the plan, or check that the interrupted run had the same; return the plan in force.

        Keys that begin with `run_` say how the work is done; an interrupted run's own are kept, because the bytes of
        the result may depend on them.
        """
        path = self.folder / STATE
        if not self.resumed:
            atomic_write_bytes(path, dump_json(plan))
            return plan
        try:
            old = _completed(read_json(path))
        except CheckpointError:
            raise ConfigError(
                f"{str(path)!r}, which says how the interrupted run was begun, is damaged: "
                "delete the folder to start afresh"
            ) from None
        if difference := first_difference(old, plan, [key for key in plan if not key.startswith("run_")]):
            raise _begun_otherwise(self.folder, difference)
        return old

    def clean(self) -> None:
        """Remove what an interrupted run left behind beside its state and finished shards."""
        for path in (self.folder / PRUNED).glob("*.partial-*"):
            path.unlink()
        for path in self.folder.iterdir():
            if path.name in (STATE, LOCK, PRUNED, RECOVERY, BUDGET):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.name.endswith(".safetensors"):
                path.unlink()

    def publish(self) -> None:
        """Move the finished folder to its place."""
        if self.output.exists():
            raise OutputError(
                f"output {str(self.output)!r} appeared while it was derived; the result is in {str(self.folder)!r}"
            )
        shutil.rmtree(self.folder / PRUNED, ignore_errors=True)
        for name in (ACTIVATIONS, PARENT_ACTIVATIONS, RECOVERY, LOCK):
            (self.folder / name).unlink(missing_ok=True)
        self.folder.rename(self.output)
        tidy(self.output)


def tidy(output: Path) -> None:
    """Delete from a finished folder what it was resumed by: last, because a kill may keep it from being renamed."""
    for name in (BUDGET, STATE):
        (output / name).unlink(missing_ok=True)


@contextmanager
def open_workspace(output: Path, *, resume: bool) -> Iterator[Workspace]:
    """Create or take up `OUT.partial`.

    Raises
    ------
    OutputError
        When the output exists, an interrupted run is there and `resume` is False, another process works in it, the
        folder cannot be written, or the disk is full.
    """
    check_output(output, resume=resume)
    folder = partial_folder(output)
    resumed = (folder / STATE).is_file()
    with locked(folder, output) as created:
        try:
            workspace = Workspace(output, folder, resumed)
            workspace.clean()
            yield workspace
        except Exception as error:
            if disk_is_full(error):
                raise OutputError(
                    f"the disk is full; finished blocks are in {str(folder)!r}: make room and run again with --resume"
                ) from None
            # What an earlier run has finished outlives any error, and so does a result that only could not be moved.
            if not resumed and not (folder / MANIFEST).is_file() and not (folder / PRUNED_WHOLE).is_file():
                shutil.rmtree(folder, ignore_errors=True)
                remove_empty(created)
            raise


@contextmanager
def locked(folder: Path, output: Path) -> Iterator[list[Path]]:
    """Create a folder in which `output` is worked on, hold its lock, and yield the parents that were made for it.

    Raises
    ------
    OutputError
        When another process holds the lock, or the folder cannot be written.
    """
    lock = FileLock(folder / LOCK, blocking=False)
    try:
        created = make_parents(folder)
        folder.mkdir(exist_ok=True)
        lock.acquire()
    except Timeout:
        raise OutputError(f"another process derives into {str(folder)!r}: wait for it or name another output") from None
    except OSError as error:
        raise OutputError(f"output {str(output)!r} cannot be written: {error.strerror}; name another one") from None
    try:
        yield created
    finally:
        lock.release()


def check_output(output: Path, *, resume: bool = False) -> None:
    """Raise `OutputError` when `output` exists, or an interrupted run of it that is not to be resumed."""
    if os.path.lexists(output):
        raise OutputError(f"output {str(output)!r} exists: name another one or delete it")
    if not resume and os.path.lexists(partial_folder(output)):
        raise OutputError(
            f"{str(partial_folder(output))!r} holds an interrupted derivation: add --resume to go on with it, "
            "or delete it to start afresh"
        )
    if resume and partial_folder(output).is_dir():
        names = {path.name for path in partial_folder(output).iterdir()}
        # A run that was killed at once leaves its lock and perhaps a half-written state.
        if STATE not in names and any(not name.startswith((LOCK, STATE)) for name in names):
            raise OutputError(
                f"{str(partial_folder(output))!r} is no interrupted derivation: name another output or move it"
            )


def partial_folder(output: Path) -> Path:
    """Return the folder in which `output` is worked on."""
    return output.with_name(f"{output.name}.partial")


def begun_recipe(output: Path) -> dict[str, Any] | None:
    """Return the recipe that a finished or interrupted derivation of `output` has, as JSON; None if there is none."""
    for path in (output / MANIFEST, partial_folder(output) / STATE):
        try:
            recipe = _completed(read_json(path))["recipe"]
        except (CheckpointError, KeyError, TypeError):
            continue
        return recipe if isinstance(recipe, dict) else None
    return None


def check_finished(output: Path, plan: dict[str, Any]) -> None:
    """Raise `OutputError` when an existing `output` is anything but a finished sub-model of this plan."""
    try:
        manifest = read_json(output / MANIFEST)
    except CheckpointError:
        raise OutputError(f"output {str(output)!r} exists and is no sub-model: name another one") from None
    if difference := first_difference(manifest, plan, ("recipe", "base_model", "calibration", "shortlist", "recovery")):
        raise _made_otherwise(output, difference)


def check_begun(output: Path, begun: dict[str, Any], recipe: dict[str, Any]) -> None:
    """Raise what resuming with another recipe than a derivation was begun with ends in, before work is done for it."""
    if difference := first_difference({"recipe": begun}, {"recipe": recipe}, ("recipe",)):
        finished = os.path.lexists(output)
        raise _made_otherwise(output, difference) if finished else _begun_otherwise(partial_folder(output), difference)


def _made_otherwise(output: Path, difference: str) -> OutputError:
    return OutputError(f"output {str(output)!r} exists, made with another {difference}: name another one")


def _begun_otherwise(folder: Path, difference: str) -> ConfigError:
    return ConfigError(
        f"{str(folder)!r} was begun with another {difference}: "
        "use the same options to resume, or delete the folder to start afresh"
    )


def first_difference(old: dict[str, Any], new: dict[str, Any], keys: Iterable[str]) -> str | None:
    """Name the first difference of two plans, the older one of which may be an earlier version's; None if none is."""
    old = _completed(old)
    for key in keys:
        if _decisive(old.get(key)) != _decisive(new.get(key)):
            return describe_difference(key, _decisive(old.get(key)), _decisive(new.get(key)))
    return None


def _completed(content: dict[str, Any]) -> dict[str, Any]:
    """Append the options that a recipe of an earlier version lacks."""
    recipe = content.get("recipe")
    if not isinstance(recipe, dict):
        return content
    return {**content, "recipe": recipe | {key: one for key, one in _LATER_OPTIONS.items() if key not in recipe}}


def _decisive(value: Any) -> Any:
    """Leave out what hashes beside it decide: what the base model was called, and what a text has of benchmarks."""
    implied = ("model", "name", "benchmarks")
    return {k: v for k, v in value.items() if k not in implied} if isinstance(value, dict) else value
