"""`lerp_embedding`: y_i = W(λ_i)[id_i]."""

from __future__ import annotations

import torch
from torch import Tensor

from dami_kernels import formats
from dami_kernels.ops import direct, library
from dami_kernels.rows import along, lam_map, lam_per_row, lerp, sum_per_lam
from dami_kernels.weight import LerpWeight


@library.public("lookup", direct.lerp_embedding)
def lerp_embedding(
    ids: Tensor,
    weight: LerpWeight,
    lam: Tensor,
    *,
    rows_per_lam: int | None = None,
    row_to_lam: Tensor | None = None,
) -> Tensor:
    """Like `F.embedding`, with each looked-up row interpolated at its own λ.

    Args:
        ids: [...] int64 or int32, in [0, V). Each id counts as a row.
        weight: [V, D].
        lam, rows_per_lam, row_to_lam: as in `lerp_linear`.

    Returns:
        [..., D] of the weight's dtype. Gradients flow to lam.

    Raises:
        TypeError, ValueError: an argument is invalid. The message names it, what was expected and what was passed.
        IndexError: an id is out of range (on the CPU; on a GPU it is undefined, as in torch).
    """
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids must be an int64 or int32 Tensor, got {got}")
    library.check_weight("weight", weight, dim=2)
    if weight.device != ids.device:
        raise ValueError(f"weight must be on {ids.device} as the input is, got {weight.device}")
    lam, rows_per_lam = lam_map(lam, ids.numel(), rows_per_lam, row_to_lam, ids.device)
    own_embedding = getattr(formats.get(weight.format), "embedding", None)
    if own_embedding is not None:
        y = own_embedding(ids.reshape(-1), lam_per_row(lam, rows_per_lam, row_to_lam), *weight.tensors)
        return y.reshape(*ids.shape, weight.shape[1])
    y = torch.ops.dami.lerp_embedding(
        ids.reshape(-1),
        list(weight.tensors),
        lam,
        row_to_lam,
        rows_per_lam,
        weight.format,
        weight.dtype,
        weight.shape[1],
    )
    return y.reshape(*ids.shape, weight.shape[1])


def _check_operands(
    ids: Tensor,
    weight: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    format: str,
    dtype: torch.dtype,
    columns: int,
) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids must be an int64 or int32 Tensor, got {ids.dtype}")
    library.check_rows(ids, 1, lam, row_to_lam, rows_per_lam)
    library.check_stored(format, weight, (weight[0].shape[0], columns), dtype, ids.device)


def _fake(
    ids: Tensor,
    weight: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    format: str,
    dtype: torch.dtype,
    columns: int,
) -> Tensor:
    return weight[0].new_empty(ids.shape[0], columns, dtype=dtype)


def _looked_up(ids: Tensor, weight: list[Tensor], format: str, columns: int) -> tuple[Tensor, Tensor]:
    """Returns the looked-up rows of both ends in float32."""
    base, target = formats.get(format).unpack(*weight, columns=columns, rows=ids.long())
    return base.float(), target.float()


def _plain(
    ids: Tensor,
    weight: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    format: str,
    dtype: torch.dtype,
    columns: int,
) -> Tensor:
    per_row = lam_per_row(lam, rows_per_lam, row_to_lam).unsqueeze(1)
    return lerp(*_looked_up(ids, weight, format, columns), per_row).to(dtype)


def _gradients(
    dy: Tensor,
    ids: Tensor,
    weight: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    format: str,
    dtype: torch.dtype,
    columns: int,
) -> tuple[None, Tensor]:
    base, target = _looked_up(ids, weight, format, columns)
    dlam = (dy.float() * (target - base)).sum(1)
    return None, sum_per_lam(dlam, lam, rows_per_lam, row_to_lam)


def _tangent(
    _: None,
    dlam: Tensor,
    ids: Tensor,
    weight: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    format: str,
    dtype: torch.dtype,
    columns: int,
) -> Tensor:
    base, target = _looked_up(ids, weight, format, columns)
    return along(lam_per_row(dlam, rows_per_lam, row_to_lam).unsqueeze(1), target - base).to(dtype)


library.define(
    "lerp_embedding(Tensor ids, Tensor[] weight, Tensor lam, Tensor? row_to_lam, SymInt rows_per_lam, str format, "
    "ScalarType dtype, SymInt columns) -> Tensor",
    check=_check_operands,
    fake=_fake,
    plain=_plain,
    gradients=_gradients,
    tangent=_tangent,
)
