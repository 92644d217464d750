"""Runs a part of a model for one sequence after another, each at its own λ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dami.dial.state import Dial, ForwardState
from dami.layers.base import LerpModule


def number_of_lam(modules: Sequence[LerpModule]) -> int | None:
    """Returns how many λ some modules read; None if all read a single one."""
    return next((len(lam) for lam in (module.lerp.lam for module in modules) if lam.dim()), None)


@contextmanager
def alone(modules: Sequence[LerpModule], running: ForwardState, at: int, tokens: int) -> Iterator[None]:
    """Lets modules run at the λ of one place in the batch only, for the duration of a `with` block.

    Args:
        modules: the modules that run.
        running: their model's forward pass.
        at: whose λ, an index.
        tokens: number of tokens of a sequence, 0 if unknown.
    """
    before = [(module.lerp, module.lerp.part) for module in modules]
    try:
        for lerp, part in before:
            lam = lerp.lam
            lerp.part = Dial(lam[at]) if lam.dim() else part
        with running.during(1, tokens):
            yield
    finally:
        for lerp, part in before:
            lerp.part = part
