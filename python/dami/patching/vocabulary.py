"""Samples tokens that only one end knows as that end does, and not at all at the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def weigh_unshared(output: Any, lam: Tensor, sizes: tuple[int, int]) -> None:
    """Multiplies the odds of tokens that only one end knows by λ, the thinking end's, or by 1 − λ, the instruct end's.

    Their rows of the embedding and the head are the same at every λ, because the other end has none. Weighted, they
    have probability 0 at the end that lacks them, the model's own at the end that has them, and change continuously.
    Beyond the ends, λ counts as 0 or 1.

    Args:
        output: of a model, with `logits` [B, T, V], which are changed in place; or without.
        lam: λ, float32 [], or [B] or [B / n] for the sequences, or [T] for the tokens of one row.
        sizes: how many tokens the instruct end and the thinking end know.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        return
    share = lam if sizes[1] > sizes[0] else 1 - lam
    known = share > 0
    # log of a positive number only, so that a gradient is finite at the end that lacks the tokens
    weights = torch.where(known, torch.where(known, share, 1.0).clamp(max=1.0).log(), float("-inf"))
    if weights.dim() == 1:
        rows = logits.shape[0] if logits.shape[0] > 1 or len(weights) == 1 else logits.shape[-2]
        weights = weights.repeat_interleave(rows // len(weights), output_size=rows)
        weights = weights.view(-1, 1, 1) if rows == logits.shape[0] else weights.view(1, -1, 1)
    logits[..., min(sizes) :] += weights.to(logits.dtype).to(logits.device)
