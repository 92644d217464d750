"""`lerp_embedding`: a tile of looked-up rows at a time."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dami_kernels.launching import Job, Launch, launch
from dami_kernels.triton.device import BASE, SECOND, combine, load_end, row_lam
from dami_kernels.triton.host import bits_of, cdiv, strides_of
from dami_kernels.tuning import row_config


@triton.jit(do_not_specialize=["M", "rows_per_lam"])
def _lerp_embedding_kernel(
    ids,
    weight,
    lam,
    row_to_lam,
    y,
    M,
    D,
    rows_per_lam,
    strides,
    BASE_BITS: tl.constexpr,
    SECOND_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = tl.program_id(1) * BLOCK_D
    valid = rows < M
    lams = row_lam(lam, row_to_lam, rows, valid, rows_per_lam)
    found = tl.load(ids + rows, mask=valid, other=0)
    # A row with λ = 0, or where it is stored with λ = 1, reads only the end that it needs.
    base_needed = valid & (lams != 1.0) if SECOND_BITS == 0 else valid
    second_needed = valid & (lams != 0.0)
    base = load_end(
        weight, strides, BASE, found, base_needed, start, D, BLOCK_D, tl.float32, BASE_BITS, SECOND_BITS
    )  # fmt: skip
    second = load_end(
        weight, strides, SECOND, found, second_needed, start, D, BLOCK_D, tl.float32, BASE_BITS, SECOND_BITS
    )  # fmt: skip
    columns = start + tl.arange(0, BLOCK_D)
    tl.store(
        y + rows.to(tl.int64)[:, None] * D + columns[None, :],
        combine(base, second, lams[:, None], SECOND_BITS).to(y.dtype.element_ty),
        mask=valid[:, None] & (columns < D)[None, :],
    )


def lerp_embedding(
    ids: Tensor,
    weight: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    format: str,
    dtype: torch.dtype,
    columns: int,
) -> Tensor:
    return launch(_plan, (ids, tuple(weight), lam, row_to_lam), rows_per_lam, format, dtype, columns)


def _plan(
    ids: Tensor,
    weight: tuple[Tensor, ...],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    format: str,
    dtype: torch.dtype,
    columns: int,
) -> Job | Tensor:
    M, D = len(ids), columns
    if M * D == 0:
        return weight[0].new_empty(M, D, dtype=dtype)
    config = row_config(D)
    named = {
        "M": M,
        "D": D,
        "rows_per_lam": rows_per_lam,
        "strides": strides_of(weight),
        **bits_of(format),
        "BLOCK_M": config.block_m,
        "BLOCK_D": config.block_d,
        "num_warps": config.num_warps,
    }
    grid = cdiv(M, config.block_m), cdiv(D, config.block_d)
    return Job((ids, weight, lam, row_to_lam), (M, D), dtype, (Launch(_lerp_embedding_kernel, grid, named),))
