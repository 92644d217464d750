"""Finds misspelt keywords of ours: transformers' `**kwargs` would swallow them, and the default λ would apply."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from difflib import get_close_matches

import torch

from dami.callers import listed

OURS = ("intensity", "prompt_intensity", "prompt_tail")
LAMBDA = ("lam", "lambda_", "lmbda", "λ")
ALIKE = 0.75  # of difflib, from 0 to 1: no keyword in transformers is as much like ours,
ALIKE_PROMPTS = 0.85  # except for many that begin with "prompt_"


@torch.compiler.assume_constant_result  # a graph is traced for the keywords of one call
def meant(name: str) -> str | None:
    """The keyword of ours that an unknown keyword probably means, or None."""
    return _meant(name)


@functools.cache
def _meant(name: str) -> str | None:
    if name in LAMBDA:
        return OURS[0]
    alike = ALIKE_PROMPTS if name.startswith("prompt_") else ALIKE
    return next(iter(get_close_matches(name.lower(), OURS, 1, alike)), None)


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


def check_settings(config: object) -> None:
    """Raises a TypeError for λ in a generation config, which keeps whatever it is given, and where nothing reads it."""
    for name in vars(config):
        if ours := meant(name):
            raise TypeError(f"generate takes {ours} as an argument, generate(…, {ours}=…), got {name!r} in its config")
