"""Measures launch parameters of `lerp_linear` on this GPU and writes its table into dami_kernels/tuning/tables.

For each shape the candidates of `dami_kernels.tuning` are compiled, checked and timed in CUDA graphs; the fastest goes
into the table, and for few rows also whether the kernel in CUDA C++ is faster still. What the table has already and is
not measured now stays. The rows that matter most come first; what does not fit into the time is named.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import lams, suite
from benchmarks.ahead import META, PROCESSES, attempt, compiling, described, share
from benchmarks.check import check_linear
from benchmarks.journal import WHOLE, Journal
from benchmarks.linear import has_cuda_kernel
from benchmarks.machine import Call, Gpu
from benchmarks.measure import DTYPES, LOST, SingleEntryCache
from benchmarks.shapes import HEAD_ROWS, LAYERS
from benchmarks.timing import Budget, Times, interleaved
from benchmarks.weights import KERNEL_FORMATS, Copies, count_of
from dami_kernels import LerpWeight, cuda, launching, lerp_linear
from dami_kernels.tuning import (
    LinearConfig,
    LinearEntry,
    device_of,
    linear_candidates,
    load_table,
    save_table,
    table_path,
)

ROWS = [1, 16, 64, 4096, 8, 4, 32, 256, 1024]
SLOW = 1.3  # candidates this many times slower than the fastest are dropped
CUDA = "the kernel in CUDA C++"
Candidate = LinearConfig | str  # parameters of Triton's kernel, or CUDA for the other kernel


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
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser("python -m benchmarks tune", description=__doc__)
    add = parser.add_argument
    models = [model for model in LAYERS if model != "square"]
    add("--models", nargs="+", choices=models, default=["Qwen3-4B"], metavar="MODEL", help=", ".join(models))
    known = ", ".join(KERNEL_FORMATS)
    add("--formats", nargs="+", choices=KERNEL_FORMATS, default=KERNEL_FORMATS, metavar="FORMAT", help=known)
    add("--rows", "-m", type=int, nargs="+", default=ROWS, metavar="M")
    add("--dtype", choices=DTYPES, default="bf16")
    add("--seconds", type=float, default=0.15, help="of timing for each shape, about")
    add("--budget", type=float, default=165, metavar="SECONDS", help="for everything, but for 15 more at the most")
    add("--results", type=Path, metavar="DIRECTORY", help="for a copy of the table, and the log")
    add("--compile", type=share, metavar="I/N", help=argparse.SUPPRESS)  # this share of the kernels, without timing
    add("--journal", type=Path, help=argparse.SUPPRESS)  # for `supervise`
    options = parser.parse_args(argv)
    if options.compile:
        return compile_ahead(options)
    return tune(options) if options.journal else supervise(options, argv)


def supervise(options: argparse.Namespace, argv: list[str]) -> int:
    """Tunes in a separate process, as the suite runs its parts, while other processes compile."""
    if not torch.cuda.is_available():
        raise SystemExit("this needs a GPU, and torch finds none: torch.cuda.is_available() is false")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.results.resolve() if options.results else Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        run = suite.Run(folder, folder / "tune.txt", Path(scratch), options.budget, on_gpu=True)
        part = suite.Part("tune", " ".join(argv), 0)
        with run.ending():
            for i in range(PROCESSES):
                run.start(part.command("--compile", f"{i}/{PROCESSES}"), Path(scratch) / "compile.txt")
            run.part(part, options.budget)
    return run.code


def compile_ahead(options: argparse.Namespace) -> int:
    """Compiles a share of the candidates' kernels, in the order of the cases."""
    os.nice(10)
    dtype = DTYPES[options.dtype]
    copies = SingleEntryCache(lambda n, k: Copies((n, k), dtype, META, options.formats, 1))
    with compiling(options.compile):
        device = device_of(META)
        for case in cases(options):
            (weight,) = copies(case.n, case.k).weights[case.format]
            x = torch.empty(case.rows, case.k, dtype=dtype, device=META)
            lam = lams.make("distinct", case.rows).to(META).lam
            for config in linear_candidates(case.rows, case.n, case.k, dtype, case.format, device):
                with forced(config):
                    attempt(config, partial(lerp_linear, x, weight, lam))
    return 0


def tune(options: argparse.Namespace) -> int:
    here, journal = Gpu(), Journal(options.journal)
    dtype = DTYPES[options.dtype]
    device = device_of(here.device)
    path = table_path(device.name)
    table = {
        (entry.M, entry.N, entry.K, entry.dtype, entry.format): entry
        for entries in load_table(device.name).values()
        for entry in entries
    }

    def make(n: int, k: int) -> Copies:
        return Copies((n, k), dtype, here.device, options.formats, count_of((n, k), here.cold_bytes))

    copies = SingleEntryCache(make)
    budget = Budget(options.budget)
    for case in budget.spend(cases(options)):
        if journal.is_done(case) or journal.is_fatal(case, WHOLE):
            continue
        journal.at(case, WHOLE)
        candidates = linear_candidates(case.rows, case.n, case.k, dtype, case.format, device)
        tuner = Tuner(case, here, journal, budget)
        try:
            with torch.inference_mode():
                times = tuner.times(candidates, copies(case.n, case.k).weights[case.format], options.seconds)
        except Exception as error:
            tuner.passed_over(str(case), error)
            times = {}
        here.forget()
        by_triton = {config: taken.median for config, taken in times.items() if isinstance(config, LinearConfig)}
        if by_triton:
            best = min(by_triton, key=by_triton.__getitem__)
            prefers_cuda = CUDA in times and times[CUDA].median < by_triton[best]
            print(f"{case}: {told(times, candidates[0])}: {best}", flush=True)
            table[case.rows, case.n, case.k, dtype, case.format] = LinearEntry(
                case.rows, case.n, case.k, dtype, case.format, best, prefers_cuda
            )
            save_table(path, table.values())  # after each case, so that a stopped run keeps its results
            if options.results:
                shutil.copy(path, options.results)
        else:
            print(f"{case}: none of {len(candidates)} candidates runs", flush=True)
        journal.done(case)
    for case in budget.left_out:
        print(f"left out, no time: {case}", flush=True)
    print(f"wrote {path}" if table else f"nothing to write into {path}", flush=True)
    return 0


def told(times: dict[Candidate, Times], by_rule: LinearConfig) -> str:
    """Describes the fastest time of Triton's kernel, and other details."""

    def microseconds(candidate: Candidate) -> str:
        return f"{times[candidate].median * 1e6:.1f} µs"

    fastest = min((candidate for candidate in times if candidate != CUDA), key=lambda config: times[config].median)
    more = [f"{microseconds(by_rule)} by rule" if by_rule in times else "the rule's is far slower, or fails"]
    more += [f"{microseconds(CUDA)} by {CUDA}"] if CUDA in times else []
    return f"{microseconds(fastest)}, {', '.join(more)}"


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Returns every shape once, for each number of rows in order."""
    layers = {(*LAYERS[model][layer], layer): None for model in options.models for layer in LAYERS[model]}
    found = {
        Case(n, k, rows, format): None
        for rows, (n, k, layer), format in itertools.product(options.rows, layers, options.formats)
        if layer != "lm_head" or rows <= HEAD_ROWS
    }
    return iter(found)


class Tuner:
    """Times the candidates for one case."""

    def __init__(self, case: Case, here: Gpu, journal: Journal, budget: Budget) -> None:
        self.case, self.here, self.journal, self.budget = case, here, journal, budget

    def times(
        self, candidates: list[LinearConfig], weights: list[LerpWeight], seconds: float
    ) -> dict[Candidate, Times]:
        """Times each candidate that compiles and is correct, except those that are far slower."""
        case = self.case
        x = torch.randn(case.rows, case.k, device=self.here.device).to(weights[0].dtype)
        batch = lams.make("uniform" if case.rows > lams.SEQUENCE else "distinct", case.rows)
        lam, rows_per_lam, _ = batch.to(self.here.device)
        per_row = batch.per_row().to(self.here.device)

        def triton_call(i: int) -> Tensor:
            return lerp_linear(x, weights[i % len(weights)], lam, rows_per_lam=rows_per_lam)

        def cuda_call(i: int) -> Tensor:
            tensors = [*weights[i % len(weights)].tensors]
            return cuda.lerp_linear(x, tensors, [], lam, None, rows_per_lam, case.format, False)

        stopwatches: dict[Candidate, Callable[[], float]] = {}
        once: dict[Candidate, float] = {}

        def consider(candidate: Candidate, call: Call) -> None:
            if self.journal.is_fatal(case, str(candidate)):
                return
            self.journal.at(case, str(candidate))
            try:
                check_linear(call(0), x, weights[0], per_row)
                stopwatch = self.here.stopwatch(call, len(weights))
                once[candidate] = min(stopwatch() for _ in range(2))
                stopwatches[candidate] = stopwatch
            except Exception as error:  # too many registers, too much shared memory, or worse
                self.passed_over(str(candidate), error)

        if has_cuda_kernel(x):
            consider(CUDA, cuda_call)
        for config in candidates:
            if stopwatches and self.budget.is_spent():
                break
            with forced(config):
                consider(config, triton_call)
        fastest = min((once[config] for config in stopwatches if config != CUDA), default=0)
        contenders = {
            candidate: partial(self.timed, candidate, stopwatch)
            for candidate, stopwatch in stopwatches.items()
            if candidate == CUDA or once[candidate] <= SLOW * fastest
        }
        return interleaved(contenders, seconds) if contenders else {}

    def timed(self, candidate: Candidate, stopwatch: Callable[[], float]) -> float:
        self.journal.at(self.case, str(candidate))
        return stopwatch()

    def passed_over(self, what: str, error: Exception) -> None:
        print(f"passed over: {what}: {described(error)}", flush=True)
        if self.here.is_lost():
            print("the device is lost to this process", flush=True)
            raise SystemExit(LOST) from error


@contextmanager
def forced(config: LinearConfig) -> Iterator[None]:
    """Forces Triton's kernel with these parameters, whatever the shape."""
    kernel = importlib.import_module("dami_kernels.triton.linear")
    launching.forget()
    try:
        with patch.object(kernel, "linear_config", lambda *_: config), patch.object(cuda, "takes", lambda *_: False):
            yield
    finally:
        launching.forget()
