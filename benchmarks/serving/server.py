"""A server on the loopback interface for the time of a measurement, and what is said of the measurement."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from benchmarks.machine import commit, processor

ROOT = Path(__file__).resolve().parents[2]
DAMI = "from dami.cli import app; app()"


@dataclass
class Server:
    """A running server, by default `dami serve` with the shipped pair. Metrics are those of `dami serve` alone."""

    url: str
    process: subprocess.Popen[bytes]

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return json.load(response)

    def metrics(self) -> dict[str, float]:
        """Returns metric values by name, with labels as the server prints them."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def memory(self) -> int:
        """Returns the memory in bytes of the process and its children. What is shared with others is divided."""
        total = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it has ended
                session = int(stat.read_text().rpartition(")")[2].split()[3])
                if session == self.process.pid:
                    text = (stat.parent / "smaps_rollup").read_text()
                    total += 1024 * int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)[1])  # type: ignore[index]
        return total

    def wait_until_idle(self, seconds: float = 60) -> float:
        """Waits until the server is idle, and returns the seconds that took.

        Raises:
            TimeoutError: it takes too long.
        """
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            found = self.metrics()
            if not any(
                found[f"dami_{name}"] for name in ("requests_waiting", "requests_running", "kv_cache_usage_ratio")
            ):
                return time.perf_counter() - start
            time.sleep(0.1)
        raise TimeoutError(f"the server is still busy after {seconds} s: {found}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(*arguments: str, threads: int | None = None, seconds: float = 120, well: bool = True) -> Iterator[Server]:
    """Starts `dami serve` with these arguments, waits until it responds, and ends it afterwards with SIGTERM.

    Args:
        arguments: arguments besides --port.
        threads: number of threads of its kernels; the system's default if None.
        seconds: time limit for the start.
        well: whether its exit status must be 0.

    Raises:
        RuntimeError: it does not start, or ends with an error.
        TimeoutError: it takes too long.
    """
    port = free_port()
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-c", DAMI, "serve", "--port", str(port), *arguments]
    with started(command, environment, port, seconds, well) as server:
        yield server


@contextmanager
def started(
    command: Sequence[str], environment: Mapping[str, str], port: int, seconds: float, well: bool = False
) -> Iterator[Server]:
    """Starts a server's command, waits until it responds, and ends it and its children afterwards with SIGTERM.

    Args:
        command: the command line.
        environment: variables besides this process's own.
        port: the port on which the server listens on the loopback interface.
        seconds: time limit for the start.
        well: whether its exit status must be 0.

    Raises:
        RuntimeError: it does not start, or ends with an error.
        TimeoutError: it takes too long.
    """
    # To a file, because a full pipe that nobody reads would block the server.
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=log, stderr=log, start_new_session=True
        )
        server = Server(f"http://127.0.0.1:{port}", process)
        try:
            end = time.perf_counter() + seconds
            while not _answers(server):
                if process.poll() is not None:
                    raise RuntimeError(f"{command[0]} ended with {process.returncode}: {_end_of(log)}")
                if time.perf_counter() > end:
                    raise TimeoutError(f"{command[0]} does not answer after {seconds} s: {_end_of(log)}")
                time.sleep(0.2)
            yield server
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            if process.wait(60) and well:
                raise RuntimeError(f"{command[0]} ended with {process.returncode}: {_end_of(log)}")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(server: Server) -> bool:
    try:
        with urllib.request.urlopen(f"{server.url}/health", timeout=30) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _end_of(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read()[-2000:].decode(errors="replace")


def about(threads: int | None = None) -> dict[str, object]:
    """Returns the columns that say where a row of results was measured."""
    packages = ("torch", "transformers", "locust")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": processor(),
        "threads": threads or os.environ.get("OMP_NUM_THREADS") or os.cpu_count(),
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
    }


def quantile(values: Sequence[float], share: float) -> float:
    """Returns the quantile: the value below which this share of the values lies."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]
