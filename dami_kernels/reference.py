"""The reference: every operator in plain torch and float64, one line of algebra each. Slow, but obviously correct.

Here `lam` has one value per row: its shape is that of x without the last dimension, or broadcasts to it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Ends = tuple[Tensor, Tensor]


def _lerp(ends: Ends, lam: Tensor) -> Tensor:
    base, target = (end.double() for end in ends)
    return base + lam * (target - base)


def lerp_linear(x: Tensor, weight: Ends, lam: Tensor, bias: Ends | None = None) -> Tensor:
    """y_i = x_i · (W_b + λ_i (W_t − W_b))ᵀ + b_b + λ_i (b_t − b_b)."""
    lam = lam.double().unsqueeze(-1)
    base, target = (F.linear(x.double(), end.double()) for end in weight)
    y = base + lam * (target - base)
    return y if bias is None else y + _lerp(bias, lam)


def lerp_experts(x: Tensor, weight: Ends, lam: Tensor, expert: Tensor, bias: Ends | None = None) -> Tensor:
    """`lerp_linear` of row i with the weight of its expert: weight [E, N, K], expert [rows] int64, bias [E, N]."""
    lam = lam.double().unsqueeze(-1)
    y = torch.einsum("rk,rnk->rn", x.double(), _lerp((weight[0][expert], weight[1][expert]), lam.unsqueeze(-1)))
    return y if bias is None else y + _lerp((bias[0][expert], bias[1][expert]), lam)


def lerp_embedding(ids: Tensor, weight: Ends, lam: Tensor) -> Tensor:
    """y_i = W_b[id_i] + λ_i (W_t[id_i] − W_b[id_i])."""
    base, target = weight
    return _lerp((base[ids], target[ids]), lam.unsqueeze(-1).double())


def lerp_rms_norm(x: Tensor, weight: Ends, lam: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """y_i = x_i / sqrt(mean(x_i²) + eps) · (offset + w(λ_i))."""
    x = x.double()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normed * (offset + _lerp(weight, lam.double().unsqueeze(-1)))


def lerp_layer_norm(x: Tensor, weight: Ends, lam: Tensor, eps: float, bias: Ends | None = None) -> Tensor:
    """y_i = (x_i − mean(x_i)) / sqrt(var(x_i) + eps) · w(λ_i) + b(λ_i)."""
    lam = lam.double().unsqueeze(-1)
    y = F.layer_norm(x.double(), x.shape[-1:], eps=eps) * _lerp(weight, lam)
    return y if bias is None else y + _lerp(bias, lam)
