"""What the parts share: they give cases and the methods of each; here these are checked, timed, printed and stored."""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.check import WrongResult
from benchmarks.machine import Call, Machine, about, machine
from benchmarks.record import RESULTS, store, text_table
from benchmarks.timing import Budget, Times, interleaved
from benchmarks.weights import FORMATS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Case(Protocol):
    """A group of lines of the table."""

    def columns(self) -> dict[str, object]:
        """What tells it from others in the results."""


@dataclass(frozen=True)
class Method:
    """A way to compute the result of a case.

    Attributes:
        name, format: what it is called in the results; no format for plain PyTorch.
        call: computes it; takes the number of the call, by which it chooses among its copies.
        moved: bytes that it must read and write.
        operations: that it must do, a multiply-add being two.
        dtype: of the multiply-adds.
        check: raises WrongResult for what `call` returned.
        is_eager: whether to time it outside of a CUDA graph as well.
    """

    name: str
    format: str
    call: Call
    moved: int
    operations: int
    dtype: torch.dtype
    check: Callable[[Any], None] | None = None
    is_eager: bool = False


def parser(part: str, about: str | None) -> argparse.ArgumentParser:
    """The options that all parts have."""
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
    add("--results", type=Path, default=RESULTS, metavar="DIRECTORY", help="of the CSV file that rows are appended to")
    return parser


def run(
    file: str,
    options: argparse.Namespace,
    cases: Iterable[Case],
    prepare: Callable[[Case, Machine], tuple[list[Method], int]],
) -> int:
    """Measures cases, most important first, within the budget.

    Args:
        file: name of the CSV file.
        cases: each becomes a group of rows.
        prepare: gives the methods of a case, and the copies of their weights.

    Returns:
        1 if a result had to be refused or a method failed, else 0.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.filterwarnings("error", "dami: ", UserWarning)  # a format without a kernel is not worth timing
    torch.manual_seed(0)
    budget = Budget(options.budget)
    here = machine()
    facts = about(here) | {"dtype": options.dtype}
    print(f"{facts['device']}, {facts['isa']}, torch {facts['torch']}, {facts['dtype']}", flush=True)
    missing: set[tuple[str, str]] = set()  # methods and formats without a kernel
    ceilings: dict[object, float] = {}
    refused = False

    def rows_of(case: Case) -> list[dict[str, object]]:
        nonlocal refused
        methods, copies = prepare(case, here)
        right = []
        for method in methods:
            kernel = method.name, method.format
            wrong = UserWarning if kernel in missing else fault(method)
            if wrong is None:
                right.append(method)
            elif wrong is UserWarning:
                missing.add(kernel)
            else:
                refused = True
        return [] if options.check_only else timed(right, copies, here, options.seconds, ceilings)

    for case in budget.spend(cases):
        print(f"\n{case}", flush=True)
        try:
            with torch.inference_mode():
                rows = rows_of(case)
        except torch.OutOfMemoryError:
            print("left out: not enough memory")
            continue
        store([facts | case.columns() | row for row in rows], options.results / file)
        show(rows)
    for case in budget.left_out:
        print(f"left out, no time: {case}")
    return int(refused)


def fault(method: Method) -> type[Exception] | None:
    """Why a method must not be timed, which is printed; None if it may be."""
    try:
        result = method.call(0)
        if method.check is not None:
            method.check(result)
    except UserWarning as warning:
        print(f"left out: {method.name} {method.format}: {warning}")
        return UserWarning
    except WrongResult as wrong:
        print(f"REFUSED: {method.name} {method.format}: {wrong}")
        return WrongResult
    except (RuntimeError, AttributeError) as error:  # it does not compile, or this torch does not have it
        print(f"FAILED: {method.name} {method.format}: {type(error).__name__}: {error}")
        return RuntimeError
    return None


def timed(
    methods: list[Method], copies: int, here: Machine, seconds: float, ceilings: dict[object, float]
) -> list[dict[str, object]]:
    """A row for each method. `ceilings` keeps the best bandwidth and peaks of the run, whatever a slow minute has."""
    stopwatches = {method: here.stopwatch(method.call, copies) for method in methods}
    times = interleaved(stopwatches, seconds)
    eager = {method: here.eager(method.call) for method in methods if method.is_eager}
    stopwatches.clear()
    here.forget()
    ceilings["bandwidth"] = max(here.bandwidth(), ceilings.get("bandwidth", 0))
    for dtype in {method.dtype for method in methods}:
        ceilings[dtype] = max(here.peak(dtype), ceilings.get(dtype, 0))
    return [
        row(method, times[method], eager.get(method), ceilings["bandwidth"], ceilings[method.dtype])
        for method in methods
    ]


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
    """Prints the rows of one case; the ratio is to the first method of plain PyTorch."""
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


class Kept:
    """The last of some values that take much memory: another one is made only after it is gone."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make
        self.key: tuple[Any, ...] | None = None
        self.value: Any = None

    def __call__(self, *key: Any) -> Any:
        if key != self.key:
            self.value, self.key = None, key
            self.value = self.make(*key)
        return self.value
