"""How `lerp_experts` is cut into programs."""

from __future__ import annotations

from functools import lru_cache

import torch

from dami_kernels.tuning.config import LinearConfig
from dami_kernels.tuning.device import Device
from dami_kernels.tuning.linear import linear_config


@lru_cache(1 << 14)
def experts_config(
    rows: int, E: int, N: int, K: int, dtype: torch.dtype, format: str, device: Device, invariant: bool
) -> LinearConfig:
    """Launch parameters for x [rows, K] and weights [E, N, K], of which the host does not know the offsets.

    Rows are taken to be spread over the experts. Then there are as many programs as for one weight with the features of
    all of them, and with the rows of one. A tile has room for twice those, for routers are uneven and a second tile
    reads the expert's weight again; unless one tile cannot hold them, and larger ones would stay emptier. For the same
    reason none has more than 128 rows.

    If invariant, a function of all but the rows, without blending.
    """
    active = E if invariant else min(E, rows)
    share = -(-rows // active)
    M = min(256, max(share, min(2 * share, rows, 128)))
    return linear_config(M, active * N, K, dtype, format, device, invariant)
