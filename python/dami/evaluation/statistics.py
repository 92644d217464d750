"""Estimates with 95 % intervals: Wilson's for single proportions, a bootstrap over questions for all else."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Places = NDArray[np.int64]  # indices of questions
RESAMPLES = 2000
Z95 = 1.959964  # half-width of a 95 % interval in standard deviations


class Interval(NamedTuple):
    """An estimate and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


def wilson(accuracy: float, count: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of a proportion, which stays inside [0, 1] and has positive width at 0 and 1.

    (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n)
    """
    p, z2n = accuracy, Z95**2 / count
    middle = p + z2n / 2
    half = Z95 * math.sqrt(p * (1 - p) / count + z2n / (4 * count))
    return max(0.0, (middle - half) / (1 + z2n)), min(1.0, (middle + half) / (1 + z2n))


def proportions(table: Array) -> list[Interval]:
    """Returns the mean of every column of shares [questions, L], with Wilson's interval."""
    return [Interval(share, *wilson(share, len(table))) for share in table.mean(0).tolist()]


def bootstrap(statistic: Callable[[Places], Array], questions: int, seed: int = 0) -> list[Interval]:
    """Returns percentile intervals of a statistic from 2000 resamples of the questions with replacement.

    Args:
        statistic: maps indices of questions, [questions], to any number of values; nan if undefined.
        questions: number of questions.
        seed: of the resampling.
    """
    value = np.atleast_1d(statistic(np.arange(questions)))
    if not len(value):
        return []
    drawn = np.stack([np.atleast_1d(statistic(rows)) for rows in _draws(questions, seed)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # if a statistic is nan in all resamples
        low, high = np.nanpercentile(drawn, [2.5, 97.5], axis=0)
    return [Interval(*map(float, triple)) for triple in zip(value, low, high, strict=True)]


@lru_cache(maxsize=8)
def _draws(questions: int, seed: int) -> Places:
    """Returns the indices of questions in every resample, [RESAMPLES, questions]."""
    return np.random.default_rng(seed).integers(0, questions, (RESAMPLES, questions))
