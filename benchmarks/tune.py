"""Measures launch parameters of `lerp_linear` on this GPU and writes its table into dami_kernels/tuning/tables.

For each shape the candidates of `dami_kernels.tuning` are compiled, checked and timed in CUDA graphs; the fastest goes
into the table. So does, for few rows, whether the kernel in CUDA C++ is faster still, and for more rows whether torch's
library is. What the table has already and is not measured now stays. The rows that matter most come first; what does
not fit into the time is named.
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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import lams, suite
from benchmarks.ahead import META, PROCESSES, attempt, compiling, described, share
from benchmarks.check import check_linear
from benchmarks.journal import WHOLE, Journal
from benchmarks.lams import Lams
from benchmarks.linear import has_cuda_kernel
from benchmarks.machine import Call, Gpu
from benchmarks.measure import DTYPES, LOST, SingleEntryCache
from benchmarks.shapes import HEAD_ROWS, LAYERS
from benchmarks.timing import Budget, Times, interleaved
from benchmarks.weights import KERNEL_FORMATS, Copies, count_of
from dami_kernels import LerpWeight, cuda, launching, lerp_linear, products
from dami_kernels.tuning import (
    LinearConfig,
    LinearEntry,
    Route,
    device_of,
    linear_candidates,
    load_table,
    save_table,
    table_path,
)
from dami_kernels.tuning.routes import TOGETHER

ROWS = [1, 16, 64, 4096, 8, 4, 32, 256, 1024]
SLOW = 1.3  # candidates this many times slower than the fastest are dropped
CUDA = "the kernel in CUDA C++"
Candidate = LinearConfig | Route | str  # parameters of Triton's kernel, a route, or CUDA for the other kernel
ROUTES = {"one": ("identical", Route.BLEND), "mixed": ("distinct", Route.PRODUCTS)}  # by column, and kind of λ


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
        entry = tuner.entry(candidates, lambda case=case: copies(case.n, case.k).weights[case.format], options.seconds)
        here.forget()
        if entry is not None:
            table[case.rows, case.n, case.k, dtype, case.format] = entry
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

    def entry(
        self, candidates: list[LinearConfig], weights: Callable[[], list[LerpWeight]], seconds: float
    ) -> LinearEntry | None:
        """Returns the table's entry for this case, or None if no candidate runs. Prints what decided."""
        case = self.case
        with torch.inference_mode():
            try:
                of = weights()
                times = self.times(candidates, of, seconds)
            except Exception as error:
                self.passed_over(str(case), error)
                return None
            by_triton = {config: taken.median for config, taken in times.items() if isinstance(config, LinearConfig)}
            if not by_triton:
                return None
            best = min(by_triton, key=by_triton.__getitem__)
            prefers_cuda = CUDA in times and times[CUDA].median < by_triton[best]
            print(f"{case}: {told(times, candidates[0])}: {best}", flush=True)
            entry = LinearEntry(case.rows, case.n, case.k, of[0].dtype, case.format, best, prefers_cuda)
            return replace(entry, **{column: self.route(best, column, of, seconds) for column in ROUTES})

    def times(
        self, candidates: list[LinearConfig], weights: list[LerpWeight], seconds: float
    ) -> dict[Candidate, Times]:
        """Times each candidate that compiles and is correct, except those that are far slower."""
        case = self.case
        of = Operands(case, "uniform" if case.rows > lams.SEQUENCE else "distinct", weights, self.here)
        contest = Contest(self, of, len(weights))
        if has_cuda_kernel(of.x):
            contest.consider(CUDA, of.by_cuda)
        for config in candidates:
            if contest.stopwatches and self.budget.is_spent():
                break
            with forced(config):
                contest.consider(config, of.by_operator)
        return contest.times(seconds)

    def route(self, best: LinearConfig, column: str, weights: list[LerpWeight], seconds: float) -> Route:
        """Returns the faster of our kernel and the route of a column, for rows of its kind of λ."""
        kind, way = ROUTES[column]
        if self.case.rows < TOGETHER or self.budget.is_spent():
            return Route.KERNEL
        of = Operands(self.case, kind, weights, self.here)
        contest = Contest(self, of, len(weights))
        with forced(best if column == "one" or self.case.rows <= 128 else None):  # else the plan has a tile for it
            contest.consider(Route.KERNEL, of.by_operator)
        contest.consider(way, partial(of.by_library, way=way))
        times = contest.times(seconds)
        if way not in times or Route.KERNEL not in times:
            return Route.KERNEL
        medians = {candidate: f"{taken.median * 1e6:.1f} µs" for candidate, taken in times.items()}
        print(f"  {lams.KINDS[kind]}: {medians[Route.KERNEL]}, {medians[way]} by {way.value}", flush=True)
        return min((Route.KERNEL, way), key=lambda candidate: times[candidate].median)

    def timed(self, candidate: Candidate, stopwatch: Callable[[], float]) -> float:
        self.journal.at(self.case, str(candidate))
        return stopwatch()

    def passed_over(self, what: str, error: Exception) -> None:
        print(f"passed over: {what}: {described(error)}", flush=True)
        if self.here.is_lost():
            print("the device is lost to this process", flush=True)
            raise SystemExit(LOST) from error


class Operands:
    """x, copies of a weight and λ of one kind, and the ways to multiply them."""

    def __init__(self, case: Case, kind: str, weights: list[LerpWeight], here: Gpu) -> None:
        self.case, self.weights = case, weights
        self.x = torch.randn(case.rows, case.k, device=here.device).to(weights[0].dtype)
        batch = lams.make(kind, case.rows)
        self.per_row = batch.per_row().to(here.device)
        # As the operator sees one λ for all rows: by the length of lam, not by its values.
        self.lam, self.rows_per_lam, _ = (Lams(batch.lam[:1], case.rows) if kind == "identical" else batch).to(
            here.device
        )

    def weight(self, i: int) -> LerpWeight:
        return self.weights[i % len(self.weights)]

    def by_operator(self, i: int) -> Tensor:
        return lerp_linear(self.x, self.weight(i), self.lam, rows_per_lam=self.rows_per_lam)

    def by_cuda(self, i: int) -> Tensor:
        tensors = [*self.weight(i).tensors]
        return cuda.lerp_linear(self.x, tensors, [], self.lam, None, self.rows_per_lam, self.case.format, False)

    def by_library(self, i: int, way: Route) -> Tensor:
        tensors = [*self.weight(i).tensors]
        return products.lerp_linear(self.x, tensors, [], self.lam, None, self.rows_per_lam, self.case.format, way)


class Contest:
    """The stopwatches of the candidates that run and are right."""

    def __init__(self, tuner: Tuner, operands: Operands, copies: int) -> None:
        self.tuner, self.operands, self.copies = tuner, operands, copies
        self.stopwatches: dict[Candidate, Callable[[], float]] = {}
        self.once: dict[Candidate, float] = {}

    def consider(self, candidate: Candidate, call: Call) -> None:
        tuner, of = self.tuner, self.operands
        if tuner.journal.is_fatal(tuner.case, str(candidate)):
            return
        tuner.journal.at(tuner.case, str(candidate))
        try:
            check_linear(call(0), of.x, of.weights[0], of.per_row)
            stopwatch = tuner.here.stopwatch(call, self.copies)
            self.once[candidate] = min(stopwatch() for _ in range(2))
            self.stopwatches[candidate] = stopwatch
        except Exception as error:  # too many registers, too much shared memory, or worse
            tuner.passed_over(str(candidate), error)

    def times(self, seconds: float) -> dict[Candidate, Times]:
        """Times in turn what is not far slower than the fastest configuration; what is no configuration always."""
        configs = [config for config in self.stopwatches if isinstance(config, LinearConfig)]
        fastest = min((self.once[config] for config in configs), default=0)
        contenders = {
            candidate: partial(self.tuner.timed, candidate, stopwatch)
            for candidate, stopwatch in self.stopwatches.items()
            if candidate not in configs or self.once[candidate] <= SLOW * fastest
        }
        return interleaved(contenders, seconds) if contenders else {}


@contextmanager
def forced(config: LinearConfig | None) -> Iterator[None]:
    """Forces Triton's kernel, whatever the shape: with these parameters, or with those that it would have."""
    kernel = importlib.import_module("dami_kernels.triton.linear")
    with ExitStack() as stack:
        stack.callback(launching.forget)  # after the patches are undone
        if config is not None:
            stack.enter_context(patch.object(kernel, "linear_config", lambda *_: config))
        stack.enter_context(patch.object(kernel, "route", lambda *_: Route.KERNEL))
        stack.enter_context(patch.object(cuda, "takes", lambda *_: False))
        launching.forget()
        yield
