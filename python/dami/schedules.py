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

import torch
from torch import Tensor

Schedule = Callable[[int, Tensor], float | Tensor]


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
        ids = (self.ids,) if isinstance(self.ids, int) else tuple(self.ids)
        if not ids:
            raise ValueError("ids must hold at least one token, got none")
        object.__setattr__(self, "ids", ids)

    def __call__(self, step: int, tokens: Tensor) -> float | Tensor:
        ids = tokens.new_tensor(self.ids)
        if step < len(ids):
            return self.before
        passed = (tokens.unfold(1, len(ids), 1) == ids).all(2).any(1)
        return torch.where(passed, self.after, self.before)
