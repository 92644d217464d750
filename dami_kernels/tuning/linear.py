"""Launch parameters of `lerp_linear`."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import torch

from dami_kernels import formats
from dami_kernels.tuning.config import LinearConfig
from dami_kernels.tuning.device import Device
from dami_kernels.tuning.tables import load_table, nearest

MIXED = 256  # rows: if λ changes within fewer, so it may in any tile

# (features, inner) of a tile by its rows, largest first. A tile has at least as many features as rows, or the programs
# would read more of x from the L2 cache than of the weights from memory. The exception is 128 rows, where two
# accumulators leave room for only 64 features.
_TILES_16_BIT = {16: ((64, 128), (32, 128), (16, 256)), 32: ((64, 128), (32, 128)), 64: ((64, 64),), 128: ((64, 64),)}
_TILES_FLOAT32 = {16: ((64, 32), (32, 64), (16, 64)), 32: ((64, 16), (32, 32)), 64: ((64, 16),)}


@lru_cache(1 << 14)  # called some hundred times per decode step
def linear_config(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    format: str,
    device: Device,
    invariant: bool = False,
    mixes_lams: bool = False,
) -> LinearConfig:
    """Returns launch parameters for x [M, K] and weights [N, K], with N features in total.

    Uses the configuration measured on this GPU for the nearest M. Without one, or for many rows that differ in λ, takes
    the largest tile that still keeps most of the device busy, and splits K if even the smallest does not. If invariant,
    the result does not depend on M, and weights are not blended. `mixes_lams` says that λ changes within any MIXED
    rows.
    """
    if invariant:
        rows = 32 if dtype == torch.float32 else 64
        # Every program that sums splits reads all rows of its tile, however few there are: not 128 features.
        tiles = [tile for tile in _tiles(rows, K, dtype, format, device) if tile[1] <= 64]
        config = _config(1, N, K, dtype, format, device, tiles[:1])
        return replace(config, use_blend=False)
    takes_mixed = mixes_lams and device.has_wide_mma and not device.has_tensor_memory and M > 128
    measured = load_table(device.name).get((N, K, dtype, format)) if device.name else None
    if measured and not takes_mixed:  # measured with rows of one λ where there are that many
        return nearest(measured, M).config
    tiles = _tiles(M, K, dtype, format, device)
    if takes_mixed:
        # Tiles of which two accumulators fit, and which read their weights least often.
        if _num_coded(format) == 0:
            tiles = [tile for tile in tiles if tile[0] <= 128]
        elif dtype.itemsize == 2 and K % 16 == 0:
            tiles = [(256, 64, 64), (128, 64, 64)][M <= 256 :]
    return _config(M, N, K, dtype, format, device, tiles)


def linear_candidates(M: int, N: int, K: int, dtype: torch.dtype, format: str, device: Device) -> list[LinearConfig]:
    """Returns the configurations to time for one shape, the default choice first.

    They have the tiles for M and for half and twice the rows, with fewer and more splits and stages."""
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
                # Two ends to dequantise and 128 features to sum leave no registers for a fourth stage's addresses.
                if num_stages < 4 or _num_coded(format) < 2 or tile[1] < 128
            ]
    return list(dict.fromkeys(candidates))


def row_span(M: int, rows_per_lam: int, config: LinearConfig) -> int:
    """Returns how many rows tiles may not cross: those of one λ if that is cheaper than mixed tiles, else M.

    A tile with several λ takes twice the time of one whose weight is blended. Ending tiles where λ changes takes more
    tiles, because the last one of each λ is not full.
    """
    if not config.use_blend:
        return M
    boundaries = M // rows_per_lam - 1
    on_tiles = boundaries // (config.block_m // math.gcd(rows_per_lam, config.block_m))
    tiles = -(-M // config.block_m)
    mixed = min(boundaries - on_tiles, tiles)
    return rows_per_lam if (boundaries + 1) * -(-rows_per_lam // config.block_m) < tiles + mixed else M


def _num_coded(format: str) -> int:
    """Returns how many of a format's two matrices are stored as codes."""
    both = formats.matrices(format)
    return sum(matrix.bits is not None for matrix in (both.base, both.second))


Tile = tuple[int, int, int]

_STEP_BY_GROUP = 4 * 32  # a group for each of four warps, or of four lanes


def _goes_by_group(rows: int, K: int, dtype: torch.dtype, format: str, device: Device) -> bool:
    """Whether tiles of so many rows take whole groups of codes, as `LinearConfig.by_group` says.

    Only NVIDIA's machine code was looked at, and from 17 rows on only that for bfloat16 on sm_90.
    """
    if not 0 == K % _STEP_BY_GROUP < K or dtype.itemsize != 2 or not _num_coded(format) or device.is_amd:
        return False
    return rows <= 16 or (rows <= 64 and dtype == torch.bfloat16 and device.arch == "sm_90")


def _tiles(M: int, K: int, dtype: torch.dtype, format: str, device: Device) -> list[Tile]:
    """Returns tiles for M rows, largest first."""
    if _goes_by_group(M, K, dtype, format, device):
        # With codes at both ends a step has twice the columns, for which older GPUs lack registers, and on
        # sm_90 9 to 16 rows take fewer instructions as 32.
        is_long = _num_coded(format) == 2 and device.has_wide_mma
        sizes = (8, 32, 64) if is_long and dtype == torch.bfloat16 and device.arch == "sm_90" else (8, 16, 32, 64)
        rows = next(rows for rows in sizes if rows >= M)
        inner = 2 * _STEP_BY_GROUP if is_long and K % (2 * _STEP_BY_GROUP) == 0 else _STEP_BY_GROUP
        return [(rows, features, inner) for features in ([64] if rows <= 16 else [128, 64])]
    table = _TILES_FLOAT32 if dtype == torch.float32 else _TILES_16_BIT
    rows = next((rows for rows in table if rows >= M), max(table))
    tiles = [(rows, *tile) for tile in table[rows]]
    if rows == 64 >= M and _num_coded(format) and table is _TILES_16_BIT and device.arch == "sm_90" and K % 128 == 0:
        tiles = [(64, 64, 128)]  # only there were the instructions counted
    if M > rows == 128:
        # mma.sync also holds operands in registers, which leaves too few for two accumulators of 128 by 128. The same
        # is true of AMD if codes are converted.
        if device.has_wide_mma or (device.is_amd and _num_coded(format) == 0):
            tiles.insert(0, (128, 128, 64))
        # Blends the weight once for 256 rows instead of 128. Blending takes as long as the product of 128 rows.
        if device.has_wide_mma and M > 256:
            tiles.insert(0, (256, 128, 64))
        tiles.append((64, 64, 64))
    # Triton copies rows aligned to 16 elements asynchronously. Others go through registers, a few elements at a time.
    if K % 16:
        tiles = [(rows, features, 64 // dtype.itemsize) for rows, features, _ in tiles if features <= 64]
    if _num_coded(format):
        # Base and delta are multiplied as twice the features, which four warps share without exchanging data. Along K
        # a tile has whole groups.
        tiles = [(rows, features, max(inner, 32)) for rows, features, inner in tiles if features >= 64]
        # Except in float32: from 64 features on, counting both ends, Triton 3.6 multiplies codes as TF32 on sm_100
        # regardless of input precision, because it looks at the width of the loaded type. Other GPUs lack registers.
        if dtype == torch.float32:
            tiles = [(rows, 16, 32)]
    return list(dict.fromkeys(tiles))


def _config(M: int, N: int, K: int, dtype: torch.dtype, format: str, device: Device, tiles: list[Tile]) -> LinearConfig:
    by_group = tiles[0][2] % _STEP_BY_GROUP == 0 and _goes_by_group(tiles[0][0], K, dtype, format, device)
    enough = device.processors * 2 if by_group and tiles[0][0] <= 32 else device.processors * 3 // 4

    def programs(tile: Tile) -> int:
        return -(-M // tile[0]) * -(-N // tile[1])

    tile = next((tile for tile in tiles if programs(tile) >= enough), tiles[-1])
    if len(tiles) > 1 and (tile[0] == 256 or (by_group and tile[1] == 128)):
        # By instruction count, twice the rows take 1.6 times as long, and twice the features 1.9 times. But the last
        # round may be emptier.
        rounds = [-(-programs(tile) // device.processors) for tile in tiles[:2]]
        tile = tiles[0] if (1.6 if tile[0] == 256 else 1.9) * rounds[0] <= rounds[1] else tiles[1]
    block_m, block_n, block_k = tile
    # A split has at least four steps, or filling its pipeline would cost more than the extra parallelism gains.
    max_splits = -(-K // (_STEP_BY_GROUP if by_group else block_k)) // 4
    split_k = 1
    while split_k * programs(tile) < enough and split_k * 2 <= max_splits:
        split_k *= 2
    aligned = K % 16 == 0
    mixed_m = block_m
    if block_n == 128 and (block_m == 256 or _num_coded(format) or device.has_tensor_memory):
        # Two accumulators of 128 by 128, or one of 256 rows, would spill next to the registers for dequantising. Two
        # accumulators would also spill if both come back from tensor memory at once.
        mixed_m = min(block_m, 64)
    elif device.has_tensor_memory and not aligned:  # loads go through registers too
        mixed_m = min(block_m, 128 // dtype.itemsize)
    # Two ends are dequantised, and two accumulators come back from tensor memory at once.
    crowded = device.has_tensor_memory and _num_coded(format) == 2 and block_m == 32
    stages = _stages(_stage_bytes(tile, dtype), device) if aligned else 2
    warps = 8 if block_m * block_n * dtype.itemsize >= (128 if aligned else 64) * 64 * 2 or crowded else 4
    if by_group:
        warps = block_n // 16
        x = block_m * block_k * dtype.itemsize
        step = x + block_n * block_k * formats.matrices(format).bytes_per_weight(dtype)
        # A stage is being computed, from registers except for the x of `wgmma`; the others are on their way.
        room = device.shared / 3 if block_m <= 16 else device.shared * warps / 8 - x
        stages = max(2, min(4, 1 + int(room / step)))
    return LinearConfig(
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        mixed_m=mixed_m,
        split_k=split_k,
        # While one tile holds all rows, reading the weights takes longer than multiplying them twice. With few rows,
        # so does blending them.
        use_blend=32 < block_m < M and not by_group,
        num_warps=warps,
        num_stages=stages,
        by_group=by_group,
    )


def _stage_bytes(tile: Tile, dtype: torch.dtype) -> int:
    """Returns the bytes of x and of two weights in one step."""
    return (tile[0] + 2 * tile[1]) * tile[2] * dtype.itemsize


def _stages(bytes_per_stage: int, device: Device) -> int:
    """Returns pipeline stages: as many as let two programs share a multiprocessor, but at least three if three fit."""
    if device.is_amd:
        return 2
    return max(2, min(4, max(3, device.shared // 2 // bytes_per_stage), device.shared // bytes_per_stage))
