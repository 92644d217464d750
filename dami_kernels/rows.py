"""Maps rows to λ: checks the three ways to pass λ and reduces them to one."""

from __future__ import annotations

import torch
from torch import Tensor


def lam_map(
    lam: Tensor, rows: int, rows_per_lam: int | None, row_to_lam: Tensor | None, device: torch.device
) -> tuple[Tensor, int]:
    """Checks λ against the rows and returns it in the operators' form: `(lam [L], rows_per_lam)`.

    Row r takes `lam[row_to_lam[r]]` if a map is given, else `lam[r // rows_per_lam]`.

    Args:
        lam: float32. [] for all rows, [rows] for one per row, [L] with `rows_per_lam` or `row_to_lam`.
        rows: number of rows of the input, the product of its leading dimensions.
        rows_per_lam: number of rows per λ, for a padded batch; L · rows_per_lam must equal `rows`.
        row_to_lam: int32 [rows], indices into `lam`, for a ragged batch.
        device: the device that `lam` and `row_to_lam` must be on.
    """
    if not isinstance(lam, Tensor):
        raise TypeError(f"lam must be a float32 Tensor, got {type(lam).__name__}")
    if lam.dtype != torch.float32:
        raise TypeError(f"lam must have dtype torch.float32, got {lam.dtype}")
    if lam.device != device:
        raise ValueError(f"lam must be on {device} as the input is, got {lam.device}")
    if lam.dim() > 1:
        raise ValueError(f"lam must have shape [] or [L], got {list(lam.shape)}")
    if rows_per_lam is not None and row_to_lam is not None:
        raise ValueError("rows_per_lam and row_to_lam exclude each other, got both")
    if lam.dim() == 0:
        if rows_per_lam is not None or row_to_lam is not None:
            raise ValueError("lam must have shape [L] when rows_per_lam or row_to_lam is given, got []")
        return lam.reshape(1), rows
    if row_to_lam is not None:
        if not isinstance(row_to_lam, Tensor) or row_to_lam.dtype != torch.int32:
            got = row_to_lam.dtype if isinstance(row_to_lam, Tensor) else type(row_to_lam).__name__
            raise TypeError(f"row_to_lam must be an int32 Tensor, got {got}")
        if row_to_lam.device != device:
            raise ValueError(f"row_to_lam must be on {device} as the input is, got {row_to_lam.device}")
        if row_to_lam.dim() != 1 or row_to_lam.shape[0] != rows:
            raise ValueError(f"row_to_lam must have shape [{rows}], one index per row, got {list(row_to_lam.shape)}")
        return lam, 1
    if rows_per_lam is None:
        if lam.shape[0] != rows:
            raise ValueError(
                f"lam must have shape [] or [{rows}], one λ per row, got {list(lam.shape)}; "
                "for one λ per sequence pass rows_per_lam or row_to_lam"
            )
        return lam, 1
    if rows_per_lam < 1 or lam.shape[0] * rows_per_lam != rows:
        raise ValueError(f"len(lam) * rows_per_lam must equal the {rows} rows, got {lam.shape[0]} * {rows_per_lam}")
    return lam, rows_per_lam


def lam_per_row(lam: Tensor, rows_per_lam: int, row_to_lam: Tensor | None) -> Tensor:
    """Returns λ of every row, [rows], given what `lam_map` returned."""
    if row_to_lam is not None:
        return lam.index_select(0, row_to_lam)
    return lam.unsqueeze(1).expand(lam.shape[0], rows_per_lam).reshape(-1)


def sum_per_lam(per_row: Tensor, lam: Tensor, rows_per_lam: int, row_to_lam: Tensor | None) -> Tensor:
    """Adjoint of `lam_per_row`: sums `per_row` [rows] over the rows of each λ and returns [L]."""
    if row_to_lam is not None:
        return torch.zeros_like(lam).index_add(0, row_to_lam, per_row)
    return per_row.reshape(lam.shape[0], rows_per_lam).sum(1)


def lerp(base: Tensor, target: Tensor, lam: Tensor) -> Tensor:
    """Like `torch.lerp`, but exact at λ=0 and λ=1 even if the other end is not finite, as in the kernels.

    A finite end stays in the formula, so that derivatives with respect to λ are correct at λ=0 and λ=1 too.
    """
    return torch.lerp(
        torch.where((lam == 1) & ~base.isfinite(), target, base),
        torch.where((lam == 0) & ~target.isfinite(), base, target),
        lam,
    )


def along(dlam: Tensor, difference: Tensor) -> Tensor:
    """Returns λ̇ · difference, which is 0 where λ̇ is 0, even if an end is not finite."""
    return dlam * torch.where((dlam == 0) & ~difference.isfinite(), 0.0, difference)
