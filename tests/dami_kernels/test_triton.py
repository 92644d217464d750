"""The Triton kernels' numbers on a machine without a GPU: the contracts of test_ops.py and test_triton_numbers.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "arguments",
    [
        "test_ops.py test_triton_numbers.py test_triton_groups.py",
        "test_views.py",
        "test_triton_experts.py",
        pytest.param("test_experts.py", marks=pytest.mark.slow),
        pytest.param("test_triton_numbers.py -m slow", marks=pytest.mark.slow),
    ],
)
def test_numbers_in_the_interpreter(arguments: str) -> None:
    """In a process of its own, because the interpreter takes the place of `triton.jit`."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.dami_kernels.triton_interpreter", "-p", "no:cacheprovider"]
    given = [str(HERE / each) if each.endswith(".py") else each for each in arguments.split()]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command + given, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout
