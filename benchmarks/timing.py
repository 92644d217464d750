"""Timing that is fair: methods take turns, one that is slow gets fewer of them, and a budget of time is kept."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from statistics import quantiles
from typing import NamedTuple, TypeVar

Case = TypeVar("Case")
Name = TypeVar("Name", bound=Hashable)


class Times(NamedTuple):
    """Seconds of one call: quantiles over a number of measurements."""

    p10: float
    median: float
    p90: float
    count: int

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        low, median, high = (quantiles(seconds, n=10, method="inclusive")[i] for i in (0, 4, 8))
        return cls(low, median, high, len(seconds))


def interleaved(
    stopwatches: dict[Name, Callable[[], float]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[Name, Times]:
    """Calls all stopwatches in turn for about `seconds` seconds, at least five times each.

    Args:
        stopwatches: each runs its method and returns the seconds of one call.
        seconds: the time for all together. A stopwatch that alone would take most of it gets fewer turns.
        clock: returns the time in seconds.
    """

    def cost(stopwatch: Callable[[], float]) -> float:
        start = clock()
        stopwatch()
        return clock() - start

    once = {name: min(cost(stopwatch) for _ in range(2)) for name, stopwatch in stopwatches.items()}
    share = seconds / len(once)
    rounds = max(5, min(200, int(seconds / sum(min(taken, share / 5) for taken in once.values()))))
    times: dict[Name, list[float]] = {name: [] for name in once}
    for turn, (name, taken) in itertools.product(range(rounds), once.items()):
        if turn % min(rounds // 5, int(rounds * taken / (4 * share)) + 1) == 0:
            times[name].append(stopwatches[name]())
    return {name: Times.of(taken) for name, taken in times.items()}


class Budget:
    """Iterates over cases, most important first, until the time is up, and keeps those left out."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.end = clock() + seconds
        self.left_out: list[object] = []

    def is_spent(self) -> bool:
        return self.clock() >= self.end

    def spend(self, cases: Iterable[Case]) -> Iterator[Case]:
        for case in cases:
            if self.is_spent():
                self.left_out.append(case)
            else:
                yield case
