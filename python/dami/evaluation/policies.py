"""Measures what choosing λ per question is worth, compared with static λ at equal tokens on the same answers.

A sweep has the answers to every question at every λ, so any choice can be evaluated without generating again. A λ
between two λ of the sweep is treated as a random choice between them whose mean is that λ.
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
    """The results of a policy, with 95 % intervals.

    Attributes:
        accuracy: in [0, 1].
        tokens: per question, including those spent on choosing.
        static: the best accuracy of static λ with as many tokens. It is chosen on the same questions, which favours it,
            and may split queries randomly between two λ. If no static λ is as cheap, it is the cheapest one's.
        gain: accuracy − static.
        over_thinking: accuracy − accuracy of the greatest λ.
        tokens_saved: tokens of the greatest λ − tokens.
    """

    accuracy: Interval
    tokens: Interval
    static: Interval
    gain: Interval
    over_thinking: Interval
    tokens_saved: Interval


def play(frontier: Frontier, policy: ArrayLike, extra_tokens: float | Array = 0.0) -> Outcome:
    """Evaluates a policy on the questions of a frontier.

    Args:
        frontier: scores and tokens of the questions at every λ.
        policy: λ of every question, [questions], or the probability of each λ, [questions, L].
        extra_tokens: tokens spent on choosing, one number for all questions or one for each.

    Raises:
        ValueError: the policy has neither shape, or a λ is outside the measured range.
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
    """Returns each λ as probabilities of its neighbours among the increasing `intensities`, [len(lams), L]."""
    grid = np.asarray(intensities)
    if not ((lams >= grid[0]) & (lams <= grid[-1])).all():
        raise ValueError(
            f"policy must choose λ from {grid[0]:g} to {grid[-1]:g}, as measured, got {lams.min():g} to {lams.max():g}"
        )
    columns = [np.interp(lams, grid, unit) for unit in np.eye(len(grid))]
    return np.column_stack(columns)


def at_random(frontier: Frontier, policy: Array) -> Array:
    """Gives every question the same mix of λ as the policy overall: the policy if it ignored the question."""
    lots = lots_between(frontier.intensities, policy)
    return np.broadcast_to(lots.mean(0), lots.shape)


def auroc(signal: ArrayLike, positive: ArrayLike) -> float:
    """Returns the probability that a positive case has a larger signal than a negative one. Ties count half.

    (R − n₊(n₊ + 1)/2) / (n₊ n₋), with R the sum of the positives' ranks (Mann and Whitney). nan if either
    class is empty.

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
