"""Keywords that are meant for us and misspelt: transformers' `**kwargs` would take them, and λ would be another."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from difflib import get_close_matches

import torch

OURS = ("intensity", "prompt_intensity")
LAMBDA = ("lam", "lambda_", "lmbda", "λ")
ALIKE = 0.75  # of difflib, from 0 to 1: no keyword in transformers is as much like ours


@torch.compiler.assume_constant_result  # a graph is traced for the keywords of one call
def meant(name: str) -> str | None:
    """Which of our keywords a keyword of nobody else's is meant for; None if it is not like any."""
    return _meant(name)


@functools.cache
def _meant(name: str) -> str | None:
    if name in LAMBDA:
        return OURS[0]
    return next(iter(get_close_matches(name.lower(), OURS, 1, ALIKE)), None)


def check_keywords(function: str, given: Iterable[str], *takes: str) -> None:
    """Refuses what is like one of our keywords: TypeError.

    Args:
        function: that was called.
        given: the keywords that it would hand on.
        takes: those of ours that it takes itself.
    """
    for name in given:
        ours = meant(name)
        if ours is not None:
            elsewhere = "" if ours in takes else f"; {ours} is for generate"
            raise TypeError(f"{function} takes λ as {' and '.join(takes)}, got {name!r}{elsewhere}")
