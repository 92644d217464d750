"""Times `lerp_linear` in every format against plain PyTorch.

All methods of a case are timed together, in turn, on weights that no cache holds: a call takes the next of many
copies. A format without a kernel is left out, as is a result that is further from float64 than the contract allows.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import lams, limits, measure
from benchmarks.check import check_linear
from benchmarks.lams import Lams
from benchmarks.machine import Call, Machine
from benchmarks.measure import DTYPES, Method
from benchmarks.shapes import HEAD_ROWS, LAYERS
from benchmarks.weights import KERNEL_FORMATS, Copies, count_of
from dami_kernels import LerpWeight, cuda, lerp_linear
from dami_kernels.tuning import Route, device_of, route, rows_together
from dami_kernels.tuning.cuda import MAX_ROWS

OURS = "lerp_linear"
CUDA, TRITON = "lerp_linear, CUDA C++", "lerp_linear, Triton"  # names for the kernel that the operator does not choose
HUGE = "lerp_linear, huge pages"
MERGED = "F.linear, one merged"
MERGED_FLOAT32 = "F.linear, one merged, fp32"
TWO = "two F.linear + lerp"
BLEND = "blend + F.linear"
COPIES = "a merged copy per λ"
DECODE = 64  # most rows for which the host's share of a call is measured
MAX_LAMS = 64  # limit for methods that launch something for every λ; beyond it they are far slower


@dataclass(frozen=True)
class Case:
    """A layer of a model, a number of rows and a kind of λ."""

    model: str
    layer: str
    rows: int
    kind: str

    @property
    def shape(self) -> tuple[int, int]:
        return LAYERS[self.model][self.layer]

    def columns(self) -> dict[str, object]:
        n, k = self.shape
        return {"model": self.model, "layer": self.layer, "n": n, "k": k, "m": self.rows, "lam": self.kind}

    def __str__(self) -> str:
        n, k = self.shape
        return f"{self.model} {self.layer} (N={n}, K={k}), M={self.rows}, {self.kind}: {lams.KINDS[self.kind]}"


def main(argv: list[str] | None = None) -> int:
    parser = measure.parser("linear", __doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=LAYERS, default=["square"], metavar="MODEL", help=", ".join(LAYERS))
    add("--layers", nargs="+", metavar="LAYER", help="qkv, o, gate_up, down, lm_head; default: all")
    add("--rows", "-m", type=int, nargs="+", default=[1, 4, 16, 64, 256], metavar="M", help="rows of x")
    kinds = "; ".join(f"{kind}: {what}" for kind, what in lams.KINDS.items())
    add("--lams", nargs="+", choices=lams.KINDS, default=["distinct", "identical", "zero"], metavar="KIND", help=kinds)
    options = parser.parse_args(argv)

    def make(shape: tuple[int, int], here: Machine) -> Copies:
        count = count_of(shape, here.cold_bytes)
        made = Copies(shape, DTYPES[options.dtype], here.device, options.formats, count)
        return made, made.in_huge_pages() if "pair" in options.formats else []

    copies = measure.SingleEntryCache(make)

    def prepare(case: Case, here: Machine) -> tuple[list[Method], int]:
        of, moved = copies(case.shape, here)
        x = torch.randn(case.rows, case.shape[1], device=here.device).to(DTYPES[options.dtype])
        batch = lams.make(case.kind, case.rows)
        return [*ours(x, batch, of, moved), *rivals(x, batch, of, here.has_fast_float32)], len(of.ends)

    return measure.run("linear.csv", options, cases(options), prepare)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Returns all requested cases, except those with many rows of lm_head."""
    for model in options.models:
        for layer in LAYERS[model]:
            if options.layers and layer not in options.layers:
                continue
            for rows, kind in itertools.product(options.rows, options.lams):
                if layer != "lm_head" or rows <= HEAD_ROWS:
                    yield Case(model, layer, rows, kind)


def has_cuda_kernel(x: Tensor) -> bool:
    """Whether the CUDA C++ kernel supports x."""
    return x.is_cuda and len(x) <= MAX_ROWS and cuda.WHY_NOT is None


def is_by_library(x: Tensor, weight: LerpWeight, rows_per_lam: int, batch: Lams) -> bool:
    """Whether the operator on a GPU takes another route than our kernel."""
    n, k = weight.shape
    together = rows_together(len(x), rows_per_lam, batch.row_to_lam is not None)
    return route(len(x), n, k, x.dtype, weight.format, device_of(x.device), together) is not Route.KERNEL


def ours(x: Tensor, batch: Lams, copies: Copies, moved: list[LerpWeight]) -> Iterator[Method]:
    """Yields the operator in every format, and on the weights in huge pages, if any were `moved` there.

    On a GPU, for few rows, also the kernel that the operator does not choose.
    """
    lam, rows_per_lam, row_to_lam = batch.to(x.device)
    per_row = batch.per_row()
    n, k = copies.ends[0][0].shape

    def method(name: str, format: str, call: Call) -> Method:
        weight = copies.weights[format][0]
        return Method(
            name,
            format,
            call,
            limits.bytes_read(weight, per_row) + limits.activation_bytes(len(x), n, k, x.dtype),
            limits.operations(weight, per_row),
            x.dtype,
            check=lambda y: check_linear(y, x, weight, per_row.to(x.device)),
            is_eager=len(x) <= DECODE,
        )

    def operator(i: int, weights: list[LerpWeight]) -> Tensor:
        given = {"rows_per_lam": rows_per_lam} if row_to_lam is None else {"row_to_lam": row_to_lam}
        return lerp_linear(x, weights[i % len(weights)], lam, **given)

    def by_triton(i: int, weights: list[LerpWeight]) -> Tensor:
        from benchmarks.tune import forced

        with forced(None):
            return operator(i, weights)

    def kernel(i: int, weights: list[LerpWeight], function: Callable[..., Tensor]) -> Tensor:
        weight = weights[i % len(weights)]
        return function(x, [*weight.tensors], [], lam, row_to_lam, rows_per_lam, weight.format, False)

    for format, weights in copies.weights.items():
        yield method(OURS, format, partial(operator, weights=weights))
        if format in KERNEL_FORMATS and has_cuda_kernel(x):
            from dami_kernels import triton

            is_cuda = cuda.takes(x, [*weights[0].tensors], format, False, device_of(x.device))
            name, function = (TRITON, triton.lerp_linears) if is_cuda else (CUDA, cuda.lerp_linear)
            yield method(name, format, partial(kernel, weights=weights, function=function))
        elif format in KERNEL_FORMATS and x.device.type != "cpu" and is_by_library(x, weights[0], rows_per_lam, batch):
            yield method(TRITON, format, partial(by_triton, weights=weights))
    if moved:
        yield method(HUGE, "pair", partial(operator, weights=moved))


def rivals(x: Tensor, batch: Lams, copies: Copies, with_float32: bool) -> Iterator[Method]:
    ends, merged = copies.ends, copies.merged()
    n, k = merged[0].shape
    per_row = batch.per_row()
    lams = per_row.unique().tolist()
    # The rows of every λ. This would take seconds for the methods left out below.
    members = [(per_row == value).nonzero().squeeze(1).to(x.device) for value in lams[: MAX_LAMS + 1]]
    column = per_row.unsqueeze(1).to(x)
    scratch = torch.empty_like(merged[0])

    def rows_of(j: int) -> Tensor:
        return x if len(lams) == 1 else x[members[j]]

    def together(parts: Iterator[Tensor]) -> Tensor:
        if len(lams) == 1:
            return next(parts)
        y = x.new_empty(len(x), n)
        for rows, part in zip(members, parts, strict=True):
            y[rows] = part
        return y

    def two(i: int) -> Tensor:
        base, target = (F.linear(x, end) for end in ends[i % len(ends)])
        return torch.lerp(base, target, column)

    def blend(i: int) -> Tensor:
        pair = ends[i % len(ends)]
        return together(F.linear(rows_of(j), torch.lerp(*pair, value, out=scratch)) for j, value in enumerate(lams))

    def copy_per_lam(i: int) -> Tensor:
        return together(F.linear(rows_of(j), merged[(i + j) % len(merged)]) for j in range(len(lams)))

    def method(name: str, call: Call, weights: int, products: int = 1, dtype: torch.dtype = x.dtype) -> Method:
        moved = weights * n * k * dtype.itemsize + limits.activation_bytes(len(x), n, k, dtype)
        return Method(
            name, "", call, moved, products * 2 * len(x) * n * k, dtype, is_eager=name == MERGED and len(x) <= DECODE
        )

    yield method(MERGED, lambda i: F.linear(x, merged[i % len(merged)]), 1)
    yield method(TWO, two, 2, products=2)
    if len(lams) <= MAX_LAMS:
        yield method(BLEND, blend, 2)
        yield method(COPIES, copy_per_lam, len(lams))
    if with_float32 and x.dtype != torch.float32:
        x32 = x.float()
        full = [end.float() for end in merged[: max(2, len(merged) // 4)]]
        yield method(MERGED_FLOAT32, lambda i: F.linear(x32, full[i % len(full)]), 1, dtype=torch.float32)
