"""How `lerp_experts` is cut into programs."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from dami_kernels.tuning.device import Device
from dami_kernels.tuning.linear import LinearConfig, linear_config


@lru_cache(1 << 14)
def experts_config(
    rows: int, E: int, N: int, K: int, dtype: torch.dtype, format: str, device: Device, invariant: bool
) -> LinearConfig:
    """Launch parameters for x [rows, K] and weights [E, N, K], of which the host does not know the offsets.

    Rows are taken to be spread over the experts. Then there are as many programs as for one weight with the features of
    all of them, and with the rows of one. A tile has room for twice those, for routers are uneven and a second tile
    reads the expert's weight again; unless one tile cannot hold them, and larger ones would stay emptier.

    If invariant, a function of all but the rows, without what the λ of other rows decide.
    """
    if invariant:
        return replace(linear_config(64, E * N, K, dtype, format, device), use_blend=False, split_k=1)
    active = min(E, rows)
    share = -(-rows // active)
    return linear_config(max(share, min(2 * share, rows, 128)), active * N, K, dtype, format, device)
