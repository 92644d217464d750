"""Follows the thoughts of running requests on the device, where their last tokens are, and sets λ that depends on them.

λ of a thought that has a budget bends as `dami.schedules.bent` says, and the answer after a thought may have a λ of its
own. What was set is kept, because a request that vLLM preempts is read again at the same λ.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from dami.serving.vllm.trajectories import Trajectory


class Thoughts:
    """The thoughts of requests, one slot for each.

    Args:
        device: where the tokens are.
        longest: the most tokens of a request.
    """

    def __init__(self, device: Any, longest: int) -> None:
        self._device = device
        self._tags: list[Tensor] = []  # those that open and close a thought, the same for all requests
        self._slots: weakref.WeakKeyDictionary[Trajectory, int] = weakref.WeakKeyDictionary()
        self._taken: dict[int, int] = {}  # tokens of the answer that each slot has followed
        self._free: list[int] = []
        self._inside = torch.empty(0, dtype=torch.bool, device=device)
        self._ended = self._inside.clone()
        self._used = torch.empty(0, dtype=torch.int64, device=device)
        self._said = torch.empty(0, 0, dtype=torch.int64, device=device)  # the last tokens
        self._wishes = torch.empty(0, 3, device=device)  # budget, span and λ of the answer; NaN for none
        self._lam = torch.empty(0, longest, device=device)  # what was set

    def follow(self, lam: Tensor, ids: Tensor, requests: Iterable[tuple[Trajectory, int, int, int]]) -> None:
        """Changes λ of the tokens of a step that are inside a thought with a budget, or after a thought.

        Args:
            lam: float32 [tokens], λ without regard to thoughts.
            ids: int [tokens], the tokens.
            requests: of each, its trajectory, the row of its first token, that token's place, and the number of tokens.
        """
        new = []
        for trajectory, row, start, count in requests:
            end = start + count
            if not trajectory.thinks or end <= trajectory.prompt:
                continue
            slot, first = self._slot(trajectory), max(start, trajectory.prompt)
            taken = trajectory.prompt + self._taken[slot]
            if first < taken:  # read again
                known = self._lam[slot, first - trajectory.prompt : min(end, taken) - trajectory.prompt]
                lam[row + first - start : row + min(end, taken) - start] = known
            if end > taken:
                new.append((slot, row + taken - start, self._taken[slot], bool(trajectory.turns)))
                self._taken[slot] += 1
        if new:
            self._take(lam, ids, *async_tensor_h2d(np.array(new, dtype=np.int64).T.copy(), self._device))

    @torch.inference_mode()
    def wrap_up(self, trajectory: Trajectory, tokens: int) -> None:
        """Lets the thought of a request have so many more tokens at most, over which λ bends."""
        slot = self._slots.get(trajectory)
        if slot is None:  # which will begin with it
            return
        budget, span, _ = self._wishes[slot]
        end = self._used[slot] + self._inside[slot] + tokens
        later = ~(budget <= end)  # or none at all
        self._wishes[slot, 0] = torch.where(later, end, budget)
        self._wishes[slot, 1] = torch.where(later, tokens, span)

    def _take(self, lam: Tensor, ids: Tensor, slots: Tensor, rows: Tensor, taken: Tensor, turned: Tensor) -> None:
        """Takes up the next token of each slot."""
        said = torch.cat([self._said[slots, 1:], ids[rows].long().unsqueeze(1)], 1)
        opened, closed = ((said[:, -len(tag) :] == tag).all(1) for tag in self._tags)
        before = self._inside[slots]
        used, inside = self._used[slots] + before, torch.where(opened | closed, opened, before)
        ended = self._ended[slots] | closed
        budget, span, answer = self._wishes[slots].unbind(1)
        given = lam[rows]
        share = ((budget - used) / span).clamp(0, 1)
        bent = given - given.clamp(min=0) * (1 - share)
        after = torch.where(ended & answer.isfinite() & (turned == 0), answer, given)
        found = torch.where(inside, torch.where(budget.isfinite() & (span > 0), bent, given), after)
        self._said[slots], self._inside[slots], self._used[slots], self._ended[slots] = said, inside, used, ended
        lam[rows] = self._lam[slots, taken] = found

    def _slot(self, trajectory: Trajectory) -> int:
        """Returns the slot of a request, which is free again when its trajectory is gone."""
        if trajectory not in self._slots:
            if not self._free:
                self._grow(trajectory)
            slot = self._slots[trajectory] = self._free.pop()
            weakref.finalize(trajectory, self._free.append, slot)
            self._taken[slot] = 0
            self._inside[slot], self._ended[slot], self._used[slot] = trajectory.inside, False, 0
            self._said[slot] = -1
            wishes = [
                np.nan if wish is None else wish for wish in (trajectory.budget, trajectory.span, trajectory.answer)
            ]
            self._wishes[slot] = torch.tensor(wishes, device=self._device)
            for _, tokens in trajectory.wraps:
                self.wrap_up(trajectory, tokens)
        return self._slots[trajectory]

    def _grow(self, trajectory: Trajectory) -> None:
        """Adds slots for requests like one with this trajectory."""
        if not self._tags:
            self._tags = [torch.tensor(tag, device=self._device) for tag in (trajectory.start, trajectory.end)]
            self._said = self._said.new_empty(0, max(map(len, self._tags)))
        old = len(self._inside)
        new = max(16, old)
        self._free += range(old, old + new)
        for name in ("_inside", "_ended", "_used", "_said", "_wishes", "_lam"):
            tensor = getattr(self, name)
            setattr(self, name, torch.cat([tensor, tensor.new_zeros(new, *tensor.shape[1:])]))
