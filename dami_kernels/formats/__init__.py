"""How a base and a target weight are stored together.

Formats are registered by name: the package's own below, yours with `register_format`. The protocol `Format` defines
what a format is, and everything else follows from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dami_kernels.formats import int4, int8, lowrank, pair, w8d4
from dami_kernels.formats.base import ALL, Codes, Format, Layout, Matrices, Matrix, Numbers, Rows
from dami_kernels.quantize import row_blocks

__all__ = [
    "ALL",
    "Codes",
    "Format",
    "Layout",
    "Matrices",
    "Matrix",
    "Numbers",
    "Rows",
    "check",
    "float_blocks",
    "get",
    "matrices",
    "names",
    "register_format",
    "suffixes",
]

_FORMATS: dict[str, Format] = {}


def register_format(name: str, format: Format) -> None:
    """Registers a format by name, for use in `LerpWeight.pack`, the operators, and patched and saved models.

    Register the format before you load a model that was saved with it. Kernels can read `Matrices` only. With any
    other format an operator runs in plain torch and warns once, unless the format brings its own products.

    Raises:
        TypeError: the format lacks something that `Format` names.
        ValueError: the name is taken or not an identifier, or the suffixes of the stored tensors are not distinct.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name must be an identifier, got {name!r}")
    if _FORMATS.get(name, format) is not format:
        raise ValueError(f"name must not be that of another format, got {name!r}")
    lacking = [part for part in ("pack", "unpack", "layout") if not callable(getattr(format, part, None))]
    if lacking:
        raise TypeError(f"format must have pack, unpack and layout, got {format!r} without {', '.join(lacking)}")
    tensors = getattr(format, "TENSORS", None)
    if not isinstance(tensors, tuple) or not tensors or not all(isinstance(suffix, str) for suffix in tensors):
        raise TypeError(f"format.TENSORS must be a tuple of one string at least, got {tensors!r}")
    if len(set(tensors)) != len(tensors):
        raise ValueError(f"format.TENSORS must be distinct, got {tensors!r}")
    _FORMATS[name] = format


def names() -> list[str]:
    """Returns the names of all formats, sorted."""
    return sorted(_FORMATS)


def get(name: str) -> Format:
    """Returns the format called `name`. Raises ValueError if there is none."""
    if name not in _FORMATS:
        raise ValueError(f"format must be one of {names()}, got {name!r}; `register_format` adds others")
    return _FORMATS[name]


def matrices(name: str) -> Matrices:
    """Returns the format called `name`. Raises NotImplementedError if it is not a `Matrices` format."""
    format = get(name)
    if not isinstance(format, Matrices):
        raise NotImplementedError(f"no kernel reads the format {name!r}")
    return format


def suffixes() -> list[str]:
    """Returns the suffixes of all tensors stored alongside a parameter, sorted."""
    return sorted({suffix for format in _FORMATS.values() for suffix in format.TENSORS} - {""})


def check(format: str, tensors: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> None:
    """Checks that tensors are what a format stores for ends of this shape and dtype. Kernels rely on it.

    Raises:
        ValueError: the format is unknown, or the number of tensors, their shapes or their devices are wrong.
        TypeError: a dtype is wrong.
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
    """Yields both ends in float32, a block of the first dimension at a time, to avoid a full copy."""
    for rows in row_blocks(tensors[0].shape[0], tensors[0].shape[1:-1].numel() * columns):
        base, target = get(format).unpack(*tensors, columns=columns, rows=rows)
        yield rows, base.float(), target.float()


register_format("pair", pair.FORMAT)
register_format("int8", int8.FORMAT)
register_format("int4", int4.FORMAT)
register_format("w8d4", w8d4.FORMAT)
register_format("lowrank", lowrank)
