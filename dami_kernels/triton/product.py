"""A product with interpolated weights, Yᵀ = W(λ) · Xᵀ, one tile of features by rows at a time. `lerp_linear` and
`lerp_experts` share it.

The weight is the left operand of `tl.dot`, so that a weight blended in registers can stay there: on sm_90 only the left
operand of wgmma may come from registers, on sm_100 only the left operand of tcgen05 from tensor memory.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language import target_info

from dami_kernels.launching import Job, Launch
from dami_kernels.triton.codes import UNIT, rounded
from dami_kernels.triton.device import (
    BASE,
    GROUP,
    SECOND,
    STEP,
    blend,
    combine,
    fetch_end,
    first_tensor,
    late,
    lerp,
    load_end,
    row_lam,
    start,
)
from dami_kernels.triton.groups import add_groups, in_ones
from dami_kernels.triton.host import bits_of, cdiv, early
from dami_kernels.triton.lanes import columns_of_half, load_halves
from dami_kernels.tuning import LinearConfig

BLEND = tl.constexpr(2)
BOTH = tl.constexpr(3)
MAX_PARTS = 1 << 23  # float32 numbers, 32 MB, of the parts of tiles that are computed in one launch


class Operands(NamedTuple):
    """Operands of one product, on the device.

    Attributes:
        x, stride_x: the rows, dense along K.
        weight, strides: the tensors of the weight's format [N, K], and the strides of each.
        bias: its two ends [N], or None.
        lam, row_to_lam, rows_per_lam: as `row_lam` takes them.
        out, stride_out: where y's rows go.
        parts, arrived: if K is split, float32 [splits, BLOCK_M, BLOCK_N] for this tile, and how many of its splits have
            been computed, 0 before and after; else None.
    """

    x: tl.tensor
    stride_x: tl.tensor
    weight: tl.tuple
    strides: tl.tuple
    bias: tl.tuple | None
    lam: tl.tensor
    row_to_lam: tl.tensor | None
    rows_per_lam: tl.tensor
    out: tl.tensor
    stride_out: tl.tensor
    parts: tl.tensor | None
    arrived: tl.tensor | None


class Tile(NamedTuple):
    """A part of a product: rows [row, row_end) of x, features from `feature` on, steps [step_begin, step_end) along K.

    There is at least one step. Features end at N, and columns end at K. The program has `rows_before` others.
    """

    rows_before: tl.tensor
    row: tl.tensor
    row_end: tl.tensor
    feature: tl.tensor
    N: tl.tensor
    K: tl.tensor
    step_begin: tl.tensor
    step_end: tl.tensor


class Plan(NamedTuple):
    """Compile-time constants: how the weight is stored, whether steps along K are whole, `LinearConfig`, and IS_EARLY.

    A program that is early may begin before earlier launches have ended.
    """

    BASE_BITS: tl.constexpr
    SECOND_BITS: tl.constexpr
    EVEN_K: tl.constexpr
    USE_BLEND: tl.constexpr
    BLOCK_M: tl.constexpr
    MIXED_M: tl.constexpr
    BLOCK_N: tl.constexpr
    BLOCK_K: tl.constexpr
    BY_GROUP: tl.constexpr
    NUM_STAGES: tl.constexpr
    IS_EARLY: tl.constexpr


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
def _load(END: tl.constexpr, operands, features, k, tile, DTYPE: tl.constexpr, plan):
    """A tile of one matrix of the weight."""
    BITS: tl.constexpr = plan.SECOND_BITS if END == SECOND else plan.BASE_BITS
    FIRST: tl.constexpr = first_tensor(END, plan.BASE_BITS)
    limit = None if plan.EVEN_K else tile.K
    # Triton makes a constant of a stride of 1: then it is features that lie together in memory.
    IS_TRANSPOSED: tl.constexpr = BITS == 0 and isinstance(operands.strides[FIRST][0], int)
    if plan.EVEN_K and not IS_TRANSPOSED:
        # The last feature again instead of those beyond: a copy with a condition takes two more instructions. Not of
        # features that lie together, which would be copied one by one.
        features, wanted = tl.minimum(features, tile.N - 1), None
    else:
        wanted = features < tile.N
    return load_end(
        operands.weight, operands.strides, END, features, wanted, k, limit,
        plan.BLOCK_K, DTYPE, plan.BASE_BITS, plan.SECOND_BITS,
    )  # fmt: skip


@triton.jit
def _ends_tile(ENDS: tl.constexpr, operands, tile, one_lam, BLOCK_M: tl.constexpr, plan):
    """`product_tile` with BLOCK_M rows, from both ends, from one, or from their blend at one λ.

    `one_lam` is a tile [1, 1]: the compiler moves the layout of a loaded tile freely but not that of a scalar, and
    given a scalar it sends the blended weight through shared memory.
    """
    x, K, row_end = operands.x, tile.K, tile.row_end
    BLOCK_N: tl.constexpr = plan.BLOCK_N
    BLOCK_K: tl.constexpr = plan.BLOCK_K
    rows = tile.row + tl.arange(0, BLOCK_M)
    features = tile.feature + tl.arange(0, BLOCK_N)
    if plan.EVEN_K:
        rows = tl.minimum(rows, row_end - 1)  # the last row again, as in `_load`
    # Up to sm_90 the quantised formats multiply both ends at once, as twice the features: in two products x would have
    # to lie in shared memory in two layouts, one for each width of codes. Tensor memory and AMD's registers take the
    # ends one by one, and stacked ends would go through shared memory, to the threads that have those features.
    APART: tl.constexpr = target_info.is_hip() or (
        target_info.cuda_capability_geq(10) and not target_info.cuda_capability_geq(12)
    )
    STACKED: tl.constexpr = ENDS == BOTH and plan.SECOND_BITS != 0 and not APART
    # Of stacked ends a run of features of the base is followed by the same of the delta, so that a thread has both. Of
    # 64 and 64 features eight warps have 16 each: then a run is half of that.
    RUN: tl.constexpr = 8 if BLOCK_N == 64 and BLOCK_M > 64 else BLOCK_N
    DTYPE: tl.constexpr = tl.float32 if ENDS == BLEND else x.dtype.element_ty
    y = tl.zeros((2 * BLOCK_N if STACKED else BLOCK_N, BLOCK_M), tl.float32)
    second_y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    carry, second_carry = tl.zeros_like(y), tl.zeros_like(second_y)
    x += rows.to(tl.int64)[None, :] * operands.stride_x
    # Without a loop that may run zero times, ptxas finds the sums untouched between one wgmma and the next.
    tl.assume(tile.step_end > tile.step_begin)
    for step in range(tile.step_begin, tile.step_end):
        k = step * BLOCK_K
        if ENDS != SECOND:
            base = _load(BASE, operands, features, k, tile, DTYPE, plan)
        if ENDS != BASE:
            second = _load(SECOND, operands, features, k, tile, DTYPE, plan)
        inner = k + tl.arange(0, BLOCK_K)[:, None]
        x_mask = None if plan.EVEN_K else (rows < row_end)[None, :] & (inner < K)
        x_tile = tl.load(x + inner, mask=x_mask, other=None if plan.EVEN_K else 0.0)
        if ENDS == BLEND:
            # Blended in float32 and rounded once, as the merged weight of the accuracy contract is. λ is no NaN: a tile
            # with one is mixed.
            w = rounded(blend(base, second, one_lam, plan.SECOND_BITS), x_tile.dtype)
            y, carry = _add_step(y, carry, w, x_tile)
        elif STACKED:
            w = tl.join(base, second).reshape(BLOCK_N // RUN, RUN, BLOCK_K, 2)
            w = w.permute(0, 3, 1, 2).reshape(2 * BLOCK_N, BLOCK_K)
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
        y = y.reshape(BLOCK_N // RUN, 2, RUN, BLOCK_M).permute(0, 2, 3, 1)
        y, second_y = tl.split(y.reshape(BLOCK_N, BLOCK_M, 2))
    if tl.bfloat16 == DTYPE and plan.EVEN_K and not target_info.is_hip():
        y *= UNIT if (plan.SECOND_BITS if ENDS == SECOND else plan.BASE_BITS) else 1.0
        second_y *= UNIT if plan.SECOND_BITS else 1.0
    _store(ENDS, operands, tile, y, second_y, one_lam, BLOCK_M, plan)


@triton.jit
def _lanes_tile(ENDS: tl.constexpr, operands, tile, one_lam, plan):
    """`_groups_tile` for more rows than 16, with the columns of a step in the order of `lanes`."""
    x = operands.x
    BLOCK_M: tl.constexpr = plan.BLOCK_M
    BLOCK_N: tl.constexpr = plan.BLOCK_N
    # The last row and the last feature again instead of those beyond, as in `_load`.
    rows = tl.minimum(tile.row + tl.arange(0, BLOCK_M), tile.row_end - 1)
    features = tl.minimum(tile.feature + tl.arange(0, BLOCK_N), tile.N - 1)
    FEATURES: tl.constexpr = 2 * BLOCK_N if ENDS == BOTH else BLOCK_N
    y = tl.zeros((FEATURES, BLOCK_M), tl.float32)
    x += rows.to(tl.int64)[None, :] * operands.stride_x + columns_of_half()[:, None]
    tl.assume(tile.step_end > tile.step_begin)
    # Given its own number of stages, a loop also copies ahead what no product reads: the scales.
    for step in tl.range(tile.step_begin, tile.step_end, num_stages=plan.NUM_STAGES):
        k = step * plan.BLOCK_K
        x_at = x + k
        for ahead in tl.static_range(0, plan.BLOCK_K, STEP):
            w = _load_halves(BASE, operands, features, k, ahead, plan)
            if ENDS == BOTH:
                w = tl.join(w, _load_halves(SECOND, operands, features, k, ahead, plan)).permute(2, 0, 1)
            # Two products, so that one address of x serves a row's columns of both halves.
            first, second = tl.split(w.reshape(FEATURES, 2, STEP // 2).permute(0, 2, 1))
            y = tl.dot(first, tl.load(x_at + ahead), y)
            y = tl.dot(second, tl.load(x_at + ahead + GROUP // 2), y)
    second_y = None
    if ENDS == BOTH:
        y, second_y = tl.split(y.reshape(2, BLOCK_N, BLOCK_M).permute(1, 2, 0))
        second_y *= UNIT if plan.SECOND_BITS else 1.0
    y *= UNIT if plan.BASE_BITS else 1.0
    _store(ENDS, operands, tile, y, second_y, one_lam, BLOCK_M, plan)


@triton.jit
def _load_halves(END: tl.constexpr, operands, features, k, ahead: tl.constexpr, plan):
    return load_halves(operands.weight, operands.strides, END, features, k, ahead, plan.BASE_BITS, plan.SECOND_BITS)


@triton.jit
def _groups_tile(ENDS: tl.constexpr, operands, tile, one_lam, plan):
    """`product_tile` from both ends or from the base, of which at least one is codes, with few rows and a whole K."""
    x, row_end = operands.x, tile.row_end
    BLOCK_M: tl.constexpr = plan.BLOCK_M
    BLOCK_N: tl.constexpr = plan.BLOCK_N
    rows = tile.row + tl.arange(0, BLOCK_M)
    # The last feature again instead of those beyond, as in `_load`.
    features = tl.minimum(tile.feature + tl.arange(0, BLOCK_N), tile.N - 1)
    sums = tl.zeros((STEP // GROUP, BLOCK_N, BLOCK_M), tl.float32)
    second_sums = tl.zeros_like(sums)
    x += rows.to(tl.int64)[None, :] * operands.stride_x
    # Given its own number of stages, a loop also copies ahead what no product reads: the scales.
    for step in tl.range(tile.step_begin, tile.step_end, num_stages=plan.NUM_STAGES):
        k = step * plan.BLOCK_K
        for ahead in tl.static_range(0, plan.BLOCK_K, STEP):
            columns = k + ahead + tl.arange(0, STEP)
            x_tile = tl.load(x + columns[:, None], mask=(rows < row_end)[None, :], other=0.0)
            sums = _add_groups(BASE, sums, operands, features, k, ahead, x_tile, plan)
            if ENDS == BOTH:
                second_sums = _add_groups(SECOND, second_sums, operands, features, k, ahead, x_tile, plan)
    y = in_ones(tl.sum(sums, 0), x.dtype.element_ty, plan.BASE_BITS)
    second_y = in_ones(tl.sum(second_sums, 0), x.dtype.element_ty, plan.SECOND_BITS)
    _store(ENDS, operands, tile, y, second_y, one_lam, BLOCK_M, plan)


@triton.jit
def _add_groups(END: tl.constexpr, sums, operands, features, k, ahead: tl.constexpr, x_tile, plan):
    return add_groups(
        sums, operands.weight, operands.strides, END, features, k, ahead, x_tile, plan.BASE_BITS, plan.SECOND_BITS
    )


@triton.jit
def _lams(operands, rows, valid):
    """`row_lam` of these rows of x."""
    rows_per_lam = operands.rows_per_lam
    if operands.x.dtype.element_ty == tl.float32:
        # It has no registers to spare, and a division of signed numbers keeps some from the first to the last one.
        rows, rows_per_lam = rows.to(tl.uint32), tl.cast(rows_per_lam, tl.uint32)
    return row_lam(operands.lam, operands.row_to_lam, rows, valid, rows_per_lam)


@triton.jit
def _store(ENDS: tl.constexpr, operands, tile, y, second_y, lams, BLOCK_M: tl.constexpr, plan):
    """Stores a tile [BLOCK_N, BLOCK_M] of y plus the bias, or the split's part, of which BLOCK_M rows may be a part.

    Of BOTH ends y and `second_y` are the sums, and every row is interpolated at its λ; otherwise at `lams` [1, 1].
    """
    BLOCK_N: tl.constexpr = plan.BLOCK_N
    if operands.x.dtype.element_ty == tl.float32 and not plan.EVEN_K:
        # Here masks of rows are computed early, and would fill registers until those of the results need them.
        tile = Tile(
            tile.rows_before, late(tile.row), tile.row_end, tile.feature, tile.N, tile.K, tile.step_begin, tile.step_end
        )
    if ENDS == BOTH:
        # λ is loaded again, as the sums lie: kept from the beginning it would fill registers all through the loop.
        rows = tile.row + tl.arange(0, BLOCK_M)[None, :]
        lams = _lams(operands, rows, rows < tile.row_end)
        y = combine(y, second_y, lams, plan.SECOND_BITS)
    if operands.bias is not None:
        features = tile.feature + tl.arange(0, BLOCK_N)
        mask = (features < tile.N) & (tile.step_begin == 0)
        bias_base = tl.load(operands.bias[0] + features, mask=mask, other=0.0)[:, None]
        bias_target = tl.load(operands.bias[1] + features, mask=mask, other=0.0)[:, None]
        y += lerp(bias_base, bias_target, lams)
    y = tl.trans(y)
    if operands.parts is None:
        _store_rows(operands, tile, y, BLOCK_M, BLOCK_N)
    else:
        row_of_part = tl.program_id(1) * plan.BLOCK_M + tile.rows_before + tl.arange(0, BLOCK_M)
        tl.store(operands.parts + row_of_part[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], y)


@triton.jit
def _store_rows(operands, tile, y, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    rows, features = tile.row + tl.arange(0, BLOCK_M), tile.feature + tl.arange(0, BLOCK_N)
    out = operands.out + rows.to(tl.int64)[:, None] * operands.stride_out + features[None, :]
    mask = (rows < tile.row_end)[:, None] & (features < tile.N)[None, :]
    tl.store(out, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sum_splits(operands, tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """In the last program of a tile, whichever that is: stores the sum of all parts, always in the same order."""
    tl.debug_barrier()  # all threads have stored their part; the atomic then releases it and acquires the others'
    splits = tl.num_programs(1)
    if tl.atomic_add(operands.arrived, 1, sem="acq_rel") == splits - 1:
        tl.store(operands.arrived, 0)  # for the next launch, or the next replay of a graph
        parts = operands.parts + tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for split in tl.range(splits, loop_unroll_factor=4):
            y += tl.load(parts + split * (BLOCK_M * BLOCK_N), cache_modifier=".cg")
        _store_rows(operands, tile, y, BLOCK_M, BLOCK_N)


@triton.jit
def _fetch_first_steps(operands, tile, plan):
    """Asks for the weights of the first steps before anything else, which may wait for earlier launches."""
    rows = tl.minimum(tile.feature + tl.arange(0, plan.BLOCK_N), tile.N - 1)
    COLUMNS: tl.constexpr = 4 * (STEP if plan.BY_GROUP else plan.BLOCK_K)
    for end in tl.static_range(2):
        fetch_end(
            operands.weight, operands.strides, end, rows, tile.step_begin * plan.BLOCK_K, tile.K,
            COLUMNS, plan.BASE_BITS, plan.SECOND_BITS,
        )  # fmt: skip


@triton.jit
def product_tile(operands, tile, plan):
    """Computes a tile and stores it. The one with the first step adds the bias.

    MIXED_M rows at a time are computed where the tile has several λ.
    """
    if plan.IS_EARLY:
        _fetch_first_steps(operands, tile, plan)
        start()
    row, row_end = tile.row, tile.row_end
    rows = row + tl.arange(0, plan.BLOCK_M)
    lams = _lams(operands, rows, rows < row_end)
    one_lam = _lams(operands, tl.full((1, 1), row, tl.int32), True)
    # Not by min and max: they pass over a NaN, whose row would then take its neighbours' λ.
    mixed = tl.sum(((rows < row_end) & (lams != tl.max(one_lam))).to(tl.int32)) > 0
    only_base = not mixed and tl.max(one_lam) == 0.0
    if plan.BY_GROUP and plan.BLOCK_M <= 16:
        if only_base:
            _groups_tile(BASE, operands, tile, one_lam, plan)
        else:
            _groups_tile(BOTH, operands, tile, one_lam, plan)
    elif plan.BY_GROUP:
        if only_base:
            _lanes_tile(BASE, operands, tile, one_lam, plan)
        else:
            _lanes_tile(BOTH, operands, tile, one_lam, plan)
    elif only_base:
        _ends_tile(BASE, operands, tile, one_lam, plan.BLOCK_M, plan)
    elif plan.SECOND_BITS == 0 and not mixed and tl.max(one_lam) == 1.0:
        _ends_tile(SECOND, operands, tile, one_lam, plan.BLOCK_M, plan)
    elif plan.USE_BLEND and not mixed:
        _ends_tile(BLEND, operands, tile, one_lam, plan.BLOCK_M, plan)
    else:
        # Not the parts of a tile that have no rows; but a loop of one round is none if its bounds are constants.
        STEP: tl.constexpr = plan.MIXED_M
        for first in range(0, STEP if plan.BLOCK_M == STEP else min(plan.BLOCK_M, row_end - row), STEP):
            part = Tile(first, row + first, row_end, tile.feature, tile.N, tile.K, tile.step_begin, tile.step_end)
            _ends_tile(BOTH, operands, part, one_lam, STEP, plan)
    if operands.parts is not None:
        _sum_splits(operands, tile, plan.BLOCK_M, plan.BLOCK_N)


def job(
    kernel: triton.JITFunction,
    programs: int,
    config: LinearConfig,
    operands: tuple[Any, ...],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    K: int,
    format: str,
    *,
    even_k: bool,
    is_early: bool = False,
    **arguments: object,
) -> Job:
    """Returns the launches of a kernel of `product_tile` with `programs` programs for each split of K.

    More programs than MAX_PARTS allows at once are launched one lot after the other, with the same parts.

    Args:
        kernel: takes the operands, `out`, `parts`, `arrived`, K, steps_per_split, the first program and the constants
            of `Plan`.
        shape, dtype: of the result.
        arguments: the kernel's other arguments.
    """
    steps = max(1, cdiv(K, config.block_k))
    steps_per_split = cdiv(steps, config.split_k)
    splits = cdiv(steps, steps_per_split)
    size = splits * config.block_m * config.block_n  # numbers of the parts of a tile
    at_once = programs if splits == 1 else min(programs, max(1, MAX_PARTS // size))
    named = {
        **({"parts": None, "arrived": None} if splits == 1 else {}),
        "K": K,
        "steps_per_split": steps_per_split,
        **arguments,
        **bits_of(format),
        "EVEN_K": even_k,
        "USE_BLEND": config.use_blend,
        "BLOCK_M": config.block_m,
        "MIXED_M": config.mixed_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BY_GROUP": config.by_group,
        "NUM_STAGES": config.num_stages,
        "IS_EARLY": is_early,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    named |= early() if is_early else {}
    lots = [
        Launch(kernel, (min(at_once, programs - first), splits), {**named, "first_program": first})
        for first in range(0, programs, at_once)
    ]
    parts, counters = (0, 0) if splits == 1 else (at_once * size, at_once)
    return Job(operands, shape, dtype, tuple(lots), parts, counters)
