"""The choice between our kernel of `lerp_linear` and products of torch's library, from some number of rows on."""

from __future__ import annotations

from functools import cache, lru_cache

import torch

from dami_kernels.tuning.config import Route
from dami_kernels.tuning.device import Device
from dami_kernels.tuning.tables import load_table, nearest

SCRATCH = 128 * 2**20  # bytes that a route may take besides x, y and the weight, whatever the model
TOGETHER = 32  # fewest rows in a row at one λ for which blending their weight is considered
# With AMX a core multiplies 1024 pairs of bfloat16 in a cycle, without it our kernel 64. A blend in pieces moves some
# 20 bytes for each weight, about two cycles. So for R rows it is R/1024 + 2 cycles a weight against R/64: the same at
# 137, and a third at 512. Counted, not measured.
AMX_ROWS = 512


@lru_cache(1 << 14)  # called some hundred times per decode step
def route(
    M: int, N: int, K: int, dtype: torch.dtype, format: str, device: Device, together: int, invariant: bool = False
) -> Route:
    """Returns how to compute x [M, K] with weights of N features. Does not depend on any λ.

    Args:
        together: how many rows in a row are known to share a λ: all of them, the rows of a sequence, or 1.
        invariant: a row's bits must not depend on the number of rows, so it takes no library's product.

    What was measured on this device decides, at the nearest number of rows. Without a measurement it is our kernel,
    except on a CPU with AMX, by the count above.
    """
    if invariant or K == 0 or dtype == torch.float32:  # which the library may compute in TF32, if it is told so
        return Route.KERNEL
    measured = load_table(device.name).get((N, K, dtype, format)) if device.name else None
    if together >= TOGETHER:
        if measured:
            return nearest(measured, together).one
        by_amx = device.arch == "amx" and dtype == torch.bfloat16 and together >= AMX_ROWS
        return Route.BLEND if by_amx else Route.KERNEL
    return nearest(measured, M).mixed if measured and has_float32_results(device) else Route.KERNEL


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
