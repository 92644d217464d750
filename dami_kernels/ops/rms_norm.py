"""`lerp_rms_norm`: y_i = x_i / rms(x_i) · (offset + w(λ_i))."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dami_kernels.ops import direct, library
from dami_kernels.rows import along, lam_map, lam_per_row, lerp, sum_per_lam
from dami_kernels.weight import LerpWeight


@library.public("norm", direct.lerp_rms_norm)
def lerp_rms_norm(
    x: Tensor,
    weight: LerpWeight,
    lam: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    rows_per_lam: int | None = None,
    row_to_lam: Tensor | None = None,
) -> Tensor:
    """Applies RMS normalisation, with the weight of each row interpolated at the row's own λ.

    y_i = x_i / sqrt(mean(x_i²) + eps) · (offset + w_b + λ_i (w_t − w_b)), in float32, rounded once.

    Args:
        x: [..., D] float32, bfloat16 or float16. Its leading dimensions are the rows.
        weight: [D], format "pair", of x's dtype and device.
        lam, rows_per_lam, row_to_lam: as in `lerp_linear`.
        eps: added to the mean square.
        offset: 1.0 for norms that store weight − 1, as Gemma's do.

    Returns:
        Shape and dtype of x. Gradients flow to x and lam.

    Raises:
        TypeError, ValueError: an argument is invalid. The message names it, what was expected and what was passed.
    """
    rows = library.check_norm(x, {"weight": weight})
    lam, rows_per_lam = lam_map(lam, rows, rows_per_lam, row_to_lam, x.device)
    y = torch.ops.dami.lerp_rms_norm(
        x.reshape(rows, x.shape[-1]), list(weight.tensors), lam, row_to_lam, rows_per_lam, eps, offset
    )
    return y.reshape(x.shape)


def _check_operands(
    x: Tensor,
    weight: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    eps: float,
    offset: float,
) -> None:
    library.check_rows(x, 2, lam, row_to_lam, rows_per_lam)
    library.check_stored("pair", weight, x.shape[1:], x.dtype, x.device)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _plain(
    x: Tensor,
    weight: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    eps: float,
    offset: float,
) -> Tensor:
    base, target = (end.float() for end in weight)
    per_row = lam_per_row(lam, rows_per_lam, row_to_lam).unsqueeze(1)
    scale = torch.rsqrt(x.float().square().mean(1, keepdim=True) + eps)
    return (x.float() * scale * (offset + lerp(base, target, per_row))).to(x.dtype)


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor]:
    """With n = x·s, s = 1/rms(x) and g = dy·w(λ): dx = s (g − n mean(g n)), dλ = Σ dy n Δw."""
    base, target = (end.float() for end in weight)
    per_row = lam_per_row(lam, rows_per_lam, row_to_lam).unsqueeze(1)
    scale = torch.rsqrt(x.float().square().mean(1, keepdim=True) + eps)
    normed = x.float() * scale
    g = dy.float() * (offset + lerp(base, target, per_row))
    dx = (scale * (g - normed * (g * normed).mean(1, keepdim=True))).to(x.dtype)
    dlam = (dy.float() * normed * (target - base)).sum(1)
    return dx, sum_per_lam(dlam, lam, rows_per_lam, row_to_lam)


def _tangent(
    dx: Tensor,
    dlam: Tensor,
    x: Tensor,
    weight: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    eps: float,
    offset: float,
) -> Tensor:
    """With n and s as above: ṅ = s (ẋ − n mean(n ẋ)), ẏ = ṅ·w(λ) + λ̇ n Δw."""
    base, target = (end.float() for end in weight)
    per_row, dlam = (lam_per_row(each, rows_per_lam, row_to_lam).unsqueeze(1) for each in (lam, dlam))
    scale = torch.rsqrt(x.float().square().mean(1, keepdim=True) + eps)
    normed, dx = x.float() * scale, dx.float()
    dnormed = scale * (dx - normed * (normed * dx).mean(1, keepdim=True))
    return (dnormed * (offset + lerp(base, target, per_row)) + along(dlam, normed * (target - base))).to(x.dtype)


library.define(
    "lerp_rms_norm(Tensor x, Tensor[] weight, Tensor lam, Tensor? row_to_lam, SymInt rows_per_lam, float eps, "
    "float offset) -> Tensor",
    check=_check_operands,
    fake=_fake,
    plain=_plain,
    gradients=_gradients,
    tangent=_tangent,
)
