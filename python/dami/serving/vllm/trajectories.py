"""λ of a request in vLLM, by place: of its prompt, of the prompt's tail, and of each token of its answer.

A trajectory travels to vLLM's other processes in the `extra_args` of its request's parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEY = "dami_trajectory"  # in `SamplingParams.extra_args`


@dataclass(eq=False)
class Trajectory:
    """λ at which each token of a request is read.

    Attributes:
        prompt: number of tokens of the prompt.
        points: (tokens, λ) in ascending order, the first of them at 0 tokens of the answer: λ goes in straight lines
            from one to the next, and stays at the last. λ of the first is also that of the prompt's tail.
        tail: tokens at the end of the prompt.
        before: λ of the prompt before its tail.
        turns: (place, λ) in ascending order: λ set by hand, from this place of the sequence on.
        wraps: (place, tokens): how many more tokens a thought may have, as set by hand, from this place on.
        pilot: the name under which the states of its prompt are kept; empty if they are not.
        budget: the most tokens of its thoughts; None for no limit.
        span: over how many tokens λ bends before that; 0 if it does not.
        answer: λ after a thought; None for that of the thought.
        start, end: the tokens of the tags around a thought.
        inside: whether the prompt ends inside a thought.
    """

    prompt: int
    points: Sequence[Sequence[float]]
    tail: int
    before: float
    turns: list[Sequence[float]] = field(default_factory=list)
    wraps: list[Sequence[int]] = field(default_factory=list)
    pilot: str = ""
    budget: int | None = None
    span: float = 0.0
    answer: float | None = None
    start: Sequence[int] = ()
    end: Sequence[int] = ()
    inside: bool = False

    @classmethod
    def of(cls, params: Any) -> Trajectory | None:
        """Returns the trajectory that a request's parameters hold; None if it is no request to a pair."""
        packed = ((params and params.extra_args) or {}).get(KEY)
        return None if packed is None else cls(**packed)

    def put(self, params: Any) -> None:
        """Puts the trajectory into a request's parameters."""
        params.extra_args = {**(params.extra_args or {}), KEY: asdict(self)}

    @property
    def last(self) -> float:
        """The place from which on λ does not change any more."""
        if self.turns:
            return self.turns[-1][0]
        if len(self.points) > 1:
            return self.prompt - 1 + self.points[-1][0]
        return 0 if self.before == self.points[0][1] else max(0, self.prompt - self.tail)

    @property
    def final(self) -> float:
        """λ from there on."""
        return self.turns[-1][1] if self.turns else self.points[-1][1]

    @property
    def thinks(self) -> bool:
        """Whether λ also depends on the tokens of the answer: on its thoughts."""
        return self.budget is not None or self.answer is not None

    def lam(self, start: int, end: int) -> NDArray[np.float32]:
        """Returns λ from the place `start` to before `end`, without regard to thoughts: float32 [end − start]."""
        places = np.arange(start, end)
        tokens, lams = zip(*self.points, strict=True)
        lam = np.interp(places + 1 - self.prompt, tokens, lams)  # the prompt's last token gives the answer's first
        lam[places < self.prompt - self.tail] = self.before
        for place, turned in self.turns:
            lam[places >= place] = turned
        return lam.astype(np.float32)

    def turn(self, place: int, intensity: float | None, wrap_up: int | None = None) -> None:
        """Sets λ from a place on that has not been read yet, or how many more tokens a thought may have there."""
        if intensity is not None:
            self.turns = [turn for turn in self.turns if turn[0] < place] + [(place, intensity)]
        if wrap_up is not None:
            self.wraps = [*self.wraps, (place, wrap_up)]

    def key(self, start: int, end: int) -> str:
        """Returns what the prefix cache has to know of a block beside its tokens: what their λ follow from."""
        if self.thinks and end > self.prompt:  # and from the tokens, by which the cache knows the block, too
            by_hand = [[each for each in changes if each[0] < end] for changes in (self.turns, self.wraps)]
            return repr(
                (self.prompt, self.points, self.tail, self.before, by_hand, self.budget, self.span, self.answer)
            )
        if start >= self.last:
            return self.final.hex()
        runs = [(lam, len([*same])) for lam, same in groupby(self.lam(start, end).tolist())]
        return " ".join(lam.hex() if count == end - start else f"{lam.hex()}*{count}" for lam, count in runs)

    @property
    def salt(self) -> str:
        """What a cache has to know that has no keys for blocks: λ, or all there is if not every token has the same."""
        return repr(self) if self.last or self.thinks else self.final.hex()


def lams(trajectories: Iterable[Trajectory], starts: NDArray[Any], counts: NDArray[Any]) -> NDArray[np.float32]:
    """Returns λ of every token of a step, float32 [tokens].

    Args:
        trajectories: one for each request.
        starts: int [requests], places of the requests' first tokens in the step.
        counts: int [requests], how many tokens of each there are.
    """
    trajectories = [*trajectories]
    found = np.repeat(np.array([trajectory.final for trajectory in trajectories], np.float32), counts)
    for trajectory, start, count, end in zip(trajectories, starts, counts, np.cumsum(counts), strict=True):
        if start < trajectory.last:
            found[end - count : end] = trajectory.lam(start, start + count)
    return found
