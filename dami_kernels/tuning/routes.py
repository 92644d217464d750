"""The choice between our kernel of `lerp_linear` and products of torch's library, from some number of rows on."""

from __future__ import annotations

from functools import cache, lru_cache

import torch

from dami_kernels import formats
from dami_kernels.tuning.config import Route
from dami_kernels.tuning.device import Device
from dami_kernels.tuning.linear import MIXED, linear_config
from dami_kernels.tuning.tables import load_table, nearest

SCRATCH = 128 * 2**20  # bytes that a route may take besides x, y and the weight, whatever the model
TOGETHER = 32  # fewest rows in a row at one λ for which blending their weight is considered
# With AMX our kernel blends a weight anew for every 256 rows at one λ. A blend for all rows and one product of torch's
# take 1.6 to 1.0 of its time with 512 rows, 1.4 to 0.9 with 1024 and 1.1 to 0.8 with 2048 (N = K = 3072).
AMX_ROWS = 2048
# If K is no multiple of 32, oneDNN's product by AMX lets a NaN in a row of x into the row before it.
AMX_K = 32
# What a processor does in a cycle at best, by architecture: 16-bit operations of its matrix unit, bytes from the L2
# cache and, on the slowest GPU of its kind, from memory: as in benchmarks/gpus.py, from the makers' publications.
RATES = {"sm_90": (4096, 38.8, 13.9), "sm_100": (8192, 38.8, 29.1)}
LIBRARY_TILE = 128  # rows and features
WORTH = 0.9  # of our kernel's time: what is only counted must promise this much
UNPACKED = 20  # bytes moved for each code of which plain torch makes a number
LERPED = 26  # bytes moved for each of y: two float32 results and their lerp, written and read, and y written


@lru_cache(1 << 14)  # called some hundred times per decode step
def route(
    M: int, N: int, K: int, dtype: torch.dtype, format: str, device: Device, together: int, invariant: bool = False
) -> Route:
    """Returns how to compute x [M, K] with weights of N features. Does not depend on any λ.

    Args:
        together: how many rows in a row are known to share a λ: all of them, the rows of a sequence, or 1.
        invariant: a row's bits must not depend on the number of rows, so it takes no library's product.

    What was measured on this device decides, at the nearest number of rows. Without a measurement it is our kernel,
    unless counts promise more of a route: on a CPU with AMX and on the GPUs above.
    """
    if invariant or K == 0 or dtype == torch.float32:  # which the library may compute in TF32, if it is told so
        return Route.KERNEL
    measured = load_table(device.name).get((N, K, dtype, format)) if device.name else None
    if together >= TOGETHER:
        if measured:
            return nearest(measured, together).one
        by_amx = device.arch == "amx" and dtype == torch.bfloat16 and together >= AMX_ROWS and K % AMX_K == 0
        return Route.BLEND if by_amx else _by_count(M, N, K, dtype, format, device, together)
    if measured:
        return nearest(measured, M).mixed if has_float32_results(device) else Route.KERNEL
    return _by_count(M, N, K, dtype, format, device, together)


def _by_count(M: int, N: int, K: int, dtype: torch.dtype, format: str, device: Device, together: int) -> Route:
    """Returns the route of least time if every part of it took what its slowest limit implies."""
    if device.arch not in RATES:
        return Route.KERNEL
    matrix, l2, memory = RATES[device.arch]
    config = linear_config(M, N, K, dtype, format, device, mixes_lams=together < MIXED)
    both, is_mixed = formats.matrices(format), together < TOGETHER
    stored = both.bytes_per_weight(dtype)
    # Cycles of a processor for each weight of the layer. The library's last round of tiles is not full either.
    products = (2 if is_mixed else 1) * 2 * M / matrix
    tiles = -(-M // LIBRARY_TILE) * -(-N // LIBRARY_TILE)
    by_library = products * -(-tiles // device.processors) * device.processors / tiles
    rows = config.mixed_m if is_mixed else config.block_m
    read = -(-M // rows) * stored + dtype.itemsize * M / config.block_n
    kernel = max(products, read / l2, stored / memory)
    if is_mixed:
        moved = stored + unpacked_bytes(format) + LERPED * M / K
        way, other = Route.PRODUCTS, by_library + moved / memory
    else:
        way, other = Route.BLEND, by_library + M / together * (stored + dtype.itemsize) / memory
    return way if other < WORTH * kernel else Route.KERNEL


def unpacked_bytes(format: str) -> int:
    """Returns the bytes moved for each weight, by two products, to make numbers of what is stored as codes."""
    both = formats.matrices(format)
    return UNPACKED * sum(part.bits is not None for part in (both.base, both.second))


def candidates(together: int, device: Device) -> list[Route]:
    """Returns the routes to time for rows of which so many in a row share a λ, our kernel first."""
    if together >= TOGETHER:
        return [Route.KERNEL, Route.BLEND]
    return [Route.KERNEL, Route.PRODUCTS] if has_float32_results(device) else [Route.KERNEL]


def has_float32_results(device: Device) -> bool:
    """Whether the library multiplies 16-bit numbers with float32 results, as the accuracy of two products needs."""
    return device.arch.startswith(("sm_", "gfx"))


def rows_together(M: int, rows_per_lam: int, has_map: bool) -> int:
    """Returns how many rows in a row are known to share a λ. A map is data, which the host does not read."""
    return 1 if has_map else min(rows_per_lam, M)


def piece(rows: int, bytes_per_feature: int) -> int:
    """Returns how many features, a multiple of 64, to compute at a time, so that their scratch stays within SCRATCH.

    Args:
        rows: of x, each with two float32 results for every feature, and their lerp; 0 for none.
        bytes_per_feature: of the weight's copy.
    """
    return max(64, SCRATCH // max(1, 12 * rows + bytes_per_feature) // 64 * 64)


@cache
def cpu() -> Device:
    """Returns the CPU, whose name no table has."""
    return Device("amx" if torch.cpu.get_capabilities().get("amx_bf16") else "cpu", processors=1, shared=0)
