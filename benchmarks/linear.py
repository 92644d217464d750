"""Times `lerp_linear` on the CPU against plain PyTorch, prints the table and appends it to results/linear.csv.

    python benchmarks/linear.py                      # the best instruction set of this CPU
    python benchmarks/linear.py --isa avx2           # PyTorch and the kernels both held to AVX2

Weights are cold: every call reads other ones, and together they are several times the last-level cache. The methods of
a table are interleaved. A row whose result is further from float64 than plain PyTorch's is not printed: the run fails.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

# Libraries read these when they are loaded, so they are set before torch is imported.
HELD_TO = {
    "avx2": {"DAMI_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"DAMI_CPU_ISA": "avx512", "ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=HELD_TO, help="hold PyTorch and the kernels to this instruction set")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rows", "-m", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="M, rows of x")
    parser.add_argument("--features", "-n", type=int, default=3072, help="N, output features")
    parser.add_argument("--inner", "-k", type=int, default=3072, help="K, input features")
    parser.add_argument("--threads", type=int, help="default: as many as torch chooses")
    parser.add_argument("--seconds", type=float, default=2.0, help="time given to each table of methods")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "linear.csv")
    return parser.parse_args()


arguments = parse_arguments()
if arguments.isa:
    os.environ.update(HELD_TO[arguments.isa])

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor  # noqa: E402

from dami_kernels import LerpWeight, lerp_linear, native, reference  # noqa: E402

COLD_BYTES = 256 << 20
CHECKED_FEATURES = 64


@dataclass(frozen=True)
class Row:
    """One line of results/linear.csv: one method on one batch."""

    commit: str
    date: str
    device: str
    isa: str
    threads: int
    torch: str
    dtype: str
    M: int
    N: int
    K: int
    batch: str
    method: str
    ms_p50: float
    ms_p20: float
    ms_p80: float
    ratio: float  # of ms_p50 to that of F.linear on one merged weight of the same dtype
    of_limit: float  # of the time that memory or arithmetic alone would take
    of_bandwidth: float
    of_peak: float
    bandwidth_gb_s: float  # measured in this run, as is the next
    peak_gflop_s: float
    error: float  # relative to float64, root mean square


Method = tuple[Callable[[int], Tensor], float, float]
"""A call that takes a counter, to choose its weights by; bytes it has to read; operations it has to do."""


def methods_of(batch: str, x: Tensor, lam: Tensor, weights: list[LerpWeight]) -> dict[str, Method]:
    """The operator and its rivals, all computing one batch. The first is the unit of the ratios."""
    (rows, k), n = x.shape, weights[0].shape[0]
    size, work = float(n * k * x.element_size()), 2.0 * rows * n * k
    singles = [end for weight in weights for end in weight.tensors]
    blended = torch.empty_like(singles[0])
    single32 = [end.float() for end in singles[: max(1, len(singles) // 2)]]
    x32 = x.float()
    values = lam.unique()
    groups = [(lam == value).nonzero().squeeze(1) for value in values]

    def copies(i: int) -> Tensor:
        y = x.new_empty(rows, n)
        for j, group in enumerate(groups):
            y[group] = F.linear(x[group], singles[(i * len(groups) + j) % len(singles)])
        return y

    def two_linears(i: int) -> Tensor:
        base, target = (F.linear(x, end) for end in weights[i % len(weights)].tensors)
        return torch.lerp(base, target, lam.unsqueeze(1).to(x.dtype))

    def blend_then_linear(i: int) -> Tensor:
        base, target = weights[i % len(weights)].tensors
        return F.linear(x, torch.lerp(base, target, float(values), out=blended))

    ends = 1 if batch == "all base" else 2
    passes = 2 if batch == "mixed" else 1  # of the arithmetic, at least: rows of one λ can share a blended weight
    methods: dict[str, Method] = {
        "F.linear, one merged weight": (lambda i: F.linear(x, singles[i % len(singles)]), size, work)
    }
    if x.dtype != torch.float32:
        methods["the same in float32"] = (
            lambda i: F.linear(x32, single32[i % len(single32)]),
            4.0 * n * k,
            work,
        )
    if batch == "8 λ":
        methods["one merged copy per λ"] = (copies, size * len(groups), work)
    if batch in ("8 λ", "mixed"):
        methods["two F.linear and a lerp"] = (two_linears, 2 * size, 2 * work)
    elif batch == "one λ":
        methods["blend, then F.linear"] = (blend_then_linear, 4 * size, work)
    methods["lerp_linear"] = (lambda i: lerp_linear(x, weights[i % len(weights)], lam), ends * size, passes * work)
    return methods


def check(x: Tensor, lam: Tensor, weight: LerpWeight) -> float:
    """Error of `lerp_linear` against float64; RuntimeError if it is above 1.1 times that of one merged weight."""
    base, target = (end[:CHECKED_FEATURES] for end in weight.tensors)
    oracle = reference.lerp_linear(x, (base, target), lam)

    def error(y: Tensor) -> float:
        return ((y.double() - oracle).norm() / oracle.norm()).item()

    part = LerpWeight.pack(base, target)
    plain = torch.stack([F.linear(row, part.materialize(value)) for row, value in zip(x, lam.tolist(), strict=True)])
    ours = error(lerp_linear(x, weight, lam)[:, :CHECKED_FEATURES])
    if ours > 1.1 * error(plain) + torch.finfo(torch.float32).eps:
        raise RuntimeError(f"lerp_linear is wrong: error {ours:.2e}, plain PyTorch's {error(plain):.2e}")
    return ours


def time_methods(methods: dict[str, Method], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every call, the methods taking turns until the time is over; the first turn is not counted."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    i, end = 0, time.perf_counter() + seconds
    while i < 6 or time.perf_counter() < end:
        for name, (call, _, _) in methods.items():
            start = time.perf_counter()
            call(i)
            times[name].append(1e3 * (time.perf_counter() - start))
        i += 1
    return {name: series[1:] for name, series in times.items()}


def device_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    ).stdout.strip()


def main() -> None:
    torch.manual_seed(0)
    if native.WHY_NOT:
        sys.exit(f"nothing to measure: {native.WHY_NOT}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    n, k = arguments.features, arguments.inner
    pairs = -(-COLD_BYTES // (2 * n * k * dtype.itemsize))
    weights = []
    for _ in range(pairs):
        base = torch.randn(n, k) / k**0.5
        weights.append(LerpWeight.pack(base.to(dtype), (base + 0.03 * torch.randn(n, k) / k**0.5).to(dtype)))
    stream = torch.ones(COLD_BYTES // 4)
    bandwidth = max(native.read_bandwidth(stream) for _ in range(3))
    peaks = {kind: max(native.peak_flops(kind) for _ in range(3)) for kind in {dtype, torch.float32}}
    shared = {
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(),
        "isa": native.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": arguments.dtype,
        "N": n,
        "K": k,
        "bandwidth_gb_s": round(bandwidth / 1e9, 1),
    }
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{shared['device']}, {shared['isa']}, {shared['threads']} threads, {arguments.dtype}, N={n}, K={k}: "
        f"reads {bandwidth / 1e9:.1f} GB/s, multiplies {peaks[dtype] / 1e9:.0f} GFLOP/s"
    )
    results = []
    for rows in arguments.rows:
        x = torch.randn(rows, k).to(dtype)
        lams = {
            "mixed": torch.linspace(0.05, 0.95, rows),  # every row its own
            "8 λ": torch.linspace(0.05, 0.95, 8).repeat(rows // 8),
            "one λ": torch.full((rows,), 0.3),
            "all base": torch.zeros(rows),
        }
        for batch, lam in lams.items():
            if len(lam) != rows or (rows == 1 and batch == "mixed"):
                continue
            error = check(x, lam, weights[0])
            methods = methods_of(batch, x, lam, weights)
            times = time_methods(methods, arguments.seconds)
            unit = statistics.median(next(iter(times.values())))
            table = Table("method", "ms", "ratio", "of limit", title=f"M = {rows}, {batch}", title_justify="left")
            for method, (_, size, work) in methods.items():
                p20, p50, p80 = statistics.quantiles(times[method], n=10)[1::3]
                peak = peaks[torch.float32 if "float32" in method else dtype]
                of_bandwidth, of_peak = size / bandwidth / p50 * 1e3, work / peak / p50 * 1e3
                results.append(
                    Row(
                        **shared,  # type: ignore[arg-type]
                        M=rows,
                        batch=batch,
                        method=method,
                        ms_p50=round(p50, 4),
                        ms_p20=round(p20, 4),
                        ms_p80=round(p80, 4),
                        ratio=round(p50 / unit, 3),
                        of_limit=round(max(of_bandwidth, of_peak), 3),
                        of_bandwidth=round(of_bandwidth, 3),
                        of_peak=round(of_peak, 3),
                        peak_gflop_s=round(peak / 1e9, 1),
                        error=float(f"{error:.2e}") if method == "lerp_linear" else float("nan"),
                    )
                )
                table.add_row(method, f"{p50:.3f}", f"{p50 / unit:.2f}", f"{max(of_bandwidth, of_peak):.0%}")
            console.print(table)
    new = not arguments.output.exists()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with open(arguments.output, "a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        if new:
            writer.writeheader()
        writer.writerows(map(asdict, results))
    console.print(f"appended to {arguments.output}")


if __name__ == "__main__":
    main()
