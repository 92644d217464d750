"""What the parts share: they give cases and the methods of each; here these are checked, timed, printed and stored."""

from __future__ import annotations

import argparse
import math
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

import torch

from benchmarks.ahead import Ahead, attempt, described
from benchmarks.check import WrongResult
from benchmarks.journal import WHOLE, Journal
from benchmarks.machine import Call, Machine, about, machine
from benchmarks.record import RESULTS, store, text_table
from benchmarks.timing import Budget, Times, interleaved
from benchmarks.weights import FORMATS

P = ParamSpec("P")
T = TypeVar("T")
LOST = 70  # exit status of a part that lost its device
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Case(Protocol):
    """A case, shown as a group of lines of the table."""

    def columns(self) -> dict[str, object]:
        """Returns the columns that identify the case in the results."""


@dataclass(frozen=True)
class Method:
    """A way to compute the result of a case.

    Attributes:
        name, format: as shown in the results. Plain PyTorch has no format.
        call: computes the result. It takes the number of the call, which selects one of its copies.
        moved: bytes that it has to read and write.
        operations: operations that it has to do. A multiply-add counts as two.
        dtype: dtype of the multiply-adds.
        check: raises WrongResult if the result of `call` is wrong.
        is_eager: whether to time it outside of a CUDA graph too.
    """

    name: str
    format: str
    call: Call
    moved: int
    operations: int
    dtype: torch.dtype
    check: Callable[[Any], None] | None = None
    is_eager: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.format}".strip()


def parser(part: str, about: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the options that all parts share."""
    parser = argparse.ArgumentParser(
        f"python -m benchmarks {part}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--formats", nargs="+", choices=FORMATS, default=FORMATS, metavar="FORMAT", help=", ".join(FORMATS))
    add("--dtype", choices=DTYPES, default="bf16")
    add("--threads", type=int, help="of the CPU; default: as PyTorch chooses")
    seconds = 0.3 if torch.cuda.is_available() else 1.0
    add("--seconds", type=float, default=seconds, help="of timing for each case, about")
    add("--budget", type=float, default=math.inf, metavar="SECONDS", help="for everything; what does not fit is named")
    add("--check-only", action="store_true", help="compile and check, without timing anything")
    add("--compile-only", action="store_true", help=argparse.SUPPRESS)  # for `suite`: runs within `ahead.compiling`
    add("--journal", type=Path, help=argparse.SUPPRESS)  # for `suite`: records what is running
    add("--results", type=Path, default=RESULTS, metavar="DIRECTORY", help="of the CSV file that rows are appended to")
    return parser


def run(
    file: str,
    options: argparse.Namespace,
    cases: Iterable[Case],
    prepare: Callable[[Case, Machine], tuple[list[Method], int]],
) -> int:
    """Measures cases within the budget, most important first. A failure does not affect other cases.

    Args:
        file: name of the CSV file.
        cases: the cases. Each becomes a group of rows.
        prepare: returns the methods of a case and the copies of their weights.

    Returns:
        1 if a result was rejected or a method failed, else 0.

    Raises:
        SystemExit: with LOST, if an error made the device unusable. Another process may continue.
    """
    if options.compile_only:
        compile_ahead(cases, prepare)
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.filterwarnings("error", "dami: ", UserWarning)  # do not time formats without a kernel
    torch.manual_seed(0)
    budget = Budget(options.budget)
    here = machine()
    facts = about(here) | {"dtype": options.dtype}
    print(f"{facts['device']}, {facts['isa']}, torch {facts['torch']}, {facts['dtype']}", flush=True)
    part = Part(here, Journal(options.journal), options.seconds)
    for case in budget.spend(cases):
        if part.journal.is_done(case):
            continue
        print(f"\n{case}", flush=True)
        if part.journal.is_fatal(case, WHOLE):
            print("left out: it ended the process before", flush=True)
            continue
        part.journal.at(case, WHOLE)
        with torch.inference_mode(), part.failing(WHOLE):
            methods, copies = prepare(case, here)
            right = [method for method in methods if part.is_right(case, method)]
            if options.check_only:
                print(f"right: {', '.join(map(str, right))}", flush=True)
            elif rows := part.timed(case, right, copies):
                store([facts | case.columns() | row for row in rows], options.results / file)
                show(rows)
        part.journal.done(case)
    for left_out in budget.left_out:
        print(f"left out, no time: {left_out}", flush=True)
    return int(part.failed)


def compile_ahead(cases: Iterable[Case], prepare: Callable[[Case, Any], tuple[list[Method], int]]) -> None:
    """Calls our methods of every case, within `ahead.compiling`."""
    here = Ahead()

    def compile(case: Case) -> None:
        for method in prepare(case, here)[0]:
            if method.format:
                attempt(f"{case}, {method}", partial(method.call, 0))

    for case in cases:
        attempt(case, partial(compile, case))


class Part:
    """A run of one part: what is missing, what has failed, and what is running."""

    def __init__(self, here: Machine, journal: Journal, seconds: float) -> None:
        self.here, self.journal, self.seconds = here, journal, seconds
        self.missing: set[str] = set()  # methods without a kernel
        self.ceilings: dict[object, float] = {}
        self.failed = False

    @contextmanager
    def failing(self, what: object) -> Iterator[None]:
        """Prints an error and suppresses it, unless the device is lost."""
        try:
            yield
        except Exception as error:  # from torch, Triton's compiler or the driver: none may stop later cases
            self.failed = True
            is_wrong = isinstance(error, WrongResult)
            print(f"REFUSED: {what}: {error}" if is_wrong else f"FAILED: {what}: {described(error)}", flush=True)
            if self.here.is_lost():
                print("the device is lost to this process", flush=True)
                raise SystemExit(LOST) from error
            traceback.clear_frames(error.__traceback__)  # frames keep tensors alive
            self.here.forget()

    def is_right(self, case: Case, method: Method) -> bool:
        """Whether a method's result is correct, so that it may be timed. Prints the reason if not."""
        if str(method) in self.missing:
            return False
        if self.journal.is_fatal(case, str(method)):
            print(f"left out: {method}: it ended the process before", flush=True)
            return False
        self.journal.at(case, method)
        right = False
        with self.failing(method):
            try:
                result = method.call(0)
                if method.check is not None:
                    method.check(result)
                right = True
            except UserWarning as warning:
                print(f"left out: {method}: {warning}", flush=True)
                self.missing.add(str(method))
        return right

    def timed(self, case: Case, methods: list[Method], copies: int) -> list[dict[str, object]]:
        """Returns a row for each method, except those that fail."""
        stopwatches: dict[Method, Callable[[], float]] = {}
        times: dict[Method, Times] = {}
        eager: dict[Method, float | None] = {}
        for method in methods:
            self.journal.at(case, method)
            with self.failing(method):
                stopwatches[method] = self._watched(case, method, self.here.stopwatch(method.call, copies))
        while stopwatches and not times:
            times = self._in_turn(stopwatches)
        for method in times:
            if method.is_eager:
                self.journal.at(case, method)
                with self.failing(f"{method}, eager"):
                    eager[method] = self.here.eager(method.call)
        stopwatches.clear()
        self.here.forget()
        self._raise_ceilings({method.dtype for method in times})
        bandwidth, peaks = self.ceilings.get("bandwidth", math.nan), self.ceilings
        return [
            row(method, taken, eager.get(method), bandwidth, peaks.get(method.dtype, math.nan))
            for method, taken in times.items()
        ]

    def _in_turn(self, stopwatches: dict[Method, Callable[[], float]]) -> dict[Method, Times]:
        """Returns the times of all methods. If one fails, removes it and returns none."""
        try:
            return interleaved(stopwatches, self.seconds)
        except Failure as failure:
            del stopwatches[failure.method]
            with self.failing(failure.method):
                raise failure.error from None
        return {}

    def _watched(self, case: Case, method: Method, stopwatch: Callable[[], float]) -> Callable[[], float]:
        def seconds() -> float:
            self.journal.at(case, method)
            try:
                return stopwatch()
            except Exception as error:
                raise Failure(method, error) from error

        return seconds

    def _raise_ceilings(self, dtypes: set[torch.dtype]) -> None:
        """Keeps the best bandwidth and peaks of the run, in case the machine is slow for a while."""
        measures = {"bandwidth": self.here.bandwidth, **{dtype: partial(self.here.peak, dtype) for dtype in dtypes}}
        for what, measure in measures.items():
            with suppress(torch.OutOfMemoryError):  # keep the earlier measurement
                self.ceilings[what] = max(measure(), self.ceilings.get(what, 0))


class Failure(Exception):
    """A method failed while several were timed in turn."""

    def __init__(self, method: Method, error: Exception) -> None:
        self.method, self.error = method, error


def row(method: Method, times: Times, eager: float | None, bandwidth: float, peak: float) -> dict[str, object]:
    return {
        "method": method.name,
        "format": method.format,
        "median_ms": f"{1e3 * times.median:.5f}",
        "p10_ms": f"{1e3 * times.p10:.5f}",
        "p90_ms": f"{1e3 * times.p90:.5f}",
        "count": times.count,
        "eager_ms": "" if eager is None else f"{1e3 * eager:.5f}",
        "moved_bytes": method.moved,
        "limit_ms": f"{1e3 * max(method.moved / bandwidth, method.operations / peak):.5f}",
        "bandwidth_gb_s": f"{bandwidth / 1e9:.1f}",
        "peak_gflop_s": f"{peak / 1e9:.1f}",
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the rows of one case. Ratios are relative to the first method of plain PyTorch."""
    if not rows:
        return
    unit = next((float(row["median_ms"]) for row in rows if not row["format"]), math.nan)
    lines: list[list[object]] = [["method", "ms", "p10", "p90", "eager", "ratio", "of the limit"]]
    for row in rows:
        median = float(row["median_ms"])
        cells = (row[key] and f"{float(row[key]):.3f}" for key in ("median_ms", "p10_ms", "p90_ms", "eager_ms"))
        share = float(row["limit_ms"]) / median
        lines.append([f"{row['method']} {row['format']}", *cells, f"{median / unit:.2f}", f"{share:.0%}"])
    print(text_table(lines), flush=True)


class SingleEntryCache(Generic[P, T]):
    """Caches a function's last value, for values that take much memory: frees it before computing the next."""

    def __init__(self, make: Callable[P, T]) -> None:
        self.make = make
        self.entry: tuple[object, T] | None = None

    def __call__(self, *key: P.args, **named: P.kwargs) -> T:
        if self.entry is None or self.entry[0] != (key, named):
            self.entry = None
            self.entry = (key, named), self.make(*key, **named)
        return self.entry[1]
