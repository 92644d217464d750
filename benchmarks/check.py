"""The check that every measured result must pass: the accuracy contract of the kernels, against float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dami_kernels import LerpWeight, formats, reference

ROWS = 32  # number of rows whose error is compared with a merged copy's
EVERY = 16  # checks one random feature out of this many; no tile is narrower


class WrongResult(Exception):
    """A result deviates from float64 by more than the contract allows, so its time is meaningless."""


def error(y: Tensor, oracle: Tensor) -> float:
    """Returns the root mean square of the difference relative to the oracle's."""
    return ((y.double() - oracle).square().mean().sqrt() / oracle.square().mean().sqrt()).item()


def check(y: Tensor, oracle: Tensor, plain: Tensor, factor: float = 1.1) -> None:
    """Raises `WrongResult` if `y` is more than `factor` times as far from `oracle` as plain PyTorch's result.

    Two more terms allow for plain PyTorch being exact by luck on few values, and for blending float32 ends in float32.
    """
    luck = torch.finfo(y.dtype).eps / plain.numel() ** 0.5 + 2**-23
    got, allowed = error(y, oracle), error(plain, oracle)
    if not got <= factor * allowed + luck:
        raise WrongResult(f"error {got:.3e}, that of plain PyTorch {allowed:.3e}")


def some_features(n: int, device: torch.device) -> Tensor:
    """Returns one feature out of every 16, int64."""
    first = torch.arange(0, n, EVERY, device=device)
    return (first + torch.randint(EVERY, first.shape, device=device)).clamp_(max=n - 1)


def check_linear(y: Tensor, x: Tensor, weight: LerpWeight, lam: Tensor) -> None:
    """Checks y [M, N] = x W(λ)ᵀ: the contract on some rows, and approximate equality on all. One feature in 16.

    Args:
        x: [M, K].
        weight: [N, K]. Its ends are those that its format stores.
        lam: float32 [M].
    """
    features = some_features(weight.shape[0], x.device)
    ends = formats.get(weight.format).unpack(*weight.tensors, columns=x.shape[1], rows=features)
    y, oracle = y[:, features], reference.lerp_linear(x, ends, lam)
    base, target = (end.float() for end in ends)
    rows = torch.linspace(0, len(x) - 1, min(len(x), ROWS), device=x.device).long()
    plain = torch.cat([F.linear(x[i : i + 1], torch.lerp(base, target, lam[i]).to(x.dtype)) for i in rows])
    # Without a kernel, `lowrank` rounds the base's product, and then the sum.
    check(y[rows], oracle[rows], plain, 2 if weight.format == "lowrank" and not y.is_cpu else 1.1)
    distance = (y.double() - oracle).norm(dim=1) / oracle.norm() * len(x) ** 0.5
    slack = 1 + 4 / len(features) ** 0.5  # with few features, a row's error can be large by chance
    if not bool((distance <= slack * max(torch.finfo(y.dtype).eps, 1e-4)).all()):
        raise WrongResult(f"row {int(distance.nan_to_num(torch.inf).argmax())} is off by {distance.max():.1e}")
