"""`decode_attention`: attention of a decoding step, one query for each sequence."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor

from dami_kernels.ops import library
from dami_kernels.weight import FLOAT_DTYPES


def decode_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Computes attention of one query for each sequence. Heads that share a key head read its keys once.

    On a CPU, keys after the last one that a query sees are not read: a static cache has room for more than it holds.

    Args:
        query: [batch, heads, 1, size] float32, bfloat16 or float16.
        key, value: [batch, key heads, keys, size] of the same dtype; the size of a value may be another.
        mask: bool [batch or 1, 1, 1, keys], which keys a query sees; None if it sees all. One that sees none gets 0.
        scale: scale of the scores.

    Returns:
        [batch, 1, heads, size of a value]. There is no gradient.

    Raises:
        TypeError, ValueError: an argument is invalid. The message names it, what was expected and what was passed.
    """
    y = torch.ops.dami.decode_attention(query, key, value, mask, scale)
    return y.reshape(query.shape[0], 1, query.shape[1], value.shape[3])


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    if query.dtype not in FLOAT_DTYPES:
        raise TypeError(f"query must be of float32, bfloat16 or float16, got {query.dtype}")
    if query.dim() != 4 or query.shape[2] != 1:
        raise ValueError(f"query must be [batch, heads, 1, size], got shape {list(query.shape)}")
    batch, heads, _, size = query.shape
    for name, given in ("key", key), ("value", value):
        if given.dtype != query.dtype or given.device != query.device:
            raise TypeError(f"{name} must be {query.dtype} on {query.device}, got {given.dtype} on {given.device}")
        if given.dim() != 4 or given.shape[0] != batch or given.shape[:3] != key.shape[:3]:
            raise ValueError(f"{name} must be [{batch}, key heads, keys, size], got shape {list(given.shape)}")
    if key.shape[3] != size:
        raise ValueError(f"key must have the size of query, {size}, got shape {list(key.shape)}")
    if not heads:
        raise ValueError(f"query must have heads, got shape {list(query.shape)}")
    if not key.shape[1] or heads % key.shape[1]:
        raise ValueError(f"key must have a number of heads that divides {heads}, got shape {list(key.shape)}")
    if mask is not None:
        if mask.dtype != torch.bool or mask.device != query.device:
            raise TypeError(f"mask must be torch.bool on {query.device}, got {mask.dtype} on {mask.device}")
        if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1:] != (1, 1, key.shape[2]):
            raise ValueError(f"mask must be [{batch} or 1, 1, 1, {key.shape[2]}], got shape {list(mask.shape)}")


def _run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    _check(query, key, value, mask)
    dense = [None if each is None else each.contiguous() for each in (query, key, value, mask)]
    if query.is_cpu and any(map(operator.is_not, dense, (query, key, value, mask))):
        return torch.ops.dami.decode_attention(*dense, scale)  # by the kernel, which takes no tensors with gaps
    grouped = query.reshape(len(query), key.shape[1], query.shape[1] // key.shape[1], query.shape[3])
    y = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    return y.reshape(len(query), query.shape[1] * value.shape[3])


def _fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    _check(query, key, value, mask)
    return query.new_empty(query.shape[0], query.shape[1] * value.shape[3])


library.register(
    "decode_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale) -> Tensor", _run, _fake
)
