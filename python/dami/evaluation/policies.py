"""Measures what choosing λ per question is worth, compared with static λ at equal tokens on the same answers.

A sweep has the answers to every question at every λ, so any choice can be evaluated without generating again. A λ
between two λ of the sweep is treated as a random choice between them whose mean is that λ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dami.evaluation.frontier import Frontier, hull_at
from dami.evaluation.statistics import Array, Interval, Places, bootstrap, wilson


@dataclass(frozen=True)
class Outcome:
    """The results of a policy, with 95 % intervals: Wilson's for shares, bootstrapped for all else.

    Attributes:
        accuracy: in [0, 1].
        tokens: per question, including those spent on choosing.
        static: the best accuracy of static λ with as many tokens. It is chosen on the same questions, which favours it,
            and may split queries randomly between two λ. If no static λ is as cheap, it is the cheapest one's.
        gain: accuracy − static.
        over_thinking: accuracy − accuracy of the greatest λ.
        tokens_saved: tokens of the greatest λ − tokens.
        incomplete: share of answers that are empty or cut off.
        aes: `efficiency_score` against the greatest λ; nan if that is never right.
    """

    accuracy: Interval
    tokens: Interval
    static: Interval
    gain: Interval
    over_thinking: Interval
    tokens_saved: Interval
    incomplete: Interval
    aes: Interval


def play(frontier: Frontier, policy: ArrayLike, extra_tokens: float | Array = 0.0) -> Outcome:
    """Evaluates a policy on the questions of a frontier.

    Args:
        frontier: scores and tokens of the questions at every λ.
        policy: λ of every question, [questions], or the probability of each λ, [questions, L].
        extra_tokens: tokens spent on choosing, one number for all questions or one for each.

    Raises:
        ValueError: the policy has neither shape, or a λ is outside the measured range.
    """
    lots = _lots(frontier, policy)
    scores, tokens = (lots * frontier.scores).sum(1), (lots * frontier.tokens).sum(1) + extra_tokens
    incomplete = (lots * (1 - frontier.well_formed)).sum(1)
    thinking = int(np.argmax(frontier.intensities))

    def statistics(rows: Places) -> Array:
        static, costs = frontier.scores[rows].mean(0), frontier.tokens[rows].mean(0)
        score, cost = scores[rows].mean(), tokens[rows].mean()
        there = hull_at(static, costs, float(max(cost, costs.min())))
        efficiency = efficiency_score(score, cost, static[thinking], costs[thinking])
        return np.array(
            [score, cost, there, score - there, score - static[thinking], costs[thinking] - cost,
             incomplete[rows].mean(), efficiency]
        )  # fmt: skip

    outcome = Outcome(*bootstrap(statistics, len(frontier), frontier.seed))
    shares = {name: getattr(outcome, name).value for name in ("accuracy", "incomplete")}
    return replace(outcome, **{name: Interval(share, *wilson(share, len(frontier))) for name, share in shares.items()})


def efficiency_score(accuracy: float, tokens: float, base_accuracy: float, base_tokens: float) -> float:
    """Returns the accuracy–efficiency score (AES) of O1-Pruner (arXiv 2501.12570) against a base: higher is better.

    ΔL + 3 ΔA if ΔA ≥ 0, otherwise ΔL + 5 ΔA, where ΔL = (base tokens − tokens) / base tokens and
    ΔA = (accuracy − base accuracy) / base accuracy. nan if the base accuracy is 0.
    """
    if base_accuracy == 0:
        return float("nan")
    saved, gained = 1 - tokens / base_tokens, accuracy / base_accuracy - 1
    return float(saved + (3 if gained >= 0 else 5) * gained)


@dataclass(frozen=True)
class Room:
    """What choosing λ for each question could add to the best static λ, with 95 % intervals.

    Worth is accuracy − price · tokens, where as many tokens as the greatest λ takes on average cost the price.

    Attributes:
        total: worth of each question's best λ − worth of the best static λ. The best λ is chosen by all samples but one
            and scored by that one, for each sample in turn. So luck adds nothing, and what so few samples cannot tell
            apart is missed: an estimator that knows kinds of questions can win more than this.
        won: the share of that which a policy adds to the best static λ; negative if it is worse than that.
    """

    total: Interval
    won: Interval


def room(samples: Sequence[Frontier], policy: ArrayLike, price: float, extra_tokens: float | Array = 0.0) -> Room:
    """Measures the room for choosing λ, and a policy's share of it.

    Args:
        samples: two or more samples of the answers to the same questions, one in each frontier.
        policy, extra_tokens: as for `play`.
        price: of the tokens.

    Raises:
        ValueError: as for `play`, there is one sample, or the samples have other questions or λ.
    """
    shapes = {(len(sample), sample.intensities) for sample in samples}
    if len(samples) < 2 or len(shapes) > 1:
        raise ValueError(f"samples must be two or more of the same questions and λ, got {len(samples)} of {shapes}")
    scores, tokens = (np.stack([getattr(sample, name) for sample in samples]) for name in ("scores", "tokens"))
    each = price / tokens[:, :, -1].mean()
    worths = scores - each * tokens  # [samples, questions, L]
    others = worths.sum(0) - worths
    best = np.take_along_axis(worths, others.argmax(2)[:, :, None], 2)[:, :, 0].mean(0)
    worth = worths.mean(0)
    chosen = (_lots(samples[0], policy) * worth).sum(1) - each * np.asarray(extra_tokens)

    def statistics(places: Places) -> Array:
        static = worth[places].mean(0).max()
        total = best[places].mean() - static
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.array([total, (chosen[places].mean() - static) / total])

    return Room(*bootstrap(statistics, len(worth), samples[0].seed))


def _lots(frontier: Frontier, policy: ArrayLike) -> Array:
    """Returns a policy as the probability of each λ, [questions, L]."""
    lots = np.asarray(policy, dtype=np.float64)
    if lots.shape == (len(frontier),):
        lots = lots_between(frontier.intensities, lots)
    if lots.shape != frontier.scores.shape:
        raise ValueError(
            f"policy must have shape [{len(frontier)}] or {list(frontier.scores.shape)}, got {list(lots.shape)}"
        )
    return lots


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
