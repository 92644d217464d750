"""Finds misspelt keywords of ours: transformers' `**kwargs` would swallow them, and the default λ would apply."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from difflib import get_close_matches

import torch

from dami.callers import listed

# how much a misspelling is alike, of difflib, from 0 to 1: no keyword in transformers is as much like ours
OURS = {"intensity": 0.75, "prompt_intensity": 0.75, "prompt_tail": 0.85}
LAMBDA = ("lam", "lambda_", "lmbda", "λ")


@torch.compiler.assume_constant_result  # a graph is traced for the keywords of one call
def meant(name: str) -> str | None:
    """The keyword of ours that an unknown keyword probably means, or None."""
    return _meant(name)


@functools.cache
def _meant(name: str) -> str | None:
    if name in LAMBDA:
        return "intensity"
    return next((ours for ours, alike in OURS.items() if get_close_matches(name.lower(), [ours], 1, alike)), None)


def check_keywords(function: str, given: Iterable[str], *takes: str) -> None:
    """Raises a TypeError if a keyword looks like a misspelling of one of ours.

    Args:
        function: name of the function that was called.
        given: keywords that it would pass on.
        takes: keywords of ours that it accepts.
    """
    for name in given:
        ours = meant(name)
        if ours is not None:
            elsewhere = "" if ours in takes else f"; {ours} is for generate"
            raise TypeError(f"{function} takes λ as {listed(takes, 'and')}, got {name!r}{elsewhere}")
