"""`lerp_linear` and `lerp_linears`: Yᵀ = W(λ) · Xᵀ, a tile of features by rows at a time.

The weight is the left operand of `tl.dot`, so that a weight blended in registers can stay there: on sm_90 only wgmma's
left operand may come from registers, on sm_100 only tcgen05's left operand from tensor memory.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dami_kernels import cuda
from dami_kernels.triton.device import BASE, SECOND, blend, combine, lerp, load_end, row_lam
from dami_kernels.triton.host import (
    cdiv,
    is_even,
    on_device_of,
    strides_of,
    vectors,
    weights_of,
    with_rows_in_one_piece,
)
from dami_kernels.tuning import device_of, linear_config, row_span

BLEND = tl.constexpr(2)
BOTH = tl.constexpr(3)


@triton.jit
def _add_step(y, carry, w, x):
    """y + carry += w · x, for one step over K.

    On tensor cores y is their accumulator. Float32 has none, and added to y one by one its products would make a single
    chain over all of K, whose error grows with K's root: there a step is summed by itself, and `carry` collects what y
    rounds away when it is added (Fast2Sum).
    """
    if x.dtype == tl.float32:
        # "ieee" keeps float32 away from TF32, whose 10 bits of mantissa would break the accuracy contract.
        step = tl.dot(w, x, input_precision="ieee")
        total = y + step
        carry += step - (total - y)
        y = total
    else:
        y = tl.dot(w, x, y)
    return y, carry


@triton.jit
def _carried(y, carry):
    """y with what its rounding has lost; where y is not finite the carry is NaN, and y stays."""
    return tl.where(carry == carry, y + carry, y)


@triton.jit
def _tile(
    ENDS: tl.constexpr,
    x,
    stride_x,
    weight,
    strides,
    bias,
    lam,
    row_to_lam,
    rows_per_lam,
    one_lam,
    out,
    stride_out,
    tile,
    FORMAT: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`linear_tile` from both ends, from one, or from their blend at one λ.

    `one_lam` is a tile [1, 1]: the compiler moves the layout of a loaded tile freely but not that of a scalar, and
    given a scalar it sends the blended weight through shared memory.
    """
    row, row_end, feature, N, K, step_begin, step_end = tile
    rows = row + tl.arange(0, BLOCK_M)
    features = feature + tl.arange(0, BLOCK_N)
    limit = None if EVEN_K else K
    # The quantised formats multiply both ends at once, as twice the features: in two products x would have to lie in
    # shared memory in two layouts, one for each width of codes.
    STACKED: tl.constexpr = ENDS == BOTH and FORMAT != "pair"
    DTYPE: tl.constexpr = tl.float32 if ENDS == BLEND else x.dtype.element_ty
    y = tl.zeros((2 * BLOCK_N if STACKED else BLOCK_N, BLOCK_M), tl.float32)
    second_y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    carry, second_carry = tl.zeros_like(y), tl.zeros_like(second_y)
    x += rows.to(tl.int64)[None, :] * stride_x
    # Without a loop that may run zero times, ptxas finds the sums untouched between one wgmma and the next.
    tl.assume(step_end > step_begin)
    for step in range(step_begin, step_end):
        k = step * BLOCK_K
        if ENDS != SECOND:
            base = load_end(weight, strides, BASE, features, features < N, k, limit, BLOCK_K, DTYPE, FORMAT)
        if ENDS != BASE:
            second = load_end(weight, strides, SECOND, features, features < N, k, limit, BLOCK_K, DTYPE, FORMAT)
        inner = k + tl.arange(0, BLOCK_K)[:, None]
        x_mask = (rows < row_end)[None, :] if EVEN_K else (rows < row_end)[None, :] & (inner < K)
        x_tile = tl.load(x + inner, mask=x_mask, other=0.0)
        if ENDS == BLEND:
            # Blended in float32 and rounded once, as the merged weight of the accuracy contract is.
            w = blend(base, second, one_lam, FORMAT).to(x_tile.dtype)
            y, carry = _add_step(y, carry, w, x_tile)
        elif STACKED:
            w = tl.join(base, second).permute(2, 0, 1).reshape(2 * BLOCK_N, BLOCK_K)
            y, carry = _add_step(y, carry, w, x_tile)
        else:
            if ENDS != SECOND:
                y, carry = _add_step(y, carry, base, x_tile)
            if ENDS == SECOND:
                y, carry = _add_step(y, carry, second, x_tile)
            if ENDS == BOTH:
                second_y, second_carry = _add_step(second_y, second_carry, second, x_tile)
    if x.dtype.element_ty == tl.float32:
        y = _carried(y, carry)
        second_y = _carried(second_y, second_carry)
    if STACKED:
        y, second_y = tl.split(y.reshape(2, BLOCK_N, BLOCK_M).permute(1, 2, 0))
    if ENDS == BOTH:
        # λ is loaded again, as the sums lie: kept from the beginning it would fill registers all through the loop.
        row_tile = row + tl.arange(0, BLOCK_M)[None, :]
        one_lam = row_lam(lam, row_to_lam, row_tile, row_tile < row_end, rows_per_lam)
        y = combine(y, second_y, one_lam, FORMAT)
    if bias is not None:
        mask = (features < N) & (step_begin == 0)
        bias_base = tl.load(bias[0] + features, mask=mask, other=0.0)[:, None]
        bias_target = tl.load(bias[1] + features, mask=mask, other=0.0)[:, None]
        y += lerp(bias_base, bias_target, one_lam)
    out += rows.to(tl.int64)[:, None] * stride_out + features[None, :]
    tl.store(out, tl.trans(y).to(out.dtype.element_ty), mask=(rows < row_end)[:, None] & (features < N)[None, :])


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
    stride_out,
    tile,
    FORMAT: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_BLEND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MIXED_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes one tile of one split's share of y, and stores it into out [rows, stride_out].

    `tile` is (first row, end of rows, first feature, N, K, first step, end of steps), with one step at least. The split
    with the first step adds the bias. MIXED_M rows at a time are computed where the tile has several λ.
    """
    row, row_end, feature, N, K, step_begin, step_end = tile
    rows = row + tl.arange(0, BLOCK_M)
    lams = row_lam(lam, row_to_lam, rows, rows < row_end, rows_per_lam)
    one_lam = row_lam(lam, row_to_lam, tl.full((1, 1), row, tl.int32), True, rows_per_lam)
    # Not by min and max: they pass over a NaN, whose row would then take its neighbours' λ.
    mixed = tl.sum(((rows < row_end) & (lams != tl.max(one_lam))).to(tl.int32)) > 0
    if not mixed and tl.max(one_lam) == 0.0:
        _tile(
            BASE, x, stride_x, weight, strides, bias, lam, row_to_lam, rows_per_lam, one_lam, out, stride_out, tile,
            FORMAT, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif FORMAT == "pair" and not mixed and tl.max(one_lam) == 1.0:
        _tile(
            SECOND, x, stride_x, weight, strides, bias, lam, row_to_lam, rows_per_lam, one_lam, out, stride_out, tile,
            FORMAT, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif USE_BLEND and not mixed:
        _tile(
            BLEND, x, stride_x, weight, strides, bias, lam, row_to_lam, rows_per_lam, one_lam, out, stride_out, tile,
            FORMAT, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        # Not the parts of a tile that have no rows; but a loop of one round is none if its bounds are constants.
        for start in range(0, BLOCK_M if BLOCK_M == MIXED_M else min(BLOCK_M, row_end - row), MIXED_M):
            part = (row + start, row_end, feature, N, K, step_begin, step_end)
            _tile(
                BOTH, x, stride_x, weight, strides, bias, lam, row_to_lam, rows_per_lam, one_lam, out, stride_out, part,
                FORMAT, EVEN_K, MIXED_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip


# M, rows_per_lam and span change with every batch: specialised on, they would compile the kernel again.
@triton.jit(do_not_specialize=["M", "rows_per_lam", "span"])
def _lerp_linear_kernel(
    x,
    weights,
    biases,
    lam,
    row_to_lam,
    out,
    M,
    sizes,
    K,
    steps_per_split,
    rows_per_lam,
    span,
    stride_x,
    strides,
    FORMAT: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_BLEND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MIXED_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of one split's share of y, into out [splits, M, all features].

    Args:
        weights, biases: of every weight its tensors, and None or the pair of its ends; in `out` their features follow
            one another.
        sizes: features of every weight.
        span: rows that no tile reaches across, a divisor of M.
        strides: of the tensors of each weight.
    """
    # Of the weight whose tile this is: its tensors, its first tile and its first column in `out`.
    weight, bias, N, first_tile, column = weights[0], None if biases is None else biases[0], sizes[0], 0, 0
    tiles_n, columns = tl.cdiv(N, BLOCK_N), N
    for i in tl.static_range(1, len(sizes)):
        tiles_n += tl.cdiv(sizes[i], BLOCK_N)
        columns += sizes[i]
    tiles_per_span = tl.cdiv(span, BLOCK_M)
    tiles_m = M // span * tiles_per_span
    pid, split = tl.program_id(0), tl.program_id(1)
    # Programs that run at the same time share eight tiles of the weight, and some of x, in the L2 cache.
    tile_n, tile_m = tl.swizzle2d(pid // tiles_m, pid % tiles_m, tiles_n, tiles_m, 8)
    tiles_before, columns_before = 0, 0
    for i in tl.static_range(1, len(sizes)):
        tiles_before += tl.cdiv(sizes[i - 1], BLOCK_N)
        columns_before += sizes[i - 1]
        if tile_n >= tiles_before:
            weight, N, first_tile, column = weights[i], sizes[i], tiles_before, columns_before
            if biases is not None:
                bias = biases[i]

    first_row = tile_m // tiles_per_span * span
    row, row_end = first_row + tile_m % tiles_per_span * BLOCK_M, first_row + span
    begin = split * steps_per_split
    end = min(begin + steps_per_split, max(tl.cdiv(K, BLOCK_K), 1))
    feature = (tile_n - first_tile) * BLOCK_N
    out += split.to(tl.int64) * M * columns + column
    tile = (row, row_end, feature, N, K, begin, end)
    linear_tile(
        x, stride_x, weight, strides, bias, lam, row_to_lam, rows_per_lam, out, columns, tile,
        FORMAT, EVEN_K, USE_BLEND, BLOCK_M, MIXED_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _sum_splits_kernel(parts, y, size, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr):
    """y [size] from parts [SPLIT_K, size], summed in an order that does not depend on which program ended first."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLIT_K):
        total += tl.load(parts + split * size + index, mask=index < size, other=0.0)
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
    if cuda.takes(x, weight, format, invariant, device_of(x.device)):
        return cuda.lerp_linear(x, weight, bias, lam, row_to_lam, rows_per_lam, format, invariant)
    return lerp_linears(x, weight, bias, lam, row_to_lam, rows_per_lam, format, invariant)


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
    groups = weights_of(weights, format)
    strides = strides_of(groups[0])
    if any(strides_of(group) != strides for group in groups[1:]):
        each = [
            lerp_linears(x, list(group), biases[2 * i : 2 * i + 2], lam, row_to_lam, rows_per_lam, format, invariant)
            for i, group in enumerate(groups)
        ]
        return torch.cat(each, 1)
    M, K = x.shape
    sizes = tuple(group[0].shape[0] for group in groups)
    N = sum(sizes)
    y = x.new_empty(M, N)
    if y.numel() == 0:
        return y
    config = linear_config(M, N, K, x.dtype, format, device_of(x.device), invariant)
    span = row_span(M, rows_per_lam, config) if row_to_lam is None else M
    x = with_rows_in_one_piece(x)
    pairs = tuple([vectors(biases[i : i + 2]) for i in range(0, len(biases), 2)]) or None
    steps = max(1, cdiv(K, config.block_k))
    steps_per_split = cdiv(steps, config.split_k)
    splits = cdiv(steps, steps_per_split)
    parts = y if splits == 1 else x.new_empty(splits, M, N, dtype=torch.float32)
    tiles_n = sum([cdiv(size, config.block_n) for size in sizes])
    with on_device_of(x):
        _lerp_linear_kernel[M // span * cdiv(span, config.block_m) * tiles_n, splits](
            x,
            groups,
            pairs,
            lam,
            row_to_lam,
            parts,
            M,
            sizes,
            K,
            steps_per_split,
            rows_per_lam,
            span,
            x.stride(0),
            strides,
            FORMAT=format,
            EVEN_K=is_even(groups, format, K, config.block_k),
            USE_BLEND=config.use_blend,
            BLOCK_M=config.block_m,
            MIXED_M=config.mixed_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if splits > 1:
            _sum_splits_kernel[cdiv(y.numel(), 256),](parts, y, y.numel(), SPLIT_K=splits, BLOCK=256)
    return y
