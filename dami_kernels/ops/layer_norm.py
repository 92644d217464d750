"""`lerp_layer_norm`: y_i = (x_i − mean(x_i)) / std(x_i) · w(λ_i) + b(λ_i)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dami_kernels.ops import library
from dami_kernels.rows import lam_map, lam_per_row, sum_per_lam
from dami_kernels.weight import LerpWeight


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
    """`F.layer_norm` over the last dimension, weight and bias of each row interpolated at the row's own λ.

    Computed in float32, rounded once.

    Args:
        x: [..., D] float32, bfloat16 or float16. Its leading dimensions are the rows.
        weight: [D], format "pair", of x's dtype and device.
        lam, rows_per_lam, row_to_lam: as in `lerp_linear`.
        bias: [D], likewise.
        eps: added to the variance.

    Returns:
        Shape and dtype of x. Gradients flow to x and lam.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
    """
    rows = library.check_norm(x, {"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    lam, rows_per_lam = lam_map(lam, rows, rows_per_lam, row_to_lam, x.device)
    y = torch.ops.dami.lerp_layer_norm(
        x.reshape(rows, x.shape[-1]),
        list(weight.tensors),
        [] if bias is None else list(bias.tensors),
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
    y = F.layer_norm(x.float(), x.shape[1:], eps=eps) * torch.lerp(weight[0].float(), weight[1].float(), per_row)
    if bias:
        y += torch.lerp(bias[0].float(), bias[1].float(), per_row)
    return y.to(x.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, lam, row_to_lam, rows_per_lam, eps = inputs
    ctx.save_for_backward(x, lam, row_to_lam, *weight, *bias)
    ctx.rows_per_lam, ctx.eps = rows_per_lam, eps


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """With n = (x − mean) s and g = dy·w(λ): dx = s (g − mean(g) − n mean(g n)), dλ = Σ dy (n Δw + Δb)."""
    x, lam, row_to_lam, base, target, *bias = ctx.saved_tensors
    base, target, dy = base.float(), target.float(), dy.float()
    per_row = lam_per_row(lam, ctx.rows_per_lam, row_to_lam).unsqueeze(1)
    variance, mean = torch.var_mean(x.float(), 1, correction=0, keepdim=True)
    scale = torch.rsqrt(variance + ctx.eps)
    normed = (x.float() - mean) * scale
    g = dy * torch.lerp(base, target, per_row)
    dx = (scale * (g - g.mean(1, keepdim=True) - normed * (g * normed).mean(1, keepdim=True))).to(x.dtype)
    dlam = (dy * normed * (target - base)).sum(1)
    if bias:
        dlam += dy @ (bias[1].float() - bias[0].float())
    dlam = sum_per_lam(dlam, lam, ctx.rows_per_lam, row_to_lam)
    return dx, [None, None], [None] * len(bias), dlam, None, None, None


library.define(
    "lerp_layer_norm(Tensor x, Tensor[] weight, Tensor[] bias, Tensor lam, Tensor? row_to_lam, SymInt rows_per_lam, "
    "float eps) -> Tensor",
    check=_check_operands,
    fake=_fake,
    plain=_plain,
    setup_context=_setup_context,
    backward=_backward,
)
