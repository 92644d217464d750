"""The run of all parts, each a process of its own: in time, and nothing that fails costs another's numbers."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__, linear, measure, operators, step, suite
from benchmarks.journal import Journal, blame
from benchmarks.record import load
from tests.benchmarks import fake_part

PARTS = {"linear": linear, "operators": operators, "step": step}
MERGED = "one_merged:right"


@pytest.mark.parametrize("part", [*suite.CPU, suite.SMOKE, *suite.GPU], ids=str)
def test_parts_ask_for_what_there_is(part: suite.Part, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        measure, "run", lambda file, options, cases, prepare: asked.update(file=file, cases=[*cases], options=options)
    )
    __main__.main([*part.command("--budget", 7, "--results", tmp_path)[3:]])
    assert asked["file"] == f"{part.name}.csv"
    assert asked["cases"]
    assert (asked["options"].budget, asked["options"].results) == (7, tmp_path)


def test_what_matters_most_comes_first_on_a_gpu() -> None:
    first = [f"{part.name} {part.arguments}" for part in (suite.SMOKE, *suite.GPU[:3])]
    gate_up = "linear --models Qwen3-4B --layers gate_up --rows"
    assert first == [
        f"{gate_up} 1 --lams distinct --seconds 0.1",
        f"{gate_up} 1 16 64 --lams distinct",
        "step --rows 1 --seconds 2",
        f"{gate_up} 4096 --lams uniform ragged",
    ]
    assert sum(part.seconds + suite.STARTING for part in (suite.SMOKE, *suite.GPU[:3])) < 465 - suite.TEST_SECONDS


class Fake(suite.Part):
    """A part on a device that is not there."""

    def command(self, *more: object) -> list[str]:
        return [sys.executable, "-m", "tests.benchmarks.fake_part", *self.arguments.split(), *map(str, more)]


def run_of(tmp_path: Path, seconds: float = 300) -> suite.Run:
    return suite.Run(tmp_path, tmp_path / "suite.txt", tmp_path, seconds, on_gpu=True)


def measured(tmp_path: Path) -> set[tuple[str, str]]:
    return {(row["model"], row["method"]) for row in load(tmp_path / "linear.csv")}


def of_both(*methods: str) -> set[tuple[str, str]]:
    return {(case, method) for case in ("first", "second") for method in methods}


def test_what_fails_costs_itself_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it within one process."""
    behaviours = {"a": "wrong", "b": "resources", "c": "memory", "d": "resources@1", "e": "memory@2", "f": "right"}
    arguments = [f"{name}:{behaviour}" for name, behaviour in behaviours.items()]
    assert fake_part.main([MERGED, *arguments, "--results", str(tmp_path)]) == 1
    assert measured(tmp_path) == of_both("one merged", "f")
    out = capsys.readouterr().out
    assert out.count("REFUSED: a pair: error 1, that of plain PyTorch 0") == 2
    for name in "bd":
        assert out.count(f"FAILED: {name} pair: OutOfResources: out of resource: shared memory") == 2
    for name in "ce":
        assert out.count(f"FAILED: {name} pair: OutOfMemoryError: CUDA out of memory") == 2


def test_what_ends_a_process_is_left_out_of_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "STALLED", 4)
    run = run_of(tmp_path)
    with run.ending():
        part = Fake("linear", f"{MERGED} bad:crash hung:hang@2 worse:lost@2 good:right --cases first", 200)
        run.parts([part], run.end)
    assert run.code == 1
    assert measured(tmp_path) == {("first", "one merged"), ("first", "good")}
    out = capsys.readouterr().out
    assert f"CRASHED: {part}: ended by SIGSEGV; it was at: first | bad pair" in out
    assert f"CRASHED: {part}: no sign of life for 4 s; it was at: first | hung pair" in out
    assert f"CRASHED: {part}: exit status {measure.LOST}; it was at: first | worse pair" in out
    assert out.count("CRASHED") == 2 * 3  # and again in the summary
    assert f"{tmp_path / 'linear.csv'}: 2 rows" in out
    assert "  first 1 distinct: one merged 1.0000 ms; pair 1.00" in out
    assert (tmp_path / "suite.txt").read_text() == out
    assert [line.rpartition(" | ")[2] for line in run.fatal] == ["bad pair", "hung pair", "worse pair"]


def test_parts_that_cannot_start_or_take_too_long_cost_only_themselves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "STARTING", 0)
    monkeypatch.setattr(suite, "MIN_SECONDS", 1)
    run = run_of(tmp_path)
    broken, endless = Fake("linear", "--nonsense", 20), Fake("linear", f"{MERGED} long:hang", 3)
    run.parts([broken, endless], run.end)
    run.parts([Fake("linear", MERGED, 100)], time.monotonic() + 0.5)
    out = capsys.readouterr().out
    assert f"CRASHED: {broken}: exit status 2; it was at: nothing known" in out
    assert f"CRASHED: {endless}: it took too long; it was at: " in out
    assert f"left out, no time: linear {MERGED}" in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_what_there_is_and_a_summary(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, rows = run_of(tmp_path), tmp_path / "linear.csv"

    def cut() -> None:
        while not load(rows):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=cut, daemon=True).start()
    before = signal.getsignal(number)
    with run.ending():
        run.parts([Fake("linear", MERGED, 100), Fake("linear", "long:hang", 100)], run.end)
    assert signal.getsignal(number) is before
    assert run.code == 1
    assert all(process.poll() is not None for process in run.processes)
    out = capsys.readouterr().out
    assert f"CUT OFF by {number.name}" in out
    assert "  first 1 distinct: one merged 1.0000 ms" in out


def test_a_journal_knows_what_ended_a_process(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    assert blame(path) is None
    journal = Journal(path)
    assert not journal.is_done("a")
    journal.at("a", "x")
    journal.done("a")
    assert blame(path) is None
    journal.at("b", "x")
    with path.open("a") as file:
        file.write(f"{blame(path)}\n")
    journal = Journal(path)
    assert journal.is_done("a")
    assert not journal.is_done("b")
    assert journal.is_fatal("b", "x")
    assert not journal.is_fatal("c", "x")
    with path.open("a") as file:
        file.write("fatal c | x\n")
    assert Journal(path).is_fatal("d", "x")  # in two cases: it is the method
    assert not Journal(path).is_fatal("d", "y")
    Journal(None).at("a", "x")  # keeps nothing


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """With a GPU, whose parts are fakes; what was run, in order."""
    import torch

    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(suite, "SMOKE", Fake("linear", f"{MERGED} ours:right --check-only", 60))
    monkeypatch.setattr(suite, "GPU", [Fake("linear", f"{MERGED} ours:right", 60)])
    start = suite.Run.start

    def noted(self: suite.Run, command: list[str], log: Path | None = None) -> subprocess.Popen[bytes]:
        names = {"setup.py": "build", "--compile": "compile", "pytest": "tests", "--check-only": "smoke"}
        name = next((names[word] for word in command if word in names), "part")
        done.append(name)
        if name in ("build", "compile", "tests"):
            command = [sys.executable, "-c", f"print('FAILED here: {name}'); raise SystemExit(1)"]
        return start(self, command, log)

    monkeypatch.setattr(suite.Run, "start", noted)
    return done


def test_on_a_gpu_numbers_come_before_the_tests(
    machine: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And neither a failed build nor failed compilations nor failed tests keep them away."""
    monkeypatch.setattr(suite.Run, "build_cuda", lambda run, log: run.start(["setup.py"], log))
    monkeypatch.setattr(suite, "PROCESSES", 2)
    monkeypatch.setattr(suite, "ROOT", suite.ROOT)
    assert suite.main(["--gpu", "--results", str(tmp_path)]) == 1
    assert machine == ["build", "compile", "compile", "smoke", "part", "tests"]
    assert measured(tmp_path) == of_both("one merged", "ours")
    out = capsys.readouterr().out
    assert "right: one merged, ours pair" in out
    assert "FAILED to be built, so all parts are without" in out
    assert "FAILED: the tests: exit status 1" in out
    assert {path.name for path in tmp_path.iterdir()} == {"linear.csv", "suite.txt", "compile.txt"}
    assert (tmp_path / "compile.txt").read_text().count("FAILED here: compile") == 2


def test_nothing_compiles_beside_the_tests(machine: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each process holds some of the device's memory, of which the tests take their share."""
    compiling: list[subprocess.Popen[bytes]] = []
    beside: list[bool] = []
    start = suite.Run.start

    def noted(self: suite.Run, command: list[str], log: Path | None = None) -> subprocess.Popen[bytes]:
        if "pytest" in command:
            beside.extend(process.poll() is None for process in compiling)
        if "--compile" not in command:
            return start(self, command, log)
        compiling.append(
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], preexec_fn=os.setpgrp)
        )
        self.processes.append(compiling[-1])
        return compiling[-1]

    monkeypatch.setattr(suite.Run, "start", noted)
    monkeypatch.setattr(suite.Run, "build_cuda", lambda run, log: None)
    monkeypatch.setattr(suite, "PROCESSES", 2)
    suite.main(["--gpu", "--results", str(tmp_path)])
    assert beside == [False, False]


@pytest.mark.parametrize("helps", [True, False])
def test_a_failed_smoke_check_is_repeated_without_early_launches(
    helps: bool, machine: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All parts then do without programmatic dependent launch, if the check passes so. Who failed is tried again."""
    seen: list[tuple[str | None, int]] = []

    def part(run: suite.Run, part: suite.Part, seconds: float) -> bool:
        seen.append((os.environ.get("DAMI_PDL"), len(run.fatal)))
        run.fatal.append("fatal a | b")
        return helps and "DAMI_PDL" in os.environ

    monkeypatch.setattr(suite.Run, "part", part)
    monkeypatch.setattr(suite.Run, "build_cuda", lambda run, log: None)
    monkeypatch.setattr(suite, "PROCESSES", 1)
    monkeypatch.delenv("DAMI_PDL", raising=False)
    with monkeypatch.context() as patch:
        patch.setenv("DAMI_PDL", "1")  # so that it is restored afterwards
        patch.delenv("DAMI_PDL")
        suite.main(["--gpu", "--results", str(tmp_path)])
    assert seen == [(None, 0), ("0", 0), ("0" if helps else None, 1)]


def test_without_nvcc_the_cuda_kernels_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, started = run_of(tmp_path), []
    monkeypatch.setattr(suite.Run, "start", lambda self, command, log: started.append(command))
    monkeypatch.setattr(suite, "CUDA_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert run.build_cuda(tmp_path / "compile.txt") is None
    build = [sys.executable, "setup.py", "build_ext", "--inplace", "--parallel", "2"]
    assert started == ([] if importlib.util.find_spec("dami_kernels._C") else [build])
    started.clear()
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: None)
    assert run.build_cuda(tmp_path / "compile.txt") is None
    assert started == [build]  # the compiled part for launches
    started.clear()
    assert "the kernels in CUDA C++: left out, there is no nvcc" in capsys.readouterr().out
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch(mode=0o755)
    run.build_cuda(tmp_path / "compile.txt")
    monkeypatch.setenv("PATH", str(nvcc.parent))
    monkeypatch.setenv("CUDA_HOME", "")
    run.build_cuda(tmp_path / "compile.txt")
    assert started == [["env", f"CUDA_HOME={tmp_path / 'cuda'}", *build], build]


def test_without_a_gpu_its_run_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="this needs a GPU, and torch finds none"):
        suite.main(["--gpu", "--results", str(tmp_path)])


def test_the_gpu_tests_are_found() -> None:
    assert {*suite.gpu_tests()} >= {f"tests/dami_kernels/test_triton_{name}.py" for name in ("gpu", "numbers")}


def test_help_tells_of_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["--help"]) == 0
    assert {*__main__.PARTS} <= {*capsys.readouterr().out.split()}


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        __main__.main(["all"])
    assert "PART must be one of suite, linear" in capsys.readouterr().err


def test_without_a_part_the_suite_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(suite, "main", lambda argv: asked.extend(argv) or 3)
    assert __main__.main(["--budget", "30"]) == 3
    assert asked == ["--budget", "30"]
