"""Routes tokens to experts."""

from __future__ import annotations

import torch
from torch import Tensor


def by_expert(chosen: Tensor, experts: int, places: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the pairs of a token and an expert by expert.

    Args:
        chosen: integers [tokens, k], the experts of each token.
        experts: number of experts in this process.
        places: the index of each expert in this process, -1 for those of other processes; None if all are here.

    Returns:
        [tokens · k], the expert of each sorted pair, where `experts` stands for those of other processes and comes
        last; int64 [tokens · k], the index of each sorted pair in `chosen`, flattened; and int32 [experts], the end of
        each expert's pairs.
    """
    chosen = chosen.reshape(-1)
    if places is not None:
        chosen = places[chosen.long()]
        chosen = torch.where(chosen < 0, experts, chosen)
    expert, pair = chosen.sort(stable=True)
    each = torch.arange(experts, dtype=expert.dtype, device=expert.device)
    return expert, pair, torch.searchsorted(expert, each, right=True, out_int32=True)
