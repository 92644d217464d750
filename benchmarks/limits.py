"""The least time that a machine allows: bytes over its bandwidth or operations over its peak, whichever is more."""

from __future__ import annotations

import torch
from torch import Tensor

from dami_kernels import LerpWeight, formats


def bytes_read(weight: LerpWeight, lam: Tensor) -> int:
    """Returns the stored bytes that a product must read at these λ. At an end, only that end, if it is stored."""
    format = formats.get(weight.format)
    matrices = format if isinstance(format, formats.Matrices) else None
    first = len(matrices.base.suffixes) if matrices else 1  # `lowrank` stores its base first
    base, rest = (sum(tensor.nbytes for tensor in part) for part in (weight.tensors[:first], weight.tensors[first:]))
    if bool((lam == 0).all()):
        return base
    if matrices and matrices.has_target and bool((lam == 1).all()):
        return rest
    return base + rest


def operations(weight: LerpWeight, lam: Tensor) -> int:
    """Returns the operations of a product with `weight` [N, K] at each row's λ. A multiply-add counts as two.

    Rows at an end take one product. Rows that share another λ take two products, or a blend of the weight (two
    multiply-adds each) and one product, whichever is less. `lowrank` takes a product with each of its tensors.
    """
    if weight.format == "lowrank":
        return 2 * len(lam) * sum(tensor.numel() for tensor in weight.tensors)
    values, counts = lam.unique(return_counts=True)
    total = 0
    for value, rows in zip(values.tolist(), counts.tolist(), strict=True):
        total += 2 * rows if value in (0, 1) else min(4 * rows, 2 * rows + 4)
    return total * weight.shape.numel()


def activation_bytes(rows: int, n: int, k: int, dtype: torch.dtype) -> int:
    """Returns the bytes of reading x and writing y."""
    return rows * (n + k) * dtype.itemsize
