"""`lowrank`: target = base + up · down, as in a LoRA adapter. Exact at λ=0; the base's bytes and a little more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dami_kernels.formats.base import ALL, Layout, Rows

TENSORS = ("", "_down", "_up")


def pack(base: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Returns base [N, K], not copied, and down [R, K] and up [N, R] of its dtype, with the smallest sufficient R.

    The singular values left out amount to no more than the error of rounding the target to its dtype.

    Raises:
        ValueError: the ends are not matrices, or the difference needs so high a rank that `int8` would be smaller.
    """
    if base.dim() != 2:
        raise ValueError(f"base and target must be matrices to be stored as 'lowrank', got shape {list(base.shape)}")
    delta = target.double() - base.double()
    _, exponent = torch.frexp(target.double())
    ulp = torch.finfo(base.dtype).eps * torch.exp2(exponent.double() - 1)
    rounding = ulp.square().sum() / 12  # the variance of a uniform error of one ulp
    N, K = base.shape
    max_rank = N * K // (base.element_size() * (N + K))  # one byte per weight, as `int8` takes
    U, S, V = torch.svd_lowrank(delta, q=min(max_rank + 8, N, K), niter=4)
    left_out = delta.square().sum() - torch.cat((S.new_zeros(1), S.square().cumsum(0)))
    sufficient = (left_out <= 1.1 * rounding).nonzero()
    if not len(sufficient) or sufficient[0] > max_rank:
        raise ValueError(
            f"target − base must have a rank of at most {max_rank} to be stored as 'lowrank', got a higher one: "
            "use 'int4' or 'int8'"
        )
    rank = max(1, int(sufficient[0]))
    root = S[:rank].sqrt()
    return base, (V[:, :rank] * root).t().to(base.dtype).contiguous(), (U[:, :rank] * root).to(base.dtype)


def unpack(*tensors: Tensor, columns: int, rows: Rows = ALL) -> tuple[Tensor, Tensor]:
    """Returns the base as stored and the target in float32."""
    base, down, up = tensors
    return base[rows], torch.addmm(base[rows].float(), up[rows].float(), down.float())


def layout(shape: Sequence[int], dtype: torch.dtype, *tensors: Tensor) -> Sequence[Layout]:
    """Returns the layout for a matrix. The rank is taken from the second tensor."""
    (*rows, columns), rank = shape, tensors[1].shape[0] if tensors[1].dim() else 1
    return (shape, dtype), ((rank, columns), dtype), ((*rows, rank), dtype)


def linear(x: Tensor, lam: Tensor, *tensors: Tensor) -> Tensor:
    """Computes x · baseᵀ + λ (x · downᵀ) · upᵀ with plain products, where no kernel does it."""
    base, down, up = tensors
    low = (lam.unsqueeze(1) * F.linear(x, down).float()).to(x.dtype)
    return torch.addmm(F.linear(x, base), low, up.t())


def embedding(ids: Tensor, lam: Tensor, *tensors: Tensor) -> Tensor:
    """Computes base[ids] + λ up[ids] · down."""
    base, down, up = tensors
    low = lam.unsqueeze(1) * F.embedding(ids, up).float()
    return torch.addmm(F.embedding(ids, base).float(), low, down.float()).to(base.dtype)
