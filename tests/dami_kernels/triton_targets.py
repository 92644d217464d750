"""Operands without memory for kernels that are compiled for GPUs that are not there, see benchmarks/codegen.py."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.codegen import DEVICES, TARGETS, Compiled, Driver, compiling_for

__all__ = ["DEVICES", "TARGETS", "Compiled", "Driver", "compiling_for", "meta", "stored"]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def stored(
    *shape: int, dtype: torch.dtype = torch.bfloat16, format: str = "pair", transposed: bool = False
) -> list[Tensor]:
    """The tensors of a weight [..., N, K], as `format` lays them out; an end may be the transpose of what is stored."""
    *rows, K = shape
    *experts, N = rows
    groups = -(-K // 32)
    end = meta(*experts, K, N, dtype=dtype).mT if transposed else meta(*shape, dtype=dtype)
    int8, int4 = meta(*rows, groups * 32, dtype=torch.int8), meta(*rows, groups * 16, dtype=torch.uint8)
    scale = meta(*rows, groups)
    return {
        "pair": [end, end],
        "int8": [end, int8, scale],
        "int4": [end, int4, scale],
        "w8d4": [int8, scale, int4, scale],
    }[format]
