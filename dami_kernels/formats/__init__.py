"""How a base and a target weight are stored together: one module per format, found by its file name.

A format is a module with two functions and one constant, and nothing else needs to know about it:

    TENSORS: tuple[str, ...]                              # what each stored tensor is called, as a parameter suffix
    pack(base, target) -> tuple[Tensor, ...]              # the stored tensors, in TENSORS' order
    unpack(*tensors) -> tuple[Tensor, Tensor]             # base and target again, in the storage dtype
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Protocol

from torch import Tensor


class Format(Protocol):
    """What a format module offers."""

    TENSORS: tuple[str, ...]

    def pack(self, base: Tensor, target: Tensor) -> tuple[Tensor, ...]: ...

    def unpack(self, *tensors: Tensor) -> tuple[Tensor, Tensor]: ...


def names() -> list[str]:
    """Names of all formats, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


@cache
def get(name: str) -> Format:
    """The format called `name`; ValueError if there is none."""
    if name not in names():
        raise ValueError(f"format must be one of {names()}, got {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
