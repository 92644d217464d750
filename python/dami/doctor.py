"""Reports what is installed, which kernels run here, whether they are correct, and how to fix any problems.

`dami doctor` prints the report, to be pasted into bug reports. It contains no names of users, hosts or directories, and
only those environment variables that dami, OpenMP and Triton read.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor

import dami_kernels
from dami.tables import FittedTable
from dami.version import __version__
from dami_kernels import LerpWeight, cuda, formats, native
from dami_kernels.ops import library
from dami_kernels.tuning.device import device_of
from dami_kernels.tuning.tables import table_path

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "huggingface-hub", "triton", "peft", "numpy")
VARIABLES = ("DAMI_CPU_ISA", "OMP_NUM_THREADS", "TRITON_INTERPRET")
ROWS, FEATURES = 4, 512  # for the self-test: four sequences decoding
TOLERANCE = 0.01  # relative error of a kernel in bfloat16, where rounding alone gives 0.004


@dataclass(frozen=True)
class Check:
    """The test of one operator on one device, in bfloat16.

    Attributes:
        device: "cpu" or "cuda".
        operator, format: the operator that was called, and the format of its weights.
        kernel: the name of the kernel that runs it, or "plain torch".
        why: why no kernel runs it; None if one does.
        error: root mean square of the difference from plain torch, relative to its result; None without a kernel.
        microseconds: median time of a call; None without a kernel.
        plain_microseconds: median time of a call in plain torch.
    """

    device: str
    operator: str
    format: str
    kernel: str
    why: str | None
    error: float | None
    microseconds: float | None
    plain_microseconds: float


@dataclass(frozen=True)
class Problem:
    """A problem and its remedy."""

    what: str
    remedy: str


@dataclass(frozen=True)
class Report:
    """Everything that `dami doctor` reports."""

    installed: dict[str, str]
    machine: dict[str, str]
    checks: tuple[Check, ...]
    problems: tuple[Problem, ...]

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=1 << 12, color_system=None, highlight=False).print(self)  # so wide that no line wraps
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        facts = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        for name, value in {**self.installed, **self.machine}.items():
            facts.add_row(name, Text(value))
        yield facts
        yield Text(f"\nbfloat16, {ROWS} rows, each at its own λ, {FEATURES}×{FEATURES} weights:")
        heads = ("device", "operator", "format", "runs as", "error", "µs", "plain torch, µs")
        yield FittedTable(heads, [*map(_cells, self.checks)], left=4)
        yield Text("\nproblems: none" if not self.problems else "\nproblems:")
        for problem in self.problems:
            yield Text(f"- {problem.what}\n  → {problem.remedy}")


def _cells(check: Check) -> tuple[str, ...]:
    error = "–" if check.error is None else f"{check.error:.1e}"
    took = "–" if check.microseconds is None else f"{check.microseconds:.0f}"
    named = (check.device, check.operator, check.format, check.kernel)
    return (*named, error, took, f"{check.plain_microseconds:.0f}")


def examine() -> Report:
    """Examines this installation and this machine, and runs every operator; takes a few seconds."""
    checks = tuple(check for device in devices() for check in self_test(device))
    found = [*version_problems(), *machine_problems(), *kernel_problems(checks)]
    problems = tuple(Problem(nameless(each.what), nameless(each.remedy)) for each in found)
    return Report(installed(), machine(), checks, problems)


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def installed() -> dict[str, str]:
    """Returns versions by package."""
    packages = {package: _version(package) or "not installed" for package in PACKAGES}
    return {"dami": __version__, "python": platform.python_version(), **packages}


def machine() -> dict[str, str]:
    """Returns facts about the machine and how it is used."""
    isa = "not compiled"
    if native.WHY_NOT is None:
        others = [name for name in native.supported_isas() if name != native.isa()]
        isa = native.isa() + (f"; {' and '.join(others)} would run too" if others else "")
    facts = {
        "system": f"{platform.system()} {platform.machine()}",
        "CPU": f"{_cpu()}, {_count(_cores(), 'core')}, {_count(torch.get_num_threads(), 'thread')}",
        "CPU kernels": isa,
        "GPU": "none",
        "CUDA kernels": "compiled" if cuda.WHY_NOT is None else "not compiled",
    }
    if torch.cuda.is_available():
        names = []
        for index in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(index).total_memory
            names.append(f"{device_of(torch.device('cuda', index)).name} ({memory / 1e9:.0f} GB)")
        runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        facts["GPU"] = f"{', '.join(names)}, {runtime}"
    return facts | {name: os.environ[name] for name in VARIABLES if name in os.environ}


def self_test(device: str) -> Iterator[Check]:
    """Runs every operator in every format as a kernel and in plain torch, and compares the results."""
    for operator, format, arguments in _calls(torch.device(device)):
        plain = library.PLAIN[operator]
        wanted, plain_took = _timed(plain, arguments, device)
        kernel, error, took = library.kernel_of(operator, device), None, None
        if not isinstance(kernel, str):
            try:
                got, took = _timed(kernel, arguments, device)
            except NotImplementedError as missing:
                kernel = str(missing)
            else:
                difference = (got.float() - wanted.float()).square().mean() / wanted.float().square().mean()
                error = difference.sqrt().item()
        why = nameless(kernel) if isinstance(kernel, str) else None
        runs_as = "plain torch" if why else _name(operator, format, arguments, device)
        yield Check(device, operator, format, runs_as, why, error, took, plain_took)


def _name(operator: str, format: str, arguments: tuple[Any, ...], device: str) -> str:
    if device == "cpu":
        return f"C++ {native.isa()}"
    if operator == "lerp_linear":
        x, weight, *_ = arguments
        if cuda.takes(x, weight, format, False, device_of(x.device)):
            return "CUDA C++"
    return "Triton"


def _calls(device: torch.device) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Yields every operator and format, with arguments for the operator's schema."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(device, torch.bfloat16)

    def pack(*shape: int, format: str) -> list[Tensor]:
        base = random(*shape)
        return list(LerpWeight.pack(base, base + 0.1 * random(*shape), format).tensors)

    x, lam = random(ROWS, FEATURES), torch.linspace(0, 1, ROWS, dtype=torch.float32, device=device)
    ids = torch.arange(ROWS, device=device)
    ends = torch.tensor([1, ROWS], dtype=torch.int32, device=device)
    for format in formats.names():
        if hasattr(formats.get(format), "linear"):  # this format needs no kernel
            continue
        weight, experts = pack(FEATURES, FEATURES, format=format), pack(2, FEATURES, FEATURES, format=format)
        rows = (lam, None, 1)
        yield "lerp_linear", format, (x, weight, [], *rows, format, False)
        yield "lerp_linears", format, (x, weight * 3, [], *rows, format, False)
        yield "lerp_experts", format, (x, experts, [], *rows, ends, format, False)
        yield "lerp_embedding", format, (ids, weight, *rows, format, x.dtype, FEATURES)
    vectors = pack(FEATURES, format="pair")
    yield "lerp_rms_norm", "pair", (x, vectors, lam, None, 1, 1e-6, 0.0)
    yield "lerp_layer_norm", "pair", (x, vectors, vectors, lam, None, 1, 1e-6)


def _timed(function: Callable[..., Tensor], arguments: tuple[Any, ...], device: str) -> tuple[Tensor, float]:
    """Returns the result of a call and its median time in microseconds, after one warm-up call."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    result, times = function(*arguments), []
    for _ in range(15):
        wait()
        start = time.perf_counter()
        function(*arguments)
        wait()
        times.append(time.perf_counter() - start)
    return result, 1e6 * statistics.median(times)


def version_problems() -> Iterator[Problem]:
    """Yields packages whose installed version does not fit, or that are missing."""
    try:
        wanted = [Requirement(line) for line in requires("dami-kernels") or ()]
    except PackageNotFoundError:
        return
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            yield Problem(
                f"{requirement.name}{requirement.specifier} is needed, and {found or 'none'} is installed",
                f'pip install "{requirement.name}{requirement.specifier}"',
            )


def machine_problems() -> Iterator[Problem]:
    """Yields what makes this machine slower than it could be."""
    if native.WHY_NOT is None and native.isa() != native.supported_isas()[-1]:
        best = native.supported_isas()[-1]
        yield Problem(f"the CPU kernels are held to {native.isa()}, and this CPU has {best}", "unset DAMI_CPU_ISA")
    if torch.get_num_threads() > _cores():
        yield Problem(
            f"torch runs {_count(torch.get_num_threads(), 'thread')} on {_count(_cores(), 'core')}",
            f"export OMP_NUM_THREADS={_cores()}",
        )
    if not torch.cuda.is_available() and (shutil.which("nvidia-smi") or shutil.which("rocm-smi")):
        built = torch.version.cuda or torch.version.hip
        yield Problem(
            "there is a GPU's driver, and torch sees no GPU",
            "check the driver and CUDA_VISIBLE_DEVICES" if built else "install a torch built for it: pytorch.org",
        )
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name = device_of(torch.device("cuda", index)).name
        if not table_path(name).exists():
            yield Problem(
                f"no launch parameters were measured on {name}: the kernels use a heuristic", "dami bench --tune"
            )


def kernel_problems(checks: tuple[Check, ...]) -> Iterator[Problem]:
    """Yields operators without a kernel, grouped by reason, and kernels with wrong results."""
    reasons: dict[str, list[str]] = {}
    for check in checks:
        if check.why is not None:
            reasons.setdefault(check.why, []).append(f"{check.operator} ({check.format})")
        elif check.error is None or not check.error <= TOLERANCE:
            what = f"{check.operator} ({check.format}) on {check.device} differs from plain torch by {check.error}"
            yield Problem(what, "do not rely on it, and report it with this text")
    for why, operators in reasons.items():
        what, _, remedy = why.partition(": ")
        yield Problem(f"{', '.join(operators)} run as plain torch, many times slower: {what}", remedy or "report it")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def nameless(text: str) -> str:
    """Removes this machine's directories from a message."""
    folders = {str(Path(dami_kernels.__file__).parent): "dami_kernels", str(Path.home()): "~"}
    for folder, name in folders.items():
        if len(folder) > 1:
            text = text.replace(folder, name)
    return text


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
