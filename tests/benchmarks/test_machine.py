"""The machine's part of timing. Without a GPU, stand-ins for torch.cuda show what would be asked of it."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import machine
from dami_kernels import native

FRACTIONS: list[float] = []


class Graph:
    """Replays what was called while it was captured."""

    captured: list[int] = []  # noqa: RUF012
    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


class Event:
    """Time goes on by 8 ms from event to event."""

    ticks = itertools.count(step=8)

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = next(Event.ticks)

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> machine.Gpu:
    @contextmanager
    def graph(captured: Graph) -> Iterator[None]:
        Graph.captured = []
        yield

    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
        "Stream": Stream,
        "stream": lambda stream: nullcontext(),
        "current_stream": Stream,
        "_sleep": lambda cycles: None,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "get_device_name": lambda: "a GPU",
        "get_device_capability": lambda: (9, 0),
        "get_device_properties": lambda device: SimpleNamespace(total_memory=66 * 10**9),
        "set_per_process_memory_fraction": FRACTIONS.append,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(machine.Gpu, "device", torch.device("cpu"))
    monkeypatch.setattr(machine.Gpu, "_warm", lambda self: None)
    return machine.Gpu()


def test_a_graph_holds_a_call_on_every_copy(gpu: machine.Gpu) -> None:
    def call(i: int) -> None:
        Graph.captured.append(i)

    for copies, calls in ((20, 20), (3, 16)):
        seconds = gpu.stopwatch(call, copies)
        assert Graph.captured == list(range(calls))
        assert seconds() == seconds() == pytest.approx(8e-3 / calls)
    assert gpu.eager(call) > 0  # type: ignore[operator]
    gpu.forget()


def test_bandwidth_and_peak_count_bytes_and_operations(gpu: machine.Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "ones", lambda n, device: torch.empty(1).expand(n))
    monkeypatch.setattr(torch, "empty_like", lambda source: torch.empty(1))
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: torch.empty(1))
    monkeypatch.setattr(machine.Gpu, "_best", lambda self, work: 1.0)
    assert gpu.bandwidth() == 2 * 2**30
    assert gpu.peak(torch.bfloat16) == 2 * 8192**3


def test_a_process_takes_a_part_of_the_memory(gpu: machine.Gpu) -> None:
    assert FRACTIONS[-1] == pytest.approx(0.5)


def test_a_device_is_lost_when_nothing_runs_on_it(gpu: machine.Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert not gpu.is_lost()
    assert not machine.Cpu.is_lost(machine.Cpu)  # type: ignore[arg-type]
    monkeypatch.setattr(torch, "randn", fails)
    assert gpu.is_lost()


def test_facts_of_a_gpu(gpu: machine.Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(machine.Gpu, "peak", lambda self, dtype: 0.0)
    monkeypatch.setattr(subprocess, "check_output", lambda *_, **__: "580.1, 1980\n")
    monkeypatch.setattr(machine, "commit", lambda: "abc")
    facts = machine.about(gpu)
    assert (facts["device"], facts["isa"], facts["driver"], facts["clock_mhz"]) == ("a GPU", "sm_90", "580.1", "1980")


@pytest.mark.skipif(native.WHY_NOT is not None, reason="the compiled part is missing")
def test_both_machines_tell_the_same_facts(gpu: machine.Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(machine.Gpu, "peak", lambda self, dtype: 0.0)
    assert [*machine.Cpu().about()] == [*gpu.about()]


def test_without_nvidia_smi_facts_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "check_output", missing)
    assert machine.nvidia_smi("driver_version", "clocks.sm") == ["", ""]


def test_the_commit_is_told_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "check_output", missing)
    monkeypatch.setenv("COMMIT", "1234567")
    commit: Callable[[], str] = machine.commit.__wrapped__
    assert commit() == "1234567"


def test_without_a_gpu_there_is_none_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="this needs a GPU"):
        machine.Gpu()
