"""What `dami doctor` says of this machine, and of machines that something is wrong with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from dami import cli, doctor
from typer.testing import CliRunner

from dami_kernels import formats, native
from dami_kernels.ops import library


@pytest.fixture(scope="module")
def report() -> doctor.Report:
    return doctor.examine()


def test_every_operator_is_run_in_every_format_a_kernel_reads(report: doctor.Report) -> None:
    on_cpu = {(check.operator, check.format): check for check in report.checks if check.device == "cpu"}
    assert {operator for operator, _ in on_cpu} == library.PLAIN.keys()
    assert {format for _, format in on_cpu} == set(formats.names()) - {"lowrank"}
    for check in on_cpu.values():
        if native.WHY_NOT is None:
            assert check.kernel == f"C++ {native.isa()}"
            assert check.error is not None
            assert check.error < 0.01
            assert check.microseconds is not None
        else:
            assert check.kernel == "plain torch"


def test_it_tells_versions_and_the_machine(report: doctor.Report) -> None:
    assert report.installed["torch"] == torch.__version__
    assert re.search(r", (1 core|\d+ cores), (1 thread|\d+ threads)$", report.machine["CPU"])
    assert report.machine["CPU kernels"].partition(";")[0] == native.isa()
    text = str(report)
    for name in (*report.installed, *report.machine):
        assert any(line.startswith(name) for line in text.splitlines())
    for problem in report.problems:
        assert problem.what in text
        assert problem.remedy in text


def test_it_tells_nobodys_name(report: doctor.Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert doctor.machine()["OMP_NUM_THREADS"] == "2"
    assert "hf_secret" not in str(doctor.machine())
    assert str(Path.home()) not in str(report)
    folder = Path(native.__file__).parent
    assert doctor.nameless(f"cannot open {folder}/_C.so or {Path.home()}/x") == "cannot open dami_kernels/_C.so or ~/x"


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["doctor", *arguments], env={"COLUMNS": "100"})


def test_the_command_prints_a_report_or_json(report: doctor.Report, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = doctor.Report(report.installed, report.machine, report.checks, ())
    monkeypatch.setattr(doctor, "examine", lambda: healthy)
    result = run()
    assert (result.exit_code, result.stdout) == (0, f"{healthy}\n")
    assert result.stdout.endswith("problems: none\n")
    record = json.loads(run("--json").stdout)
    assert record["installed"]["dami"] == healthy.installed["dami"]
    assert len(record["checks"]) == len(healthy.checks)
    ill = doctor.Report(report.installed, report.machine, (), (doctor.Problem("too hot", "open a window"),))
    monkeypatch.setattr(doctor, "examine", lambda: ill)
    result = run()
    assert result.exit_code == 1
    assert result.stdout.endswith("problems:\n- too hot\n  → open a window\n")


def told(problems: Any) -> list[tuple[str, str]]:
    return [(problem.what, problem.remedy) for problem in problems]


def test_a_missing_compiled_part_is_a_problem_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "WHY_NOT", "the compiled part is missing (no _C): install a C++ compiler")
    checks = tuple(doctor.self_test("cpu"))
    assert {check.kernel for check in checks} == {"plain torch"}
    assert doctor.machine()["CPU kernels"] == "not compiled"
    ((what, remedy),) = told(doctor.kernel_problems(checks))
    assert what.startswith("lerp_linear (int4), lerp_linears (int4)")
    assert what.endswith("run as plain torch, many times slower: the compiled part is missing (no _C)")
    assert remedy == "install a C++ compiler"


def test_a_format_that_no_kernel_reads_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.WHY_NOT is not None:
        pytest.skip(native.WHY_NOT)
    monkeypatch.setattr(native, "FORMATS", {"pair": 2})
    monkeypatch.setattr(native, "LINEAR_FORMATS", {"pair"})
    checks = tuple(doctor.self_test("cpu"))
    assert {check.format for check in checks if check.why} == {"int4", "int8", "w8d4"}
    problems = told(doctor.kernel_problems(checks))
    assert len(problems) == 3
    assert all("no kernel reads the format" in what for what, _ in problems)


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_a_kernel_that_is_wrong_is_a_problem(error: float) -> None:
    check = doctor.Check("cpu", "lerp_linear", "pair", "C++ avx2", None, error, 1.0, 1.0)
    ((what, remedy),) = told(doctor.kernel_problems((check,)))
    assert what == f"lerp_linear (pair) on cpu differs from plain torch by {error}"
    assert "report it" in remedy
    right = doctor.Check("cpu", "lerp_linear", "pair", "C++ avx2", None, 0.004, 1.0, 1.0)
    assert not told(doctor.kernel_problems((right,)))


def test_old_and_missing_packages_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch>=99", "no-such-package>=1", "rich>=1", 'triton>=99; extra == "triton"']
    monkeypatch.setattr(doctor, "requires", lambda _: wanted)
    assert told(doctor.version_problems()) == [
        (f"torch>=99 is needed, and {doctor.version('torch')} is installed", 'pip install "torch>=99"'),
        ("no-such-package>=1 is needed, and none is installed", 'pip install "no-such-package>=1"'),
    ]


def test_too_many_threads_and_a_gpu_that_torch_does_not_see_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_cores", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "there" if name == "nvidia-smi" else None)
    monkeypatch.setattr(torch.version, "cuda", None)
    problems = dict(told(doctor.machine_problems()))
    assert problems["torch runs 3 threads on 1 core"] == "export OMP_NUM_THREADS=1"
    assert problems["there is a GPU's driver, and torch sees no GPU"] == "install a torch built for it: pytorch.org"


def test_a_lesser_instruction_set_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.WHY_NOT is not None:
        pytest.skip(native.WHY_NOT)
    monkeypatch.setattr(native, "isa", lambda: "scalar")
    monkeypatch.setattr(native, "supported_isas", lambda: ["scalar", "avx2"])
    problem = ("the CPU kernels are held to scalar, and this CPU has avx2", "unset DAMI_CPU_ISA")
    assert problem in told(doctor.machine_problems())


def test_a_gpu_is_named_and_its_table_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device = type("Device", (), {"name": "A Card"})()
    memory = type("Properties", (), {"total_memory": 80e9})()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    monkeypatch.setattr(doctor, "device_of", lambda _: device)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert doctor.devices() == ["cpu", "cuda"]
    assert doctor.machine()["GPU"] == "A Card (80 GB), CUDA 13.0"
    what = "no launch parameters were measured on A Card: the kernels use a heuristic"
    assert (what, "dami bench --tune") in told(doctor.machine_problems())
