"""Tokens on their way to experts."""

from __future__ import annotations

import torch
from torch import Tensor


def by_expert(chosen: Tensor, experts: int, places: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of a token and an expert, sorted by expert.

    Args:
        chosen: integers [tokens, k], the experts of each token.
        experts: how many are here.
        places: the place of each expert in this process, -1 for those of others; None if all are here.

    Returns:
        [tokens · k], the experts, those of others after the last; int64 [tokens · k], which pair each is, k for each
        token; and int32 [experts], the end of each one's pairs.
    """
    chosen = chosen.reshape(-1)
    if places is not None:
        chosen = places[chosen.long()]
        chosen = torch.where(chosen < 0, experts, chosen)
    expert, pair = chosen.sort(stable=True)
    each = torch.arange(experts, dtype=expert.dtype, device=expert.device)
    return expert, pair, torch.searchsorted(expert, each, right=True, out_int32=True)
