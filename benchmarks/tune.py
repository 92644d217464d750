"""Measures launch parameters of `lerp_linear` on this GPU and writes its table into dami_kernels/tuning/tables.

For each shape the candidates of `dami_kernels.tuning` are compiled, checked and timed in CUDA graphs; the
fastest goes into the table. What the table has already and is not measured now stays.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import lams
from benchmarks.check import WrongResult, check_linear
from benchmarks.machine import Call, Gpu
from benchmarks.measure import DTYPES, Kept
from benchmarks.shapes import HEAD_ROWS, LAYERS
from benchmarks.timing import Budget, Times, interleaved
from benchmarks.weights import FORMATS, Copies, count_of
from dami_kernels import LerpWeight, lerp_linear
from dami_kernels.tuning import (
    LinearConfig,
    LinearEntry,
    device_of,
    linear_candidates,
    load_table,
    save_table,
    table_path,
)


@dataclass(frozen=True)
class Case:
    """Rows of x, and a weight [n, k] in a format."""

    n: int
    k: int
    rows: int
    format: str

    def __str__(self) -> str:
        return f"N={self.n}, K={self.k}, {self.format}, M={self.rows}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks tune", description=__doc__)
    add = parser.add_argument
    models = [model for model in LAYERS if model != "square"]
    kernels = [format for format in FORMATS if format != "lowrank"]
    add("--models", nargs="+", choices=models, default=models, metavar="MODEL", help=", ".join(models))
    add("--formats", nargs="+", choices=kernels, default=kernels, metavar="FORMAT", help=", ".join(kernels))
    add("--rows", "-m", type=int, nargs="+", default=[1, 16, 32, 64, 128, 512, 2048, 8192], metavar="M")
    add("--dtype", choices=DTYPES, default="bf16")
    add("--seconds", type=float, default=0.3, help="of timing for each shape, about")
    add("--budget", type=float, default=math.inf, metavar="SECONDS", help="for everything")
    add("--table", type=Path, metavar="FILE", help="default: where the kernels look for this GPU's")
    options = parser.parse_args(argv)
    here = Gpu()
    dtype = DTYPES[options.dtype]
    device = device_of(here.device)
    path = options.table or table_path(device.name)
    table = {
        (entry.M, entry.N, entry.K, entry.dtype, entry.format): entry
        for entries in load_table(device.name).values()
        for entry in entries
    }
    copies = Kept(lambda n, k: Copies((n, k), dtype, here.device, options.formats, count_of((n, k), here.cold_bytes)))
    budget = Budget(options.budget)
    for case in budget.spend(cases(options)):
        candidates = linear_candidates(case.rows, case.n, case.k, dtype, case.format, device)
        with torch.inference_mode():
            times = measured(case, candidates, copies(case.n, case.k).weights[case.format], here, options.seconds)
        here.forget()
        if not times:
            print(f"{case}: none of {len(candidates)} candidates runs", flush=True)
            continue
        best = min(times, key=lambda config: times[config].median)
        by_rule = f"{times[candidates[0]].median * 1e6:.1f} µs by rule" if candidates[0] in times else "rule fails"
        print(f"{case}: {times[best].median * 1e6:.1f} µs, {by_rule}, of {len(times)}: {best}", flush=True)
        table[case.rows, case.n, case.k, dtype, case.format] = LinearEntry(
            case.rows, case.n, case.k, dtype, case.format, best
        )
        save_table(path, table.values())  # at once, so that a run that is stopped leaves what it found
    for case in budget.left_out:
        print(f"left out, no time: {case}")
    print(f"wrote {path}")
    return 0


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Every shape once, in the order of the models."""
    shapes = {(*LAYERS[model][layer], layer): None for model in options.models for layer in LAYERS[model]}
    seen = set()
    for n, k, layer in shapes:
        for rows, format in itertools.product(options.rows, options.formats):
            case = Case(n, k, rows, format)
            if case not in seen and (layer != "lm_head" or rows <= HEAD_ROWS):
                seen.add(case)
                yield case


def measured(
    case: Case, candidates: list[LinearConfig], weights: list[LerpWeight], here: Gpu, seconds: float
) -> dict[LinearConfig, Times]:
    """The time of each candidate that compiles and computes what it should."""
    x = torch.randn(case.rows, case.k, device=here.device).to(weights[0].dtype)
    batch = lams.make("uniform" if case.rows > lams.SEQUENCE else "distinct", case.rows)
    lam, rows_per_lam = batch.lam.to(here.device), batch.rows_per_lam

    def call(i: int) -> torch.Tensor:
        return lerp_linear(x, weights[i % len(weights)], lam, rows_per_lam=rows_per_lam)

    stopwatches = {}
    for config in candidates:
        with forced(config):
            if runs(call, x, weights[0], lam.repeat_interleave(rows_per_lam), config):
                stopwatches[config] = here.stopwatch(call, len(weights))
    return interleaved(stopwatches, seconds) if stopwatches else {}


def runs(call: Call, x: torch.Tensor, weight: LerpWeight, per_row: torch.Tensor, config: LinearConfig) -> bool:
    """Whether the kernel compiles with the parameters forced on it, and is right."""
    try:
        check_linear(call(0), x, weight, per_row)
    except (RuntimeError, WrongResult) as error:  # too many registers or too much shared memory, or worse
        print(f"{config}: {type(error).__name__}: {error}")
        return False
    return True


@contextmanager
def forced(config: LinearConfig) -> Iterator[None]:
    """Makes the kernel take these parameters, whatever the shape."""
    kernel = importlib.import_module("dami_kernels.triton.linear")
    chosen = kernel.linear_config
    kernel.linear_config = lambda *_: config
    try:
        yield
    finally:
        kernel.linear_config = chosen
