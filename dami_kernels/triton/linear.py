"""`lerp_linear`: Yᵀ = W(λ) · Xᵀ, a tile of features by rows at a time.

The weight is the left operand of `tl.dot`, so that a weight blended in registers can stay there: on sm_90 only wgmma's
left operand may come from registers, on sm_100 only tcgen05's left operand from tensor memory.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dami_kernels.triton.device import BASE, SECOND, blend, combine, lerp, load_end, row_lam
from dami_kernels.triton.host import (
    TENSORS,
    cdiv,
    check_format,
    on_device_of,
    strides_of,
    vectors,
    with_rows_in_one_piece,
)
from dami_kernels.tuning import device_of, linear_config

BLEND = tl.constexpr(2)
BOTH = tl.constexpr(3)


@triton.jit
def _linear(
    ENDS: tl.constexpr,
    x,
    stride_x,
    weight,
    strides,
    lam,
    tile,
    FORMAT: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """W · Xᵀ over a range of k, [BLOCK_N, BLOCK_M] float32: of both ends, of one, or (the first) of their blend.

    `lam` is a tile [1, 1]: the compiler moves the layout of a loaded tile freely but not that of a scalar, and given a
    scalar it sends the blended weight through shared memory.
    """
    rows, features, M, N, K, step_begin, step_end = tile
    y_base = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    y_target = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    x += rows.to(tl.int64)[None, :] * stride_x
    DTYPE: tl.constexpr = tl.float32 if ENDS == BLEND else x.dtype.element_ty
    for step in range(step_begin, step_end):
        k = step * BLOCK_K
        limit = None if EVEN_K else K
        if ENDS != SECOND:
            base = load_end(weight, strides, BASE, features, features < N, k, limit, BLOCK_K, DTYPE, FORMAT)
        if ENDS != BASE:
            target = load_end(weight, strides, SECOND, features, features < N, k, limit, BLOCK_K, DTYPE, FORMAT)
        inner = k + tl.arange(0, BLOCK_K)[:, None]
        x_mask = (rows < M)[None, :] if EVEN_K else (rows < M)[None, :] & (inner < K)
        x_tile = tl.load(x + inner, mask=x_mask, other=0.0)
        # "ieee" keeps float32 away from TF32, whose 10 bits of mantissa would break the accuracy contract.
        if ENDS == BLEND:
            # Blended in float32 and rounded once, as the merged weight of the accuracy contract is. The short form
            # does: λ = 0 and λ = 1 never come here.
            w = blend(base, target, lam, FORMAT)
            y_base = tl.dot(w.to(x_tile.dtype), x_tile, y_base, input_precision="ieee")
        else:
            if ENDS != SECOND:
                y_base = tl.dot(base, x_tile, y_base, input_precision="ieee")
            if ENDS != BASE:
                y_target = tl.dot(target, x_tile, y_target, input_precision="ieee")
    return y_base, y_target


@triton.jit
def linear_tile(
    x,
    stride_x,
    weight,
    strides,
    bias,
    lam,
    row_to_lam,
    rows_per_lam,
    out,
    tile,
    FORMAT: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_BLEND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes one tile of one split's share of y, and stores it into out [rows, N].

    `tile` is (first row, M, first feature, N, K, first step, end of the steps); rows end at M, features at N.
    """
    first_row, M, first_feature, N, K, step_begin, step_end = tile
    rows = first_row + tl.arange(0, BLOCK_M)
    features = first_feature + tl.arange(0, BLOCK_N)
    loop = (rows, features, M, N, K, step_begin, step_end)
    lams = row_lam(lam, row_to_lam, rows, rows < M, rows_per_lam)
    first = row_lam(lam, row_to_lam, tl.full((1, 1), first_row, tl.int32), True, rows_per_lam)
    # Not by min and max: they pass over a NaN, whose row would then take its neighbours' λ.
    mixed = tl.sum(((rows < M) & (lams != tl.max(first))).to(tl.int32)) > 0
    if not mixed and tl.max(first) == 0.0:
        y, _ = _linear(BASE, x, stride_x, weight, strides, first, loop, FORMAT, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K)
    elif FORMAT == "pair" and not mixed and tl.max(first) == 1.0:
        _, y = _linear(SECOND, x, stride_x, weight, strides, first, loop, FORMAT, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K)
    elif USE_BLEND and not mixed:
        y, _ = _linear(BLEND, x, stride_x, weight, strides, first, loop, FORMAT, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K)
    else:
        base, target = _linear(
            BOTH, x, stride_x, weight, strides, first, loop, FORMAT, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K
        )
        # λ is loaded again, as the accumulators lie: kept from above it would fill registers all through the loop.
        row_tile = first_row + tl.arange(0, BLOCK_M)[None, :]
        y = combine(base, target, row_lam(lam, row_to_lam, row_tile, row_tile < M, rows_per_lam), FORMAT)
    if bias is not None:
        mask = (features < N) & (step_begin == 0)
        bias_base = tl.load(bias[0] + features, mask=mask, other=0.0)[:, None]
        bias_target = tl.load(bias[1] + features, mask=mask, other=0.0)[:, None]
        row_tile = first_row + tl.arange(0, BLOCK_M)[None, :]
        y += lerp(bias_base, bias_target, row_lam(lam, row_to_lam, row_tile, row_tile < M, rows_per_lam))
    out += rows.to(tl.int64)[:, None] * N + features[None, :]
    tl.store(out, tl.trans(y).to(out.dtype.element_ty), mask=(rows < M)[:, None] & (features < N)[None, :])


# M and rows_per_lam change with every batch: specialised on, they would compile the kernel again.
@triton.jit(do_not_specialize=["M", "rows_per_lam"])
def _lerp_linear_kernel(
    x,
    weight,
    bias,
    lam,
    row_to_lam,
    out,
    M,
    N,
    K,
    steps_per_split,
    rows_per_lam,
    stride_x,
    strides,
    FORMAT: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_BLEND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of one split's share of y, into out [splits, M, N]."""
    pid, split = tl.program_id(0), tl.program_id(1)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # Programs that run at the same time share eight tiles of the weight, and some of x, in the L2 cache.
    tile_n, tile_m = tl.swizzle2d(pid // tiles_m, pid % tiles_m, tiles_n, tiles_m, 8)
    begin = split * steps_per_split
    tile = (tile_m * BLOCK_M, M, tile_n * BLOCK_N, N, K, begin, min(begin + steps_per_split, tl.cdiv(K, BLOCK_K)))
    out += split.to(tl.int64) * M * N
    linear_tile(
        x, stride_x, weight, strides, bias, lam, row_to_lam, rows_per_lam, out, tile,
        FORMAT, EVEN_K, USE_BLEND, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _sum_splits_kernel(parts, y, size, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr):
    """y [size] from parts [SPLIT_K, size], summed in an order that does not depend on which program ended first."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    splits = tl.arange(0, SPLIT_K).to(tl.int64)
    total = tl.sum(tl.load(parts + splits[:, None] * size + index[None, :], mask=(index < size)[None, :], other=0.0), 0)
    tl.store(y + index, total.to(y.dtype.element_ty), mask=index < size)


def lerp_linear(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    format: str,
    invariant: bool,
) -> Tensor:
    check_format(format)
    M, K = x.shape
    N = weight[0].shape[0]
    y = x.new_empty(M, N)
    if y.numel() == 0:
        return y
    config = linear_config(M, N, K, x.dtype, format, device_of(x.device))
    x = with_rows_in_one_piece(x)
    parts = y if config.split_k == 1 else x.new_empty(config.split_k, M, N, dtype=torch.float32)
    steps = cdiv(K, config.block_k * config.split_k)
    with on_device_of(x):
        _lerp_linear_kernel[cdiv(M, config.block_m) * cdiv(N, config.block_n), config.split_k](
            x,
            tuple(weight),
            vectors(bias),
            lam,
            row_to_lam,
            parts,
            M,
            N,
            K,
            steps,
            rows_per_lam,
            x.stride(0),
            strides_of(weight),
            FORMAT=format,
            EVEN_K=K % config.block_k == 0,
            USE_BLEND=config.use_blend,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if config.split_k > 1:
            _sum_splits_kernel[cdiv(y.numel(), 256),](parts, y, y.numel(), SPLIT_K=config.split_k, BLOCK=256)
    return y


def lerp_linears(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    format: str,
    invariant: bool,
) -> Tensor:
    check_format(format)
    each = TENSORS[format]
    rest = (lam, row_to_lam, rows_per_lam, format, invariant)
    ys = [
        lerp_linear(x, weights[i * each : (i + 1) * each], biases[2 * i : 2 * i + 2], *rest)
        for i in range(len(weights) // each)
    ]
    return torch.cat(ys, 1)
