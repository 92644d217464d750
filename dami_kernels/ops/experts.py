"""`lerp_experts`: y_i = x_i · W_e(λ_i)ᵀ + b_e(λ_i), rows sorted by their expert e."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dami_kernels import formats
from dami_kernels.ops import direct, library
from dami_kernels.rows import along, lam_map, lam_per_row, lerp, sum_per_lam
from dami_kernels.weight import LerpWeight


@library.public("product", direct.lerp_experts)
def lerp_experts(
    x: Tensor,
    weight: LerpWeight,
    lam: Tensor,
    expert_offsets: Tensor,
    bias: LerpWeight | None = None,
    *,
    rows_per_lam: int | None = None,
    row_to_lam: Tensor | None = None,
    invariant: bool = False,
) -> Tensor:
    """Applies `lerp_linear` to each row with the weight of its expert. Rows must be sorted by expert.

    Args:
        x: [rows, K] float32, bfloat16 or float16.
        weight: [E, N, K], of x's dtype and device.
        lam, rows_per_lam, row_to_lam, invariant: as in `lerp_linear`.
        expert_offsets: int32 [E], the end of each expert's rows, which begin at the end of the previous expert's, as in
            torch's grouped products. It is not copied to the host.
        bias: [E, N], format "pair".

    Returns:
        [rows, N] of x's dtype. Rows after the last expert's are zeros. Gradients flow to x and lam.

    Raises:
        TypeError, ValueError: an argument is invalid. The message names it, what was expected and what was passed.
        IndexError: the offsets decrease or exceed the number of rows (on the CPU; undefined on a GPU).
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    library.check_weight("weight", weight, x, dim=3)
    if x.dim() != 2 or x.shape[1] != weight.shape[2]:
        raise ValueError(f"x must have shape [rows, {weight.shape[2]}], weight's K, got {list(x.shape)}")
    experts, outputs, _ = weight.shape
    if not isinstance(expert_offsets, Tensor) or expert_offsets.dtype != torch.int32:
        got = expert_offsets.dtype if isinstance(expert_offsets, Tensor) else type(expert_offsets).__name__
        raise TypeError(f"expert_offsets must be an int32 Tensor, got {got}")
    if expert_offsets.shape != (experts,):
        raise ValueError(
            f"expert_offsets must have shape [{experts}], one per expert, got {list(expert_offsets.shape)}"
        )
    if expert_offsets.device != x.device:
        raise ValueError(f"expert_offsets must be on {x.device} as the input is, got {expert_offsets.device}")
    if bias is not None:
        library.check_weight("bias", bias, x, dim=2)
        if bias.shape != (experts, outputs) or bias.format != "pair":
            raise ValueError(
                f"bias must be a 'pair' of shape [{experts}, {outputs}], weight's E and N, "
                f"got {bias.format!r} of {list(bias.shape)}"
            )
    lam, rows_per_lam = lam_map(lam, x.shape[0], rows_per_lam, row_to_lam, x.device)
    return torch.ops.dami.lerp_experts(
        x,
        list(weight.tensors),
        None if bias is None else list(bias.tensors),
        lam,
        row_to_lam,
        rows_per_lam,
        expert_offsets,
        weight.format,
        invariant,
    )


def _check_operands(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    offsets: Tensor,
    format: str,
    invariant: bool,
) -> None:
    library.check_rows(x, 2, lam, row_to_lam, rows_per_lam)
    experts, outputs = weight[0].shape[:2]
    library.check_vector("expert_offsets", offsets, experts, x.device)
    library.check_stored(format, weight, (experts, outputs, x.shape[1]), x.dtype, x.device)
    if bias:
        library.check_stored("pair", bias, (experts, outputs), x.dtype, x.device)


def _fake(x: Tensor, weight: list[Tensor], *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight[0].shape[1])


def _rows_of_experts(offsets: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """Yields each expert that has rows, with its rows. Yields nothing on the meta device."""
    begin = 0
    for expert, end in enumerate([] if offsets.is_meta else offsets.tolist()):
        if not begin <= end <= rows:
            raise IndexError(f"expert_offsets must not decrease and end within {rows} rows, got {offsets.tolist()}")
        if end > begin:
            yield expert, slice(begin, end)
        begin = end


def _plain(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    offsets: Tensor,
    format: str,
    invariant: bool,
) -> Tensor:
    per_row = lam_per_row(lam, rows_per_lam, row_to_lam).unsqueeze(1)
    y = x.new_zeros(x.shape[0], weight[0].shape[1])
    for expert, rows in _rows_of_experts(offsets, x.shape[0]):
        one = x[rows].float()
        for block, base, target in formats.float_blocks(format, [t[expert] for t in weight], x.shape[1]):
            biases = [end[expert, block].float() for end in bias] or (None, None)
            ys = F.linear(one, base, biases[0]), F.linear(one, target, biases[1])
            y[rows, block] = lerp(*ys, per_row[rows]).to(y.dtype)
    return y


def _of_experts(pieces: list[Tensor], x: Tensor, columns: int) -> Tensor:
    """Returns [rows of x, columns] in float32: the experts' rows concatenated, and zeros for rows without an expert."""
    others = x.shape[0] - sum(len(piece) for piece in pieces)
    return torch.cat([*pieces, x.new_zeros(others, columns, dtype=torch.float32)])


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    offsets: Tensor,
    format: str,
    invariant: bool,
) -> tuple[Tensor, Tensor]:
    """Computes dx and dλ as in `lerp_linear`, expert by expert. Copies the offsets to the host."""
    # A separate operator, because torch.compile cannot trace code that depends on the offsets' values. If gradients are
    # to be differentiated again, which never happens while it traces, they have to be in plain torch.
    backward = _plain_gradients if torch.is_grad_enabled() else torch.ops.dami.lerp_experts_backward
    return backward(dy, x, weight, bias, lam, row_to_lam, rows_per_lam, offsets, format)


def _plain_gradients(
    dy: Tensor,
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    offsets: Tensor,
    format: str,
) -> tuple[Tensor, Tensor]:
    dy = dy.float()
    ends: tuple[list[Tensor], list[Tensor]] = [], []
    biases = []
    for expert, rows in _rows_of_experts(offsets, x.shape[0]):
        dy_base = dy_target = x.new_zeros(rows.stop - rows.start, x.shape[1], dtype=torch.float32)
        for block, base, target in formats.float_blocks(format, [t[expert] for t in weight], x.shape[1]):
            dy_base = dy_base + dy[rows, block] @ base
            dy_target = dy_target + dy[rows, block] @ target
        ends[0].append(dy_base)
        ends[1].append(dy_target)
        if bias:
            biases.append((dy[rows] @ (bias[1][expert].float() - bias[0][expert].float())).unsqueeze(1))
    dy_base, dy_target = (_of_experts(pieces, x, x.shape[1]) for pieces in ends)
    per_row = lam_per_row(lam, rows_per_lam, row_to_lam).unsqueeze(1)
    dx = lerp(dy_base, dy_target, per_row).to(x.dtype)
    dlam = ((dy_target - dy_base) * x.float()).sum(1) + _of_experts(biases, x, 1).squeeze(1)
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
    offsets: Tensor,
    format: str,
    invariant: bool,
) -> Tensor:
    """Computes ẏ as in `lerp_linear`, expert by expert. Copies the offsets to the host."""
    per_row, dlam = (lam_per_row(each, rows_per_lam, row_to_lam).unsqueeze(1) for each in (lam, dlam))
    pieces = []
    for expert, rows in _rows_of_experts(offsets, x.shape[0]):
        blocks = []
        for block, base, target in formats.float_blocks(format, [t[expert] for t in weight], x.shape[1]):
            difference = F.linear(x[rows].float(), target) - F.linear(x[rows].float(), base)
            if bias:
                difference = difference + (bias[1][expert, block].float() - bias[0][expert, block].float())
            along_x = lerp(F.linear(dx[rows].float(), base), F.linear(dx[rows].float(), target), per_row[rows])
            blocks.append(along_x + along(dlam[rows], difference))
        pieces.append(torch.cat(blocks, 1))
    return _of_experts(pieces, x, weight[0].shape[1]).to(x.dtype)


library.define(
    "lerp_experts(Tensor x, Tensor[] weight, Tensor[]? bias, Tensor lam, Tensor? row_to_lam, SymInt rows_per_lam, "
    "Tensor offsets, str format, bool invariant) -> Tensor",
    check=_check_operands,
    fake=_fake,
    plain=_plain,
    gradients=_gradients,
    tangent=_tangent,
)

library.LIBRARY.define(
    "lerp_experts_backward(Tensor dy, Tensor x, Tensor[] weight, Tensor[] bias, Tensor lam, Tensor? row_to_lam, "
    "SymInt rows_per_lam, Tensor offsets, str format) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
library.LIBRARY.impl("lerp_experts_backward", _plain_gradients, "CompositeExplicitAutograd")
torch.library.register_fake(
    "dami::lerp_experts_backward",
    lambda dy, x, weight, bias, lam, *_: (x.new_empty(x.shape), torch.empty_like(lam)),
    lib=library.LIBRARY,
)
library.register_vmap("lerp_experts_backward")
