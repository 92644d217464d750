"""Runs the parts that suit this machine, most important first, each in a process of its own, within a time.

On a GPU its tests come first, and what fails in them is not timed. Meanwhile every part compiles its kernels and checks
their results, so that the timing finds them compiled.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.record import RESULTS

ROOT = Path(__file__).resolve().parents[1]
STARTING = 15  # seconds that a part may take beyond its budget: loading, and its last case
TEST_SECONDS = 140


@dataclass(frozen=True)
class Part:
    """A part of the benchmarks, what to ask it, and the seconds it may take at most."""

    name: str
    arguments: str
    seconds: int

    def command(self, *more: object) -> list[str]:
        return [sys.executable, "-m", "benchmarks", self.name, *self.arguments.split(), *map(str, more)]

    def __str__(self) -> str:
        return f"{self.name} {self.arguments}"


ROW_BY_ROW = "--operators embedding rms_norm layer_norm"
CPU = [
    Part("linear", "--rows 1 4 16 64 256", 80),
    Part("linear", "--models Qwen3-4B --layers qkv o gate_up down --rows 1 16 --lams distinct", 55),
    Part("step", "--rows 1 16", 50),
    Part("operators", "--operators experts --rows 1 16", 25),
    Part("operators", f"{ROW_BY_ROW} --rows 16 4096 --seconds 0.5", 25),
]
DECODE, PREFILL = "--rows 1 4 16 64", "--rows 2048 4096 16384"
GPU = [
    Part("linear", f"--models Qwen3-4B --layers qkv o gate_up down {DECODE} --lams distinct zero", 75),
    Part("linear", f"--models Qwen3-4B --layers o gate_up down {PREFILL} --lams uniform distinct", 60),
    Part("step", "--rows 1 16 64 --seconds 3", 60),
    Part(
        "linear", "--models Qwen3-4B --layers gate_up --rows 2 8 32 128 256 512 1024 8192 --lams uniform distinct", 45
    ),
    Part("linear", "--models tiny --rows 1 --lams distinct", 10),
    Part("operators", "--operators experts --rows 1 16 64 4096", 30),
    Part("operators", f"{ROW_BY_ROW} --rows 1 64 4096", 25),
    Part("linear", "--models Qwen3-4B --layers gate_up --rows 16 64 4096 --lams identical zipf ends", 30),
    Part("linear", "--models Qwen3-8B Llama-3.1-8B Qwen3-30B-A3B --rows 1 16 64 4096 --lams uniform", 90),
    Part("linear", "--models Qwen3-4B --layers lm_head --rows 1 16 64 --lams distinct", 20),
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks suite", description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="refuse to run without a GPU")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIRECTORY")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="default: 225 on a CPU, 465 on a GPU")
    options = parser.parse_args(argv)
    import torch

    on_gpu = torch.cuda.is_available()
    if options.gpu and not on_gpu:
        raise SystemExit("this needs a GPU, and torch finds none: torch.cuda.is_available() is false")
    results = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + (options.budget or (465 if on_gpu else 225))
    failed = prepare_gpu(results) if on_gpu else []
    code = run(without(GPU if on_gpu else CPU, failed), end, results)
    print(f"\nresults: {', '.join(str(path) for path in sorted(results.glob('*.csv')))}")
    return int(bool(failed) or code)


def run(
    parts: list[Part],
    end: float,
    results: Path,
    call: Callable[..., int] = subprocess.call,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Runs parts one after the other until the time `end`; returns 1 if one of them failed or refused something."""
    code = 0
    for part in parts:
        left = end - clock() - STARTING
        if left < 5:
            print(f"\nleft out, no time: {part}")
            continue
        budget = min(part.seconds, left)
        print(f"\n== {part}", flush=True)
        try:
            command = part.command("--budget", int(budget), "--results", results)
            code |= bool(call(command, cwd=ROOT, timeout=budget + STARTING))
        except subprocess.TimeoutExpired:
            print(f"\nstopped: {part} took longer than {budget + STARTING:.0f} s")
            code = 1
    return code


def prepare_gpu(results: Path) -> list[str]:
    """Runs the tests and, beside them, compiles what the parts need; returns the names of the tests that failed."""
    end = time.monotonic() + TEST_SECONDS
    log = results / "gpu-tests.txt"
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-rfE", "--tb=short", "-p", "no:cacheprovider", *gpu_tests()]
    if importlib.util.find_spec("xdist"):
        tests += ["-n", "4"]
    print(f"== tests, while the kernels are compiled: {log}", flush=True)
    with log.open("w") as out, (results / "gpu-compile.txt").open("w") as compiled:
        running = [subprocess.Popen(tests, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)]
        running += [
            subprocess.Popen(part.command("--check-only"), cwd=ROOT, stdout=compiled, stderr=subprocess.STDOUT)
            for part in GPU
        ]
        for process in running:
            finish(process, end)
    text = log.read_text()
    print("\n".join(text.splitlines()[-15:]), flush=True)
    failed = failures(text)
    if not failed and running[0].returncode not in (0, 2):  # 2: interrupted
        raise SystemExit(f"the tests did not run, so nothing is timed: {log}")
    return failed


def gpu_tests() -> list[str]:
    """The files with tests for a GPU; others may need what this machine lacks."""
    files = sorted((ROOT / "tests" / "dami_kernels").glob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]


def finish(process: subprocess.Popen[bytes], end: float) -> None:
    """Waits until the time `end`, then stops the process and says so."""
    try:
        process.wait(max(1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        print(f"stopped after {TEST_SECONDS} s: {process.args}")
        process.send_signal(signal.SIGINT)  # pytest then tells what has failed so far
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def failures(log: str) -> list[str]:
    """Names of the tests that failed, of pytest's short summary."""
    return re.findall(r"^(?:FAILED|ERROR) (\S+)", log, re.MULTILINE)


def without(parts: list[Part], failed: list[str]) -> list[Part]:
    """The parts, less what a failed test names: a format, else an operator. `step` needs several operators.

    A test that names neither takes nothing away: every result is checked again where it is timed.
    """
    if not failed:
        return parts
    from benchmarks.operators import PREPARE
    from benchmarks.weights import FORMATS

    formats = {format for test in failed for format in FORMATS if format in test.lower()}
    others = [test for test in failed if not any(format in test.lower() for format in FORMATS)]
    operators = {name for test in others for name in ("linear", *PREPARE) if name in test.lower()}
    kept = []
    for part in parts:
        if part.name == "linear" and "linear" in operators:
            continue
        if part.name == "step" and operators & {"linear", "embedding", "rms_norm"}:
            continue
        arguments = " ".join(word for word in part.arguments.split() if word not in operators)
        if "--operators --" in arguments:
            continue  # none is left
        if formats:
            arguments += f" --formats {' '.join(format for format in FORMATS if format not in formats)}"
        kept.append(replace(part, arguments=arguments))
    for name in sorted({*formats, *operators}):
        print(f"REFUSED, for its tests fail: {name}")
    return kept
