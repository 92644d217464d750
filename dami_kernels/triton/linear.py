"""`lerp_linear` and `lerp_linears`: each program computes one tile of one of the weights."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from dami_kernels import cuda, products
from dami_kernels.launching import Job, launch
from dami_kernels.triton.host import cdiv, in_words, is_even, strides_of, vectors, weights_of, with_rows_in_one_piece
from dami_kernels.triton.product import Operands, Plan, Tile, job, product_tile
from dami_kernels.tuning import MIXED, Route, device_of, linear_config, route, row_span, rows_together

Weights = tuple[tuple[Tensor, ...], ...]


# M, rows_per_lam and span change with every batch. Specialising on them would recompile the kernel.
@triton.jit(do_not_specialize=["M", "rows_per_lam", "span", "first_program"])
def _lerp_linear_kernel(
    x,
    weights,
    biases,
    lam,
    row_to_lam,
    out,
    parts,
    arrived,
    first_program,
    M,
    sizes,
    K,
    steps_per_split,
    rows_per_lam,
    span,
    stride_x,
    strides,
    BASE_BITS: tl.constexpr,
    SECOND_BITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_BLEND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MIXED_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BY_GROUP: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    """One tile of y, or of one split's share of it. `out` holds y [M, features] of each weight.

    Args:
        weights, biases: of every weight its tensors, and None or the pair of its ends.
        sizes: features of every weight.
        span: rows that no tile reaches across, a divisor of M.
        strides: of the tensors of each weight.
    """
    # Of the weight whose tile this is: its tensors, its first tile and the features before its own.
    weight, bias, N, first_tile, column = weights[0], None if biases is None else biases[0], sizes[0], 0, 0
    tiles_n = tl.cdiv(N, BLOCK_N)
    for i in tl.static_range(1, len(sizes)):
        tiles_n += tl.cdiv(sizes[i], BLOCK_N)
    tiles_per_span = tl.cdiv(span, BLOCK_M)
    tiles_m = M // span * tiles_per_span
    pid, split = first_program + tl.program_id(0), tl.program_id(1)
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
    out += tl.cast(column, tl.int64) * M
    if parts is not None:
        parts += tl.program_id(0).to(tl.int64) * tl.num_programs(1) * (BLOCK_M * BLOCK_N)
        arrived += tl.program_id(0)
    product_tile(  # not of variables: assigned to one, a constant would no longer be a constant
        Operands(x, stride_x, weight, strides, bias, lam, row_to_lam, rows_per_lam, out, N, parts, arrived),
        Tile(0, row, row_end, feature, N, K, begin, end),
        Plan(
            BASE_BITS,
            SECOND_BITS,
            EVEN_K,
            USE_BLEND,
            BLOCK_M,
            MIXED_M,
            BLOCK_N,
            BLOCK_K,
            BY_GROUP,
            NUM_STAGES,
            IS_EARLY,
        ),
    )


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
    operands = x, (tuple(weight),), (tuple(bias),) if bias else None, lam, row_to_lam
    return launch(_plan_one, operands, rows_per_lam, format, invariant)


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
    pairs = tuple([tuple(biases[i : i + 2]) for i in range(0, len(biases), 2)]) or None
    return launch(_plan, (x, groups, pairs, lam, row_to_lam), rows_per_lam, format, invariant)


def _plan_one(
    x: Tensor,
    weights: Weights,
    biases: Weights | None,
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    format: str,
    invariant: bool,
) -> Job | Tensor:
    shape = len(x), weights[0][0].shape[0]
    if cuda.takes(x, list(weights[0]), format, invariant, device_of(x.device)):
        bias = list(biases[0]) if biases else []
        return cuda.lerp_linear(x, list(weights[0]), bias, lam, row_to_lam, rows_per_lam, format, invariant)
    made = _plan(x, weights, biases, lam, row_to_lam, rows_per_lam, format, invariant)
    return made.view(shape) if isinstance(made, Tensor) else replace(made, shape=shape)


def _plan(
    x: Tensor,
    weights: Weights,
    biases: Weights | None,
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    format: str,
    invariant: bool,
) -> Job | Tensor:
    rest = lam, row_to_lam, rows_per_lam, format, invariant
    strides = strides_of(weights[0])
    if any(strides_of(weight) != strides for weight in weights[1:]):
        each = zip(weights, biases or [()] * len(weights), strict=True)
        return torch.cat([lerp_linears(x, list(weight), list(bias), *rest) for weight, bias in each])
    M, K = x.shape
    sizes = tuple(weight[0].shape[0] for weight in weights)
    N = sum(sizes)
    if M * N == 0:
        return x.new_empty(0)
    together = rows_together(M, rows_per_lam, row_to_lam is not None)
    way = route(M, N, K, x.dtype, format, device_of(x.device), together, invariant)
    if way is not Route.KERNEL:
        return _by_library(x, weights, biases, lam, row_to_lam, rows_per_lam, format, way)
    mixes_lams = row_to_lam is None and rows_per_lam < MIXED
    config = linear_config(M, N, K, x.dtype, format, device_of(x.device), invariant, mixes_lams)
    span = row_span(M, rows_per_lam, config) if row_to_lam is None else M
    if config.by_group:
        weights = in_words(weights, format)
        strides = strides_of(weights[0])
    x = with_rows_in_one_piece(x)
    return job(
        _lerp_linear_kernel,
        M // span * cdiv(span, config.block_m) * sum([cdiv(size, config.block_n) for size in sizes]),
        config,
        (x, weights, tuple([vectors(bias) for bias in biases]) if biases else None, lam, row_to_lam),
        (M * N,),
        x.dtype,
        K,
        format,
        even_k=is_even(weights, format, K, config.block_k),
        is_early=config.block_m <= 64 and K > 0,  # a step of decoding, whose weights are all that takes time
        M=M,
        sizes=sizes,
        rows_per_lam=rows_per_lam,
        span=span,
        stride_x=x.stride(0),
        strides=strides,
    )


def _by_library(
    x: Tensor,
    weights: Weights,
    biases: Weights | None,
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    format: str,
    way: Route,
) -> Tensor:
    M, sizes = len(x), [len(weight[0]) for weight in weights]
    y = x.new_empty(M * sum(sizes))
    parts = y.split([M * size for size in sizes])
    for weight, bias, part in zip(weights, biases or [()] * len(weights), parts, strict=True):
        rest = lam, row_to_lam, rows_per_lam, format, way, part.view(M, -1)
        products.lerp_linear(x, list(weight), list(bias), *rest)
    return y
