"""Without a kernel the operators run as plain torch, right but slow, and say so once."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch

from dami_kernels import native
from dami_kernels.ops import library
from tests.dami_kernels import test_ops


@pytest.fixture
def _without_compiled_part(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(native, "WHY_NOT", "it was not built")
    library._warn_once.cache_clear()
    with native.bypassed():
        yield


@pytest.mark.usefixtures("_without_compiled_part")
def test_warns_once_and_says_why() -> None:
    case = test_ops.Case("linear", torch.float32, bias=False)
    with pytest.warns(UserWarning, match="dami::lerp_linear runs as plain torch.*it was not built"):
        case.run(case.x, torch.tensor(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.run(case.x, torch.tensor(0.5))


@pytest.mark.usefixtures("_without_compiled_part")
@pytest.mark.filterwarnings("ignore:dami")
@test_ops.every_case
@test_ops.every_dtype
def test_accuracy(name: str, bias: bool, dtype: torch.dtype) -> None:
    test_ops.test_accuracy(name, bias, dtype, test_ops.LAMBDAS["mixed"])


def test_import_needs_neither_triton_nor_the_compiled_part() -> None:
    """Both are optional: a fresh interpreter without them imports the package and runs an operator."""
    code = """
import sys
sys.modules["triton"] = sys.modules["dami_kernels._C"] = None
import torch, dami_kernels
weight = dami_kernels.LerpWeight.pack(torch.eye(3), 2 * torch.eye(3))
print(dami_kernels.lerp_linear(torch.ones(1, 3), weight, torch.tensor(0.5)).tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[[1.5, 1.5, 1.5]]", done.stderr
    assert "runs as plain torch" in done.stderr
