"""What a model reached on a set of problems of which each has a score from 0 to 1, and beside another model."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from secateur.evaluation.proportions import PairedShare, Share, paired


@dataclass(frozen=True)
class Scores:
    """Scores of one model on one task.

    Attributes
    ----------
    metric
        What the first of `means` is, `pass@1` or `exact match`; models are compared by it.
    means
        {metric: mean over problems with its 95% interval}.
    problems, problems_of_task
        How many were asked, and how many there are.
    values
        {problem: its score}, of the first metric.
    outcomes
        How many answers ended in each way, where answers are programs.
    style
        How the model was asked.
    """

    metric: str
    means: dict[str, Share]
    problems: int
    problems_of_task: int
    values: dict[str, float]
    outcomes: dict[str, int] = field(default_factory=dict)
    style: str = ""

    @property
    def main(self) -> Share:
        """The mean of `metric`."""
        return self.means[self.metric]


@dataclass(frozen=True)
class ScoresComparison:
    """A model beside another on the same problems; `p_corrected` is for all comparisons of an evaluation (Holm)."""

    against: str
    metric: str
    paired: PairedShare
    p_corrected: float | None = None


def compare_scores(scores: Scores, other: Scores, against: str) -> ScoresComparison:
    """Compare the first metric problem by problem."""
    ours, theirs = _in_common(scores.values, other.values)
    return ScoresComparison(against, scores.metric, paired(ours, theirs))


def _in_common(ours: Mapping[str, float], theirs: Mapping[str, float]) -> tuple[list[float], list[float]]:
    common = [name for name in ours if name in theirs]
    return [ours[name] for name in common], [theirs[name] for name in common]
