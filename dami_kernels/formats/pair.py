"""`pair`: both ends as they are. Exact at λ=0 and λ=1; twice the bytes of one weight."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dami_kernels.formats import ALL, Layout, Rows

TENSORS = ("", "_target")


def pack(base: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Keeps both tensors, without a copy."""
    return base, target


def unpack(*tensors: Tensor, columns: int, rows: Rows = ALL) -> tuple[Tensor, Tensor]:
    """Both ends as they are; views where `rows` is a slice."""
    base, target = tensors
    return base[rows], target[rows]


def layout(shape: Sequence[int], dtype: torch.dtype, *_: Tensor) -> Sequence[Layout]:
    return (shape, dtype), (shape, dtype)
