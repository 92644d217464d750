"""The Triton kernels' numbers on a machine without a GPU: the contracts of test_ops.py and test_triton_numbers.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent


def test_numbers_in_the_interpreter() -> None:
    """In a process of its own, because the interpreter takes the place of `triton.jit`."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.dami_kernels.triton_interpreter", "-p", "no:cacheprovider"]
    files = [str(HERE / "test_ops.py"), str(HERE / "test_triton_numbers.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command + files, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout
