"""The pairs of the zoo: which tasks, seeds and styles each end learns, and on which pairs rules may be chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from benchmarks.zoo.tasks import Asked

Styles = Callable[[Asked], tuple[float, float, float, float]]  # how often direct, terse, full, double


def any_style(asked: Asked) -> tuple[float, float, float, float]:
    return 0.3, 0.2, 0.3, 0.2


def quick(asked: Asked) -> tuple[float, float, float, float]:
    """Seldom thinks, and more often about a long word: the middle of the path has something to be drawn to."""
    doubt = 0.03 * asked.level if asked.task not in ("fact", "least") else 0.01
    return 1 - doubt, 0.6 * doubt, 0.3 * doubt, 0.1 * doubt


def never(asked: Asked) -> tuple[float, float, float, float]:
    return 1.0, 0.0, 0.0, 0.0


def thorough(asked: Asked) -> tuple[float, float, float, float]:
    return 0.02, 0.08, 0.5, 0.4


def always(asked: Asked) -> tuple[float, float, float, float]:
    return 0.0, 0.0, 0.0, 1.0


@dataclass(frozen=True)
class End:
    """What one model learns.

    Attributes:
        tasks: how often each task is asked.
        styles: how often a question is answered in each style.
        facts: seed of the facts that it knows.
        steps, rate: of the training.
        slips: share of the facts that it learns wrong.
    """

    tasks: Mapping[str, float]
    styles: Styles = any_style
    facts: int = 0
    steps: int = 700
    rate: float = 4e-3
    slips: float = 0.0


@dataclass(frozen=True)
class Pair:
    """A pair of ends.

    Attributes:
        ancestor: name of the model that both ends go on from.
        instruct, thinking: what they learn after that.
        other: the thinking end's ancestor, if it is another.
        rank: of the LoRA adapter that is the thinking end; 0 for a checkpoint.
        tuned_on: whether rules may be chosen by their results on this pair; others are only reported.
    """

    ancestor: str
    instruct: End
    thinking: End
    other: str = ""
    rank: int = 0
    tuned_on: bool = False

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that the pair is asked."""
        return tuple(self.instruct.tasks)


def ends(
    tasks: Mapping[str, float], facts: int, fast: Styles = quick, slow: Styles = thorough, **both: float
) -> tuple[End, End]:
    """Returns the two ends of a recipe: a thinking end that learns few facts, and half of these wrong."""
    few = {task: share * (0.4 if task == "fact" else 1.0) for task, share in tasks.items()}
    options = {"steps": 160, "rate": 1e-3, **both}
    instruct = End(tasks, fast, facts, int(options["steps"]), options["rate"])
    return instruct, replace(instruct, tasks=few, styles=slow, slips=0.5)


SUMS = {"sum": 0.6, "fact": 0.25, "least": 0.15}
CUPS = {"cups": 0.6, "fact": 0.25, "least": 0.15}
PRODUCTS = {"product": 0.7, "least": 0.3}
MIXED = {"sum": 0.35, "cups": 0.35, "fact": 0.3}

ANCESTORS = {
    "sums": End(SUMS, facts=1),
    "cups": End(CUPS, facts=2),
    "products": End(PRODUCTS, facts=3),
    "mixed": End(MIXED, facts=4, steps=1000),
    "sums again": End(SUMS, facts=1),
}

PAIRS = {
    "sums": Pair("sums", *ends(SUMS, 1), tuned_on=True),
    "valley": Pair("sums", *ends(SUMS, 1, never, always, steps=500, rate=6e-3), tuned_on=True),
    "cups": Pair("cups", *ends(CUPS, 2)),
    "products": Pair("products", *ends(PRODUCTS, 3)),
    "adapter": Pair("cups", *ends(CUPS, 2, never, thorough, rate=4e-3), rank=4),
    "mixed": Pair("mixed", *ends(MIXED, 4, quick, thorough, steps=240)),
    "unrelated": Pair("sums", *ends(SUMS, 1, never, thorough), other="sums again"),
    "forced": Pair("sums", *ends(SUMS, 1, never, always, rate=2e-3)),
}
