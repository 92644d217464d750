"""The one comparison of the numerical tests: against float64, in units of plain PyTorch's error on the same data."""

from __future__ import annotations

import torch
from torch import Tensor


def error(actual: Tensor, oracle: Tensor) -> float:
    """Root mean square of `actual` − `oracle`, over that of `oracle`; both of one shape."""
    assert actual.shape == oracle.shape, f"shape {list(actual.shape)}, oracle {list(oracle.shape)}"
    if oracle.numel() == 0:
        return 0.0
    return ((actual.double() - oracle).square().mean().sqrt() / oracle.square().mean().sqrt()).item()


def factor_for(count: int) -> float:
    """1.1, and for a few numbers three standard deviations of the ratio of two root mean squares of independent errors.

    Two libraries' roundings of five numbers differ by more than 1.1 by chance alone, one way on one CPU, the other way
    on another.
    """
    return 1.1 if count > 100 else 1.1 + 3 / max(count, 1) ** 0.5


def assert_as_accurate(actual: Tensor, oracle: Tensor, plain: Tensor, factor: float = 1.1) -> None:
    """Checks that `actual` is at most `factor` times as far from the float64 `oracle` as PyTorch's `plain` result.

    Two terms are allowed on top. One float32 epsilon: the sums of both ends are blended in float32, which matters only
    where the results are float32 themselves. One epsilon of the dtype, over the root of the number of elements: plain
    PyTorch can be right to the last bit in a few elements by luck.
    """
    assert actual.dtype == plain.dtype, f"dtype {actual.dtype}, plain torch {plain.dtype}"
    luck = torch.finfo(actual.dtype).eps / max(oracle.numel(), 1) ** 0.5
    allowed = factor * error(plain, oracle) + torch.finfo(torch.float32).eps + luck
    got = error(actual, oracle)
    assert got <= allowed, f"error {got:.3e}, allowed {allowed:.3e}, plain torch {error(plain, oracle):.3e}"
