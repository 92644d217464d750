"""The machine at hand: how to time a call on it without caches, what it can do at best, and what to call it.

`Cpu` and `Gpu` offer the same. Their numbers are seconds, bytes a second and operations a second.
"""

from __future__ import annotations

import gc
import itertools
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dami_kernels import native

Call = Callable[[int], Any]  # takes the number of the call, which selects one of its copies


class Cpu:
    device = torch.device("cpu")
    cold_bytes = 256 * 2**20  # of weights in rotation, several times the largest cache
    has_fast_float32 = True

    def __init__(self) -> None:
        if native.WHY_NOT is not None:
            raise SystemExit(native.WHY_NOT)
        self._numbers = itertools.count()
        self._memory = torch.ones(self.cold_bytes // 4)

    def about(self) -> dict[str, object]:
        return {
            "device": processor(),
            "isa": native.isa(),
            "torch_isa": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "triton": "",
            "driver": "",
            "clock_mhz": "",
        }

    def bandwidth(self) -> float:
        return native.read_bandwidth(self._memory)

    def peak(self, dtype: torch.dtype) -> float:
        return native.peak_flops(dtype)

    def stopwatch(self, call: Call, copies: int) -> Callable[[], float]:
        """Returns a stopwatch for one call. Stopwatches share a counter, so that each call uses other copies."""

        def seconds() -> float:
            i = next(self._numbers)
            start = time.perf_counter()
            call(i)
            return time.perf_counter() - start

        return seconds

    def eager(self, call: Call) -> float | None:
        """Returns None: a CPU has no CUDA graphs, so the measured time is the eager one."""
        return None

    def forget(self) -> None:
        """Does nothing, because there is no memory to free between cases."""

    def is_lost(self) -> bool:
        """Whether an error has made the device unusable for this process."""
        return False


class Gpu:
    device = torch.device("cuda")
    cold_bytes = 320 * 2**20  # several times the L2 cache of any current GPU
    has_fast_float32 = False
    replays_at_least = 16  # calls per graph, so that the graph's launch hardly counts
    most_bytes = 33 * 10**9  # of device memory: 40 GB less a context and what compiling processes need

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise SystemExit("this needs a GPU, and torch finds none: torch.cuda.is_available() is false")
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, self.most_bytes / total))
        self._warm()

    def _warm(self) -> None:
        """Works for a second, to bring clocks to their level under load."""
        end = time.monotonic() + 1
        while time.monotonic() < end:
            self.peak(torch.bfloat16)

    def about(self) -> dict[str, object]:
        import triton

        self.peak(torch.bfloat16)
        driver, clock = nvidia_smi("driver_version", "clocks.sm")
        major, minor = torch.cuda.get_device_capability()
        return {
            "device": torch.cuda.get_device_name(),
            "isa": f"sm_{major}{minor}"
            if torch.version.hip is None
            else torch.cuda.get_device_properties().gcnArchName,
            "torch_isa": f"CUDA {torch.version.cuda}" if torch.version.hip is None else f"ROCm {torch.version.hip}",
            "threads": "",
            "triton": triton.__version__,
            "driver": driver,
            "clock_mhz": clock,
        }

    def bandwidth(self) -> float:
        """Measures the bandwidth of copying 1 GiB, counting reads and writes."""
        source = torch.ones(2**30 // 4, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self._best(lambda: target.copy_(source))

    def peak(self, dtype: torch.dtype) -> float:
        """Measures the library's product of two random matrices of 8192 (float32: 4096) rows and columns."""
        n = 8192 if dtype.itemsize == 2 else 4096
        a, b = (torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2))
        return 2 * n**3 / self._best(lambda: a @ b)

    def _best(self, work: Callable[[], object]) -> float:
        def once() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return min(once() for _ in range(10))

    def stopwatch(self, call: Call, copies: int) -> Callable[[], float]:
        """Times replays of a CUDA graph of several calls, each on the next copy, and returns the mean per call."""
        calls = max(copies, self.replays_at_least)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(0)  # compiles, and initialises libraries
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                call(i)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def seconds() -> float:
            torch.cuda._sleep(200_000)  # keeps the device busy for 100 µs while the host launches the timed work
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / calls

        return seconds

    def eager(self, call: Call) -> float | None:
        """Measures the seconds of back-to-back calls from Python: the longer of the host's and the device's time."""

        def once() -> float:
            torch.cuda.synchronize()
            start = time.perf_counter()
            for i in range(50):
                call(i)
            torch.cuda.synchronize()
            return (time.perf_counter() - start) / 50

        return sorted(once() for _ in range(3))[1]

    def forget(self) -> None:
        """Frees the memory of the last graphs."""
        gc.collect()
        torch.cuda.empty_cache()

    def is_lost(self) -> bool:
        """Whether an error has made the device unusable for this process.

        Most CUDA errors do. A capture that failed leaves torch's random generator in capture mode."""
        try:
            torch.randn(1, device=self.device).item()
        except RuntimeError:
            return True
        return False


Machine = Cpu | Gpu


def machine() -> Machine:
    """Returns the GPU if there is one, else the CPU."""
    return Gpu() if torch.cuda.is_available() else Cpu()


def about(here: Machine) -> dict[str, object]:
    """Returns the columns that say where a row of results was measured."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        **here.about(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@cache
def commit() -> str:
    """Returns the measured commit, with a + if kernels have changed since. Without git, uses the variable COMMIT."""

    def git(*what: str) -> str:
        return subprocess.check_output(["git", *what], cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL)

    try:
        changed = git("status", "--porcelain", "--", "../csrc", "../dami_kernels").strip()
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "unknown")


def processor() -> str:
    """Returns the processor's name, with family and model on Linux, because virtual machines shorten the name."""
    cpuinfo = Path("/proc/cpuinfo")
    first = cpuinfo.read_text().partition("\n\n")[0] if cpuinfo.exists() else ""
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name}, family {facts['cpu family']}, model {facts['model']}" if "cpu family" in facts else name


def nvidia_smi(*what: str) -> list[str]:
    """Returns properties of the first GPU, or nothing if the tool is missing."""
    command = ["nvidia-smi", f"--query-gpu={','.join(what)}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.check_output(command, text=True, timeout=20, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return [""] * len(what)
    return [cell.strip() for cell in told.splitlines()[0].split(",")]
