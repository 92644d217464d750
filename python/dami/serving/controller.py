"""`IntensityController` turns load into λ: under load adjustable requests think less, so that answers come in time.

It is asked for the λ of every request (`grant`), told of every sequence when it comes (`start`) and when it has ended
(`finish`), and after every step how the engine is doing (`observe`). Requests with a λ of their own are never changed;
they only count as load.

**Load.** What a sequence that comes now must expect, by Little's law, as a share of the target:

    rows     = min(sequences in flight, rows that the engine decodes together)
    latency  = max(tokens in flight / rows · seconds per token at so many rows, longest wait now)
    pressure = latency / target

In flight is what has come and not ended, running or waiting. Its tokens are those that sequences at their granted λ
take of late, a running mean for each tenth of λ; seconds per token likewise, for each doubling of rows. So a sequence
counts from its start, by what was granted, and not first when its answer is there: the only delay in the loop is an
average over the answers in flight, and an average turns no correction into its opposite. The longest wait is
measured, not expected: it holds where the expectation is too low, as before the first answer has ended (unless the
pair's frontier tells the tokens), or where the cache has room for fewer rows.

**Law.** No λ above the cap is granted to an adjustable request. The cap follows the pressure p along a straight line,

    wanted = ceiling                                         p ≤ 1/2
             ceiling − (ceiling − floor) · (2p − 1)          1/2 < p < 1
             floor                                           p ≥ 1

from no change while half of the target is to spare, to the floor where it is reached. So the mean latency settles below
the target as long as the server can carry the load at the floor at all.

- **Limits.** The cap stays between floor and ceiling. At the ceiling nothing is capped, not even a λ beyond it; a
  request below the cap is never raised.
- **Rate.** It falls at once, for a burst is granted within milliseconds; it rises by its whole range in two targets.
- **Hysteresis.** It rises only while the line lies a twentieth of the range above it, or at the ceiling.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping

EASE, FULL = 0.5, 1.0  # pressure at which the cap begins to fall, and at which it reaches the floor
RISE = 2.0  # targets that the cap takes from floor to ceiling
HYSTERESIS = 0.05  # of the range
MEMORY = 32  # measurements over which means run


class Means:
    """Running means by a whole number: of all that has been measured, and from `MEMORY` measurements on of so many."""

    def __init__(self) -> None:
        self._means: dict[int, float] = {}
        self._counts: Counter[int] = Counter()

    def add(self, key: int, value: float) -> None:
        self._counts[key] += 1
        mean = self._means.get(key, value)
        self._means[key] = mean + (value - mean) / min(self._counts[key], MEMORY)

    def at(self, key: int) -> float:
        """The mean at the nearest key known, the lower of two; 0 if nothing has been measured."""
        if not self._means:
            return 0.0
        return self._means[min(self._means, key=lambda known: (abs(known - key), known))]


class IntensityController:
    """A cap on the λ of adjustable requests that follows the load.

    Attributes:
        target: seconds that an answer may take on average, from the request to its last token.
        rows: sequences that the engine decodes together, at most.
        floor: lowest cap.
        ceiling: cap without load, where nothing is capped.
    """

    def __init__(
        self,
        target_latency: float,
        rows: int,
        floor: float = 0.0,
        ceiling: float = 1.0,
        tokens: Mapping[float, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts without load.

        Args:
            target_latency: seconds.
            rows: sequences that the engine decodes together, at most.
            floor, ceiling: λ between which the cap moves.
            tokens: of an answer by λ, where they are known beforehand.
            clock: seconds from any fixed moment.

        Raises:
            ValueError: the target or rows are not above 0, or floor and ceiling are not finite and in order.
        """
        if not 0 < target_latency < math.inf:
            raise ValueError(f"target_latency must be finite and above 0, got {target_latency}")
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        if not -math.inf < floor < ceiling < math.inf:
            raise ValueError(f"floor and ceiling must be finite, the floor below, got {floor} and {ceiling}")
        self.target, self.floor, self.ceiling = float(target_latency), float(floor), float(ceiling)
        self.rows = rows
        self._clock = clock
        self._in_flight: Counter[int] = Counter()  # sequences by tenth of λ
        self._tokens = Means()  # of an answer, by tenth of λ
        for intensity, mean in (tokens or {}).items():
            self._tokens.add(_tenth(intensity), mean)
        self._seconds = Means()  # per token, by doubling of rows
        self._waited = 0.0
        self._cap = self.ceiling
        self._moved = clock()

    def grant(self, intensity: float, adjustable: bool) -> float:
        """λ for a request that comes now.

        Args:
            intensity: what it asks for.
            adjustable: whether it may get less.
        """
        cap = self._move()
        return min(intensity, cap) if adjustable and cap < self.ceiling else intensity

    def start(self, intensity: float) -> None:
        """Counts a sequence as load, until `finish`.

        Args:
            intensity: its λ, as granted.
        """
        self._in_flight[_tenth(intensity)] += 1
        self._move()

    def finish(self, intensity: float, tokens: int | None) -> None:
        """Takes a sequence out of the load.

        Args:
            intensity: its λ.
            tokens: how many it generated; None if it did not come to its end.
        """
        self._in_flight[_tenth(intensity)] -= 1
        if tokens is not None:
            self._tokens.add(_tenth(intensity), tokens)
        self._move()

    def observe(self, running: int, seconds_per_token: float, waited: float) -> None:
        """Tells how the engine is doing; best after every step.

        Args:
            running: rows that it decodes together.
            seconds_per_token: what a token of one row takes now, which is the duration of a step.
            waited: seconds that the longest-waiting sequence has been without its first token, 0 if none waits.
        """
        self._waited = waited
        if running > 0:
            self._seconds.add(running.bit_length(), seconds_per_token)
        self._move()

    @property
    def pressure(self) -> float:
        """Latency that a sequence must expect now, as a share of the target."""
        sequences = self._in_flight.total()
        if not sequences:
            return 0.0
        rows = min(sequences, self.rows)
        tokens = sum(count * self._tokens.at(tenth) for tenth, count in self._in_flight.items())
        return max(tokens / rows * self._seconds.at(rows.bit_length()), self._waited) / self.target

    @property
    def cap(self) -> float:
        """Highest λ that an adjustable request is granted now; at the ceiling there is no cap."""
        return self._move()

    def _move(self) -> float:
        """Brings the cap up to now."""
        now, span = self._clock(), self.ceiling - self.floor
        relief = min(max((FULL - self.pressure) / (FULL - EASE), 0.0), 1.0)
        wanted = self.ceiling if relief == 1 else self.floor + span * relief
        if wanted < self._cap:
            self._cap = wanted
        elif wanted == self.ceiling or wanted > self._cap + HYSTERESIS * span:
            self._cap += span * (now - self._moved) / (RISE * self.target)
            if self._cap > wanted - 1e-9 * span:  # a sum of many small rises comes out a little lower
                self._cap = wanted
        self._moved = now
        return self._cap


def _tenth(intensity: float) -> int:
    return round(10 * min(max(intensity, -1.0), 2.0))
