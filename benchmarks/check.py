"""The check that every measured result must pass: the accuracy contract of the kernels, against float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dami_kernels import LerpWeight, formats, reference

ROWS = 32  # whose error is compared with that of a merged copy
EVERY = 16  # of so many features one is checked, chosen at random: no tile is narrower


class WrongResult(Exception):
    """A result that is further from float64 than the contract allows: its time is worth nothing."""


def error(y: Tensor, oracle: Tensor) -> float:
    """Root mean square of the difference, over that of the oracle."""
    return ((y.double() - oracle).square().mean().sqrt() / oracle.square().mean().sqrt()).item()


def check(y: Tensor, oracle: Tensor, plain: Tensor, factor: float = 1.1) -> None:
    """Refuses a `y` that is more than `factor` times as far from `oracle` as what plain PyTorch computes.

    With few numbers plain PyTorch can be right by luck, and float32 ends are blended in float32: hence two terms more.
    """
    luck = torch.finfo(y.dtype).eps / plain.numel() ** 0.5 + 2**-23
    got, allowed = error(y, oracle), error(plain, oracle)
    if not got <= factor * allowed + luck:
        raise WrongResult(f"error {got:.3e}, that of plain PyTorch {allowed:.3e}")


def some_features(n: int, device: torch.device) -> Tensor:
    """One feature of every sixteen, int64."""
    first = torch.arange(0, n, EVERY, device=device)
    return (first + torch.randint(EVERY, first.shape, device=device)).clamp_(max=n - 1)


def check_linear(y: Tensor, x: Tensor, weight: LerpWeight, lam: Tensor) -> None:
    """Checks y [M, N] = x W(λ)ᵀ: the contract on some rows, and that every row is near, on one feature of every 16.

    Args:
        x: [M, K].
        weight: [N, K]; its ends are what its format stores.
        lam: float32 [M].
    """
    features = some_features(weight.shape[0], x.device)
    ends = formats.get(weight.format).unpack(*weight.tensors, columns=x.shape[1], rows=features)
    y, oracle = y[:, features], reference.lerp_linear(x, ends, lam)
    base, target = (end.float() for end in ends)
    rows = torch.linspace(0, len(x) - 1, min(len(x), ROWS), device=x.device).long()
    plain = torch.cat([F.linear(x[i : i + 1], torch.lerp(base, target, lam[i]).to(x.dtype)) for i in rows])
    # `lowrank` has no kernel: it rounds the base's product and then the sum.
    check(y[rows], oracle[rows], plain, 2 if weight.format == "lowrank" else 1.1)
    distance = (y.double() - oracle).norm(dim=1) / oracle.norm() * len(x) ** 0.5
    slack = 1 + 4 / len(features) ** 0.5  # with few of them a row can be unlucky
    if not bool((distance <= slack * max(torch.finfo(y.dtype).eps, 1e-4)).all()):
        raise WrongResult(f"row {int(distance.nan_to_num(torch.inf).argmax())} is off by {distance.max():.1e}")
