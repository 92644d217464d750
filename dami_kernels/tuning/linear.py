"""How `lerp_linear` is cut into programs."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import torch

from dami_kernels import formats
from dami_kernels.tuning.config import LinearConfig
from dami_kernels.tuning.device import Device
from dami_kernels.tuning.tables import load_table, nearest

# (features, inner) of a tile by its rows, largest first. A tile has no fewer features than rows, or the programs would
# read more of x from the L2 cache than of the weights from memory; two accumulators of 128 rows leave room for 64.
_TILES_16_BIT = {16: ((64, 128), (32, 128), (16, 256)), 32: ((64, 128), (32, 128)), 64: ((64, 64),), 128: ((64, 64),)}
_TILES_FLOAT32 = {16: ((64, 32), (32, 64), (16, 64)), 32: ((64, 16), (32, 32)), 64: ((64, 16),)}


@lru_cache(1 << 14)  # a decode step asks some hundred times
def linear_config(
    M: int, N: int, K: int, dtype: torch.dtype, format: str, device: Device, invariant: bool = False
) -> LinearConfig:
    """Launch parameters for x [M, K] and weights [N, K], N features in all.

    As measured on this GPU for the nearest M, or else by rule: the largest tile that still gives work to most of the
    device. Where even the smallest does not, K is split. If invariant, a function of all but M, without blending.
    """
    if invariant:
        rows = 32 if dtype == torch.float32 else 64
        config = _config(1, N, K, dtype, format, device, _tiles(rows, K, dtype, format, device)[:1])
        return replace(config, use_blend=False)
    measured = load_table(device.name).get((N, K, dtype, format)) if device.name else None
    if measured:
        return nearest(measured, M).config
    return _config(M, N, K, dtype, format, device, _tiles(M, K, dtype, format, device))


def linear_candidates(M: int, N: int, K: int, dtype: torch.dtype, format: str, device: Device) -> list[LinearConfig]:
    """What to time for one shape, the choice by rule first: its tiles and those of half and twice the rows, with fewer
    and more splits and stages."""
    candidates = [_config(M, N, K, dtype, format, device, _tiles(M, K, dtype, format, device))]
    for rows in {max(16, M // 2), M, 2 * M}:
        for tile in _tiles(rows, K, dtype, format, device):
            config = _config(M, N, K, dtype, format, device, [tile])
            splits = {max(1, config.split_k // 2), config.split_k, config.split_k * 2}
            stages = {2, config.num_stages, min(config.num_stages + 1, 4)}
            candidates += [
                replace(config, split_k=split_k, num_stages=num_stages)
                for split_k in sorted(splits)
                for num_stages in sorted(stages)
                if split_k == 1 or -(-K // config.block_k) >= 2 * split_k
                if num_stages == 2 or num_stages * _stage_bytes(tile, dtype) <= device.shared
                # Two ends to dequantise, and sums of 128 features, leave no registers for a fourth stage's addresses.
                if num_stages < 4 or _num_coded(format) < 2 or tile[1] < 128
            ]
    return list(dict.fromkeys(candidates))


def row_span(M: int, rows_per_lam: int, config: LinearConfig) -> int:
    """Rows that no tile shall reach across: those of one λ where that costs less than tiles with several λ, else M.

    A tile with several λ takes twice the time of one whose weight is blended; tiles that end where λ changes are more,
    as the last one of each λ is not full.
    """
    if not config.use_blend:
        return M
    boundaries = M // rows_per_lam - 1
    on_tiles = boundaries // (config.block_m // math.gcd(rows_per_lam, config.block_m))
    tiles = -(-M // config.block_m)
    mixed = min(boundaries - on_tiles, tiles)
    return rows_per_lam if (boundaries + 1) * -(-rows_per_lam // config.block_m) < tiles + mixed else M


def _num_coded(format: str) -> int:
    """How many of a format's two matrices are stored as codes."""
    both = formats.matrices(format)
    return sum(matrix.bits is not None for matrix in (both.base, both.second))


Tile = tuple[int, int, int]


def _tiles(M: int, K: int, dtype: torch.dtype, format: str, device: Device) -> list[Tile]:
    """Tiles for M rows, largest first."""
    table = _TILES_FLOAT32 if dtype == torch.float32 else _TILES_16_BIT
    rows = next((rows for rows in table if rows >= M), max(table))
    tiles = [(rows, *tile) for tile in table[rows]]
    if M > rows == 128:
        # mma.sync holds operands in registers too, and has none left for two accumulators of 128 by 128; nor has AMD
        # where codes are converted.
        if device.has_wide_mma or (device.is_amd and _num_coded(format) == 0):
            tiles.insert(0, (128, 128, 64))
        # The weight is blended once for 256 rows rather than for 128. It takes as long as the product of 128.
        if device.has_wide_mma and M > 256:
            tiles.insert(0, (256, 128, 64))
        tiles.append((64, 64, 64))
    # Triton copies rows of 16 elements' alignment past the registers; others go through them, a few at a time.
    if K % 16:
        tiles = [(rows, features, 64 // dtype.itemsize) for rows, features, _ in tiles if features <= 64]
    if _num_coded(format):
        # Base and delta are multiplied as twice the features, which four warps share without exchanging any; along K a
        # tile has whole groups.
        tiles = [(rows, features, max(inner, 32)) for rows, features, inner in tiles if features >= 64]
        # Not in float32: from 64 features on, both ends together, Triton 3.6 multiplies codes as TF32 on sm_100,
        # whatever the input precision, as it goes by the width of what was loaded. Elsewhere registers are too few.
        if dtype == torch.float32:
            tiles = [(rows, 16, 32)]
    return list(dict.fromkeys(tiles))


def _config(M: int, N: int, K: int, dtype: torch.dtype, format: str, device: Device, tiles: list[Tile]) -> LinearConfig:
    enough = device.processors * 3 // 4

    def programs(tile: Tile) -> int:
        return -(-M // tile[0]) * -(-N // tile[1])

    tile = next((tile for tile in tiles if programs(tile) >= enough), tiles[-1])
    if tile[0] == 256 and len(tiles) > 1:
        # Twice the rows take 1.6 times the time, by count of instructions, but may leave the last round emptier.
        rounds = [-(-programs(tile) // device.processors) for tile in tiles[:2]]
        tile = tiles[0] if 1.6 * rounds[0] <= rounds[1] else tiles[1]
    block_m, block_n, block_k = tile
    # A split sums at least four steps, or filling its pipeline costs more than the other processors bring.
    max_splits = -(-K // block_k) // 4
    split_k = 1
    while split_k * programs(tile) < enough and split_k * 2 <= max_splits:
        split_k *= 2
    aligned = K % 16 == 0
    mixed_m = block_m
    if block_n == 128 and (block_m == 256 or _num_coded(format) or device.has_tensor_memory):
        # Two sums of 128 by 128 would spill beside the registers that dequantising takes, or a sum of 256 rows; or
        # where both come back from tensor memory at once.
        mixed_m = min(block_m, 64)
    elif device.has_tensor_memory and not aligned:  # loads pass through registers, too
        mixed_m = min(block_m, 128 // dtype.itemsize)
    # Two ends to dequantise, for two sums that come back from tensor memory at once.
    crowded = device.has_tensor_memory and _num_coded(format) == 2 and block_m == 32
    return LinearConfig(
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        mixed_m=mixed_m,
        split_k=split_k,
        # While one tile holds all rows, reading the weights takes longer than multiplying them twice; and for few rows
        # blending them does.
        use_blend=32 < block_m < M,
        num_warps=8 if block_m * block_n * dtype.itemsize >= (128 if aligned else 64) * 64 * 2 or crowded else 4,
        num_stages=_stages(_stage_bytes(tile, dtype), device) if aligned else 2,
    )


def _stage_bytes(tile: Tile, dtype: torch.dtype) -> int:
    """Bytes of x and of two weights of a step."""
    return (tile[0] + 2 * tile[1]) * tile[2] * dtype.itemsize


def _stages(bytes_per_stage: int, device: Device) -> int:
    """Stages of the load pipeline: as many as let two programs share a processor, but at least three if three fit."""
    if device.is_amd:
        return 2
    return max(2, min(4, max(3, device.shared // 2 // bytes_per_stage), device.shared // bytes_per_stage))
