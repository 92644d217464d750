"""How a base and a target weight are stored together: one module per format, found by its file name.

A format is a module with three functions and one constant, and nothing else needs to know about it:

    TENSORS: tuple[str, ...]                  # a suffix for each stored tensor's name; "" for a base left as it is
    pack(base, target) -> tuple[Tensor, ...]  # the tensors to store, in TENSORS' order, from two float ones [..., N, K]
    unpack(*tensors, columns, rows=...)       # base and target again: as they are stored, or in float32
    layout(shape, dtype, *tensors)            # the shape and dtype that each tensor must have, of ends of these

`rows` indexes the first dimension, a slice or int64 indices, so that no whole copy is needed to read some of a weight;
`columns` is K, which a format may have padded.

A format that plain products serve best may have two more, in differentiable torch operations; no kernel is then asked:

    linear(x, lam, *tensors) -> Tensor        # x [M, K] and λ per row [M] → [M, N]
    embedding(ids, lam, *tensors) -> Tensor   # ids [M] and λ per row [M] → [M, D]
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dami_kernels.quantize import row_blocks

Rows = slice | Tensor
Layout = tuple[Sequence[int], torch.dtype]
ALL = slice(None)


class Format(Protocol):
    """What a format module offers."""

    TENSORS: tuple[str, ...]

    def pack(self, base: Tensor, target: Tensor) -> tuple[Tensor, ...]: ...

    def unpack(self, *tensors: Tensor, columns: int, rows: Rows = ALL) -> tuple[Tensor, Tensor]: ...

    def layout(self, shape: Sequence[int], dtype: torch.dtype, *tensors: Tensor) -> Sequence[Layout]: ...


def names() -> list[str]:
    """Names of all formats, sorted."""
    return sorted(_MODULES)


def get(name: str) -> Format:
    """The format called `name`; ValueError if there is none."""
    if name not in _MODULES:
        raise ValueError(f"format must be one of {names()}, got {name!r}")
    return _MODULES[name]


def check(format: str, tensors: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> None:
    """Checks that tensors are what a format stores of ends of this shape and dtype: kernels read what these promise.

    Raises:
        ValueError: the format is unknown, or the number of tensors, their shapes or their devices are wrong.
        TypeError: a dtype is.
    """
    names = get(format).TENSORS
    if len(tensors) != len(names):
        raise ValueError(f"tensors of {format!r} must be {len(names)}, got {len(tensors)}")
    device = tensors[0].device
    for i, (wanted, kind) in enumerate(get(format).layout(shape, dtype, *tensors)):
        tensor = tensors[i]
        if tensor.dtype == kind and tensor.shape == torch.Size(wanted) and tensor.device == device:
            continue
        raise (ValueError if tensor.dtype == kind else TypeError)(
            f"tensors[{i}] of {format!r} with ends of shape {list(shape)} must be {kind} of shape {list(wanted)} on "
            f"{device}, got {tensor.dtype} of shape {list(tensor.shape)} on {tensor.device}"
        )


def float_blocks(format: str, tensors: Sequence[Tensor], columns: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Both ends in float32, a block of the first dimension at a time, so that no whole copy ever exists."""
    for rows in row_blocks(tensors[0].shape[0], tensors[0].shape[1:-1].numel() * columns):
        base, target = get(format).unpack(*tensors, columns=columns, rows=rows)
        yield rows, base.float(), target.float()


# At once, and here, where what they import from this file is defined: torch.compile cannot trace an import.
_MODULES: dict[str, Any] = {
    module.name: importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)
}
