"""What the kernels share: λ of a row, the interpolation that is exact at both ends, and the loader of a weight tile."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

BASE: tl.constexpr = tl.constexpr(0)
TARGET: tl.constexpr = tl.constexpr(1)


@triton.jit
def row_lam(lam, row_to_lam, rows, valid, rows_per_lam):
    """λ of each row, float32: `lam[row_to_lam[row]]`, or `lam[row // rows_per_lam]` without a map; 0 if not valid."""
    index = rows // rows_per_lam if row_to_lam is None else tl.load(row_to_lam + rows, mask=valid, other=0)
    return tl.load(lam + index, mask=valid, other=0.0)


@triton.jit
def lerp(base, target, lam):
    """base + λ (target − base) in float32: exactly one end at λ = 0 and 1, even where the other end is not finite."""
    base = base.to(tl.float32)
    target = target.to(tl.float32)
    delta = target - base
    y = tl.where(lam < 0.5, base + lam * delta, target + (lam - 1.0) * delta)  # from the nearer end, as torch.lerp
    return tl.where(lam == 0.0, base, tl.where(lam == 1.0, target, y))


@triton.jit
def load_end(weight, strides, END: tl.constexpr, rows, columns, mask, FORMAT: tl.constexpr):
    """Tile of one end of a weight, 0 where masked. This is all that a kernel knows about a format.

    Args:
        weight, strides: the format's tensors and the strides of each.
        END: BASE or TARGET.
        rows, columns: indices that broadcast against each other to the shape of the tile.
    """
    tl.static_assert(FORMAT == "pair", "no kernel reads this format")
    offsets = rows.to(tl.int64) * strides[END][0] + columns.to(tl.int64) * strides[END][1]
    return tl.load(weight[END] + offsets, mask=mask, other=0.0)
