"""All figures that a report gives about a frontier, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dami.evaluation.frontier import Frontier, Point, StaticChoice, StepChange
from dami.evaluation.statistics import Interval


@dataclass(frozen=True)
class Findings:
    """The figures of a report. Attributes are named after the methods of `Frontier` that compute them.

    Attributes:
        questions: number of questions.
        points: one per λ.
        best_static: the best static λ, chosen on one half of the questions and scored on the other.
        oracle: accuracy and tokens if each question used its own best λ.
        hypervolume: best accuracy within a token budget, averaged over budgets.
        transition: the band of λ in which thoughts appear, or None.
        monotone_accuracy, monotone_tokens: changes from each λ to the next.
        convexity: accuracy above the chord between the neighbours.
    """

    questions: int
    points: list[Point]
    best_static: StaticChoice
    oracle: tuple[float, float]
    hypervolume: Interval
    transition: tuple[float, float] | None
    monotone_accuracy: list[StepChange]
    monotone_tokens: list[StepChange]
    convexity: list[StepChange]

    @classmethod
    def of(cls, frontier: Frontier) -> Findings:
        chosen_on, scored_on = frontier.halves()
        return cls(
            len(frontier),
            frontier.points,
            chosen_on.best_static(scored_on),
            frontier.oracle(),
            frontier.hypervolume(),
            frontier.transition(),
            frontier.monotone_accuracy(),
            frontier.monotone_tokens(),
            frontier.convexity(),
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the contents of `frontier.json`."""
        return {
            "questions": self.questions,
            "points": [asdict(point) for point in self.points],
            "best static λ, chosen on one half and scored on the other": asdict(self.best_static),
            "per-question oracle, accuracy and tokens": list(self.oracle),
            "hypervolume": self.hypervolume,
            "transition band": self.transition,
            "accuracy, from λ to λ": [asdict(step) for step in self.monotone_accuracy],
            "tokens, from λ to λ": [asdict(step) for step in self.monotone_tokens],
            "accuracy above the neighbours' chord": [asdict(step) for step in self.convexity],
        }


def verdict(steps: Sequence[StepChange]) -> str:
    """Describes which steps are significantly up or down. One that is down refutes monotonicity or convexity."""
    down = [f"{step.start:g} to {step.end:g}" for step in steps if step.change.high < 0]
    up = sum(step.change.low > 0 for step in steps)
    return f"{up} of {len(steps)} surely up, " + (f"surely down: {', '.join(down)}" if down else "none surely down")
