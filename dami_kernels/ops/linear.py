"""`lerp_linear`: y_i = x_i · W(λ_i)ᵀ + b(λ_i), and `lerp_linears`: several weights for one x, in one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dami_kernels import formats, native, products
from dami_kernels.ops import direct, library
from dami_kernels.rows import along, lam_map, lam_per_row, lerp, sum_per_lam
from dami_kernels.tuning import Route, route, routes, rows_together
from dami_kernels.weight import LerpWeight


@library.public("product", direct.lerp_linear)
def lerp_linear(
    x: Tensor,
    weight: LerpWeight,
    lam: Tensor,
    bias: LerpWeight | None = None,
    *,
    rows_per_lam: int | None = None,
    row_to_lam: Tensor | None = None,
    invariant: bool = False,
) -> Tensor:
    """Like `F.linear`, with the weight and bias of each row interpolated at the row's own λ.

    y_i = x_i · (W_b + λ_i (W_t − W_b))ᵀ + b_b + λ_i (b_t − b_b), summed in float32 and rounded once.

    Args:
        x: [..., K] float32, bfloat16 or float16. Its leading dimensions are the rows.
        weight: [N, K], of x's dtype and device.
        lam: float32. [] for all rows, [rows] for one per row, [L] with `rows_per_lam` or `row_to_lam`.
        bias: [N], format "pair".
        rows_per_lam: number of rows per λ, for a padded batch: T for x [B, T, K] with lam [B].
        row_to_lam: int32 [rows], indices into `lam`, for a ragged batch.
        invariant: makes a row's result bitwise independent of the other rows, their λ and their number. It is slower.

    Returns:
        [..., N] of x's dtype. Gradients flow to x and lam; the ends are frozen.

    Raises:
        TypeError, ValueError: an argument is invalid. The message names it, what was expected and what was passed.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    _check(x, weight, bias)
    rows = x.shape[:-1].numel()
    lam, rows_per_lam = lam_map(lam, rows, rows_per_lam, row_to_lam, x.device)
    flat = x.reshape(rows, x.shape[-1])
    own_linear = _own_linear(flat, weight.format)
    if own_linear is not None:
        per_row = lam_per_row(lam, rows_per_lam, row_to_lam)
        y = own_linear(flat, per_row, *weight.tensors)
        if bias is not None:
            base, target = bias.tensors
            y = y + lerp(base.float(), target.float(), per_row.unsqueeze(1)).to(y.dtype)
    else:
        ends = [] if bias is None else list(bias.tensors)
        rest = (lam, row_to_lam, rows_per_lam, weight.format)
        way = _route(flat, weight.shape[0], *rest, invariant)
        if way is Route.KERNEL:
            y = torch.ops.dami.lerp_linear(flat, list(weight.tensors), ends or None, *rest, invariant)
        else:
            y = products.lerp_linear(flat, list(weight.tensors), ends, *rest, way)
    return y.reshape(*x.shape[:-1], weight.shape[0])


@library.public("product", direct.lerp_linears)
def lerp_linears(
    x: Tensor,
    weights: Sequence[LerpWeight],
    lam: Tensor,
    biases: Sequence[LerpWeight] | None = None,
    *,
    rows_per_lam: int | None = None,
    row_to_lam: Tensor | None = None,
    invariant: bool = False,
) -> tuple[Tensor, ...]:
    """Applies `lerp_linear` with several weights to one x in one launch: queries, keys and values, or gate and up.

    Args:
        x, lam, rows_per_lam, row_to_lam, invariant: as in `lerp_linear`.
        weights: [N_i, K] each, all of one format.
        biases: [N_i] each, one per weight, or None.

    Returns:
        [..., N_i] for each weight, contiguous.

    Raises:
        TypeError, ValueError: an argument is invalid. The message names it, what was expected and what was passed.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    if not weights:
        raise ValueError("weights must hold at least one weight, got none")
    if biases is not None and len(biases) != len(weights):
        raise ValueError(f"biases must hold one for each of the {len(weights)} weights, got {len(biases)}")
    for i, weight in enumerate(weights):
        _check(x, weight, None if biases is None else biases[i], f"weights[{i}]", f"biases[{i}]")
        if weight.format != weights[0].format:
            raise ValueError(f"weights must share one format, got {weights[0].format!r} and {weight.format!r}")
    rows = x.shape[:-1].numel()
    lam, rows_per_lam = lam_map(lam, rows, rows_per_lam, row_to_lam, x.device)
    if _own_linear(x, weights[0].format) is not None:
        per_row = lam_per_row(lam, rows_per_lam, row_to_lam)
        return tuple(
            lerp_linear(x, weight, per_row, None if biases is None else biases[i]) for i, weight in enumerate(weights)
        )
    flat = x.reshape(rows, x.shape[-1])
    sizes = [weight.shape[0] for weight in weights]
    if _route(flat, sum(sizes), lam, row_to_lam, rows_per_lam, weights[0].format, invariant) is not Route.KERNEL:
        each = None if row_to_lam is not None else rows_per_lam
        bias: Sequence[LerpWeight | None] = biases or [None] * len(weights)
        return tuple(
            lerp_linear(x, w, lam, b, rows_per_lam=each, row_to_lam=row_to_lam)
            for w, b in zip(weights, bias, strict=True)
        )
    y = torch.ops.dami.lerp_linears(
        flat,
        [tensor for weight in weights for tensor in weight.tensors],
        None if biases is None else [tensor for bias in biases for tensor in bias.tensors],
        lam,
        row_to_lam,
        rows_per_lam,
        weights[0].format,
        invariant,
    )
    parts = y.split([rows * size for size in sizes])
    return tuple(part.view(*x.shape[:-1], size) for part, size in zip(parts, sizes, strict=True))


def _own_linear(x: Tensor, format: str) -> Callable[..., Tensor] | None:
    """Returns the products that a format brings, or None if a kernel of this device reads it."""
    if x.is_cpu and not native.WHY_NOT and format in native.LINEAR_FORMATS:
        return None
    return getattr(formats.get(format), "linear", None)


def _route(
    x: Tensor, N: int, lam: Tensor, row_to_lam: Tensor | None, rows_per_lam: int, format: str, invariant: bool
) -> Route:
    """Returns how the CPU computes x [M, K] with N features. A GPU's route is chosen below, where its kernels are.

    Whatever records, compiles or transforms the call gets the operator, which has derivatives.
    """
    if not x.is_cpu or not library.is_eager() or (torch.is_grad_enabled() and (x.requires_grad or lam.requires_grad)):
        return Route.KERNEL
    M, K = x.shape
    together = rows_together(M, rows_per_lam, row_to_lam is not None)
    return route(M, N, K, x.dtype, format, routes.cpu(), together, invariant)


def _check(
    x: Tensor, weight: LerpWeight, bias: LerpWeight | None, name: str = "weight", bias_name: str = "bias"
) -> None:
    library.check_weight(name, weight, x, dim=2)
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must have a last dimension of {weight.shape[1]}, {name}'s K, got shape {list(x.shape)}")
    if bias is not None:
        library.check_weight(bias_name, bias, x, dim=1)
        library.check_size(bias_name, bias, weight.shape[0], f"{name}'s N")
        if bias.format != "pair":
            raise ValueError(f"{bias_name} must have format 'pair', got {bias.format!r}")


def _check_operands(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    format: str,
    invariant: bool,
) -> None:
    library.check_rows(x, 2, lam, row_to_lam, rows_per_lam)
    for i, weight in enumerate(split := _split(weights, format)):
        library.check_stored(format, weight, (weight[0].shape[0], x.shape[1]), x.dtype, x.device)
        if biases:
            library.check_stored("pair", biases[2 * i : 2 * i + 2], weight[0].shape[:1], x.dtype, x.device)
    if not split:
        raise ValueError("there must be one weight at least, got none")


def _split(tensors: list[Tensor], format: str) -> list[list[Tensor]]:
    """Splits a flat list into the tensors of each weight."""
    each = len(formats.get(format).TENSORS)
    return [tensors[i : i + each] for i in range(0, len(tensors), each)]


def _fake(x: Tensor, weight: list[Tensor], *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight[0].shape[0])


def _fakes(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    format: str,
    invariant: bool,
) -> Tensor:
    return x.new_empty(x.shape[0] * sum(weight[0].shape[0] for weight in _split(weights, format)))


def _plain(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    format: str,
    invariant: bool,
) -> Tensor:
    per_row = lam_per_row(lam, rows_per_lam, row_to_lam).unsqueeze(1)
    y = x.new_empty(x.shape[0], weight[0].shape[0])
    for block, base, target in formats.float_blocks(format, weight, x.shape[1]):
        bias_base, bias_target = (end[block].float() for end in bias) if bias else (None, None)
        y[:, block] = lerp(F.linear(x.float(), base, bias_base), F.linear(x.float(), target, bias_target), per_row)
    return y


def _plains(x: Tensor, weights: list[Tensor], biases: list[Tensor], *rest: Any) -> Tensor:
    format = rest[3]
    split = _split(weights, format)
    bias = _split(biases, "pair") or [[]] * len(split)
    return torch.cat([_plain(x, *ends, *rest).flatten() for ends in zip(split, bias, strict=True)])


def _gradients(
    dy: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    format: str,
    invariant: bool,
) -> tuple[Tensor, Tensor]:
    """dx_i = dy_i W(λ_i) and dλ_i = Σ_n dy_in ((x_i Δᵀ)_n + Δb_n): both from dy·W_b and dy·W_t, summed over weights."""
    each, rows = _split(weights, format), x.shape[0]
    sizes = [weight[0].shape[0] for weight in each]
    parts = dy.float().flatten().split([rows * size for size in sizes])
    dys = [part.view(rows, size) for part, size in zip(parts, sizes, strict=True)]
    dy_base = dy_target = x.new_zeros(x.shape, dtype=torch.float32)
    for part, weight in zip(dys, each, strict=True):
        for block, base, target in formats.float_blocks(format, weight, x.shape[1]):
            columns = part.narrow(1, block.start, len(base))  # not a slice: vmap fails if it spans all columns
            dy_base = dy_base + columns @ base
            dy_target = dy_target + columns @ target
    per_row = lam_per_row(lam, rows_per_lam, row_to_lam).unsqueeze(1)
    dx = lerp(dy_base, dy_target, per_row).to(x.dtype)
    dlam = ((dy_target - dy_base) * x.float()).sum(1)
    for part, (base, target) in zip(dys, _split(biases, "pair"), strict=False):  # biases may be empty
        dlam = dlam + part @ (target.float() - base.float())
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
    format: str,
    invariant: bool,
) -> Tensor:
    """ẏ_i = ẋ_i W(λ_i)ᵀ + λ̇_i (x_i Δᵀ + Δb)."""
    per_row, dlam = (lam_per_row(each, rows_per_lam, row_to_lam).unsqueeze(1) for each in (lam, dlam))
    blocks = []
    for block, base, target in formats.float_blocks(format, weight, x.shape[1]):
        difference = F.linear(x.float(), target) - F.linear(x.float(), base)
        if bias:
            difference = difference + (bias[1][block].float() - bias[0][block].float())
        along_x = lerp(F.linear(dx.float(), base), F.linear(dx.float(), target), per_row)
        blocks.append(along_x + along(dlam, difference))
    return torch.cat(blocks, 1).to(x.dtype) if blocks else x.new_empty(x.shape[0], 0)


def _tangents(dx: Tensor, dlam: Tensor, x: Tensor, weights: list[Tensor], biases: list[Tensor], *rest: Any) -> Tensor:
    split = _split(weights, rest[3])
    bias = _split(biases, "pair") or [[]] * len(split)
    return torch.cat([_tangent(dx, dlam, x, *ends, *rest).flatten() for ends in zip(split, bias, strict=True)])


library.define(
    "lerp_linear(Tensor x, Tensor[] weight, Tensor[]? bias, Tensor lam, Tensor? row_to_lam, SymInt rows_per_lam, "
    "str format, bool invariant) -> Tensor",
    check=_check_operands,
    fake=_fake,
    plain=_plain,
    gradients=_gradients,
    tangent=_tangent,
)
library.define(
    "lerp_linears(Tensor x, Tensor[] weights, Tensor[]? biases, Tensor lam, Tensor? row_to_lam, SymInt rows_per_lam, "
    "str format, bool invariant) -> Tensor",
    check=_check_operands,
    fake=_fakes,
    plain=_plains,
    gradients=_gradients,
    tangent=_tangents,
)
