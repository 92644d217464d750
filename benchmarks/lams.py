"""The ways in which the λ of a batch can be mixed: those of Punica (identical, distinct, uniform, zipf), and the ends.

Up to 1024 rows are a decode step, where every row is a sequence of its own. More rows are a prefill of sequences of
1024 tokens each, which have one λ, except for `distinct`: every row its own λ is the worst that can be asked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SEQUENCE = 1024  # tokens per sequence in prefill
STEPS = torch.linspace(0, 1, 11)  # the λ of `zipf`, most popular first, as if users chose on a dial
POPULARITY = 1.5  # exponent of `zipf`

KINDS = {
    "distinct": "every row its own λ",
    "uniform": "sequences of one λ each; in decode √M different λ",
    "ragged": "sequences of one λ each, of unequal lengths; in decode √M of them",
    "zipf": "eleven λ, some far more popular than others",
    "ends": "0 or 1 at random",
    "identical": "one λ for all",
    "zero": "λ = 0 for all",
}


class Lams(NamedTuple):
    """λ as the operators take it: float32 [L], with the rows per λ, or the λ of each row, int32 [rows]."""

    lam: Tensor
    rows_per_lam: int
    row_to_lam: Tensor | None = None

    def per_row(self) -> Tensor:
        if self.row_to_lam is not None:
            return self.lam[self.row_to_lam]
        return self.lam.repeat_interleave(self.rows_per_lam)

    def to(self, device: torch.device) -> Lams:
        row_to_lam = None if self.row_to_lam is None else self.row_to_lam.to(device)
        return Lams(self.lam.to(device), self.rows_per_lam, row_to_lam)


def make(kind: str, rows: int, generator: torch.Generator | None = None) -> Lams:
    """Creates λ for `rows` rows on the CPU. Raises ValueError for an unknown kind or partial sequences in prefill."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {list(KINDS)}, got {kind!r}")
    if kind == "distinct":
        return Lams(torch.rand(rows, generator=generator) * 0.98 + 0.01, 1)
    if kind == "ragged":
        count = round(rows**0.5 if rows <= SEQUENCE else rows / SEQUENCE)
        starts = torch.randperm(rows - 1, generator=generator)[: count - 1] + 1
        row_to_lam = torch.zeros(rows, dtype=torch.int32).index_fill_(0, starts, 1).cumsum(0, dtype=torch.int32)
        return Lams(torch.rand(count, generator=generator) * 0.98 + 0.01, 1, row_to_lam)
    length = SEQUENCE if rows > SEQUENCE else 1
    if rows % length:
        raise ValueError(f"rows beyond {SEQUENCE} must be a multiple of it, got {rows}")
    count = rows // length
    if kind == "identical":
        lam = torch.full((count,), 0.3)
    elif kind == "zero":
        lam = torch.zeros(count)
    elif kind == "ends":
        lam = torch.randint(2, (count,), generator=generator).float()
    elif kind == "uniform":
        run = 1 if length > 1 else round(count**0.5)  # consecutive rows with one λ
        lam = (torch.rand(-(-count // run), generator=generator) * 0.98 + 0.01).repeat_interleave(run)[:count]
    else:
        weights = torch.arange(1, len(STEPS) + 1).float() ** -POPULARITY
        lam = STEPS[torch.multinomial(weights, count, replacement=True, generator=generator)]
    return Lams(lam, length)
