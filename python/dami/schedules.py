"""λ over the steps of decoding: schedules, and what turns a model's dials while `generate` runs.

A schedule is a callable `schedule(step, tokens) -> λ`:

    step    number of tokens generated so far; 0 while the prompt is read
    tokens  int64 [rows, step] on the model's device: the tokens that its rows have generated so far; rows that have
            ended are padded, and each beam of a sequence is a row
    λ       a real number for all its rows, or a tensor [rows]

It is called before every forward pass. It must not keep state between calls, because beams change places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Schedule = Callable[[int, Tensor], float | Tensor]
N = TypeVar("N", float, Tensor)


@dataclass(frozen=True)
class linear:
    """A schedule from `start` to `end` in equal steps over the first `steps` tokens, and `end` after them."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def __call__(self, step: int, tokens: Tensor) -> float:
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


@dataclass(frozen=True)
class switch_after:
    """A schedule with one λ until a row has generated the tokens `ids`, and another λ after them.

    Args:
        ids: one token or several consecutive ones, such as `tokenizer.encode("</think>", add_special_tokens=False)`.
        before: λ until a row has generated them, which is the thought.
        after: λ after them, which is the answer.
    """

    ids: int | Sequence[int]
    before: float
    after: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tag_ids(self.ids, "ids"))

    def __call__(self, step: int, tokens: Tensor) -> float | Tensor:
        ids = tokens.new_tensor(self.ids)
        if step < len(ids):
            return self.before
        passed = (tokens.unfold(1, len(ids), 1) == ids).all(2).any(1)
        return torch.where(passed, self.after, self.before)


def bent(intensity: float, left: N, span: float, least: float = 0.0) -> float | N:
    """Returns λ of a thought that nears the end of its budget, so that the model ends it by itself.

    λ falls in a straight line over the last `span` tokens and reaches `least` with the last one. A budget shorter than
    that begins at a lower λ, because a thought that has begun at length seldom ends early:

        λ(left) = λ − (λ − least) · (1 − clip(left / span, 0, 1)),  if λ > least, else λ

    Args:
        intensity: λ of the thought while there is room.
        left: how many more tokens the thought may have: a number, or a tensor of numbers.
        span: over how many tokens λ falls, above 0.
        least: λ at the end of the budget.
    """
    if intensity <= least:
        return intensity
    share = left / span
    share = share.clamp(0.0, 1.0) if isinstance(share, Tensor) else min(max(share, 0.0), 1.0)
    return intensity - (intensity - least) * (1.0 - share)  # exactly λ while there is room


def thinking(tokens: Tensor, start: Tensor, end: Tensor, inside: bool) -> tuple[Tensor, Tensor]:
    """Returns which rows are inside a thought, bool [rows], and the tokens of their thoughts, int64 [rows].

    A token counts if it was generated inside a thought, the end tag included, as in `thoughts.ThoughtMeter`.

    Args:
        tokens: int64 [rows, step], generated so far.
        start, end: int64 [ids], the tokens of the tags.
        inside: whether the prompts end inside a thought.
    """
    rows, step = tokens.shape
    place = torch.arange(step, device=tokens.device)

    def last(tag: Tensor) -> Tensor:
        """Returns where the last such tag up to each token ends; −1 if there is none."""
        ends = torch.full_like(tokens, -1)
        if step >= len(tag):
            found = (tokens.unfold(1, len(tag), 1) == tag).all(2)
            ends[:, len(tag) - 1 :] = torch.where(found, place[len(tag) - 1 :], -1)
        return ends.cummax(1).values if step else ends

    opened, closed = last(start), last(end)
    after = torch.where(torch.maximum(opened, closed) < 0, inside, opened > closed)
    states = torch.cat([after.new_full((rows, 1), inside), after], 1)  # before each token, and after the last
    return states[:, -1], states[:, :-1].sum(1)


@dataclass(frozen=True)
class bend:
    """A schedule for thoughts with a budget: λ slides toward the Instruct end as a thought nears it.

    `bent` is the law. Outside of thoughts λ is `intensity`. The schedule alone does not keep a thought within
    its budget: `dami.generation.budget.ThoughtLimit` writes the end tag when nothing is left.

    Args:
        intensity: λ while there is room, and of the answer.
        budget: the most tokens of all thoughts of a row together, at least 1.
        start, end: the tokens of the tags around a thought: one or several consecutive ones.
        inside: whether the prompts end inside a thought, as those of some thinking templates do.
        span: over how many tokens λ falls, at least 1: about as many as a thought at this λ takes by itself, if that is
            known; None for the whole budget. It may be longer than the budget, which then begins at a lower λ.
        least: λ at the end of the budget.
    """

    intensity: float
    budget: int
    start: int | Sequence[int]
    end: int | Sequence[int]
    inside: bool = False
    span: float | None = None
    least: float = 0.0

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"budget must be at least 1, got {self.budget}")
        if self.span is not None and not self.span >= 1:
            raise ValueError(f"span must be at least 1, got {self.span}")
        for name in ("start", "end"):
            object.__setattr__(self, name, tag_ids(getattr(self, name), name))

    def __call__(self, step: int, tokens: Tensor) -> float | Tensor:
        inside, used = thinking(tokens, tokens.new_tensor(self.start), tokens.new_tensor(self.end), self.inside)
        span = self.budget if self.span is None else self.span
        lam = bent(self.intensity, self.budget - used, span, self.least)
        return torch.where(inside, lam, self.intensity)


def tag_ids(ids: int | Sequence[int], name: str) -> tuple[int, ...]:
    """Returns the tokens of a tag. Raises ValueError if there are none; the message calls them `name`."""
    several = (ids,) if isinstance(ids, int) else tuple(ids)
    if not several:
        raise ValueError(f"{name} must hold at least one token, got none")
    return several
