"""`lerp_experts`: the tiles of `lerp_linear`, each with the weight of the expert that its rows belong to.

The host does not know how many rows each expert has. It launches as many programs as the worst-case offsets need, and
each program finds its expert on the device.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dami_kernels.launching import Job, launch
from dami_kernels.triton.host import cdiv, in_words, is_even, with_rows_in_one_piece
from dami_kernels.triton.product import Operands, Plan, Tile, job, product_tile
from dami_kernels.tuning import device_of, experts_config


@triton.jit
def _tile_of_expert(offsets, tile, M, E, BLOCK_M: tl.constexpr, SEGMENTS: tl.constexpr):
    """Of all tiles of all experts, one after the other, the given one: its expert, its first row, and where rows end.

    Rows after the last expert's are expert E's. Beyond the last tile the expert is SEGMENTS, which is greater than E.
    """
    expert = tl.arange(0, SEGMENTS)
    begin = tl.load(offsets + expert - 1, mask=(expert > 0) & (expert <= E), other=0)
    end = tl.load(offsets + expert, mask=expert < E, other=M)
    tiles = tl.where(expert <= E, tl.cdiv(end - begin, BLOCK_M), 0)
    end_tile = tl.cumsum(tiles, 0)
    found = tl.sum((end_tile <= tile).to(tl.int32))
    row = begin + (tile - (end_tile - tiles)) * BLOCK_M
    return found, tl.sum(tl.where(expert == found, row, 0)), tl.sum(tl.where(expert == found, end, 0))


@triton.jit(do_not_specialize=["M", "rows_per_lam", "first_program", "all_programs"])
def _lerp_experts_kernel(
    x,
    weights,
    biases,
    lam,
    row_to_lam,
    offsets,
    out,
    parts,
    arrived,
    first_program,
    all_programs,
    M,
    E,
    N,
    K,
    steps_per_split,
    rows_per_lam,
    stride_x,
    strides,
    SEGMENTS: tl.constexpr,
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
    """One tile of y [M, N], or of one split's share of it, of `all_programs`.

    `weights` and `biases` are pairs (tensor, stride from one expert to the next), `strides` those within an expert.
    """
    pid, split = first_program + tl.program_id(0), tl.program_id(1)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # Programs that run at the same time share the weights of an expert, and the rows of eight tiles, in the L2 cache.
    tile_m, tile_n = tl.swizzle2d(pid // tiles_n, pid % tiles_n, all_programs // tiles_n, tiles_n, 8)
    expert, row, end = _tile_of_expert(offsets, tile_m, M, E, BLOCK_M, SEGMENTS)
    if parts is not None:
        parts += tl.program_id(0).to(tl.int64) * tl.num_programs(1) * (BLOCK_M * BLOCK_N)
        arrived += tl.program_id(0)
    if expert < E:
        weight = [part[0] + expert.to(tl.int64) * part[1] for part in weights]
        bias = None if biases is None else [part[0] + expert.to(tl.int64) * part[1] for part in biases]
        begin = split * steps_per_split
        step_end = min(begin + steps_per_split, max(tl.cdiv(K, BLOCK_K), 1))
        product_tile(  # not of variables: assigned to one, a constant would no longer be a constant
            Operands(x, stride_x, weight, strides, bias, lam, row_to_lam, rows_per_lam, out, N, parts, arrived),
            Tile(0, row, end, tile_n * BLOCK_N, N, K, begin, step_end),
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
    elif expert == E:
        rows = row + tl.arange(0, BLOCK_M)[:, None]
        features = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        nothing = tl.zeros((BLOCK_M, BLOCK_N), out.dtype.element_ty)
        tl.store(out + rows.to(tl.int64) * N + features, nothing, mask=(rows < end) & (features < N))


def lerp_experts(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    offsets: Tensor,
    format: str,
    invariant: bool,
) -> Tensor:
    N = weight[0].shape[1]
    weights = tuple([(tensor, tensor.stride(0)) for tensor in weight])
    operands = x, weights, tuple([(end, N) for end in bias]) or None, lam, row_to_lam, offsets
    return launch(_plan, operands, rows_per_lam, format, invariant)


def _plan(
    x: Tensor,
    weights: tuple[tuple[Tensor, int], ...],
    biases: tuple[tuple[Tensor, int], ...] | None,
    lam: Tensor,
    row_to_lam: Tensor | None,
    offsets: Tensor,
    rows_per_lam: int,
    format: str,
    invariant: bool,
) -> Job | Tensor:
    weight = [tensor for tensor, _ in weights]
    M, K = x.shape
    E, N = weight[0].shape[:2]
    if M * N == 0:
        return x.new_empty(M, N)
    config = experts_config(M, E, N, K, x.dtype, format, device_of(x.device), invariant)
    if config.by_group:
        weight = list(in_words([weight], format)[0])
    x = with_rows_in_one_piece(x)
    parts = tuple([(tensor, tensor.stride(0)) for tensor in weight])
    ends = tuple([(end.contiguous(), N) for end, _ in biases]) if biases else None
    programs = row_tiles(M, E, config.block_m) * cdiv(N, config.block_n)
    return job(
        _lerp_experts_kernel,
        programs,
        config,
        (x, parts, ends, lam, row_to_lam, offsets),
        (M, N),
        x.dtype,
        K,
        format,
        even_k=is_even([weight], format, K, config.block_k),
        all_programs=programs,
        M=M,
        E=E,
        N=N,
        rows_per_lam=rows_per_lam,
        stride_x=x.stride(0),
        strides=tuple([tensor.stride()[1:] for tensor in weight]),
        SEGMENTS=1 << E.bit_length(),
    )


def row_tiles(rows: int, experts: int, block_m: int) -> int:
    """Returns the most tiles that any offsets need: each expert, and the rest, may have a tile with a single row."""
    return (rows + min(experts + 1, rows) * (block_m - 1)) // block_m
