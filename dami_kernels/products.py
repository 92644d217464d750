"""`lerp_linear` by the products of torch's library, for the calls that `tuning.route` gives to it.

Both ways keep the operator's contracts. A row at λ=0 or λ=1 has the bits that the same way gives for that end alone.
The error is at most that of `F.linear` on a merged weight: two products have float32 results, which are interpolated
and rounded once, and a blended weight is a merged one. No route depends on λ, which stays on the device. Scratch is at
most `tuning.routes.SCRATCH`, or what 64 features take.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dami_kernels import formats
from dami_kernels.tuning.config import Route
from dami_kernels.tuning.routes import piece

ROWS = 8192  # of x at a time, where two products have float32 results


def lerp_linear(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    format: str,
    way: Route,
    out: Tensor | None = None,
) -> Tensor:
    """y_i = x_i · W(λ_i)ᵀ + b(λ_i), as the operator takes its arguments; `way` is PRODUCTS or BLEND.

    Args:
        out: where y goes, [M, N]; a new tensor by default.

    Raises:
        ValueError: BLEND with a map, whose rows are not known to share a λ.
    """
    if way is Route.BLEND and row_to_lam is not None:
        raise ValueError("row_to_lam must be None to blend the weight of rows at one λ, got a map")
    y = x.new_empty(len(x), weight[0].shape[0]) if out is None else out
    if way is Route.BLEND:
        _by_blend(y, x, weight, bias, lam, rows_per_lam, format)
    else:
        _by_products(y, x, weight, bias, lam, row_to_lam, rows_per_lam, format)
    return y


def _by_blend(
    y: Tensor, x: Tensor, weight: list[Tensor], bias: list[Tensor], lam: Tensor, rows_per_lam: int, format: str
) -> None:
    """A weight at one λ is a table whose rows are all looked up at that λ."""
    N, K = y.shape[1], x.shape[1]
    ids = torch.arange(N, device=x.device)
    step = min(N, piece(0, K * x.element_size()))
    for first in range(0, N, step):
        some = ids[first : first + step]
        for i in range(len(lam)):
            at = slice(i * rows_per_lam, (i + 1) * rows_per_lam)
            blended = _looked_up(some, weight, lam[i : i + 1], None, len(some), format, x.dtype, K)
            b = None
            if bias:
                ends = [end[first : first + step].unsqueeze(0) for end in bias]
                b = _looked_up(ids[:1], ends, lam[i : i + 1], None, 1, "pair", x.dtype, len(some))[0]
            _linear(x[at], blended, b, y[at, first : first + step])


def _linear(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> None:
    """y = x · wᵀ + b, on a GPU without another pass over y, which may be a part of a matrix."""
    if not x.is_cuda:
        y.copy_(F.linear(x, w, b))
    elif b is None:
        torch.mm(x, w.t(), out=y)
    else:
        torch.addmm(b, x, w.t(), out=y)


def _by_products(
    y: Tensor,
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    format: str,
) -> None:
    (M, K), N = x.shape, y.shape[1]
    both = formats.matrices(format)
    split = len(both.base.suffixes)
    if row_to_lam is None:
        row_to_lam = torch.arange(M, dtype=torch.int32, device=x.device) // rows_per_lam
    ids = torch.arange(min(M, ROWS), device=x.device)
    copied = sum(8 + x.element_size() for matrix in (both.base, both.second) if matrix.bits)  # and on the way there
    step = min(N, piece(len(ids), K * copied))
    for first in range(0, N, step):
        part = [tensor[first : first + step] for tensor in weight]
        base = both.base.unpack(*part[:split], columns=K).to(x.dtype)
        second = both.second.unpack(*part[split:], columns=K).to(x.dtype)
        for row in range(0, M, ROWS):
            at = slice(row, row + ROWS)
            ends = [_product(x[at], base), _product(x[at], second)]
            if not both.has_target:
                ends[1] += ends[0]  # the delta's results become the target's
            for end, b in zip(ends, bias, strict=False):  # there may be none
                end += b[first : first + step]
            rows, width = ends[0].shape
            exact = _looked_up(ids[:rows], ends, lam, row_to_lam[at], 1, "pair", torch.float32, width)
            y[at, first : first + step] = exact  # rounded here, once


def _product(x: Tensor, w: Tensor) -> Tensor:
    """Returns x · wᵀ in float32."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, w.t(), out_dtype=torch.float32)
    return F.linear(x.float(), w.float())


def _looked_up(
    ids: Tensor,
    table: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    format: str,
    dtype: torch.dtype,
    columns: int,
) -> Tensor:
    """`lerp_embedding`: rows of a weight, each at its λ; also of two results, row by row, whose lerp it then is."""
    return torch.ops.dami.lerp_embedding(ids, table, lam, row_to_lam, rows_per_lam, format, dtype, columns)
