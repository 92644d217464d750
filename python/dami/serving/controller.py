"""`IntensityController` lowers λ under load: adjustable requests then think less, so that answers come in time.

The engine asks it for the λ of every request (`grant`), tells it when each sequence arrives (`start`) and ends
(`finish`), and reports after every step (`observe`). Requests that name a λ are never changed; they only count as load.

**Load.** The latency that a new sequence must expect, by Little's law, as a share of the target:

    rows     = min(sequences in flight, rows that the engine decodes together)
    latency  = max(tokens in flight / rows · seconds per token at so many rows, longest wait now)
    pressure = latency / target

A sequence is in flight from its arrival to its end, running or waiting. Its tokens are estimated by a running mean of
recent answers for each tenth of granted λ; seconds per token by a running mean for each doubling of rows. So a sequence
counts at its granted λ from its start, and not only once its answer has ended. The only delay in the loop is an average
over the answers in flight, and an average never reverses the sign of a correction. The longest wait is measured, not
estimated. It takes over where the estimate is too low: before the first answer has ended (unless the pair's frontier
gives the tokens), or when the cache has room for fewer rows.

**Law.** An adjustable request never gets a λ above the cap. The cap is piecewise linear in the pressure p,

    wanted = ceiling                                         p ≤ 1/2
             ceiling − (ceiling − floor) · (2p − 1)          1/2 < p < 1
             floor                                           p ≥ 1

It stays at the ceiling up to half of the target latency, and reaches the floor at the target. So the mean latency
settles below the target, provided that the server can carry the load at the floor.

- **Limits.** The cap stays between floor and ceiling. At the ceiling nothing is capped, not even a λ above it. A
  request below the cap is never raised.
- **Rate.** The cap falls at once, because a burst is granted within milliseconds. It rises over its whole range in
  twice the target latency.
- **Hysteresis.** The cap rises only while `wanted` is more than a twentieth of the range above it, or the ceiling.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping

EASE, FULL = 0.5, 1.0  # pressure where the cap begins to fall, and where it reaches the floor
RISE = 2.0  # target latencies that the cap takes from floor to ceiling
HYSTERESIS = 0.05  # as a share of the range
MEMORY = 32  # measurements in a running mean


class Means:
    """Running means by integer key, over all measurements at first and over about the last `MEMORY` later."""

    def __init__(self) -> None:
        self._means: dict[int, float] = {}
        self._counts: Counter[int] = Counter()

    def add(self, key: int, value: float) -> None:
        self._counts[key] += 1
        mean = self._means.get(key, value)
        self._means[key] = mean + (value - mean) / min(self._counts[key], MEMORY)

    def at(self, key: int) -> float:
        """Returns the mean at the nearest known key, the lower one in a tie; 0 if nothing has been measured."""
        if not self._means:
            return 0.0
        return self._means[min(self._means, key=lambda known: (abs(known - key), known))]


class IntensityController:
    """A cap on the λ of adjustable requests that follows the load.

    Attributes:
        target: seconds that an answer may take on average, from the request to its last token.
        rows: maximum sequences that the engine decodes together.
        floor: lowest cap.
        ceiling: the cap without load; at the ceiling nothing is capped.
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
        """Creates a controller without load.

        Args:
            target_latency: in seconds.
            rows: maximum sequences that the engine decodes together.
            floor, ceiling: λ between which the cap moves.
            tokens: mean tokens of an answer by λ, if known beforehand.
            clock: returns seconds since any fixed moment.

        Raises:
            ValueError: if the target or rows are not above 0, or if floor and ceiling are not finite and in order.
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
        self._tokens = Means()  # per answer, by tenth of λ
        for intensity, mean in (tokens or {}).items():
            self._tokens.add(_tenth(intensity), mean)
        self._seconds = Means()  # per token, by doubling of rows
        self._waited = 0.0
        self._cap = self.ceiling
        self._moved = clock()

    def grant(self, intensity: float, adjustable: bool) -> float:
        """Returns the λ for a request that arrives now.

        Args:
            intensity: the λ it asks for.
            adjustable: whether it may get less.
        """
        cap = self._move()
        return min(intensity, cap) if adjustable and cap < self.ceiling else intensity

    def start(self, intensity: float) -> None:
        """Counts a sequence as load until `finish`.

        Args:
            intensity: its λ, as granted.
        """
        self._in_flight[_tenth(intensity)] += 1
        self._move()

    def finish(self, intensity: float, tokens: int | None) -> None:
        """Removes a sequence from the load.

        Args:
            intensity: its λ, as granted.
            tokens: how many tokens it generated; None if it was cut off.
        """
        self._in_flight[_tenth(intensity)] -= 1
        if tokens is not None:
            self._tokens.add(_tenth(intensity), tokens)
        self._move()

    def observe(self, running: int, seconds_per_token: float, waited: float) -> None:
        """Reports the state of the engine, ideally after every step.

        Args:
            running: rows that it decodes together.
            seconds_per_token: time per token of one row, which is the duration of a step.
            waited: seconds that the longest-waiting sequence has waited for its first token; 0 if none is waiting.
        """
        self._waited = waited
        if running > 0:
            self._seconds.add(running.bit_length(), seconds_per_token)
        self._move()

    @property
    def pressure(self) -> float:
        """The latency that a new sequence must expect, as a share of the target."""
        sequences = self._in_flight.total()
        if not sequences:
            return 0.0
        rows = min(sequences, self.rows)
        tokens = sum(count * self._tokens.at(tenth) for tenth, count in self._in_flight.items())
        return max(tokens / rows * self._seconds.at(rows.bit_length()), self._waited) / self.target

    @property
    def cap(self) -> float:
        """The highest λ granted to adjustable requests now; at the ceiling there is no limit."""
        return self._move()

    def _move(self) -> float:
        """Updates the cap to the current time and returns it."""
        now, span = self._clock(), self.ceiling - self.floor
        relief = min(max((FULL - self.pressure) / (FULL - EASE), 0.0), 1.0)
        wanted = self.ceiling if relief == 1 else self.floor + span * relief
        if wanted < self._cap:
            self._cap = wanted
        elif wanted == self.ceiling or wanted > self._cap + HYSTERESIS * span:
            self._cap += span * (now - self._moved) / (RISE * self.target)
            if self._cap > wanted - 1e-9 * span:  # many small rises sum up to slightly less
                self._cap = wanted
        self._moved = now
        return self._cap


def _tenth(intensity: float) -> int:
    return round(10 * min(max(intensity, -1.0), 2.0))
