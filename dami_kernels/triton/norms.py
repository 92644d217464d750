"""`lerp_rms_norm` and `lerp_layer_norm`: each program takes a few whole rows.

A row that fits into a block stays in registers; a longer one is reread from the cache.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dami_kernels.launching import Job, Launch, launch
from dami_kernels.triton.device import fetch, lerp, row_lam, start
from dami_kernels.triton.host import cdiv, early, vectors, with_rows_in_one_piece
from dami_kernels.tuning import row_config


@triton.jit
def _numbers(x, columns, valid, D):
    return tl.load(x + columns, mask=valid & (columns < D), other=0.0).to(tl.float32)


@triton.jit
def _fetch(ends, D, BLOCK_D: tl.constexpr):
    for end in tl.static_range(2):
        fetch(ends[end], (0, 1), tl.zeros((1,), tl.int32), 0, D, BLOCK_D)


@triton.jit
def _vector(ends, columns, D, lams):
    """A vector at the λ of each row."""
    base = tl.load(ends[0] + columns, mask=columns < D, other=0.0)
    target = tl.load(ends[1] + columns, mask=columns < D, other=0.0)
    return lerp(base, target, lams)


@triton.jit(do_not_specialize=["M", "rows_per_lam"])
def _lerp_norm_kernel(
    x,
    weight,
    bias,
    lam,
    row_to_lam,
    y,
    M,
    D,
    rows_per_lam,
    stride_x,
    eps,
    offset,
    CENTRED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """y = (x − mean) / sqrt(variance + eps) · (offset + w(λ)) + b(λ); unless CENTRED, the mean is taken to be 0.

    `bias` and `offset` may be None.
    """
    _fetch(weight, D, BLOCK_D)
    if bias is not None:
        _fetch(bias, D, BLOCK_D)
    start()
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    valid = rows < M
    lams = row_lam(lam, row_to_lam, rows, valid, rows_per_lam)
    x += rows.to(tl.int64) * stride_x
    y += rows.to(tl.int64) * D
    block = tl.arange(0, BLOCK_D)[None, :]
    if ONE_BLOCK:  # all is loaded at once, so that nothing waits for memory after the sums
        whole = _numbers(x, block, valid, D)
        whole_factor = _vector(weight, block, D, lams)
        if bias is not None:
            whole_bias = _vector(bias, block, D, lams)

    if CENTRED:
        total = tl.zeros((BLOCK_M, 1), tl.float32)
        for first in range(0, 1 if ONE_BLOCK else D, BLOCK_D):
            total += tl.sum(whole if ONE_BLOCK else _numbers(x, first + block, valid, D), 1, keep_dims=True)
        mean = total / D

    # The mean is known before the squares are summed, for E[x²] − E[x]² would cancel where the mean is large, and what
    # its rounding left over is taken off afterwards.
    left_over = tl.zeros((BLOCK_M, 1), tl.float32)
    squares = tl.zeros((BLOCK_M, 1), tl.float32)
    for first in range(0, 1 if ONE_BLOCK else D, BLOCK_D):
        columns = first + block
        values = whole if ONE_BLOCK else _numbers(x, columns, valid, D)
        if CENTRED:
            values = tl.where(columns < D, values - mean, 0.0)
            left_over += tl.sum(values, 1, keep_dims=True)
        squares += tl.sum(values * values, 1, keep_dims=True)
    variance = squares / D
    if CENTRED:
        left_over /= D
        variance -= left_over * left_over
    scale = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))

    for first in range(0, 1 if ONE_BLOCK else D, BLOCK_D):
        columns = first + block
        values = whole if ONE_BLOCK else _numbers(x, columns, valid, D)
        if CENTRED:
            values = values - mean - left_over
        factor = whole_factor if ONE_BLOCK else _vector(weight, columns, D, lams)
        values = values * scale * (factor if offset is None else offset + factor)
        if bias is not None:
            values += whole_bias if ONE_BLOCK else _vector(bias, columns, D, lams)
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
    return _norm(x, weight, [], lam, row_to_lam, rows_per_lam, eps, offset, is_centred=False)


def lerp_layer_norm(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    eps: float,
) -> Tensor:
    return _norm(x, weight, bias, lam, row_to_lam, rows_per_lam, eps, None, is_centred=True)


def _norm(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    eps: float,
    offset: float | None,
    *,
    is_centred: bool,
) -> Tensor:
    operands = x, tuple(weight), tuple(bias) or None, lam, row_to_lam
    return launch(_plan, operands, rows_per_lam, eps, offset, is_centred)


def _plan(
    x: Tensor,
    weight: tuple[Tensor, ...],
    bias: tuple[Tensor, ...] | None,
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    eps: float,
    offset: float | None,
    is_centred: bool,
) -> Job | Tensor:
    M, D = x.shape
    if M * D == 0:
        return x.new_empty(M, D)
    x = with_rows_in_one_piece(x)
    config = row_config(D)
    named = {
        "M": M,
        "D": D,
        "rows_per_lam": rows_per_lam,
        "stride_x": x.stride(0),
        "eps": eps + 0.0,  # 0 and −0 are equal, and would be remembered as one
        "offset": None if offset is None else offset + 0.0,
        "CENTRED": is_centred,
        "BLOCK_M": config.block_m,
        "BLOCK_D": config.block_d,
        "ONE_BLOCK": config.block_d >= D,
        "num_warps": config.num_warps,
        **early(),
    }
    operands = x, vectors(weight), vectors(bias or ()), lam, row_to_lam
    return Job(operands, (M, D), x.dtype, (Launch(_lerp_norm_kernel, (cdiv(M, config.block_m),), named),))
