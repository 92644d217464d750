"""The CUDA kernels around their numbers: how they are launched, chosen and refused; what they touch in memory."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dami_kernels import cuda
from dami_kernels.tuning import cuda as tuning
from dami_kernels.tuning import linear_config, tables
from dami_kernels.tuning.cuda import MAX_WARPS, STEP, TILE, decode_warps, prefers_cuda, shared_bytes, warps_at_once
from tests.dami_kernels.cuda_on_cpu import FORMATS
from tests.dami_kernels.test_triton_plan import DEVICES, MODELS, SHAPES

HERE = Path(__file__).parent
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
NVIDIA = {arch: device for arch, device in DEVICES.items() if not device.is_amd}
every_device = pytest.mark.parametrize("device", NVIDIA.values(), ids=NVIDIA.keys())


@every_device
@pytest.mark.parametrize("format", FORMATS)
def test_a_block_fits_and_has_work(format: str, device: tuning.Device) -> None:
    for N, K in SHAPES:
        warps = decode_warps(N, K, format, device)
        assert 1 <= warps <= MAX_WARPS
        assert warps * shared_bytes(format) <= device.shared
        assert warps <= max(-(-K // STEP), 1)


@every_device
@pytest.mark.parametrize("format", FORMATS)
def test_enough_bytes_are_in_flight(format: str, device: tuning.Device) -> None:
    """In the first round of blocks: half of what the bandwidth takes at the least, or of what the layer has."""
    step_bytes, fit = tuning.step_bytes(format), warps_at_once(format, device)
    for N, K in {shape for shapes in MODELS.values() for shape in shapes}:
        warps, tiles, steps = decode_warps(N, K, format, device), -(-N // TILE), -(-K // STEP)
        in_flight = min(tiles, fit // warps * device.processors) * warps * step_bytes
        at_most = min(tiles, device.processors) * min(fit, steps) * step_bytes
        assert in_flight >= 0.5 * min(tuning.BYTES_IN_FLIGHT * device.processors, at_most), (N, K, warps)


def test_examples_of_the_plan() -> None:
    h100 = DEVICES["sm_90"]
    assert decode_warps(1, 1, "pair", h100) == 1
    # o of Qwen3-4B, of 160 blocks: two at once on a processor, or those beyond the 132nd would have it to themselves.
    assert decode_warps(2560, 4096, "pair", h100) == 4
    # Its q, k and v, of 384 blocks, three on each; so two warps of each load enough, and share 20 steps evenly.
    assert decode_warps(6144, 2560, "pair", h100) == 2


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuning.Device]:
    """A GPU with a made-up table: the CUDA kernel is faster on 4 rows, Triton's on 16."""
    device = replace(DEVICES["sm_90"], name="Some GPU")
    monkeypatch.setattr(tables, "TABLES", tmp_path)
    config = linear_config(4, 32, 64, torch.bfloat16, "pair", DEVICES["sm_90"])
    entries = [tables.LinearEntry(M, 32, 64, torch.bfloat16, "pair", config, prefers_cuda=M == 4) for M in (4, 16)]
    tables.save_table(tables.table_path(device.name), entries)
    yield device
    for function in (tables.load_table, prefers_cuda):
        function.cache_clear()


def test_nothing_unmeasured_is_preferred(measured: tuning.Device) -> None:
    call = (32, 64, torch.bfloat16, "pair")
    assert not prefers_cuda(4, *call, DEVICES["sm_90"])  # has no table
    assert [prefers_cuda(M, *call, measured) for M in (1, 4, 7, 8, 16)] == [True, True, True, False, False]
    assert not prefers_cuda(4, 32, 64, torch.float16, "pair", measured)


def test_triton_hands_over_what_is_preferred(monkeypatch: pytest.MonkeyPatch, measured: tuning.Device) -> None:
    pytest.importorskip("triton")
    from dami_kernels import triton
    from dami_kernels.triton import linear

    lam = torch.rand(4)
    monkeypatch.setattr(linear, "device_of", lambda _: measured)
    x, weight = torch.randn(4, 64).bfloat16(), [torch.randn(32, 64).bfloat16()] * 2
    monkeypatch.setattr(cuda, "WHY_NOT", None)
    handed: list[tuple[Any, ...]] = []
    result = torch.randn(4, 32)
    monkeypatch.setattr(cuda, "lerp_linear", lambda *args: handed.append(args) or result)
    assert triton.lerp_linear(x, weight, [], lam, None, 1, "pair", False) is result
    ((of_x, of_weight, of_bias, of_lam, *rest),) = handed
    assert of_x is x
    assert of_lam is lam
    assert all(got is given for got, given in zip(of_weight, weight, strict=True))
    assert (of_bias, rest) == ([], [None, 1, "pair", False])
    assert not cuda.takes(x, weight, "pair", invariant=True, device=measured)
    assert not cuda.takes(torch.cat((x, x)), weight, "pair", invariant=False, device=measured)
    assert not cuda.takes(x, [end.t().contiguous().t() for end in weight], "pair", invariant=False, device=measured)
    monkeypatch.setattr(cuda, "WHY_NOT", "missing")
    assert not cuda.takes(x, weight, "pair", invariant=False, device=measured)


def test_what_it_does_not_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "WHY_NOT", None)
    x, weight, lam = torch.randn(4, 64).bfloat16(), [torch.randn(32, 64).bfloat16()] * 2, torch.rand(9)
    with pytest.raises(NotImplementedError, match="no kernel reads the format 'lowrank'"):
        cuda.lerp_linear(x, weight, [], lam, None, 1, "lowrank", False)
    with pytest.raises(TypeError, match=r"x must be bfloat16 or float16, got torch\.float32"):
        cuda.lerp_linear(x.float(), weight, [], lam, None, 1, "pair", False)
    with pytest.raises(ValueError, match="x must have at most 8 rows, got 9"):
        cuda.lerp_linear(torch.randn(9, 64).bfloat16(), weight, [], lam, None, 1, "pair", False)
    transposed = [end.t().contiguous().t() for end in weight]
    with pytest.raises(ValueError, match=r"weight must be dense along K, got strides \[\(1, 32\), \(1, 32\)\]"):
        cuda.lerp_linear(x, transposed, [], lam, None, 1, "pair", False)
    monkeypatch.setattr(cuda, "WHY_NOT", "the compiled CUDA part is missing")
    with pytest.raises(RuntimeError, match="the compiled CUDA part is missing"):
        cuda.lerp_linear(x, weight, [], lam, None, 1, "pair", False)


def test_without_the_compiled_part_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "dami_kernels._cuda", None)
        importlib.reload(cuda)
        assert re.search("the compiled CUDA part is missing .*: install CUDA's compiler nvcc", str(cuda.WHY_NOT))
    importlib.reload(cuda)


def sanitized(*options: str) -> None:
    """Runs tests of the numbers with every load and store of the kernels checked."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("needs g++'s address sanitizer")
    environment = {
        **os.environ,
        "CUDA_ON_CPU_FLAGS": "-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", HERE / "test_cuda_numbers.py", *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1])
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


@needs_compiler
def test_nothing_is_read_or_written_where_it_must_not_be() -> None:
    sanitized("-k", "(merged_copy and bfloat16 and (16 or 100)) or (not_aligned and (pair or w8d4))")


@pytest.mark.slow
@needs_compiler
def test_the_same_at_any_shape() -> None:
    sanitized("-m", "slow or not slow")
