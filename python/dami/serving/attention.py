"""Attention of packed sequences, each for itself: for continuous batching where there is no flash attention.

transformers' own `sdpa` computes, for every token of a packed batch, the scores with the keys of all sequences, and
masks most of them away. That is quadratic in the number of sequences, and a NaN in one reaches all, as 0·NaN is NaN;
its paged `eager` leaves out soft caps besides. Here a sequence meets no keys but its own.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from dami.row_parameter import RowParameter

NAME = "dami_packed"  # of this attention, as an attn_implementation
INVARIANT = "dami_packed_invariant"  # computes each query alone: its bits do not depend on the steps a prompt came in


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    invariant: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of sequences that stand one after another.

    Args:
        module: the attention layer.
        query: [1, heads, queries of all sequences, head size].
        key, value: [1, key heads, keys of all sequences, head size]; the last keys of a sequence are of its queries.
        attention_mask: not looked at, as it follows from the lengths.
        scaling: of the scores.
        cu_seq_lens_q, cu_seq_lens_k: int32 [sequences + 1], where each sequence begins, and the end.
        sliding_window: how many keys a query sees at most, its own included.
        softcap: bends scores to stay below it.
        s_aux: an attention sink for each head, [heads].
        invariant: computes each query alone.

    Returns:
        [1, queries, heads, head size], and None in the place of weights.
    """
    result = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    sinks = s_aux.rows if isinstance(s_aux, RowParameter) else s_aux
    of_queries, of_keys = (pairwise(lengths.tolist()) for lengths in (cu_seq_lens_q, cu_seq_lens_k))
    for (begin, end), (keys, keys_end) in zip(of_queries, of_keys, strict=True):
        for first in range(begin, end, 1 if invariant else max(1, end - begin)):
            rows = slice(first, first + 1 if invariant else end)
            last_key = keys_end - (end - rows.stop)
            first_key = (
                keys if sliding_window is None else max(keys, last_key - sliding_window - (rows.stop - first) + 1)
            )
            sink = sinks[rows].t() if sinks is not None and sinks.dim() == 2 else sinks
            seen = slice(first_key, last_key)
            result[:, rows] = _attend(
                query[:, :, rows], key[:, :, seen], value[:, :, seen], scaling, sliding_window, softcap, sink
            ).transpose(1, 2)
    return result, None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of one sequence, [1, heads, queries, head size]; `sinks` [heads] or [heads, queries]."""
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    plain = softcap is None and sinks is None
    if plain and queries == 1:  # all heads of a group are queries of one key head
        grouped = query.view(1, key.shape[1], -1, query.shape[3])
        return F.scaled_dot_product_attention(grouped, key, value, scale=scaling).view(*query.shape[:3], -1)
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    if plain and queries == keys and (sliding_window is None or keys <= sliding_window):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    place = torch.arange(keys - queries, keys, device=query.device).view(-1, 1)
    at = torch.arange(keys, device=query.device)
    sees = at <= place
    if sliding_window is not None:
        sees &= at > place - sliding_window
    if plain:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=sees, scale=scaling)
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~sees, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, heads, -1, 1).expand(1, heads, queries, 1).to(scores.dtype)], 3)
    return scores.softmax(3, dtype=torch.float32)[..., :keys].to(value.dtype) @ value


AttentionInterface.register(NAME, packed_attention)
AttentionInterface.register(INVARIANT, partial(packed_attention, invariant=True))
