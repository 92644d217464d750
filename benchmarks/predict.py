"""Predicts the time of the GPU kernels from counts: bytes, instructions of the machine code, registers. Needs no GPU.

The kernels are compiled ahead of time, as they would be launched. For each limit of a GPU (benchmarks/gpus.py) the
time follows that the counted work takes at that limit; the longest is the prediction. It is a lower bound: launches,
the filling of pipelines and what lies outside of the loops over K are not counted, and clocks are those of the boost.
With a GPU that is listed there, the measured time stands beside the prediction.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import lams, limits
from benchmarks.ahead import META, described
from benchmarks.check import check_linear
from benchmarks.codegen import DEVICES, MATRIX, Compiled, compiling_for, cuda_kernels
from benchmarks.gpus import AMD_PIPES, GPUS, ISSUED, NVIDIA_PIPES, SHARED, GpuLimits
from benchmarks.machine import Gpu, commit
from benchmarks.measure import SingleEntryCache
from benchmarks.record import RESULTS, store, text_table
from benchmarks.shapes import EXPERT_LAYERS, EXPERTS, EXPERTS_PER_TOKEN, LAYERS
from benchmarks.tune import forced
from benchmarks.weights import KERNEL_FORMATS, Copies, count_of
from dami_kernels import formats, lerp_linear
from dami_kernels import triton as kernels
from dami_kernels.tuning import (
    MIXED,
    LinearConfig,
    Route,
    experts_config,
    linear_config,
    route,
    row_config,
    rows_together,
)
from dami_kernels.tuning.cuda import MAX_ROWS, STEP, TILE, decode_warps, shared_bytes
from dami_kernels.tuning.routes import LERPED, unpacked_bytes

CUDA = "lerp_linear, CUDA C++"
HEAD = LAYERS["Qwen3-4B"]["lm_head"]
KINDS = ["zero", "identical", "distinct"]
DTYPE = torch.bfloat16
PIPES = ("fma", "alu", "convert", "shared")
LIMITS = ("memory", "l2", "issue", *PIPES, "matrix")
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "M88": 4}  # bytes of a lane, by a part of the name
AMD_WIDTHS = {"u8": 1, "b8": 1, "u16": 2, "b16": 2, "b64": 8, "b96": 12, "b128": 16}


@dataclass(frozen=True)
class Case:
    """A kernel, the sizes of its operands, their format and the kind of λ."""

    kernel: str
    layer: str
    n: int
    k: int
    rows: int
    format: str
    kind: str

    def columns(self) -> dict[str, object]:
        sizes = {"layer": self.layer, "n": self.n, "k": self.k, "m": self.rows}
        return {"kernel": self.kernel, **sizes, "format": self.format, "lam": self.kind}

    @property
    def rows_per_lam(self) -> int:
        """As the operator is told."""
        return 1 if self.kind == "distinct" else self.rows

    @property
    def is_product(self) -> bool:
        return self.kernel in ("lerp_linear", "lerp_experts")


@dataclass(frozen=True)
class Work:
    """What a launch has to do, besides its instructions.

    Attributes:
        memory: bytes that memory must move, each once.
        l2: bytes that all programs read and write together.
        programs: those that have something to do.
        loops: iterations over K of each; 0 if the whole kernel is counted instead.
        operations: of the matrix unit, for each program, those on rows and features that only fill a tile included.
        path: which of the kernel's loops runs.
        tile: the launch parameters, for the record.
    """

    memory: int
    l2: int
    programs: int
    loops: int = 0
    operations: int = 0
    path: str = ""
    tile: str = ""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser("python -m benchmarks predict", description=__doc__)
    add = parser.add_argument
    known = [gpu.name for gpu in GPUS]
    add("--gpus", nargs="+", choices=known, default=known, metavar="GPU", help=", ".join(known))
    add("--layers", nargs="+", choices=LAYERS["Qwen3-4B"], default=["gate_up", "down"], metavar="LAYER")
    add("--formats", nargs="+", choices=KERNEL_FORMATS, default=KERNEL_FORMATS, metavar="FORMAT")
    add("--rows", "-m", type=int, nargs="+", default=[1, 16, 64, 4096], metavar="M")
    add("--lams", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help=", ".join(KINDS))
    add("--no-others", action="store_true", help="lerp_linear only: no experts, embedding and norms")
    add("--results", type=Path, default=RESULTS, metavar="DIRECTORY")
    options = parser.parse_args(argv)
    asked = [word for word in argv if word not in ("--results", str(options.results))]
    stopwatch = Stopwatch() if torch.cuda.is_available() else None
    facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": shlex.join(["python", "-m", "benchmarks", "predict", *asked]),
    }
    print("Predicted from counts, not measured.", flush=True)
    code = 0
    for gpu in (gpu for gpu in GPUS if gpu.name in options.gpus):
        wanted = [case for case in cases(options) if case.kernel != CUDA or cuda_kernels(gpu.arch)]
        rows = [found for case in wanted if (found := attempted(case, gpu, stopwatch))]
        code |= len(rows) < len(wanted)
        store([facts | row for row in rows], options.results / "predict.csv")
        show(gpu, rows)
    return code


def attempted(case: Case, gpu: GpuLimits, stopwatch: Stopwatch | None) -> dict[str, object] | None:
    """Returns a row of the results. A kernel that does not compile, or is not as expected, is told, and has none."""
    try:
        return row(case, gpu, stopwatch)
    except Exception as error:
        print(f"FAILED: {gpu.name}: {case}: {described(error)}", flush=True)
        return None


def cases(options: argparse.Namespace) -> Iterator[Case]:
    each = [*itertools.product(options.rows, options.formats, options.lams)]
    for layer in options.layers:
        for rows, format, kind in each:
            yield Case("lerp_linear", layer, *LAYERS["Qwen3-4B"][layer], rows, format, kind)
    if options.no_others:
        return
    for layer, rows in itertools.product(options.layers, options.rows):
        if rows <= MAX_ROWS:
            for format, kind in itertools.product(options.formats, options.lams):
                yield Case(CUDA, layer, *LAYERS["Qwen3-4B"][layer], rows, format, kind)
    vocabulary, columns = HEAD
    for rows, format in itertools.product(options.rows, options.formats):
        yield Case("lerp_experts", f"{EXPERTS} gate_up", *EXPERT_LAYERS["gate_up"], rows, format, "distinct")
        yield Case("lerp_embedding", "", vocabulary, columns, rows, format, "distinct")
    for kernel, rows in itertools.product(("lerp_rms_norm", "lerp_layer_norm"), options.rows):
        yield Case(kernel, "", 1, columns, rows, "pair", "distinct")


def row(case: Case, gpu: GpuLimits, stopwatch: Stopwatch | None) -> dict[str, object]:
    """Returns a row of the results: what was counted, and the microseconds that each limit implies."""
    kernel, work = compiled(case, gpu.arch), work_of(case, gpu.arch)
    code = chosen(kernel, work.path, case) if work.path else kernel.instructions
    counts, cycles = count(code, gpu)
    seconds = times(work, kernel.warps, cycles, gpu)
    limit = max(LIMITS, key=seconds.__getitem__)
    measured = stopwatch(case, gpu) if stopwatch else None
    way, by_library = by_route(case, gpu) if case.kernel == "lerp_linear" else (Route.KERNEL, 0.0)
    micro = {name: f"{1e6 * seconds[name]:.2f}" for name in LIMITS}
    return {
        "gpu": gpu.name,
        "arch": gpu.arch,
        **case.columns(),
        "tile": work.tile,
        "programs": work.programs,
        "warps": kernel.warps,
        "registers": kernel.registers,
        "spills": kernel.spills,
        "shared": kernel.shared,
        "blocks": resident(kernel, gpu),
        "memory_bytes": work.memory,
        "l2_bytes": work.l2,
        "instructions": len(code),
        **{f"{pipe}_instructions": counts[pipe] for pipe in PIPES},
        **{f"{name}_us": micro[name] for name in LIMITS},
        "predicted_us": micro[limit],
        "limit": limit,
        "route": way.value,
        "route_us": "" if way is Route.KERNEL else f"{1e6 * by_library:.2f}",
        "merged_us": f"{1e6 * merged(case, gpu):.2f}" if case.kernel in ("lerp_linear", CUDA) else "",
        "measured_us": "" if measured is None else f"{1e6 * measured:.2f}",
    }


def times(work: Work, warps: int, cycles: dict[str, float], gpu: GpuLimits) -> dict[str, float]:
    """Returns the seconds that each limit implies. Programs are whole: the processor with the most of them counts."""
    most = -(-work.programs // gpu.processors)
    repeated = most * warps * max(work.loops, 1)
    return {
        "memory": work.memory / gpu.memory,
        "l2": work.l2 / (gpu.l2 * gpu.processors * gpu.clock),
        **{pipe: repeated * cycles[pipe] / gpu.clock for pipe in ("issue", *PIPES)},
        "matrix": most * work.operations / (gpu.matrix * gpu.clock),
    }


def count(code: list[str], gpu: GpuLimits) -> tuple[Counter[str], dict[str, float]]:
    """Returns the instructions of each pipe, and the cycles of a processor that one warp's take there."""
    amd = gpu.arch.startswith("gfx")
    pipes = AMD_PIPES if amd else NVIDIA_PIPES
    counts: Counter[str] = Counter()
    cycles: Counter[str] = Counter()
    for instruction in code:
        name = instruction.split()[0]
        pipe, results = next(pipes[names] for names in pipes if name.startswith(tuple(names.split()) or ""))
        counts[pipe] += 1
        if pipe == "shared":
            cycles[pipe] += gpu.lanes * lane_bytes(name) / SHARED
        elif results:
            cycles[pipe] += gpu.lanes / results
    return counts, {"issue": 0 if amd else len(code) / ISSUED, **{pipe: cycles[pipe] for pipe in PIPES}}


def lane_bytes(name: str) -> int:
    """Returns the bytes that an access to shared memory moves for each lane, from its instruction's name.

    The several matrices of LDSM and STSM, and the two of AMD's `read2` and `write2`, count each.
    """
    if name.startswith("ds_"):
        width = next((size for part, size in AMD_WIDTHS.items() if re.search(rf"_{part}(_|$)", name)), 4)
        return width * (2 if re.search(r"(read|write)2", name) else 1)
    parts = name.split(".")
    width = next((WIDTHS[part] for part in parts if part in WIDTHS), 4)
    return width * (int(parts[-1]) if "M88" in parts and parts[-1].isdigit() else 1)


def resident(kernel: Compiled, gpu: GpuLimits) -> int:
    """Returns how many blocks of a kernel fit on a processor, by registers, shared memory and warps."""
    granule = 8  # registers of a thread are given in eights
    registers = -(-kernel.registers // granule) * granule * gpu.lanes * kernel.warps
    reserved = 0 if gpu.arch.startswith("gfx") else 1024  # bytes that CUDA takes for itself of every block
    by_shared = gpu.shared // max(1, kernel.shared + reserved)
    return min(gpu.registers // registers, by_shared, gpu.warps // kernel.warps)


def chosen(kernel: Compiled, path: str, case: Case) -> list[str]:
    """Returns the loop that runs for a path, of a kernel's loops over K.

    They stand in the code in the source's order, or the other way round. The last one in the source multiplies twice.

    Raises:
        ValueError: there are other loops than the source has.
    """
    has_target = formats.matrices(case.format).has_target
    names = ["base", *(["target"] if has_target else []), "blend", "both"]
    loops = kernel.products
    if len(loops) == len(names) - 1:  # few rows are never blended
        names.remove("blend")
    if len(loops) != len(names):
        raise ValueError(f"{kernel.name} for {case}: {len(loops)} loops multiply, expected one for each of {names}")
    if matrix_work(loops[0]) > matrix_work(loops[-1]):
        loops = loops[::-1]
    return loops[names.index(path)]


def matrix_work(loop: list[str]) -> int:
    """Returns the matrix instructions of a loop, those of `wgmma` by their width."""
    widths = (re.match(rf"HGMMA\.64x(\d+)|{MATRIX}", instruction) for instruction in loop)
    return sum(int(width[1] or 1) for width in widths if width)


@cache
def compiled(case: Case, arch: str) -> Compiled:
    """Returns the kernel that would be launched. λ is data: its values do not matter."""
    if case.kind == "zero":
        return compiled(replace(case, kind="identical"), arch)
    lam = torch.empty(case.rows // case.rows_per_lam, device=META)
    x, vectors = (
        torch.empty(case.rows, case.k, dtype=DTYPE, device=META),
        [torch.empty(case.k, dtype=DTYPE, device=META)] * 2,
    )
    if case.kernel == CUDA:
        warps = decode_warps(case.n, case.k, case.format, DEVICES[arch])
        return replace(cuda_kernels(arch)[case.format], warps=warps, shared=warps * shared_bytes(case.format))
    with compiling_for(arch) as launched:
        if case.kernel == "lerp_linear":
            with forced(config_of(case, arch)):
                kernels.lerp_linears(x, tensors(case), [], lam, None, case.rows_per_lam, case.format, False)
        elif case.kernel == "lerp_experts":
            rows = case.rows * EXPERTS_PER_TOKEN
            x, lam = (torch.empty(rows, *part.shape[1:], dtype=part.dtype, device=META) for part in (x, lam))
            offsets = torch.empty(EXPERTS, dtype=torch.int32, device=META)
            kernels.lerp_experts(x, tensors(case), [], lam, None, 1, offsets, case.format, False)
        elif case.kernel == "lerp_embedding":
            ids = torch.empty(case.rows, dtype=torch.int64, device=META)
            kernels.lerp_embedding(ids, tensors(case), lam, None, 1, case.format, DTYPE, case.k)
        elif case.kernel == "lerp_rms_norm":
            kernels.lerp_rms_norm(x, vectors, lam, None, 1, 1e-6, 0.0)
        else:
            kernels.lerp_layer_norm(x, vectors, vectors, lam, None, 1, 1e-6)
    return launched[0]


def tensors(case: Case) -> list[Tensor]:
    """Returns a weight's tensors, without memory."""
    shape = (EXPERTS, case.n, case.k) if case.kernel == "lerp_experts" else (case.n, case.k)
    return [*Copies(shape, DTYPE, META, [case.format], 1).weights[case.format][0].tensors]


def stored_bytes(case: Case) -> tuple[float, float]:
    """Returns the bytes of a number of the base and of the second matrix."""
    both = formats.matrices(case.format)
    return both.base.bytes_per_number(DTYPE), both.second.bytes_per_number(DTYPE)


def work_of(case: Case, arch: str) -> Work:
    if case.kernel == CUDA:
        return decode_work(case, arch)
    if case.is_product:
        return product_work(case, arch)
    config = row_config(case.k)
    tile = f"{config.block_m}x{config.block_d}"
    programs = -(-case.rows // config.block_m)
    if case.kernel == "lerp_embedding":
        base, second = stored_bytes(case)
        read = base if case.kind == "zero" else base + second
        moved = int(case.rows * case.k * (read + DTYPE.itemsize))
        return Work(moved, moved, programs * -(-case.k // config.block_d), tile=tile)
    moved = (2 * case.rows + (4 if case.kernel == "lerp_layer_norm" else 2)) * case.k * DTYPE.itemsize
    return Work(moved, moved, programs, tile=tile)


def product_work(case: Case, arch: str) -> Work:
    """Counts a product's bytes, programs and operations, from its launch parameters."""
    device, (n, k) = DEVICES[arch], (case.n, case.k)
    rows, weights, share = case.rows, 1, case.rows
    if case.kernel == "lerp_experts":  # rows spread evenly
        rows *= EXPERTS_PER_TOKEN
        weights = min(EXPERTS, rows)
        share = -(-rows // weights)
        config = experts_config(rows, EXPERTS, n, k, DTYPE, case.format, device, False)
    else:
        config = config_of(case, arch)
    path = path_of(case.kind, config)
    tiles_m, tiles_n, steps = (
        -(-a // b) for a, b in ((share, config.block_m), (n, config.block_n), (k, config.block_k))
    )
    splits = -(-steps // -(-steps // config.split_k))
    per_tile = min(config.block_m, share)
    rounds = -(-per_tile // config.mixed_m) if path == "both" else 1
    base, second = stored_bytes(case)
    weight = weights * n * k * (base if path == "base" else base + second)
    memory = weight + limits.activation_bytes(rows, n, k, DTYPE)
    parts = 2 * 4 * splits * rows * n if splits > 1 else 0  # float32, written and read
    l2 = weight * tiles_m * rounds + rows * k * DTYPE.itemsize * tiles_n + rows * n * DTYPE.itemsize + parts
    multiplied = rounds * (config.mixed_m * 2 if path == "both" else config.block_m)
    loops = -(-steps // splits) * rounds
    operations = 2 * multiplied * config.block_n * config.block_k * -(-steps // splits)
    return Work(int(memory), int(l2), weights * tiles_m * tiles_n * splits, loops, operations, path, tile_name(config))


def config_of(case: Case, arch: str) -> LinearConfig:
    """Returns the launch parameters of `lerp_linear`, whatever route would be taken."""
    mixes_lams = case.rows_per_lam < MIXED
    return linear_config(case.rows, case.n, case.k, DTYPE, case.format, DEVICES[arch], mixes_lams=mixes_lams)


def by_route(case: Case, gpu: GpuLimits) -> tuple[Route, float]:
    """Returns how `lerp_linear` is computed without a table, and the least seconds of that if it is by the library."""
    together = rows_together(case.rows, case.rows_per_lam, False)
    way = route(case.rows, case.n, case.k, DTYPE, case.format, DEVICES[gpu.arch], together)
    weights, product = case.n * case.k, 2 * case.rows * case.n * case.k / gpu.peak
    stored = sum(stored_bytes(case))
    if way is Route.BLEND:
        return way, product + weights * (stored + DTYPE.itemsize) / gpu.memory
    moved = weights * (stored + unpacked_bytes(case.format)) + LERPED * case.rows * case.n
    return way, 2 * product + moved / gpu.memory


def decode_work(case: Case, arch: str) -> Work:
    """Counts the work of the CUDA C++ kernel: blocks of 16 features, whose warps share the steps along K."""
    warps = decode_warps(case.n, case.k, case.format, DEVICES[arch])
    path, tiles, steps = "base" if case.kind == "zero" else "both", -(-case.n // TILE), -(-case.k // STEP)
    base, second = stored_bytes(case)
    weight = case.n * case.k * (base if path == "base" else base + second)
    moved = limits.activation_bytes(case.rows, case.n, case.k, DTYPE)
    x = case.rows * case.k * DTYPE.itemsize
    operations = 2 * TILE * MAX_ROWS * steps * STEP * (2 if path == "both" else 1)
    l2 = weight + moved + x * (tiles - 1)
    return Work(
        int(weight + moved), int(l2), tiles, -(-steps // warps), operations, path, f"{TILE} features, {warps} warps"
    )


def path_of(kind: str, config: LinearConfig) -> str:
    return "base" if kind == "zero" else "blend" if kind == "identical" and config.use_blend else "both"


def tile_name(config: LinearConfig) -> str:
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    return f"{tile}, {config.split_k} splits, {config.num_stages} stages"


def merged(case: Case, gpu: GpuLimits) -> float:
    """Returns the least seconds of a product with one merged weight."""
    moved = case.n * case.k * DTYPE.itemsize + limits.activation_bytes(case.rows, case.n, case.k, DTYPE)
    return max(moved / gpu.memory, 2 * case.rows * case.n * case.k / gpu.peak)


class Stopwatch:
    """Measures a case on the GPU at hand, if it is the one asked for."""

    def __init__(self) -> None:
        self.here = Gpu()
        self.name = torch.cuda.get_device_name()
        self.copies = SingleEntryCache(self._copies)

    def _copies(self, n: int, k: int, format: str) -> Copies:
        return Copies((n, k), DTYPE, self.here.device, [format], count_of((n, k), self.here.cold_bytes))

    def __call__(self, case: Case, gpu: GpuLimits) -> float | None:
        """Returns the median seconds of `lerp_linear`, whose result was checked, or None for other GPUs and kernels."""
        if case.kernel != "lerp_linear" or gpu.name not in self.name.split():
            return None
        weights = self.copies(case.n, case.k, case.format).weights[case.format]
        x = torch.randn(case.rows, case.k, device=self.here.device).to(DTYPE)
        batch = lams.make(case.kind, case.rows)
        lam, rows_per_lam, _ = batch.to(self.here.device)

        def call(i: int) -> Tensor:
            return lerp_linear(x, weights[i % len(weights)], lam, rows_per_lam=rows_per_lam)

        with torch.inference_mode(), forced(config_of(case, gpu.arch)):  # not what a table has
            check_linear(call(0), x, weights[0], batch.per_row().to(self.here.device))
            stopwatch = self.here.stopwatch(call, len(weights))
            return sorted(stopwatch() for _ in range(9))[4]


def show(gpu: GpuLimits, rows: list[dict[str, object]]) -> None:
    """Prints the rows of one GPU."""
    head = [
        "kernel",
        "layer",
        "M",
        "format",
        "λ",
        "registers",
        "blocks",
        "instructions",
        *(f"{name} µs" for name in LIMITS),
    ]
    lines: list[list[object]] = [[*head, "predicted µs", "limit", "route", "route µs", "one merged µs", "measured µs"]]
    keys = (
        "kernel",
        "layer",
        "m",
        "format",
        "lam",
        "registers",
        "blocks",
        "instructions",
        *(f"{name}_us" for name in LIMITS),
    )
    keys = *keys, "predicted_us", "limit", "route", "route_us", "merged_us", "measured_us"
    lines += [[row[key] for key in keys] for row in rows]
    print(f"\n{gpu.name} ({gpu.arch}), predicted:\n{text_table(lines)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
