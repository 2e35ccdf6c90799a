"""Rules about shares of problems that are solved."""

from types import SimpleNamespace

import pytest

from secateur.errors import RequirementError
from secateur.evaluation.programs.scoring import scores_of
from secateur.evaluation.requirements import check_requirements, parse_requirements
from secateur.evaluation.scores import compare_scores


def solved(count, of=164, failed=0):
    """Return scores of as many problems, the first of them solved, the last ones without a sandbox."""
    lines = [{"task_id": str(n), "passed": n < count, "outcome": "passed" if n < count else "wrong"} for n in range(of)]
    lines[of - failed :] = [{**line, "outcome": "sandbox_failure"} for line in lines[of - failed :]]
    return scores_of(lines, of)


def check(rule, ours, parent):
    cells = {
        "ours": SimpleNamespace(result=ours, comparison=compare_scores(ours, parent, "parent")),
        "parent": SimpleNamespace(result=parent, comparison=None),
    }
    models = (SimpleNamespace(name="ours"), SimpleNamespace(name="parent"))
    evaluation = SimpleNamespace(models=models, against="parent", cell=lambda _, name: cells[name])
    check_requirements(parse_requirements([rule], ["humaneval"], "parent"), evaluation)


@pytest.mark.parametrize(
    ("ours", "parent", "share"), [(12, 16, 0.75), (57, 76, 0.75), (69, 92, 0.75), (81, 90, 0.9), (117, 130, 0.9)]
)
def test_a_share_that_is_just_reached_is_reached(ours, parent, share):
    check(f"humaneval>={share}", solved(ours), solved(parent))
    with pytest.raises(RequirementError, match="ours misses humaneval>="):
        check(f"humaneval>={share}", solved(ours - 1), solved(parent))


@pytest.mark.parametrize(("ours", "parent"), [(solved(3), solved(0)), (solved(80, failed=1), solved(80))])
def test_what_cannot_be_compared_misses_every_rule(ours, parent):
    with pytest.raises(RequirementError, match="nothing to compare"):
        check("humaneval>=0.1", ours, parent)
    with pytest.raises(RequirementError, match="nothing to compare"):
        check("humaneval<=9", ours, parent)


def test_a_rule_that_nothing_is_held_against_is_missed():
    evaluation = SimpleNamespace(models=(SimpleNamespace(name="parent"),), against="parent")
    with pytest.raises(RequirementError, match="only parent was measured"):
        check_requirements(parse_requirements(["humaneval>=0.9"], ["humaneval"], "parent"), evaluation)
