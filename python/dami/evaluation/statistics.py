"""Estimates with 95 % intervals: Wilson's of a proportion by itself, a bootstrap over questions of everything else."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Places = NDArray[np.int64]  # of questions
RESAMPLES = 2000
Z95 = 1.959964  # half-width of a 95 % interval in standard deviations


class Interval(NamedTuple):
    """An estimate, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


def wilson(accuracy: float, count: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson's), which stays inside [0, 1] and does not vanish at its ends.

    (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n)
    """
    p, z2n = accuracy, Z95**2 / count
    middle = p + z2n / 2
    half = Z95 * math.sqrt(p * (1 - p) / count + z2n / (4 * count))
    return max(0.0, (middle - half) / (1 + z2n)), min(1.0, (middle + half) / (1 + z2n))


def proportions(table: Array) -> list[Interval]:
    """The mean of every column of shares [questions, L], with Wilson's interval."""
    return [Interval(share, *wilson(share, len(table))) for share in table.mean(0).tolist()]


def bootstrap(statistic: Callable[[Places], Array], questions: int, seed: int = 0) -> list[Interval]:
    """Intervals of statistics of questions that are drawn with replacement, by percentiles of 2000 resamples.

    Args:
        statistic: from places of questions, [questions], to [any number]; nan where it cannot be told.
        questions: how many there are.
        seed: of the draws.
    """
    value = np.atleast_1d(statistic(np.arange(questions)))
    if not len(value):
        return []
    drawn = np.stack([np.atleast_1d(statistic(rows)) for rows in _draws(questions, seed)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where a statistic is nan in all resamples
        low, high = np.nanpercentile(drawn, [2.5, 97.5], axis=0)
    return [Interval(*map(float, triple)) for triple in zip(value, low, high, strict=True)]


@lru_cache(maxsize=8)
def _draws(questions: int, seed: int) -> Places:
    """Questions of every resample, [RESAMPLES, questions]."""
    return np.random.default_rng(seed).integers(0, questions, (RESAMPLES, questions))
