"""Keeps thoughts within a budget during `generate`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from dami.schedules import tag_ids, thinking


class ThoughtLimit(LogitsProcessor):
    """Writes the end tag when a row's thoughts have used up their budget, and lets it open no other thought.

    With a fixed λ this is a hard cut. With `dami.schedules.bend` most thoughts have ended before.

    Args:
        prompt: number of tokens of the prompts, padding included.
        budget: the most tokens of all thoughts of a row together, at least 0.
        start, end: the tokens of the tags around a thought: one or several consecutive ones.
        inside: whether the prompts end inside a thought.
    """

    def __init__(
        self, prompt: int, budget: int, start: int | Sequence[int], end: int | Sequence[int], inside: bool = False
    ) -> None:
        if budget < 0:
            raise ValueError(f"budget must be at least 0, got {budget}")
        self.prompt, self.budget, self.inside = prompt, budget, inside
        self.start, self.end = tag_ids(start, "start"), tag_ids(end, "end")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns the scores [rows, vocabulary], of which only the end tag's next token is left in rows to be cut."""
        tokens = input_ids[:, self.prompt :]
        inside, used = thinking(tokens, tokens.new_tensor(self.start), tokens.new_tensor(self.end), self.inside)
        spent = used >= self.budget
        if not bool(spent.any()):
            return scores
        scores = scores.clone()
        if len(self.start) == 1:
            scores[spent, self.start[0]] = -torch.inf
        for row in (inside & spent).nonzero().flatten().tolist():
            token = next_of(self.end, tokens[row, -len(self.end) :].tolist())
            scores[row] = torch.full_like(scores[row], -torch.inf).index_fill(0, tokens.new_tensor(token), 0.0)
        return scores


def next_of(tag: Sequence[int], tokens: Sequence[int]) -> int:
    """Returns the token that continues a tag after these tokens, which may end with its beginning."""
    said = [*tokens]
    return next(tag[n] for n in range(len(tag) - 1, -1, -1) if n == 0 or said[-n:] == [*tag[:n]])
