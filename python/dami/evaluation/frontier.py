"""The accuracy–tokens frontier over λ, with confidence intervals.

Tests, rather than assumes, that more thinking costs more tokens, improves accuracy and has diminishing returns. All
intervals are 95 % intervals. A single accuracy has Wilson's interval. Everything else has percentiles of a bootstrap
over questions, which resamples all λ of a question together: they were answered together, so differences between λ are
far more certain than either value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dami.evaluation.statistics import Array, Interval, bootstrap, proportions
from dami.evaluation.statistics import wilson as wilson
from dami.evaluation.sweeps import Record


@dataclass(frozen=True)
class Point:
    """One λ over all questions; accuracy and shares in [0, 1], tokens per answer."""

    intensity: float
    accuracy: Interval
    tokens: Interval
    thinking: float  # share of answers with a thought
    well_formed: float  # share of answers that are complete


@dataclass(frozen=True)
class StaticChoice:
    """One λ chosen on some questions and scored on others."""

    intensity: float
    accuracy: Interval
    tokens: Interval


@dataclass(frozen=True)
class StepChange:
    """The change from one λ to another: significantly positive if `change.low` > 0, negative if `change.high` < 0."""

    start: float
    end: float
    change: Interval


@dataclass(frozen=True, eq=False)
class Frontier:
    """Scores and tokens of the same questions at every λ.

    Attributes:
        intensities: L increasing λ.
        scores: [questions, L], means over samples, in [0, 1].
        tokens: [questions, L], means over samples.
        thinking, well_formed: [questions, L], shares of answers.
        levels: difficulty of every question, [questions].
        seed: of the bootstrap.
    """

    intensities: tuple[float, ...]
    scores: Array
    tokens: Array
    thinking: Array
    well_formed: Array
    levels: NDArray[np.int64]
    seed: int = 0

    @classmethod
    def of(cls, records: Sequence[Record], seed: int = 0) -> Frontier:
        """Builds a frontier from the records of a sweep. Leaves out questions that lack a λ, as after an interruption.

        Raises:
            ValueError: no question was answered at every λ.
        """
        lams = sorted({record.intensity for record in records})
        answers: dict[tuple[int, float], list[Record]] = {}
        for record in records:
            answers.setdefault((record.index, record.intensity), []).append(record)
        indices = sorted({index for index, _ in answers})
        indices = [index for index in indices if all((index, lam) in answers for lam in lams)]
        if not indices:
            raise ValueError(f"records must hold a question answered at every λ, got {len(records)} records")

        def table(value: Callable[[Record], float]) -> Array:
            cells = [[np.mean([value(r) for r in answers[index, lam]]) for lam in lams] for index in indices]
            return np.array(cells, dtype=np.float64)

        return cls(
            tuple(lams),
            table(lambda r: r.score),
            table(lambda r: r.tokens),
            table(lambda r: bool(r.thought)),
            table(lambda r: r.well_formed),
            np.array([answers[index, lams[0]][0].level for index in indices]),
            seed,
        )

    def __len__(self) -> int:
        return len(self.scores)

    def select(self, questions: Sequence[int] | NDArray[np.int64]) -> Frontier:
        """Returns the frontier of some of the questions."""
        rows = np.asarray(questions)
        tables = (self.scores, self.tokens, self.thinking, self.well_formed)
        scores, tokens, thinking, well_formed = (table[rows] for table in tables)
        return Frontier(self.intensities, scores, tokens, thinking, well_formed, self.levels[rows], self.seed)

    def of_level(self, level: int) -> Frontier:
        """Returns the frontier of the questions of one level."""
        return self.select(np.flatnonzero(self.levels == level))

    def halves(self, seed: int = 0) -> tuple[Frontier, Frontier]:
        """Splits the questions into two random halves: one to choose λ on, one to score on."""
        order = np.random.default_rng(seed).permutation(len(self))
        return self.select(order[: len(self) // 2]), self.select(order[len(self) // 2 :])

    def interval(self, statistic: Callable[[Array, Array], Array]) -> list[Interval]:
        """Returns intervals of a statistic that maps mean scores and mean tokens, [L] each, to any number of values."""
        return bootstrap(
            lambda rows: statistic(self.scores[rows].mean(0), self.tokens[rows].mean(0)), len(self), self.seed
        )

    @cached_property
    def points(self) -> list[Point]:
        """Returns a point for each λ."""
        tokens = self.interval(lambda scores, tokens: tokens)
        shares = (self.thinking.mean(0).tolist(), self.well_formed.mean(0).tolist())
        return [
            Point(*values) for values in zip(self.intensities, proportions(self.scores), tokens, *shares, strict=True)
        ]

    def best_static(self, scored_on: Frontier, tokens: float = np.inf) -> StaticChoice:
        """Chooses the λ with the best accuracy within a token budget, on ties the cheapest, and scores it elsewhere.

        Raises:
            ValueError: every λ exceeds the budget.
        """
        accuracy, cost = self.scores.mean(0), self.tokens.mean(0)
        if cost.min() > tokens:
            raise ValueError(f"tokens must allow the cheapest λ, {cost.min():.1f}, got {tokens:.1f}")
        best = min(np.flatnonzero(cost <= tokens), key=lambda i: (-accuracy[i], cost[i]))
        there = scored_on.points[int(best)]
        return StaticChoice(there.intensity, there.accuracy, there.tokens)

    def best_each(self, price: float = 0.0) -> Array:
        """Returns the λ with the highest score − price · tokens for each question, [questions]; on ties the cheapest.

        Scored on the answers it was chosen on, this profits from luck, and is an upper bound for any estimator. Scored
        on other answers to the same questions, it shows how much so many answers reveal about a question.
        """
        worth = self.scores - (price + 1e-12) * self.tokens
        return np.asarray(self.intensities)[worth.argmax(1)]

    def oracle(self, price: float = 0.0) -> tuple[float, float]:
        """Returns accuracy and tokens if each question used its λ from `best_each`: an upper bound, not a target."""
        here = np.equal.outer(self.best_each(price), np.asarray(self.intensities))
        return float(self.scores[here].mean()), float(self.tokens[here].mean())

    def monotone_accuracy(self) -> list[StepChange]:
        """Returns the change of the accuracy from each λ to the next."""
        return self._steps(lambda scores, tokens: np.diff(scores))

    def monotone_tokens(self) -> list[StepChange]:
        """Returns the change of the mean tokens from each λ to the next."""
        return self._steps(lambda scores, tokens: np.diff(tokens))

    def _steps(self, change: Callable[[Array, Array], Array]) -> list[StepChange]:
        pairs = zip(self.intensities, self.intensities[1:], strict=False)
        return [StepChange(*ends, change) for ends, change in zip(pairs, self.interval(change), strict=True)]

    def convexity(self) -> list[StepChange]:
        """Returns how far each inner λ lies above the chord of its neighbours, in accuracy at its own tokens.

        If all lie above, the region below the points is convex, and thinking has diminishing returns. The value is nan
        for a point whose tokens are not between its neighbours'.
        """

        def above(scores: Array, tokens: Array) -> Array:
            width = tokens[2:] - tokens[:-2]
            with np.errstate(divide="ignore", invalid="ignore"):
                share = (tokens[1:-1] - tokens[:-2]) / width
                chord = scores[:-2] + share * (scores[2:] - scores[:-2])
            return np.where((share >= 0) & (share <= 1), scores[1:-1] - chord, np.nan)

        ends = zip(self.intensities, self.intensities[2:], strict=False)
        return [StepChange(*pair, change) for pair, change in zip(ends, self.interval(above), strict=True)]

    def accuracy_at(self, tokens: float) -> Interval:
        """Returns the best accuracy of static λ at a mean number of tokens. Queries may be split between two λ."""
        return self.interval(lambda s, t: np.array([hull_at(s, t, tokens)]))[0]

    def hypervolume(self, tokens: float | None = None) -> Interval:
        """Returns the best accuracy within budget, averaged over all up to `tokens` (by default the costliest λ's).

        It is the area that the points dominate, in [0, 1]: Zitzler and Thiele's measure with reference (`tokens`, 0).
        """
        limit = float(self.tokens.mean(0).max()) if tokens is None else tokens

        def area(scores: Array, cost: Array) -> Array:
            order = np.argsort(cost)
            edges = np.minimum(np.append(cost[order], limit), limit)
            return np.array([float((np.maximum.accumulate(scores[order]) * np.diff(edges)).sum() / limit)])

        return self.interval(area)[0]

    def transition(self, share: float = 0.1) -> tuple[float, float] | None:
        """Returns the band of λ in which thoughts appear: from `share` to 1 − `share` of the change in their share.

        Interpolates linearly between measured λ. Returns None if both ends think equally often.
        """
        thinking = self.thinking.mean(0)
        way = thinking[-1] - thinking[0]
        if abs(way) < 1e-9:
            return None
        progress = np.maximum.accumulate((thinking - thinking[0]) / way)
        low, high = (float(np.interp(at, progress, self.intensities)) for at in (share, 1 - share))
        return low, high


def hull_at(scores: Array, tokens: Array, at: float) -> float:
    """Evaluates the upper concave hull of the points (tokens, score) at `at`; nan below the cheapest point."""
    order = np.lexsort((-scores, tokens))
    hull: list[int] = []
    for i in order:
        if hull and scores[i] <= scores[hull[-1]]:
            continue  # costs more without scoring higher
        while len(hull) > 1 and _is_below(scores, tokens, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(int(i))
    return float(np.interp(at, tokens[hull], scores[hull], left=np.nan))


def _is_below(scores: Array, tokens: Array, a: int, b: int, c: int) -> bool:
    """Whether b lies on or below the line from a to c."""
    return (scores[b] - scores[a]) * (tokens[c] - tokens[a]) <= (scores[c] - scores[a]) * (tokens[b] - tokens[a])
