"""`lerp_layer_norm`: y_i = (x_i − mean(x_i)) / std(x_i) · w(λ_i) + b(λ_i)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dami_kernels.ops import direct, library
from dami_kernels.rows import along, lam_map, lam_per_row, lerp, sum_per_lam
from dami_kernels.weight import LerpWeight


@library.public("norm", direct.lerp_layer_norm)
def lerp_layer_norm(
    x: Tensor,
    weight: LerpWeight,
    lam: Tensor,
    bias: LerpWeight | None = None,
    eps: float = 1e-5,
    *,
    rows_per_lam: int | None = None,
    row_to_lam: Tensor | None = None,
) -> Tensor:
    """Like `F.layer_norm` over the last dimension, with each row's weight and bias interpolated at its own λ.

    Computes in float32 and rounds once.

    Args:
        x: [..., D] float32, bfloat16 or float16. Its leading dimensions are the rows.
        weight: [D], format "pair", of x's dtype and device.
        lam, rows_per_lam, row_to_lam: as in `lerp_linear`.
        bias: [D], like `weight`.
        eps: added to the variance.

    Returns:
        Shape and dtype of x. Gradients flow to x and lam.

    Raises:
        TypeError, ValueError: an argument is invalid. The message names it, what was expected and what was passed.
    """
    rows = library.check_norm(x, {"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    lam, rows_per_lam = lam_map(lam, rows, rows_per_lam, row_to_lam, x.device)
    y = torch.ops.dami.lerp_layer_norm(
        x.reshape(rows, x.shape[-1]),
        list(weight.tensors),
        None if bias is None else list(bias.tensors),
        lam,
        row_to_lam,
        rows_per_lam,
        eps,
    )
    return y.reshape(x.shape)


def _check_operands(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    eps: float,
) -> None:
    library.check_rows(x, 2, lam, row_to_lam, rows_per_lam)
    for ends in filter(None, (weight, bias)):
        library.check_stored("pair", ends, x.shape[1:], x.dtype, x.device)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _plain(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    eps: float,
) -> Tensor:
    per_row = lam_per_row(lam, rows_per_lam, row_to_lam).unsqueeze(1)
    y = F.layer_norm(x.float(), x.shape[1:], eps=eps) * lerp(weight[0].float(), weight[1].float(), per_row)
    if bias:
        y += lerp(bias[0].float(), bias[1].float(), per_row)
    return y.to(x.dtype)


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns n = (x − mean(x)) s and s = 1/std(x)."""
    variance, mean = torch.var_mean(x.float(), 1, correction=0, keepdim=True)
    scale = torch.rsqrt(variance + eps)
    return (x.float() - mean) * scale, scale


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """With n = (x − mean) s and g = dy·w(λ): dx = s (g − mean(g) − n mean(g n)), dλ = Σ dy (n Δw + Δb)."""
    base, target, dy = weight[0].float(), weight[1].float(), dy.float()
    per_row = lam_per_row(lam, rows_per_lam, row_to_lam).unsqueeze(1)
    normed, scale = _normed(x, eps)
    g = dy * lerp(base, target, per_row)
    dx = (scale * (g - g.mean(1, keepdim=True) - normed * (g * normed).mean(1, keepdim=True))).to(x.dtype)
    dlam = (dy * normed * (target - base)).sum(1)
    if bias:
        dlam = dlam + dy @ (bias[1].float() - bias[0].float())
    return dx, sum_per_lam(dlam, lam, rows_per_lam, row_to_lam)


def _tangent(
    dx: Tensor,
    dlam: Tensor,
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    eps: float,
) -> Tensor:
    """With n and s as above: ṅ = s (ẋ − mean(ẋ) − n mean(n ẋ)), ẏ = ṅ·w(λ) + λ̇ (n Δw + Δb)."""
    base, target, dx = weight[0].float(), weight[1].float(), dx.float()
    per_row, dlam = (lam_per_row(each, rows_per_lam, row_to_lam).unsqueeze(1) for each in (lam, dlam))
    normed, scale = _normed(x, eps)
    dnormed = scale * (dx - dx.mean(1, keepdim=True) - normed * (normed * dx).mean(1, keepdim=True))
    difference = normed * (target - base)
    if bias:
        difference = difference + (bias[1].float() - bias[0].float())
    return (dnormed * lerp(base, target, per_row) + along(dlam, difference)).to(x.dtype)


library.define(
    "lerp_layer_norm(Tensor x, Tensor[] weight, Tensor[]? bias, Tensor lam, Tensor? row_to_lam, SymInt rows_per_lam, "
    "float eps) -> Tensor",
    check=_check_operands,
    fake=_fake,
    plain=_plain,
    gradients=_gradients,
    tangent=_tangent,
)
