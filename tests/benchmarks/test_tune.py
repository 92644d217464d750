"""The tuner keeps the fastest of the candidates that run."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__, shapes, tune
from benchmarks.journal import blame
from benchmarks.machine import Cpu
from benchmarks.measure import LOST
from benchmarks.timing import Budget
from dami_kernels import lerp_linear, native, tuning

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources


class StandIn(Cpu):
    """Runs the CPU's kernels and tells times made up from the parameters that were forced on the GPU's."""

    cold_bytes = 2**18

    lost = False

    def stopwatch(self, call: Callable[[int], object], copies: int) -> Callable[[], float]:
        from dami_kernels.triton import linear

        if linear.linear_config is tuning.linear_config:  # nothing is forced on Triton's kernel: it is the other one
            return lambda: 1e-6 if call(0).shape[0] == 1 else 1.0  # type: ignore[attr-defined]
        config = linear.linear_config()  # type: ignore[call-arg]
        return lambda: 1e-4 * abs(config.split_k - 2) + 1e-6 * config.num_stages

    def is_lost(self) -> bool:
        return StandIn.lost


@pytest.fixture
def _stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tune, "Gpu", StandIn)
    monkeypatch.setattr(tune, "table_path", lambda name: tmp_path / "tables" / "GPU.json")
    monkeypatch.setitem(shapes.LAYERS, "Qwen3-4B", {"o": (64, 512), "lm_head": (96, 256)})


@pytest.mark.skipif(native.WHY_NOT is not None, reason="the compiled part is missing")
@pytest.mark.usefixtures("_stand_in")
def test_the_fastest_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    journal = ["--journal", str(tmp_path / "journal"), "--results", str(tmp_path)]
    code = __main__.main(["--tune", "--rows", "512", "1", "--formats", "int4", *journal])
    assert code == 0
    assert (tmp_path / "GPU.json").read_text() == (tmp_path / "tables" / "GPU.json").read_text()
    monkeypatch.setattr(tuning.tables, "TABLES", tmp_path / "tables")
    tuning.load_table.cache_clear()
    table = tuning.load_table("GPU")
    assert {key: [entry.M for entry in entries] for key, entries in table.items()} == {
        (64, 512, torch.bfloat16, "int4"): [1, 512],
        (96, 256, torch.bfloat16, "int4"): [1],  # few rows of the head
    }
    for (N, K, dtype, format), entries in table.items():
        for entry in entries:
            candidates = tuning.linear_candidates(entry.M, N, K, dtype, format, tuning.H100)
            splits = {config.split_k for config in candidates}
            assert entry.config.split_k == min(splits, key=lambda split_k: abs(split_k - 2))
            assert entry.config.num_stages == 2


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], dict[int, tuning.LinearEntry]]:
    """The entries of the table that was written, by their rows."""

    def entries() -> dict[int, tuning.LinearEntry]:
        monkeypatch.setattr(tuning.tables, "TABLES", tmp_path / "tables")
        tuning.load_table.cache_clear()
        found = tuning.load_table("GPU")[64, 512, torch.bfloat16, "int4"]
        tuning.load_table.cache_clear()
        return {entry.M: entry for entry in found}

    return entries


TUNE = ["--models", "Qwen3-4B", "--formats", "int4", "--rows"]


@pytest.mark.skipif(native.WHY_NOT is not None, reason="the compiled part is missing")
@pytest.mark.usefixtures("_stand_in")
def test_the_kernel_in_cuda_is_preferred_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, table: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "has_cuda_kernel", lambda x: len(x) <= 8)
    monkeypatch.setattr(tune.cuda, "lerp_linear", native.lerp_linear)
    journal = ["--journal", str(tmp_path / "journal")]
    assert tune.main([*TUNE, "1", "4", "64", *journal]) == 0
    assert {M: entry.prefers_cuda for M, entry in table().items()} == {1: True, 4: False, 64: False}
    assert "µs by the kernel in CUDA C++" in capsys.readouterr().out


@pytest.mark.skipif(native.WHY_NOT is not None, reason="the compiled part is missing")
@pytest.mark.usefixtures("_stand_in")
def test_the_library_is_preferred_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, table: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """For each kind of λ by itself; with few rows it is not asked."""

    class Slow(StandIn):
        """On which our kernel takes a second, and the library less with one λ and more with several."""

        def stopwatch(self, call: Callable[[int], object], copies: int) -> Callable[[], float]:
            if not isinstance(call, partial):
                return super().stopwatch(call, copies)
            call(0)
            return lambda: 1e-9 if call.keywords["way"] is tuning.Route.BLEND else 1.0

    monkeypatch.setattr(tune, "Gpu", Slow)
    assert tune.main([*TUNE, "16", "64", "--journal", str(tmp_path / "journal")]) == 0
    found = {M: (entry.one, entry.mixed) for M, entry in table().items()}
    assert found == {16: (tuning.Route.KERNEL,) * 2, 64: (tuning.Route.BLEND, tuning.Route.KERNEL)}
    out = capsys.readouterr().out
    assert out.count("one λ for all: ") == 2  # of the two layers
    assert " µs, 0.0 µs by blend" in out
    assert " µs, 1000000.0 µs by products" in out


@pytest.mark.skipif(native.WHY_NOT is not None, reason="the compiled part is missing")
@pytest.mark.usefixtures("_stand_in")
def test_a_candidate_that_loses_the_device_is_passed_over_by_the_next_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, table: Any
) -> None:
    monkeypatch.setitem(shapes.LAYERS, "Qwen3-4B", {"o": (64, 512)})
    config = tuning.linear_candidates(1, 64, 512, torch.bfloat16, "int4", tuning.H100)[1]

    def kills(*args: Any, **options: Any) -> torch.Tensor:
        from dami_kernels.triton import linear

        if linear.linear_config() == config:  # type: ignore[call-arg]
            monkeypatch.setattr(StandIn, "lost", True)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return lerp_linear(*args, **options)

    monkeypatch.setattr(tune, "lerp_linear", kills)
    journal = tmp_path / "journal"
    with pytest.raises(SystemExit) as ended:
        tune.main([*TUNE, "1", "--journal", str(journal)])
    assert ended.value.code == LOST
    monkeypatch.setattr(StandIn, "lost", False)
    with journal.open("a") as file:
        file.write(f"{blame(journal)}\n")
    assert tune.main([*TUNE, "1", "--journal", str(journal)]) == 0
    assert 1 in table()


@pytest.mark.skipif(native.WHY_NOT is not None, reason="the compiled part is missing")
@pytest.mark.usefixtures("_stand_in")
def test_no_case_takes_longer_than_there_is_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, table: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    spent = iter([False, True])  # between cases; then within the first, which has one candidate by then
    monkeypatch.setattr(Budget, "is_spent", lambda self: next(spent, True))
    assert tune.main([*TUNE, "1", "16", "--journal", str(tmp_path / "journal")]) == 0
    assert [*table()] == [1]
    out = capsys.readouterr().out
    assert "left out, no time: N=64, K=512, int4, M=16" in out
    assert "µs by rule" in out


def test_it_tunes_in_a_process_of_its_own_beside_those_that_compile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "PROCESSES", 2)

    def start(self: Any, command: list[str], log: Path | None = None) -> subprocess.Popen[bytes]:
        started.append(command[3:])
        process = subprocess.Popen([sys.executable, "-c", ""])
        self.processes.append(process)
        return process

    monkeypatch.setattr(tune.suite.Run, "start", start)
    assert tune.main(["--rows", "1", "--results", str(tmp_path)]) == 0
    assert [command[: command.index("tune") + 1] for command in started] == [["tune"]] * 3
    assert [command[-2:] for command in started[:2]] == [["--compile", "0/2"], ["--compile", "1/2"]]
    assert "--journal" in started[2]
    assert started[2][1:3] == ["--rows", "1"]


@pytest.mark.usefixtures("_stand_in")
def test_candidates_that_fail_are_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(tune, "lerp_linear", fails)
    assert tune.main(["--rows", "1", "--formats", "pair", "--journal", str(tmp_path / "journal")]) == 0
    assert "OutOfResources: out of resource: shared memory" in capsys.readouterr().out
    assert not (tmp_path / "tables").exists()


def test_parameters_are_forced_on_the_kernel_only_within(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launch is remembered from outside or from within."""
    from dami_kernels.triton import linear

    before, remembered = linear.linear_config, {"a launch": "of the plan's parameters"}
    monkeypatch.setattr(tune.launching, "_steps", remembered)
    config = tuning.linear_config(1, 64, 64, torch.bfloat16, "pair", tuning.H100)
    with contextlib.suppress(RuntimeError), tune.forced(config):
        assert linear.linear_config(7, 8, 9) is config  # type: ignore[call-arg, arg-type]
        assert linear.route(7, 8, 9) is tuning.Route.KERNEL  # type: ignore[call-arg]
        assert not remembered
        remembered["a launch"] = "of a candidate"
        raise RuntimeError("the failure of a candidate")
    assert linear.linear_config is before
    assert not remembered


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="this needs a GPU, and torch finds none"):
        __main__.main(["--tune"])
