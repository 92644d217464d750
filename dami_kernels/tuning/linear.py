"""How `lerp_linear` is cut into programs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from dami_kernels.tuning.device import Device

# (features, inner) of a tile by its rows, largest first. A tile has no fewer features than rows, or the programs would
# read more of x from the L2 cache than of the weights from memory; two accumulators of 128 rows leave room for 64.
_TILES_16_BIT = {16: ((64, 128), (32, 128), (16, 256)), 32: ((64, 128), (32, 128)), 64: ((64, 64),), 128: ((64, 64),)}
_TILES_FLOAT32 = {16: ((64, 32), (32, 64), (16, 64)), 32: ((64, 16), (32, 32)), 64: ((64, 16),)}


@dataclass(frozen=True)
class LinearConfig:
    """Launch parameters of the kernel of `lerp_linear`.

    Attributes:
        block_m, block_n, block_k: rows, features and inner size of a tile.
        split_k: parts into which the inner size is cut; above 1 a second kernel sums their results.
        use_blend: whether a tile of rows with one λ blends the weight, rather than keeping two accumulators.
        num_warps, num_stages: as in Triton.
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int
    use_blend: bool
    num_warps: int
    num_stages: int


@lru_cache(1 << 14)  # a decode step asks some hundred times
def linear_config(M: int, N: int, K: int, dtype: torch.dtype, format: str, device: Device) -> LinearConfig:
    """Launch parameters for x [M, K] and a weight [N, K].

    The largest tile is taken that still gives work to most of the device. Where even the smallest does not, K is split.
    """
    enough = device.processors * 3 // 4

    def programs(tile: tuple[int, int, int]) -> int:
        return -(-M // tile[0]) * -(-N // tile[1])

    # Triton copies rows of 16 elements' alignment past the registers; others go through them, a few at a time.
    aligned = K % 16 == 0
    tiles = _tiles(M, dtype, device)
    if not aligned:
        tiles = [(rows, features, 64 // dtype.itemsize) for rows, features, _ in tiles if features <= 64]
    if format != "pair":  # a tile holds whole groups of weights that share a scale
        tiles = [(rows, features, max(inner, 32)) for rows, features, inner in tiles]
    tile = next((tile for tile in tiles if programs(tile) >= enough), tiles[-1])
    block_m, block_n, block_k = tile
    # A split sums at least four steps, or filling its pipeline costs more than the other processors bring.
    most = -(-K // block_k) // 4
    split_k = 1
    while split_k * programs(tile) < enough and split_k * 2 <= most:
        split_k *= 2
    return LinearConfig(
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        split_k=split_k,
        # While one tile holds all rows, reading the weights takes longer than multiplying them twice.
        use_blend=block_m < M,
        num_warps=8 if block_m * block_n * dtype.itemsize >= (128 if aligned else 64) * 64 * 2 else 4,
        num_stages=_stages((block_m + 2 * block_n) * block_k * dtype.itemsize, device) if aligned else 2,
    )


def _tiles(M: int, dtype: torch.dtype, device: Device) -> list[tuple[int, int, int]]:
    """Candidates, largest first."""
    table = _TILES_FLOAT32 if dtype == torch.float32 else _TILES_16_BIT
    rows = next((rows for rows in table if rows >= M), max(table))
    tiles = [(rows, *tile) for tile in table[rows]]
    if M > rows == 128:
        # mma.sync holds operands in registers too, and has none left for two accumulators of 128 by 128.
        if device.has_wide_mma or device.is_amd:
            tiles.insert(0, (128, 128, 64))
        tiles.append((64, 64, 64))
    return tiles


def _stages(bytes_per_stage: int, device: Device) -> int:
    """Stages of the load pipeline: as many as let two programs share a processor, but at least three if three fit."""
    if device.is_amd:
        return 2
    return max(2, min(4, max(3, device.shared // 2 // bytes_per_stage), device.shared // bytes_per_stage))
