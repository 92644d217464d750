"""The ways in which the λ of a batch can be mixed: those of Punica (identical, distinct, uniform, zipf), and the ends.

Up to 1024 rows are a decode step, where every row is a sequence of its own. More rows are a prefill of sequences of
1024 tokens each, which have one λ, except for `distinct`: every row its own λ is the worst that can be asked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SEQUENCE = 1024  # tokens of a sequence in prefill
STEPS = torch.linspace(0, 1, 11)  # the λ of `zipf`, the most popular first, as if users chose from a dial
POPULARITY = 1.5  # exponent of `zipf`

KINDS = {
    "distinct": "every row its own λ",
    "uniform": "sequences of one λ each; in decode √M different λ",
    "zipf": "eleven λ, some far more popular than others",
    "ends": "0 or 1 at random",
    "identical": "one λ for all",
    "zero": "λ = 0 for all",
}


class Lams(NamedTuple):
    """λ as the operators take it: float32 [L], and the rows of each."""

    lam: Tensor
    rows_per_lam: int

    def per_row(self) -> Tensor:
        return self.lam.repeat_interleave(self.rows_per_lam)


def make(kind: str, rows: int, generator: torch.Generator | None = None) -> Lams:
    """λ for `rows` rows, on the CPU; ValueError for an unknown kind or a prefill of no whole sequences."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {list(KINDS)}, got {kind!r}")
    if kind == "distinct":
        return Lams(torch.rand(rows, generator=generator) * 0.98 + 0.01, 1)
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
        each = 1 if length > 1 else round(count**0.5)
        lam = (torch.rand(-(-count // each), generator=generator) * 0.98 + 0.01).repeat_interleave(each)[:count]
    else:
        weights = torch.arange(1, len(STEPS) + 1).float() ** -POPULARITY
        lam = STEPS[torch.multinomial(weights, count, replacement=True, generator=generator)]
    return Lams(lam, length)
