"""What a choice of λ per question is worth: against every static λ, at equal tokens, on the same answers.

A sweep has the answers to every question at every λ, so any choice can be read off it, without asking again. A λ
between two of the sweep is played as a lot between them, whose mean is the chosen one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dami.evaluation.frontier import Frontier, hull_at
from dami.evaluation.statistics import Array, Interval


@dataclass(frozen=True)
class Outcome:
    """What a policy gives, with 95 % intervals.

    Attributes:
        accuracy: in [0, 1].
        tokens: per question, with those that choosing took.
        static: the best accuracy that static λ reach with as many tokens, on the very same questions, which favours
            them; queries may be dealt to two λ by lot. Where no static λ is as cheap, the cheapest one's.
        gain: accuracy − static.
        over_thinking: accuracy − that of the greatest λ.
        tokens_saved: tokens of the greatest λ − tokens.
    """

    accuracy: Interval
    tokens: Interval
    static: Interval
    gain: Interval
    over_thinking: Interval
    tokens_saved: Interval


def play(frontier: Frontier, policy: ArrayLike, extra_tokens: float | Array = 0.0) -> Outcome:
    """What a policy gives on the questions of a frontier.

    Args:
        frontier: scores and tokens of the questions at every λ.
        policy: λ of every question, [questions]; or how likely it is to be given each λ, [questions, L].
        extra_tokens: what choosing took, for all questions or for each.

    Raises:
        ValueError: the policy's shape fits neither, or a λ is outside of those measured.
    """
    lots = np.asarray(policy, dtype=np.float64)
    if lots.shape == (len(frontier),):
        lots = lots_between(frontier.intensities, lots)
    if lots.shape != frontier.scores.shape:
        raise ValueError(
            f"policy must have shape [{len(frontier)}] or {list(frontier.scores.shape)}, got {list(lots.shape)}"
        )
    scores, tokens = (lots * frontier.scores).sum(1), (lots * frontier.tokens).sum(1) + extra_tokens
    both = Frontier(
        frontier.intensities,
        np.column_stack([frontier.scores, scores]),
        np.column_stack([frontier.tokens, tokens]),
        frontier.thinking,
        frontier.well_formed,
        frontier.levels,
        frontier.seed,
    )

    def statistics(score: Array, cost: Array) -> Array:
        static = hull_at(score[:-1], cost[:-1], float(max(cost[-1], cost[:-1].min())))
        thinking = int(np.argmax(frontier.intensities))
        return np.array(
            [score[-1], cost[-1], static, score[-1] - static, score[-1] - score[thinking], cost[thinking] - cost[-1]]
        )

    return Outcome(*both.interval(statistics))


def lots_between(intensities: Sequence[float], lams: Array) -> Array:
    """Each λ as a lot between its neighbours among `intensities`, which rise: shares [len(lams), L]."""
    grid = np.asarray(intensities)
    if not ((lams >= grid[0]) & (lams <= grid[-1])).all():
        raise ValueError(
            f"policy must choose λ from {grid[0]:g} to {grid[-1]:g}, as measured, got {lams.min():g} to {lams.max():g}"
        )
    columns = [np.interp(lams, grid, unit) for unit in np.eye(len(grid))]
    return np.column_stack(columns)


def at_random(frontier: Frontier, policy: Array) -> Array:
    """The same λ dealt to questions by lot: what is left of a policy that does not look at the question."""
    lots = lots_between(frontier.intensities, policy)
    return np.broadcast_to(lots.mean(0), lots.shape)


def auroc(signal: ArrayLike, positive: ArrayLike) -> float:
    """How likely a positive case has the larger signal than a negative one, ties counting half; nan without either.

    (R − n₊(n₊ + 1)/2) / (n₊ n₋), with R the sum of the positives' ranks (Mann and Whitney).

    Args:
        signal: real numbers.
        positive: as many booleans.
    """
    values, is_positive = np.asarray(signal, dtype=np.float64), np.asarray(positive, dtype=bool)
    if not 0 < is_positive.sum() < len(values):
        return float("nan")
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(count) - (count - 1) / 2)[place]
    n = int(is_positive.sum())
    return float((ranks[is_positive].sum() - n * (n + 1) / 2) / (n * (len(values) - n)))
