"""The run of all parts: in time, one process each, and nothing of what fails its tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__, linear, measure, operators, step, suite

PARTS = {"linear": linear, "operators": operators, "step": step}


@pytest.mark.parametrize("part", [*suite.CPU, *suite.GPU], ids=str)
def test_parts_ask_for_what_there_is(part: suite.Part, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        measure, "run", lambda file, options, cases, prepare: asked.update(file=file, cases=[*cases], options=options)
    )
    __main__.main([*part.command("--budget", 7, "--results", tmp_path)[3:]])
    assert asked["file"] == f"{part.name}.csv"
    assert asked["cases"]
    assert (asked["options"].budget, asked["options"].results) == (7, tmp_path)


class Machine:
    """Runs no process but lets the time pass that each would take."""

    def __init__(self, seconds: list[float]) -> None:
        self.now, self.seconds, self.called = 0.0, seconds, []  # type: ignore[var-annotated]

    def clock(self) -> float:
        return self.now

    def call(self, command: list[str], cwd: Path, timeout: float) -> int:
        self.called.append(command)
        took = self.seconds.pop(0)
        self.now += min(took, timeout)
        if took > timeout:
            raise subprocess.TimeoutExpired(command, timeout)
        return 0


def test_parts_stop_in_time(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    parts = [suite.Part(name, "--x", 50) for name in ("first", "second", "third", "fourth")]
    machine = Machine([40, 1000, 16])
    assert suite.run(parts, 140, tmp_path, machine.call, machine.clock) == 1  # the second took too long
    assert [command[3:5] for command in machine.called] == [["first", "--x"], ["second", "--x"], ["third", "--x"]]
    assert [command[command.index("--budget") + 1] for command in machine.called] == ["50", "50", "20"]
    assert machine.called[0][:3] == [sys.executable, "-m", "benchmarks"]
    out = capsys.readouterr().out
    assert "stopped: second --x took longer than 65 s" in out
    assert "left out, no time: fourth --x" in out
    assert machine.now <= 140


def test_everything_on_a_gpu_takes_less_than_eight_minutes() -> None:
    assert suite.TEST_SECONDS + 5 * 60 < 465 < 480 - suite.STARTING + 1


LOG = """\
..F.E
=== short test summary info ===
FAILED tests/a.py::test_linear_is_accurate[int8-1] - AssertionError: error
ERROR tests/a.py::test_rms_norm[3]
FAILED tests/b.py::test_a_graph_replays
3 failed, 2 passed in 1.0s
"""


def test_what_fails_its_tests_is_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    failed = suite.failures(LOG)
    assert failed == ["tests/a.py::test_linear_is_accurate[int8-1]", "tests/a.py::test_rms_norm[3]", *failed[2:]]
    parts = [
        suite.Part("linear", "--rows 1", 1),
        suite.Part("step", "", 1),
        suite.Part("operators", "--operators rms_norm embedding --rows 1", 1),
        suite.Part("operators", "--operators rms_norm --rows 1", 1),
    ]
    others = "--formats pair int4 lowrank w8d4"
    assert suite.without(parts, failed) == [
        suite.Part("linear", f"--rows 1 {others}", 1),
        suite.Part("operators", f"--operators embedding --rows 1 {others}", 1),
    ]
    assert capsys.readouterr().out == "REFUSED, for its tests fail: int8\nREFUSED, for its tests fail: rms_norm\n"
    assert suite.without(parts, ["tests/b.py::test_a_graph_replays"]) == parts
    assert [part.name for part in suite.without(parts, ["test_linear_is_accurate[1]"])] == ["operators", "operators"]


def test_without_a_gpu_its_run_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="this needs a GPU, and torch finds none"):
        suite.main(["--gpu", "--results", str(tmp_path)])


def test_the_gpu_tests_are_found() -> None:
    assert {*suite.gpu_tests()} >= {f"tests/dami_kernels/test_triton_{name}.py" for name in ("gpu", "numbers")}


def test_a_process_that_takes_too_long_is_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    suite.finish(process, 0)
    assert process.returncode is not None
    assert "stopped after" in capsys.readouterr().out


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
