"""Times `lerp_linear` on the CPU against plain PyTorch and stores the table: python benchmarks/linear.py --help.

Every method is timed in the same run, one call of each in turn, on weights that no cache holds: a call takes the next
of many copies. A result that is further from float64 than the contract allows is neither printed nor stored.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from statistics import quantiles

RESULTS = Path(__file__).parent / "results" / "linear.csv"
COLD_BYTES = 256 * 2**20  # of weights in rotation, several times the largest cache
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
LAMS = ("mixed", "one", "zero")
MERGED = "F.linear, one merged"
OURS = "lerp_linear"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", "-m", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="rows of x")
    parser.add_argument("--outputs", "-n", type=int, default=3072, help="output features")
    parser.add_argument("--inputs", "-k", type=int, default=3072, help="input features")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--isa", help="restrict our kernels to one instruction set; 'avx2' restricts PyTorch's too")
    parser.add_argument("--threads", type=int, help="default: as PyTorch chooses")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each row of the table, about")
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV file that rows are appended to")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    if options.isa:
        os.environ["DAMI_CPU_ISA"] = options.isa
    if options.isa == "avx2":  # read when torch is loaded, which is why nothing is imported before
        os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    run(options)


def run(options: argparse.Namespace) -> None:
    import torch
    from rich.console import Console

    from dami_kernels import native

    if native.WHY_NOT is not None:
        raise SystemExit(native.WHY_NOT)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, DTYPES[options.dtype])
    console = Console(width=None if Console().is_terminal else 120)
    about = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device(),
        "isa": native.isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dtype": options.dtype,
        "n": options.outputs,
        "k": options.inputs,
    }
    pairs = cold_pairs(options.outputs, options.inputs, dtype)
    table = []
    for rows, lams in itertools.product(options.rows, LAMS):
        with console.status(f"{rows} rows, λ {lams}"), torch.inference_mode():
            table += measure(rows, lams, pairs, options.seconds)
    table = [about | row for row in table]
    store(table, options.results)
    console.print(printable(table))


def cold_pairs(n: int, k: int, dtype: object) -> list[tuple]:
    """Pairs of weights, as near to each other as the published Instruct and Thinking checkpoints are."""
    import torch

    def pair() -> tuple:
        base = torch.randn(n, k) / k**0.5
        target = torch.randn(n, k).mul_(0.03 / k**0.5).add_(base)
        return base.to(dtype), target.to(dtype)

    first = pair()
    return [first] + [pair() for _ in range(max(1, COLD_BYTES // (2 * first[0].nbytes)))]


def measure(rows: int, lams: str, pairs: list[tuple], seconds: float) -> list[dict]:
    """Rows of the table for one shape and one kind of λ: what was measured, without what is the same for all."""
    import torch
    import torch.nn.functional as F

    from dami_kernels import LerpWeight, lerp_linear, native, reference

    base = pairs[0][0]
    n, k = base.shape
    dtype = base.dtype
    x = torch.randn(rows, k).to(dtype)
    x32 = x.float()
    lam = {"mixed": torch.rand(rows) * 0.98 + 0.01, "one": torch.full((rows,), 0.3), "zero": torch.zeros(rows)}[lams]
    per_row = lam.unsqueeze(1).to(dtype)
    each = lam.unique().tolist()
    packed = [LerpWeight.pack(*pair) for pair in pairs]
    # A few weights that are larger than the caches stand for one merged copy per λ, which might not fit into memory.
    merged = [pair[end] for end in (0, 1) for pair in pairs]
    merged32 = [end.float() for end in merged[: max(2, COLD_BYTES // (8 * n * k))]]
    scratch = torch.empty_like(base)

    def rows_of(one: float) -> torch.Tensor:
        return x if len(each) == 1 else x[lam == one]

    def blend(i: int) -> torch.Tensor:
        ends = pairs[i % len(pairs)]
        return torch.cat([F.linear(rows_of(one), torch.lerp(*ends, one, out=scratch)) for one in each])

    def two(i: int) -> torch.Tensor:
        return torch.lerp(*(F.linear(x, end) for end in pairs[i % len(pairs)]), per_row)

    def copies(i: int) -> torch.Tensor:
        return torch.cat([F.linear(rows_of(one), merged[(i + j) % len(merged)]) for j, one in enumerate(each)])

    methods: dict[str, Callable[[int], torch.Tensor]] = {
        OURS: lambda i: lerp_linear(x, packed[i % len(packed)], lam),
        MERGED: lambda i: F.linear(x, merged[i % len(merged)]),
        "two F.linear + lerp": two,
        "blend + F.linear": blend,
        "a merged copy per λ": copies,
    }
    if dtype != torch.float32:
        methods[f"{MERGED}, fp32"] = lambda i: F.linear(x32, merged32[i % len(merged32)])

    check(lerp_linear(x, packed[0], lam), reference.lerp_linear(x, pairs[0], lam), x, pairs[0], lam)
    times = timed(methods, seconds)
    bandwidth, peak = native.read_bandwidth(torch.ones(COLD_BYTES // 4)), native.peak_flops(dtype)
    table = []
    for method, taken in times.items():
        one_weight = method.startswith(MERGED) or lams == "zero"
        size = 4 if method.endswith("fp32") else base.element_size()
        moved = (1 if one_weight else 2) * n * k * size + rows * (n + k) * size
        operations = (2 if lams == "mixed" and not one_weight else 1) * 2 * rows * n * k
        limit = max(moved / bandwidth, operations / (native.peak_flops(torch.float32) if size == 4 else peak))
        low, median, high = (quantiles(taken, n=10, method="inclusive")[i] for i in (0, 4, 8))
        table.append(
            {
                "m": rows,
                "lam": lams,
                "method": method,
                "median_ms": f"{1e3 * median:.4f}",
                "p10_ms": f"{1e3 * low:.4f}",
                "p90_ms": f"{1e3 * high:.4f}",
                "calls": len(taken),
                "read_gb_s": f"{bandwidth / 1e9:.1f}",
                "peak_gflop_s": f"{peak / 1e9:.1f}",
                "limit_ms": f"{1e3 * limit:.4f}",
            }
        )
    return table


def timed(methods: dict[str, Callable[[int], object]], seconds: float) -> dict[str, list[float]]:
    """Seconds of every call of every method, one of each in turn; each call has a number of its own.

    A method that alone would take most of the time is called less often.
    """
    number = itertools.count()
    times: dict[str, list[float]] = {name: [] for name in methods}

    def call(name: str) -> float:
        i = next(number)
        start = time.perf_counter()
        methods[name](i)
        return time.perf_counter() - start

    once = {name: min(call(name) for _ in range(2)) for name in methods}
    share = seconds / len(methods)
    rounds = max(5, min(200, int(seconds / sum(min(taken, share / 5) for taken in once.values()))))
    for turn, (name, taken) in itertools.product(range(rounds), once.items()):
        if turn % min(rounds // 5, int(rounds * taken / (4 * share)) + 1) == 0:
            times[name].append(call(name))
    return times


def check(y: object, oracle: object, x: object, ends: tuple, lam: object) -> None:
    """The contract: at most 1.1 times as far from float64 as F.linear on the merged weight, by root mean square."""
    import torch
    import torch.nn.functional as F

    base, target = (end.float() for end in ends)
    columns = torch.randperm(base.shape[0])[:64]
    plain = torch.cat(
        [
            F.linear(x[i : i + 1], torch.lerp(base[columns], target[columns], lam[i]).to(x.dtype))
            for i in range(len(lam))
        ]
    )
    error, allowed = ((got.double() - oracle[:, columns]).square().mean().sqrt() for got in (y[:, columns], plain))
    # With few numbers plain PyTorch can be right by luck; and float32 ends are blended in float32.
    slack = (torch.finfo(x.dtype).eps / plain.numel() ** 0.5 + 2**-23) * oracle.square().mean().sqrt()
    if not error <= 1.1 * allowed + slack:
        raise SystemExit(f"wrong result, nothing stored: error {error:.3e}, that of a merged copy {allowed:.3e}")


def store(table: list[dict], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        if new:
            writer.writeheader()
        writer.writerows(table)


def printable(table: list[dict]) -> object:
    from rich.table import Table

    first = table[0]
    printed = Table(
        title=f"{first['device']}, {first['threads']} threads, {first['isa']}, {first['dtype']}, "
        f"N={first['n']}, K={first['k']}",
        caption=f"read {first['read_gb_s']} GB/s, multiply-add {first['peak_gflop_s']} GFLOP/s, torch {first['torch']} "
        f"({first['torch_isa']}); ratio: to one merged weight; limit: the least time that the machine allows, "
        "as a share of the median",
    )
    for column in ("rows", "λ", "method"):
        printed.add_column(column, no_wrap=True)
    for column in ("ms", "ratio", "limit"):  # the quantiles are in the CSV; this fits 80 columns
        printed.add_column(column, justify="right", no_wrap=True)
    for _, group in itertools.groupby(table, lambda row: (row["m"], row["lam"])):
        rows = list(group)
        one = next(float(row["median_ms"]) for row in rows if row["method"] == MERGED)
        for row in rows:
            median = float(row["median_ms"])
            printed.add_row(
                str(row["m"]) if row is rows[0] else "",
                row["lam"] if row is rows[0] else "",
                row["method"],
                f"{median:.2f}",
                f"{median / one:.2f}",
                f"{float(row['limit_ms']) / median:.0%}",
                style="bold" if row["method"] == OURS else None,
                end_section=row is rows[-1],
            )
    return printed


def commit() -> str:
    """The commit that was measured; with a + if its kernels have been changed since."""

    def git(*what: str) -> str:
        return subprocess.run(
            ["git", *what], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        ).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (
        "+" if git("status", "--porcelain", "--", "../csrc", "../dami_kernels") else ""
    )


def device() -> str:
    """The name of the processor."""

    def named() -> Iterator[str]:
        if Path("/proc/cpuinfo").exists():
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            yield from (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        yield platform.processor() or platform.machine()

    return next(named())


if __name__ == "__main__":
    main()
