"""Launch parameters of `lerp_experts`."""

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
    """Returns launch parameters for x [rows, K] and weights [E, N, K]. The host does not know the offsets.

    Assumes that rows are spread evenly over the experts. There are then as many programs as for one weight with the
    features of all experts and the rows of one. A tile has room for twice as many rows, because routing is uneven and
    a second tile would read the expert's weight again. No tile has more than 128 rows: larger ones would be emptier.

    If invariant, the result does not depend on `rows`, and weights are not blended.
    """
    active = E if invariant else min(E, rows)
    share = -(-rows // active)
    M = min(256, max(share, min(2 * share, rows, 128)))
    return linear_config(M, active * N, K, dtype, format, device, invariant)
