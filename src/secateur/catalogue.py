"""What there is to choose from, as `secateur list` shows it."""

from collections.abc import Callable
from pathlib import Path

from secateur.registry import Registry

Rows = list[dict[str, str]]
KINDS: Registry[Callable[[Path | None], Rows]] = Registry("list")


@KINDS.register("domains")
def _domains(data: Path | None) -> Rows:
    from secateur.calibration.corpora import describe_domains

    return describe_domains()


@KINDS.register("corpora")
def _corpora(data: Path | None) -> Rows:
    from secateur.calibration.corpora import describe_corpora

    return describe_corpora(data)


@KINDS.register("methods")
def _methods(data: Path | None) -> Rows:
    from secateur.pruning.methods import METHODS

    return [{"name": name, "needs": METHODS.get(name).needs, "what": METHODS.get(name).summary} for name in METHODS]


@KINDS.register("budgets")
def _budgets(data: Path | None) -> Rows:
    from secateur.pruning.budgets import BUDGETS

    return [{"name": name, "what": BUDGETS.get(name).summary} for name in BUDGETS]


@KINDS.register("tasks")
def _tasks(data: Path | None) -> Rows:
    from secateur.calibration.corpora import describe_domains
    from secateur.evaluation.tasks import describe_tasks

    return describe_tasks({row["name"]: row["description"] for row in describe_domains()})


def catalogue(kind: str, data: Path | None = None) -> Rows:
    """Return the entries of one kind: domains, corpora, methods, budgets or tasks.

    Raises
    ------
    UnknownNameError
        For another kind.
    """
    return KINDS.get(kind)(data)
