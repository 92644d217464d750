"""`lerp_linear`: Yᵀ = W(λ) · Xᵀ, a tile of features by rows at a time.

The weight is the left operand of `tl.dot`, so that a weight blended in registers can stay there: on sm_90 only wgmma's
left operand may come from registers, on sm_100 only tcgen05's left operand from tensor memory.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dami_kernels.triton.device import BASE, TARGET, lerp, load_end, row_lam
from dami_kernels.triton.host import cdiv, on_device_of, strides_of, vectors, with_rows_in_one_piece
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
    bias,
    lam,
    tile,
    FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """W · Xᵀ + b over a range of k, [BLOCK_N, BLOCK_M] float32: of both ends, of one, or (the first) of their blend.

    `lam` is a tile [1, 1]: the compiler moves the layout of a loaded tile freely but not that of a scalar, and given a
    scalar it sends the blended weight through shared memory.
    """
    rows, features, M, N, K, k_begin, k_end = tile
    y_base = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    y_target = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    x += rows.to(tl.int64)[None, :] * stride_x
    for k in range(k_begin, k_end, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        mask = (features < N)[:, None] & (inner < K)[None, :]
        if ENDS != TARGET:
            base = load_end(weight, strides, BASE, features[:, None], inner[None, :], mask, FORMAT)
        if ENDS != BASE:
            target = load_end(weight, strides, TARGET, features[:, None], inner[None, :], mask, FORMAT)
        x_tile = tl.load(x + inner[:, None], mask=(rows < M)[None, :] & (inner < K)[:, None], other=0.0)
        # "ieee" keeps float32 away from TF32, whose 10 bits of mantissa would break the accuracy contract.
        if ENDS == BLEND:
            # Blended in float32 and rounded once, as the merged weight of the accuracy contract is. The short form
            # does: λ = 0 and λ = 1 never come here.
            blend = base.to(tl.float32) + lam * (target.to(tl.float32) - base.to(tl.float32))
            y_base = tl.dot(blend.to(base.dtype), x_tile, y_base, input_precision="ieee")
        else:
            if ENDS != TARGET:
                y_base = tl.dot(base, x_tile, y_base, input_precision="ieee")
            if ENDS != BASE:
                y_target = tl.dot(target, x_tile, y_target, input_precision="ieee")
    if bias is not None:
        bias_base = tl.load(bias[0] + features, mask=features < N, other=0.0)[:, None]
        bias_target = tl.load(bias[1] + features, mask=features < N, other=0.0)[:, None]
        if ENDS == BLEND:
            y_base += lerp(bias_base, bias_target, tl.max(lam))
        else:
            y_base += bias_base
            y_target += bias_target
    return y_base, y_target


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
    k_per_split,
    rows_per_lam,
    stride_x,
    strides,
    FORMAT: tl.constexpr,
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
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    features = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k_begin = split * k_per_split
    tile = (rows, features, M, N, K, k_begin, min(k_begin + k_per_split, K))

    lams = row_lam(lam, row_to_lam, rows, rows < M, rows_per_lam)
    first = row_lam(lam, row_to_lam, tl.full((1, 1), tile_m * BLOCK_M, tl.int32), True, rows_per_lam)
    # Not by min and max: they pass over a NaN, whose row would then take its neighbours' λ.
    mixed = tl.sum(((rows < M) & (lams != tl.max(first))).to(tl.int32)) > 0
    if not mixed and tl.max(first) == 0.0:
        y, _ = _linear(BASE, x, stride_x, weight, strides, bias, first, tile, FORMAT, BLOCK_M, BLOCK_N, BLOCK_K)
    elif not mixed and tl.max(first) == 1.0:
        _, y = _linear(TARGET, x, stride_x, weight, strides, bias, first, tile, FORMAT, BLOCK_M, BLOCK_N, BLOCK_K)
    elif USE_BLEND and not mixed:
        y, _ = _linear(BLEND, x, stride_x, weight, strides, bias, first, tile, FORMAT, BLOCK_M, BLOCK_N, BLOCK_K)
    else:
        base, target = _linear(BOTH, x, stride_x, weight, strides, bias, first, tile, FORMAT, BLOCK_M, BLOCK_N, BLOCK_K)
        # λ is loaded again, as the accumulators lie: kept from above it would fill registers all through the loop.
        row_tile = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        y = lerp(base, target, row_lam(lam, row_to_lam, row_tile, row_tile < M, rows_per_lam))

    out += (split.to(tl.int64) * M + rows)[:, None] * N + features[None, :]
    tl.store(out, tl.trans(y).to(out.dtype.element_ty), mask=(rows < M)[:, None] & (features < N)[None, :])


@triton.jit(do_not_specialize=["M", "rows_per_lam"])
def _sum_splits_kernel(
    parts,
    bias,
    lam,
    row_to_lam,
    y,
    M,
    N,
    rows_per_lam,
    SPLIT_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y [M, N] from parts [SPLIT_K, M, N], summed in an order that does not depend on which program ended first."""
    pid = tl.program_id(0)
    row = pid // tl.cdiv(N, BLOCK_N)
    features = (pid % tl.cdiv(N, BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)
    splits = tl.arange(0, SPLIT_K).to(tl.int64)
    parts += (splits * M + row)[:, None] * N + features[None, :]
    total = tl.sum(tl.load(parts, mask=(features < N)[None, :], other=0.0), 0)
    if bias is not None:
        base = tl.load(bias[0] + features, mask=features < N, other=0.0)
        target = tl.load(bias[1] + features, mask=features < N, other=0.0)
        total += lerp(base, target, row_lam(lam, row_to_lam, row, True, rows_per_lam))
    tl.store(y + row.to(tl.int64) * N + features, total.to(y.dtype.element_ty), mask=features < N)


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
    if format != "pair":
        raise NotImplementedError(f"no kernel reads the format {format!r}")
    M, K = x.shape
    N = weight[0].shape[0]
    y = x.new_empty(M, N)
    if y.numel() == 0:
        return y
    config = linear_config(M, N, K, x.dtype, format, device_of(x.device))
    x = with_rows_in_one_piece(x)
    ends = vectors(bias)
    parts = y if config.split_k == 1 else x.new_empty(config.split_k, M, N, dtype=torch.float32)
    steps = cdiv(K, config.block_k * config.split_k)
    with on_device_of(x):
        _lerp_linear_kernel[cdiv(M, config.block_m) * cdiv(N, config.block_n), config.split_k](
            x,
            tuple(weight),
            ends if config.split_k == 1 else None,
            lam,
            row_to_lam,
            parts,
            M,
            N,
            K,
            steps * config.block_k,
            rows_per_lam,
            x.stride(0),
            strides_of(weight),
            FORMAT=format,
            USE_BLEND=config.use_blend,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if config.split_k > 1:
            block_n = min(triton.next_power_of_2(N), 1024)
            _sum_splits_kernel[M * cdiv(N, block_n),](
                parts, ends, lam, row_to_lam, y, M, N, rows_per_lam, SPLIT_K=config.split_k, BLOCK_N=block_n
            )
    return y


def lerp_linears(x: Tensor, weights: list[Tensor], biases: list[Tensor], *rest: Any) -> Tensor:
    return torch.cat(
        [lerp_linear(x, weights[i : i + 2], biases[i : i + 2], *rest) for i in range(0, len(weights), 2)], 1
    )
