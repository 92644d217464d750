"""The Triton kernels' numbers on a machine without a GPU: the contracts of test_ops.py and test_triton_numbers.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.marks import slow

pytest.importorskip("triton")

HERE = Path(__file__).parent
FILES = [f"test_{name}.py" for name in ("ops", "triton_numbers", "triton_groups", "views", "triton_experts")]
# w8d4 has codes of 8 and of 4 bits; what torch is told of an operator is the same on every device.
LEFT_OUT = "(test_ops and (torch.float16 or opcheck or compiles)) or (some_groups and (int8 or int4))"


@pytest.mark.parametrize(
    "arguments",
    [
        [*FILES, "-k", f"not ({LEFT_OUT})"],
        *slow([*FILES, "-k", LEFT_OUT], ["test_experts.py"], [*FILES, "-m", "slow"]),
    ],
)
def test_numbers_in_the_interpreter(arguments: list[str]) -> None:
    """In a process of its own, because the interpreter takes the place of `triton.jit`."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.dami_kernels.triton_interpreter", "-p", "no:cacheprovider"]
    given = [str(HERE / each) if each.endswith(".py") else each for each in arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command + given, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout
