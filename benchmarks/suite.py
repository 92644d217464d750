"""Runs the parts that suit this machine, most important first, each in a process of its own, within a time.

Numbers come first: a smoke check, the layers and the step that matter most, then the rest, and on a GPU its tests last.
Meanwhile other processes compile the kernels that later parts need. A part that crashes or hangs is started again and
passes over what it was at. A signal ends the run; every row measured by then is in its file, and a summary tells what
there is.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.ahead import PROCESSES, compiling, share
from benchmarks.journal import FATAL, blame
from benchmarks.record import RESULTS, load

ROOT = Path(__file__).resolve().parents[1]
STARTING = 15  # seconds that a part may exceed its budget by, for loading and its last case
LOADING = 60  # seconds until the first sign of life of a part on a GPU
STALLED = 45  # seconds without another, after which it counts as hanging; kernels compile in under a third of that
MIN_SECONDS = 5  # fewest seconds worth starting a part for
BUILDING = 60  # seconds from the start that the first measurements wait for the CUDA C++ kernels
TEST_SECONDS = 110  # reserved for the tests
CUDA_HOME = "/usr/local/cuda"  # where CUDA's own packages put nvcc, which need not be in PATH
BAD = ("REFUSED", "FAILED", "CRASHED", "ERROR")  # beginnings of lines that report a fault


@dataclass(frozen=True)
class Part:
    """A part of the benchmarks, its arguments, and the most seconds it may take."""

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
FOUR_B = "--models Qwen3-4B --layers"
SMOKE = Part("linear", f"{FOUR_B} gate_up --rows 1 --lams distinct --seconds 0.1", 30)
GPU = [
    Part("linear", f"{FOUR_B} gate_up --rows 1 16 64 --lams distinct", 30),
    Part("step", "--rows 1 --seconds 2", 40),
    Part("linear", f"{FOUR_B} gate_up --rows 4096 --lams uniform ragged", 25),
    Part("linear", "--models tiny Qwen3-4B --layers 64 qkv o down --rows 1 16 64 --lams distinct", 35),
    Part("linear", f"{FOUR_B} qkv o gate_up down --rows 2 4 8 --lams distinct", 30),
    Part("step", "--rows 16 64 --seconds 2", 40),
    Part("linear", f"{FOUR_B} o gate_up down --rows 4096 2048 16384 --lams uniform distinct ragged", 50),
    Part("linear", f"{FOUR_B} gate_up --rows 1 16 64 4096 --lams zero identical ends zipf", 30),
    Part("operators", "--operators experts --rows 1 16 64 4096", 30),
    Part("operators", f"{ROW_BY_ROW} --rows 1 64 4096", 20),
    Part("linear", f"{FOUR_B} gate_up --rows 32 128 256 512 1024 8192 --lams uniform distinct", 30),
    Part("linear", "--models Qwen3-8B Llama-3.1-8B Qwen3-30B-A3B --rows 1 16 64 4096 --lams uniform", 60),
    Part("linear", f"{FOUR_B} lm_head --rows 1 16 64 --lams distinct", 20),
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks suite", description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="refuse to run without a GPU")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIRECTORY")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="default: 225 on a CPU, 465 on a GPU")
    parser.add_argument("--compile", type=share, metavar="I/N", help=argparse.SUPPRESS)  # see `compile_ahead`
    options = parser.parse_args(argv)
    if options.compile:
        return compile_ahead(options.compile)
    import torch

    on_gpu = torch.cuda.is_available()
    if options.gpu and not on_gpu:
        raise SystemExit("this needs a GPU, and torch finds none: torch.cuda.is_available() is false")
    results = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        logs = results if on_gpu else Path(scratch)
        run = Run(results, logs / "suite.txt", Path(scratch), options.budget or (465 if on_gpu else 225), on_gpu)
        with run.ending():
            if on_gpu:
                run_on_gpu(run, logs / "compile.txt")
            else:
                run.parts(CPU, run.end)
    return run.code


def run_on_gpu(run: Run, compile_log: Path) -> None:
    """Builds the CUDA C++ kernels and meanwhile runs the smoke check, then runs the parts and the tests."""
    building = run.build_cuda(compile_log)
    command = [sys.executable, "-m", "benchmarks", "suite", "--compile"]
    compiling = [run.start([*command, f"{i}/{PROCESSES}"], compile_log) for i in range(PROCESSES)]
    run.say("\n== smoke check")
    if not run.part(SMOKE, SMOKE.seconds):
        without_early_launches(run)
    if building is not None:
        run.wait(building, run.began + BUILDING)
        run.say(f"\nthe kernels in CUDA C++: {built(building)}; {compile_log}")
    run.parts(GPU, run.end - TEST_SECONDS)
    for process in compiling:  # whose contexts take memory of the device, too, besides the tests' share
        stop(process)
    run.tests()


def without_early_launches(run: Run) -> None:
    """Checks again without programmatic dependent launch, and does all parts so if that passes."""
    run.say("\n== smoke check, without programmatic dependent launch")
    fatal, run.fatal = run.fatal, []
    os.environ["DAMI_PDL"] = "0"
    if not run.part(SMOKE, SMOKE.seconds):
        del os.environ["DAMI_PDL"]
        run.fatal = fatal


def built(building: subprocess.Popen[bytes]) -> str:
    """Describes the result of building dami_kernels._cuda."""
    if building.returncode is None:
        return "still being built, so the first parts are without"
    there = any((ROOT / "dami_kernels").glob("_cuda.*"))
    return "built" if there and building.returncode == 0 else "FAILED to be built, so all parts are without"


def compile_ahead(share: tuple[int, int]) -> int:
    """Compiles a share of the Triton kernels of all parts, in their order."""
    os.nice(10)
    with compiling(share):
        for part in GPU:
            importlib.import_module(f"benchmarks.{part.name}").main([*part.arguments.split(), "--compile-only"])
    return 0


class Cut(BaseException):
    """A signal has asked the run to end."""


class Run:
    """One run of the suite: its processes, its log, which is printed as it grows, and its outcome.

    Args:
        results: directory of the CSV files.
        log: file for all output.
        scratch: directory for temporary files.
        seconds: time limit for everything.
        on_gpu: whether to end processes that give no sign of life. A slow CPU may work silently for long.
    """

    def __init__(self, results: Path, log: Path, scratch: Path, seconds: float, on_gpu: bool) -> None:
        self.results, self.log, self.scratch, self.on_gpu = results, log, scratch, on_gpu
        self.began = time.monotonic()
        self.end = self.began + seconds
        self.code = 0
        self.fatal: list[str] = []  # journal lines of what ended a process
        self.processes: list[subprocess.Popen[bytes]] = []
        self.rows_before = {path.name: len(load(path)) for path in results.glob("*.csv")}
        log.touch()
        self.log_before = self.shown = log.stat().st_size

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Ensures that, however the run ends, no process is left and the summary is printed."""

        def cut(number: int, frame: FrameType | None) -> None:
            for other in before:
                signal.signal(other, signal.SIG_IGN)  # a second signal would cut the summary off
            raise Cut(signal.Signals(number).name)

        before = {number: signal.signal(number, cut) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        except Cut as why:
            self.say(f"\nCUT OFF by {why}")
            self.code = 1
        finally:
            for process in self.processes:
                stop(process)
            self.say(summary(self))
            for number, handler in before.items():
                signal.signal(number, handler)

    def say(self, text: str) -> None:
        with self.log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        self.show()

    def show(self) -> None:
        """Prints new whole lines of the log."""
        with self.log.open("rb") as file:
            file.seek(self.shown)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        self.shown += len(new)
        with suppress(OSError, UnicodeError):  # the reader is gone, or its encoding lacks λ
            sys.stdout.write(new.decode(errors="replace"))
            sys.stdout.flush()

    def start(self, command: Sequence[str], log: Path | None = None) -> subprocess.Popen[bytes]:
        """Starts a process that logs its output, in its own group, so that signals to our group do not reach it."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        with (log or self.log).open("ab") as out:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp
            )
        self.processes.append(process)
        return process

    def wait(self, process: subprocess.Popen[bytes], end: float, life: Path | None = None) -> str | None:
        """Waits for a process until the time `end`, or until `life` stops growing. Returns why it gave up, if so."""
        alive = time.monotonic()
        first = size = life.stat().st_size if life else 0
        while process.poll() is None:
            now, grown = time.monotonic(), life.stat().st_size if life else 0
            if grown != size:
                alive, size = now, grown
            if now >= end:
                return "it took too long"
            if life and now - alive > (limit := STALLED if size > first else LOADING):
                return f"no sign of life for {limit} s"
            self.show()
            time.sleep(0.05)
        self.show()
        return None

    def parts(self, parts: list[Part], end: float) -> None:
        """Runs one part after another until the time `end`."""
        for part in parts:
            left = end - time.monotonic() - STARTING
            if left < MIN_SECONDS:
                self.say(f"\nleft out, no time: {part}")
                continue
            self.say(f"\n== {part}")
            self.part(part, min(part.seconds, left))

    def part(self, part: Part, seconds: float) -> bool:
        """Runs one part, and tells whether all of it went well.

        If its process dies, runs it again without the cause while there is time.
        """
        journal = self.scratch / "journal"
        journal.write_bytes(b"")
        is_first = True
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) >= min(MIN_SECONDS, seconds):
            with journal.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in self.fatal)
            process = self.start(part.command("--budget", int(left), "--results", self.results, "--journal", journal))
            why = self.wait(process, end + STARTING, journal if self.on_gpu else None)
            if why is None and process.returncode in (0, 1):
                self.code |= process.returncode
                return is_first and process.returncode == 0
            stop(process, signal.SIGKILL)
            self.code, culprit = 1, blame(journal)
            at = culprit.removeprefix(FATAL) if culprit else "nothing known"
            self.say(f"CRASHED: {part}: {why or ended(process.returncode)}; it was at: {at}")
            if culprit is None:
                return False
            self.fatal.append(culprit)
            is_first = False
        return False

    def build_cuda(self, log: Path) -> subprocess.Popen[bytes] | None:
        """Builds dami_kernels._cuda in place if there is nvcc, and in any case _C, which makes launches cheap."""
        command = [sys.executable, "setup.py", "build_ext", "--inplace", "--parallel", "2"]
        homes = (os.environ.get("CUDA_HOME"), CUDA_HOME)  # setup.py looks in the first and in PATH
        home = next((home for home in homes if home and shutil.which("nvcc", path=f"{home}/bin")), None)
        if home is None and shutil.which("nvcc") is None:
            self.say("\nthe kernels in CUDA C++: left out, there is no nvcc")
            if importlib.util.find_spec("dami_kernels._C") is None:
                self.start(command, log)
            return None
        return self.start(["env", f"CUDA_HOME={home}", *command] if home else command, log)

    def tests(self) -> None:
        """Runs the tests that need a GPU, as many as there is time for."""
        left = self.end - time.monotonic()
        if left < MIN_SECONDS:
            self.say("\nleft out, no time: the tests")
            return
        self.say("\n== tests")
        # Files that need a missing module must not stop the others.
        options = "-m gpu -rfE --tb=short -p no:cacheprovider --continue-on-collection-errors"
        if importlib.util.find_spec("xdist"):
            options += " -n 4"
        process = self.start([sys.executable, "-m", "pytest", *options.split(), *gpu_tests()])
        why = self.wait(process, self.end)
        stop(process, signal.SIGINT)  # pytest then reports the failures so far
        self.show()
        if why or process.returncode:
            self.code = 1
            self.say(f"FAILED: the tests: {why or ended(process.returncode)}")


def stop(process: subprocess.Popen[bytes], how: signal.Signals = signal.SIGTERM) -> None:
    """Ends a process and its children, if it still runs."""
    for number, seconds in ((how, 5), (signal.SIGKILL, 5)):
        if process.poll() is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):  # stuck in the driver, where no signal helps
            process.wait(seconds)


def ended(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def gpu_tests() -> list[str]:
    """Returns the files with tests for a GPU. Others may need modules that this machine lacks."""
    files = sorted((ROOT / "tests" / "dami_kernels").glob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]


def summary(run: Run) -> str:
    """Summarises the run's measurements, relative to one merged weight, and its faults."""
    lines = ["\n== summary"]
    for path in sorted(run.results.glob("*.csv")):
        rows = load(path)[run.rows_before.get(path.name, 0) :]
        if rows:
            lines += [f"{path}: {len(rows)} rows", *ratios(rows)]
    with run.log.open("rb") as file:
        file.seek(run.log_before)
        told = file.read().decode(errors="replace").splitlines()
    lines += dict.fromkeys(line for line in told if line.startswith(BAD))
    return "\n".join(lines)


def kernel_of(method: str) -> str:
    """Returns the kernel that a method's name tells after a comma, in brackets."""
    kernel = method.partition(", ")[2]
    return f" ({kernel})" if kernel else ""


def ratios(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Returns a line per case: the time of one merged weight, and our times relative to it."""
    names = ("model", "operator", "layer", "layers", "shape", "m", "lam")
    cases: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["date"], *(row[name] for name in names if name in row)), []).append(row)
    for (_, *case), methods in cases.items():
        plain = [row for row in methods if "one merged" in row["method"]]
        unit = float(plain[0]["median_ms"]) if plain else float("nan")
        ours = (
            f"{row['format']}{kernel_of(row['method'])} {float(row['median_ms']) / unit:.2f}"
            for row in methods
            if row["format"]
        )
        yield f"  {' '.join(case)}: one merged {unit:.4f} ms; {', '.join(ours)}"
