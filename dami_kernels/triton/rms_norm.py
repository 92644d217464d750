"""`lerp_rms_norm`: some whole rows a program, read twice; the second time they are in the cache."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dami_kernels.triton.device import lerp, row_lam
from dami_kernels.triton.host import cdiv, on_device_of, vectors, with_rows_in_one_piece
from dami_kernels.tuning import row_config


@triton.jit(do_not_specialize=["M", "rows_per_lam"])
def _lerp_rms_norm_kernel(
    x,
    weight,
    lam,
    row_to_lam,
    y,
    M,
    D,
    rows_per_lam,
    stride_x,
    eps,
    offset,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    valid = rows < M
    lams = row_lam(lam, row_to_lam, rows, valid, rows_per_lam)
    x += rows.to(tl.int64) * stride_x
    y += rows.to(tl.int64) * D

    squares = tl.zeros((BLOCK_M, 1), tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)[None, :]
        values = tl.load(x + columns, mask=valid & (columns < D), other=0.0).to(tl.float32)
        squares += tl.sum(values * values, 1, keep_dims=True)
    scale = tl.div_rn(1.0, tl.sqrt_rn(squares / D + eps))

    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)[None, :]
        values = tl.load(x + columns, mask=valid & (columns < D), other=0.0).to(tl.float32)
        base = tl.load(weight[0] + columns, mask=columns < D, other=0.0)
        target = tl.load(weight[1] + columns, mask=columns < D, other=0.0)
        values = values * scale * (offset + lerp(base, target, lams))
        tl.store(y + columns, values.to(y.dtype.element_ty), mask=valid & (columns < D))


def lerp_rms_norm(
    x: Tensor,
    weight: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    eps: float,
    offset: float,
) -> Tensor:
    M, D = x.shape
    y = x.new_empty(M, D)
    if y.numel() == 0:
        return y
    config = row_config(D)
    x = with_rows_in_one_piece(x)
    with on_device_of(x):
        _lerp_rms_norm_kernel[cdiv(M, config.block_m),](
            x,
            vectors(weight),
            lam,
            row_to_lam,
            y,
            M,
            D,
            rows_per_lam,
            x.stride(0),
            eps,
            offset,
            BLOCK_M=config.block_m,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
        )
    return y
