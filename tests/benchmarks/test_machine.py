"""The machine's part of timing. Without a GPU, stand-ins for torch.cuda show what would be asked of it."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import __main__, machine, measure, step, suite
from benchmarks.record import load
from benchmarks.shapes import LAYERS
from benchmarks.weights import FORMATS, Copies, count_of
from dami_kernels import LerpWeight, native

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


def test_nothing_takes_more_than_40_gb() -> None:
    """The parts by addition, on tensors without memory; and that with what runs beside them."""
    meta = torch.device("meta")
    step_tensors = [
        tensor
        for model in step.random_models(step.LAYERS, torch.bfloat16, meta, FORMATS).values()
        for weight in [model.embedding, model.norm, *itertools.chain(*map(all_of, model.layers))]
        for tensor in weight.tensors
    ]
    needed = [bytes_of(step_tensors)]
    for shape in LAYERS["Qwen3-8B"].values():
        copies = Copies(shape, torch.bfloat16, meta, FORMATS, count_of(shape, machine.Gpu.cold_bytes))
        weights = [weight for weights in copies.weights.values() for weight in weights]
        needed.append(bytes_of([tensor for weight in weights for tensor in weight.tensors]))
    assert max(needed) == needed[0] > 25 * 10**9
    assert max(needed) + 2 * 2**30 < machine.Gpu.most_bytes  # beside them bandwidth is measured
    assert machine.Gpu.most_bytes + 13 * 0.5e9 < 40 * 10**9  # a context each, and of up to 12 processes that compile


def all_of(layer: step.Layer) -> list[LerpWeight]:
    return [*layer.qkv, layer.o, *layer.gate_up, layer.down, *layer.norms]


def bytes_of(tensors: list[torch.Tensor]) -> int:
    """Of their memory, what is shared once."""
    return sum({storage._cdata: storage.nbytes() for storage in (each.untyped_storage() for each in tensors)}.values())


@pytest.mark.skipif(native.WHY_NOT is not None, reason="the compiled part is missing")
@pytest.mark.filterwarnings("default")
def test_the_first_parts_of_the_suite(
    gpu: machine.Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a GPU, with small layers, and the CPU's kernels within the graphs."""
    for name, value in {"peak": lambda self, dtype: 1e12, "bandwidth": lambda self: 1e12, "cold_bytes": 2**18}.items():
        monkeypatch.setattr(machine.Gpu, name, value)
    monkeypatch.setattr(measure, "machine", lambda: gpu)
    monkeypatch.setitem(LAYERS, "Qwen3-4B", {"gate_up": (96, 64)})
    for part in (replace(suite.SMOKE, arguments=f"{suite.SMOKE.arguments} --check-only"), suite.GPU[0], suite.GPU[2]):
        arguments = part.command("--results", tmp_path, "--journal", tmp_path / f"{id(part)}.journal")[3:]
        assert __main__.main([*arguments, "--seconds", "0.01"]) == 0
    assert "right: lerp_linear pair, lerp_linear int4" in capsys.readouterr().out
    rows = [row for row in load(tmp_path / "linear.csv") if row["method"] == "lerp_linear"]
    cases = [("1", "distinct"), ("16", "distinct"), ("64", "distinct"), ("4096", "uniform"), ("4096", "ragged")]
    assert [(row["m"], row["lam"], row["format"]) for row in rows] == [(*case, f) for case in cases for f in FORMATS]
    assert all(float(row["eager_ms"]) > 0 for row in rows if int(row["m"]) <= 64)


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
