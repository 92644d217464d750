"""Attention of decoding steps: of packed sequences, for continuous batching without flash attention; of compiled ones.

For every token of a packed batch, transformers' own `sdpa` computes the scores with the keys of all sequences, and
masks most of them. That is quadratic in the number of sequences, and a NaN in one sequence reaches all, as 0·NaN is
NaN. Its paged `eager` also ignores soft caps. Here a sequence attends to its own keys only.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dami.layers.row_parameter import RowParameter
from dami_kernels import native
from dami_kernels.ops import decode_attention

NAME = "dami_packed"  # the name of this attention as an attn_implementation
INVARIANT = "dami_packed_invariant"  # computes each query alone: its bits do not depend on how a prompt is chunked
CAPTURED = "dami_packed_captured"  # does not ask the device for lengths: a captured graph can be replayed at others
GROUPED = "dami_grouped"  # is sdpa, and computes all heads of a group at once in compiled steps too
CHUNK = 16  # queries whose keys `captured_attention` gathers at once: few, as it gathers the most that any may have


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
    block_table: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Computes causal attention of concatenated sequences.

    Args:
        module: the attention layer.
        query: [1, heads, queries of all sequences, head size].
        key, value: [1, key heads, keys of all sequences, head size]; a sequence's last keys belong to its queries.
        attention_mask: ignored, as it follows from the lengths.
        scaling: scale of the scores.
        cu_seq_lens_q, cu_seq_lens_k: int32 [sequences + 1], the start of each sequence, and the end.
        sliding_window: the maximum number of keys a query sees, including its own.
        softcap: soft cap of the scores.
        s_aux: an attention sink for each head, [heads].
        invariant: computes each query alone.
        block_table, k_cache, v_cache: int32 [sequences, ·] and [pages, page, key heads, head size] twice: where the
            keys and values are, on the CPU; `key` and `value` are then those of the queries only, to be put there.

    Returns:
        [1, queries, heads, head size], and None in place of the attention weights.
    """
    if block_table is not None and k_cache is not None and v_cache is not None:
        if sliding_window is not None:
            raise NotImplementedError(f"pages hold keys that a sliding window leaves out, got {sliding_window=}")
        scale, sinks = query.shape[3] ** -0.5 if scaling is None else scaling, _of_queries(s_aux, query)
        places = k_cache, v_cache, block_table, cu_seq_lens_q, cu_seq_lens_k
        return native.attention(query, key, value, *places, scale, softcap or 0.0, sinks), None
    result = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
    for group in _groups(cu_seq_lens_q, cu_seq_lens_k, sliding_window, invariant, query.device):
        attended = _attend_group(query, key, value, group, scaling, softcap, s_aux)
        if isinstance(group.rows, slice):
            result[group.rows] = attended
        else:
            result.index_copy_(0, group.rows, attended)
    return result.unsqueeze(0), None


@dataclass(frozen=True)
class _Group:
    """Sequences with equally many queries, whose keys are padded to equal length.

    Attributes:
        rows, keys: places of their queries and of their keys.
        sees: which keys each query sees, [sequences, queries, keys]; None if all up to its own.
        sequences: their number.
    """

    rows: slice | Tensor
    keys: slice | Tensor
    sees: Tensor | None
    sequences: int = 1


class _Pass(threading.local):
    """The groups found in this thread's forward pass, by lengths and window. The lengths are kept, as ids are keys."""

    found: dict[tuple[int, int, int | None, bool], tuple[list[_Group], Tensor, Tensor]] | None = None


_this_pass = _Pass()


@contextmanager
def one_pass() -> Iterator[None]:
    """A context for one forward pass, in which no tensor of lengths changes: layers share the grouping by them."""
    _this_pass.found = {}
    try:
        yield
    finally:
        _this_pass.found = None


def _groups(
    cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor, sliding_window: int | None, invariant: bool, device: torch.device
) -> list[_Group]:
    """Returns how to attend for all sequences, as a layer of this forward pass has found it if one has."""
    found = _this_pass.found
    at = id(cu_seq_lens_q), id(cu_seq_lens_k), sliding_window, invariant
    if found is None:
        return _grouped(cu_seq_lens_q, cu_seq_lens_k, sliding_window, invariant, device)
    if at not in found:
        groups = _grouped(cu_seq_lens_q, cu_seq_lens_k, sliding_window, invariant, device)
        found[at] = groups, cu_seq_lens_q, cu_seq_lens_k
    return found[at][0]


def _grouped(
    cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor, sliding_window: int | None, invariant: bool, device: torch.device
) -> list[_Group]:
    groups: list[_Group] = []
    decoding: list[tuple[int, int, int]] = []  # number of keys, row, first key
    of_queries, of_keys = (pairwise(lengths.tolist()) for lengths in (cu_seq_lens_q, cu_seq_lens_k))
    for (begin, end), (keys, keys_end) in zip(of_queries, of_keys, strict=True):
        for first in range(begin, end, 1 if invariant else max(1, end - begin)):
            rows = slice(first, first + 1 if invariant else end)
            queries, last_key = rows.stop - first, keys_end - (end - rows.stop)
            first_key = keys if sliding_window is None else max(keys, last_key - sliding_window - queries + 1)
            count = last_key - first_key
            if queries > 1 or invariant:
                groups.append(_Group(rows, slice(first_key, last_key), _sees(queries, count, sliding_window, device)))
            else:
                decoding.append((count, first, first_key))
    decoding.sort(reverse=True)
    while decoding:
        most = decoding[0][0]
        size = next((i for i, (count, _, _) in enumerate(decoding) if 2 * count <= most), len(decoding))
        counts, rows_, first_keys = torch.tensor(decoding[:size], device=device).t().contiguous()
        del decoding[:size]
        places = torch.arange(most, device=device)
        # Pads with the sequence's own last key, so that no sequence reads another's keys.
        own = first_keys[:, None] + torch.minimum(places, counts[:, None] - 1)
        groups.append(_Group(rows_, own.flatten(), (places < counts[:, None])[:, None], size))
    return groups


def captured_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_k: int,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Computes what `packed_attention` does, with all lengths on the device only.

    Queries after those of the last sequence are padding, whose results mean nothing.

    Args:
        max_length_k: the most keys of a sequence.
        module, query, key, value, attention_mask, scaling, cu_seq_lens_q, cu_seq_lens_k, sliding_window, softcap,
            s_aux: as in `packed_attention`.
    """
    result = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
    place = torch.arange(query.shape[2], dtype=torch.int32, device=query.device)
    ends = cu_seq_lens_q[1:].contiguous()
    sequence = torch.searchsorted(ends, place, right=True).clamp(max=len(ends) - 1)
    last_key = cu_seq_lens_k[1:][sequence] - (ends[sequence] - place - 1)
    first_key = cu_seq_lens_k[:-1][sequence]
    if sliding_window is not None:
        first_key = torch.maximum(first_key, last_key - sliding_window)
    count = (last_key - first_key).clamp(min=1)
    places = torch.arange(min(max_length_k, key.shape[2]), device=query.device)
    # Pads with the query's own last key, so that no sequence reads another's keys.
    own = (first_key[:, None] + torch.minimum(places, count[:, None] - 1)).clamp(0, key.shape[2] - 1)
    sees = (places < count[:, None])[:, None]
    for rows in (slice(start, start + CHUNK) for start in range(0, len(place), CHUNK)):
        group = _Group(rows, own[rows].flatten(), sees[rows], len(sees[rows]))
        result[rows] = _attend_group(query, key, value, group, scaling, softcap, s_aux)
    return result.unsqueeze(0), None


def _attend_group(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: _Group,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Computes the attention of a group, [its queries, heads, head size]."""
    n = group.sequences
    q, k, v = (_take(x, at, n) for x, at in ((query, group.rows), (key, group.keys), (value, group.keys)))
    sinks = _of_queries(sinks, query)
    sink = None if sinks is None else sinks[group.rows].unflatten(0, (n, -1)).mT
    return _attend(q, k, v, scaling, group.sees, softcap, sink).transpose(1, 2).flatten(0, 1)


def _of_queries(sinks: Tensor | None, query: Tensor) -> Tensor | None:
    """Returns the sinks of each query of [1, heads, queries, head size], [queries, heads]."""
    sinks = sinks.rows if isinstance(sinks, RowParameter) else sinks
    return None if sinks is None else sinks.expand(query.shape[2], -1)


def _take(x: Tensor, at: slice | Tensor, sequences: int) -> Tensor:
    """Takes some places of [1, heads, places, size], as [sequences, heads, places of each, size]."""
    taken = x[0][:, at] if isinstance(at, slice) else x[0].index_select(1, at)
    return taken.unflatten(1, (sequences, -1)).transpose(0, 1)


def _sees(queries: int, keys: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """Returns which keys each of a sequence's last queries sees, [1, queries, keys]; None if all up to its own."""
    if queries == 1 or (queries == keys and (sliding_window is None or keys <= sliding_window)):
        return None
    place = torch.arange(keys - queries, keys, device=device).view(-1, 1)
    at = torch.arange(keys, device=device)
    sees = at <= place
    if sliding_window is not None:
        sees &= at > place - sliding_window
    return sees[None]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    sees: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Computes attention, [sequences, heads, queries, head size].

    `sees` is [sequences, queries, keys]; if it is None, a query sees all keys up to its own. `sinks` is [sequences,
    heads, queries].
    """
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    mask = None if sees is None else sees[:, None]
    plain = softcap is None and sinks is None
    if plain and queries == 1:  # treats all heads of a group as queries of one key head
        grouped = query.reshape(len(query), key.shape[1], -1, query.shape[3])
        attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
        return attended.reshape(*query.shape[:3], -1)
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    if plain:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = query.new_ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[..., None].to(scores.dtype)], 3)
    return scores.softmax(3, dtype=torch.float32)[..., :keys].to(value.dtype) @ value


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Computes transformers' `sdpa`. With one query, heads that share a key head read its keys and values together.

    transformers does so too, but not in a compiled step: there, it copies keys and values once for each head.

    Args:
        module, query, key, value, attention_mask, dropout, scaling, options: as in transformers.
    """
    batch, heads, queries, size = query.shape
    one_mask = attention_mask is None or attention_mask.shape[1] == 1
    if queries > 1 or not one_mask or dropout or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    if query.is_cpu and (attention_mask is None or attention_mask.dtype == torch.bool):
        scaling = size**-0.5 if scaling is None else scaling
        return decode_attention(query, key, value, attention_mask, scaling), None
    q = query.reshape(batch, key.shape[1], -1, size)
    y = F.scaled_dot_product_attention(q, key, value, attn_mask=attention_mask, scale=scaling)
    return y.reshape(batch, 1, heads, -1), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
AttentionInterface.register(NAME, packed_attention)
AttentionInterface.register(CAPTURED, captured_attention)
AttentionInterface.register(INVARIANT, partial(packed_attention, invariant=True))
