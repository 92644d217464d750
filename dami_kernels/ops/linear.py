"""`lerp_linear`: y_i = x_i · W(λ_i)ᵀ + b(λ_i)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dami_kernels import formats
from dami_kernels.ops import library
from dami_kernels.rows import lam_map, lam_per_row, sum_per_lam
from dami_kernels.weight import LerpWeight


def lerp_linear(
    x: Tensor,
    weight: LerpWeight,
    lam: Tensor,
    bias: LerpWeight | None = None,
    *,
    rows_per_lam: int | None = None,
    row_to_lam: Tensor | None = None,
) -> Tensor:
    """`F.linear` with the weight and bias of each row interpolated at the row's own λ.

    y_i = x_i · (W_b + λ_i (W_t − W_b))ᵀ + b_b + λ_i (b_t − b_b), summed in float32, rounded once.

    Args:
        x: [..., K] float32, bfloat16 or float16. Its leading dimensions are the rows.
        weight: [N, K], of x's dtype and device.
        lam: float32. [] for all rows, [rows] for one each, [L] together with one of the next two.
        bias: [N], format "pair".
        rows_per_lam: rows of each λ, for a padded batch: x [B, T, K] with lam [B] takes rows_per_lam=T.
        row_to_lam: int32 [rows], indices into `lam`, for a ragged batch.

    Returns:
        [..., N] of x's dtype. Gradients flow to x and lam; the ends are frozen.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    library.check_weight("weight", weight, x, dim=2)
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must have a last dimension of {weight.shape[1]}, weight's K, got shape {list(x.shape)}")
    if bias is not None:
        library.check_weight("bias", bias, x, dim=1)
        library.check_size("bias", bias, weight.shape[0], "weight's N")
        if bias.format != "pair":
            raise ValueError(f"bias must have format 'pair', got {bias.format!r}")
    rows = x.shape[:-1].numel()
    lam, rows_per_lam = lam_map(lam, rows, rows_per_lam, row_to_lam, x.device)
    y = torch.ops.dami.lerp_linear(
        x.reshape(rows, x.shape[-1]),
        list(weight.tensors),
        [] if bias is None else list(bias.tensors),
        lam,
        row_to_lam,
        rows_per_lam,
        weight.format,
    )
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _fake(x: Tensor, weight: list[Tensor], *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight[0].shape[0])


def _float_chunks(ends: tuple[Tensor, Tensor]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Both ends in float32, a block of output features at a time, so that no whole copy ever exists."""
    step = 1024
    for start in range(0, ends[0].shape[0], step):
        block = slice(start, start + step)
        yield block, ends[0][block].float(), ends[1][block].float()


def _plain(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    format: str,
) -> Tensor:
    per_row = lam_per_row(lam, rows_per_lam, row_to_lam).unsqueeze(1)
    y = x.new_empty(x.shape[0], weight[0].shape[0])
    for block, base, target in _float_chunks(formats.get(format).unpack(*weight)):
        bias_base, bias_target = (end[block].float() for end in bias) if bias else (None, None)
        y[:, block] = torch.lerp(
            F.linear(x.float(), base, bias_base), F.linear(x.float(), target, bias_target), per_row
        )
    return y


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, lam, row_to_lam, rows_per_lam, format = inputs
    ctx.save_for_backward(x, lam, row_to_lam, *weight, *bias)
    ctx.weights, ctx.rows_per_lam, ctx.format = len(weight), rows_per_lam, format


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """dx_i = dy_i W(λ_i) and dλ_i = Σ_n dy_in ((x_i Δᵀ)_n + Δb_n): both from dy·W_b and dy·W_t."""
    x, lam, row_to_lam, *rest = ctx.saved_tensors
    weight, bias = rest[: ctx.weights], rest[ctx.weights :]
    dy = dy.float()
    dy_base = x.new_zeros(x.shape, dtype=torch.float32)
    dy_target = torch.zeros_like(dy_base)
    for block, base, target in _float_chunks(formats.get(ctx.format).unpack(*weight)):
        dy_base += dy[:, block] @ base
        dy_target += dy[:, block] @ target
    per_row = lam_per_row(lam, ctx.rows_per_lam, row_to_lam).unsqueeze(1)
    dx = torch.lerp(dy_base, dy_target, per_row).to(x.dtype)
    dlam = ((dy_target - dy_base) * x.float()).sum(1)
    if bias:
        dlam += dy @ (bias[1].float() - bias[0].float())
    dlam = sum_per_lam(dlam, lam, ctx.rows_per_lam, row_to_lam)
    return dx, [None] * len(weight), [None] * len(bias), dlam, None, None, None


library.define(
    "lerp_linear(Tensor x, Tensor[] weight, Tensor[] bias, Tensor lam, Tensor? row_to_lam, SymInt rows_per_lam, "
    "str format) -> Tensor",
    fake=_fake,
    plain=_plain,
    setup_context=_setup_context,
    backward=_backward,
)
