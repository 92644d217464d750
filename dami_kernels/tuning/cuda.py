"""Launch parameters of the CUDA C++ decode kernel, and the choice between it and Triton's."""

from __future__ import annotations

from functools import lru_cache

import torch

from dami_kernels import formats
from dami_kernels.formats import Matrix
from dami_kernels.quantize import GROUP, SCALE
from dami_kernels.tuning.device import Device
from dami_kernels.tuning.tables import load_table, nearest

MAX_ROWS = 8  # of x
MAX_WARPS = 16  # of a block
TILE, STEP = 16, 128  # features per block; weights of each feature that a warp takes at a time
STAGES = 2  # steps in flight per warp
# Bytes that a multiprocessor must have in flight to get its share of the bandwidth: on an H200, 4.8 TB/s over 132
# multiprocessors at a latency of 1.2 µs. Computed, not measured.
BYTES_IN_FLIGHT = 44_000
# Share of a multiprocessor's shared memory; the L1 cache, for x, gets the rest. Must match decode.cu.
CARVEOUT = 0.85
MAX_WARPS_AT_ONCE = 18  # limit set by a multiprocessor's registers


def step_bytes(format: str) -> int:
    """Returns the bytes that one step of a warp loads from memory."""
    both = formats.matrices(format)
    return sum(_value_bytes(matrix) + _scale_bytes(matrix) for matrix in (both.base, both.second))


def shared_bytes(format: str) -> int:
    """Returns a warp's shared memory in bytes. Each stage holds the values, padded by a quarter, and the scales."""
    both = formats.matrices(format)
    return STAGES * sum(_value_bytes(matrix) * 5 // 4 + _scale_bytes(matrix) for matrix in (both.base, both.second))


def _value_bytes(matrix: Matrix) -> int:
    return TILE * STEP * (matrix.bits or 16) // 8


def _scale_bytes(matrix: Matrix) -> int:
    return 0 if matrix.bits is None else TILE * STEP // GROUP * SCALE.itemsize


def warps_at_once(format: str, device: Device) -> int:
    """Returns the number of warps that fit on a multiprocessor."""
    return min(int(CARVEOUT * device.shared) // shared_bytes(format), MAX_WARPS_AT_ONCE)


@lru_cache(1 << 14)  # called some hundred times per decode step
def decode_warps(N: int, K: int, format: str, device: Device) -> int:
    """Returns the warps per block for a weight [N, K]. They share the work along K. The number of rows does not matter.

    Minimises the time in this model, in bytes at full speed: blocks run in rounds of as many as the multiprocessors
    hold. A round waits for one latency. Its bytes then arrive at full speed if enough are in flight, counting one step
    per warp, and proportionally slower if not. The warp with the most steps determines the time.
    """
    steps, tiles, bytes_of_step = -(-K // STEP), -(-N // TILE), step_bytes(format)
    needed = BYTES_IN_FLIGHT * device.processors

    def time(warps: int) -> float:
        at_once = device.processors * (warps_at_once(format, device) // warps)
        if at_once == 0:
            return float("inf")

        def round(blocks: int) -> float:
            in_flight = blocks * warps * bytes_of_step
            return -(-steps // warps) * max(in_flight, needed) + needed

        full, rest = divmod(tiles, at_once)
        return full * round(at_once) + (round(rest) if rest else 0)

    return min(range(1, min(MAX_WARPS, max(steps, 1)) + 1), key=time)


@lru_cache(1 << 14)
def prefers_cuda(M: int, N: int, K: int, dtype: torch.dtype, format: str, device: Device) -> bool:
    """Whether the CUDA kernel was measured to be faster than Triton's on x [M, K] and a weight [N, K].

    Looks up the nearest M in this GPU's table. False without a table.
    """
    measured = load_table(device.name).get((N, K, dtype, format)) if device.name else None
    return measured is not None and nearest(measured, M).prefers_cuda
