"""Rules that an evaluation has to meet: a gate for scripts, such as `humaneval>=0.9`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from secateur.errors import ConfigError, RequirementError
from secateur.evaluation.perplexity import PerplexityComparison
from secateur.evaluation.results import Cell, Evaluation
from secateur.evaluation.scores import Scores, ScoresComparison

_RULE = re.compile(r"(?P<task>.+?)\s*(?P<sign>>=|<=)\s*(?P<bound>[0-9.]+(e-?[0-9]+)?)")


@dataclass(frozen=True)
class Requirement:
    """What every model has to reach on a task, as a share of what the model that is compared with reaches.

    Attributes
    ----------
    rule
        As the user wrote it.
    task
        Its name.
    at_least
        Whether the share has to be at least the bound, or at most.
    bound
        Of the score over the parent's, or of perplexity over the parent's.
    """

    rule: str
    task: str
    at_least: bool
    bound: float


def parse_requirements(
    rules: Sequence[str], tasks: Sequence[str], against: object, models: Sequence[object] = ()
) -> list[Requirement]:
    """Read rules such as `humaneval>=0.9` or `perplexity:python<=1.2`.

    Raises
    ------
    ConfigError
        For a rule that is none, one about a task that is not measured, or rules without a model to compare with, or
        with none but it.
    """
    if rules and against is None:
        raise ConfigError(f"the rule {rules[0]!r} is about shares of a parent: name it with --against")
    if rules and models and {str(one) for one in models} == {str(against)}:
        raise ConfigError(f"the rule {rules[0]!r} is about other models than {str(against)!r}: name one to evaluate")
    found = []
    for rule in rules:
        matched = _RULE.fullmatch(rule.strip())
        try:
            bound = float(matched["bound"]) if matched else 0.0
        except ValueError:
            matched = None
        if not matched:
            raise ConfigError(f"the rule {rule!r} is none: write TASK>=SHARE or TASK<=SHARE, such as humaneval>=0.9")
        if matched["task"] not in tasks:
            raise ConfigError(f"the rule {rule!r} is about a task that is not measured: {', '.join(tasks)} are")
        found.append(Requirement(rule, matched["task"], matched["sign"] == ">=", bound))
    return found


def check_requirements(requirements: Sequence[Requirement], evaluation: Evaluation) -> None:
    """Raise `RequirementError` that names each model that misses a rule, and by how much."""
    missed = []
    if requirements and all(model.name == evaluation.against for model in evaluation.models):
        raise RequirementError(f"{requirements[0].rule} holds for nothing: only {evaluation.against} was measured")
    for one in requirements:
        for model in evaluation.models:
            if model.name == evaluation.against:
                continue
            share = _share(evaluation.cell(one.task, model.name))
            if any(_not_run(evaluation.cell(one.task, name)) for name in (model.name, evaluation.against or "")):
                share = None  # neither figure says what it should
            if share is None or not (share >= one.bound if one.at_least else share <= one.bound):
                has = "nothing to compare" if share is None else f"{share:.3g} of {evaluation.against}'s"
                missed.append(f"{model.name} misses {one.rule}, it has {has}")
    if missed:
        raise RequirementError("; ".join(missed))


def _not_run(cell: Cell) -> bool:
    return isinstance(cell.result, Scores) and "sandbox_failure" in cell.result.outcomes


def _share(cell: Cell) -> float | None:
    if isinstance(cell.comparison, ScoresComparison):
        return None if cell.comparison.paired.kept is None else cell.comparison.paired.kept.value
    if isinstance(cell.comparison, PerplexityComparison):
        return cell.comparison.ratio
    return None
