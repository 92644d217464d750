"""The Triton kernels' machine code, compiled for GPUs that are not there: registers, shared memory, instructions."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("there is no machine code in the interpreter", allow_module_level=True)

from dami_kernels import triton as kernels  # noqa: E402
from dami_kernels.triton import embedding, layer_norm, linear, rms_norm  # noqa: E402
from tests.dami_kernels.test_triton_plan import DTYPES, ROWS, SHAPES, plan  # noqa: E402
from tests.dami_kernels.triton_targets import DEVICES, Compiled, compiling_for  # noqa: E402

ARCHS = list(DEVICES)
every_arch = pytest.mark.parametrize("arch", ARCHS)
DECODE, PREFILL = 1, 4096


@pytest.fixture(autouse=True, scope="module")
def _fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for this module, so that each kernel is compiled once, by this checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.cache, "dir", str(tmp_path_factory.mktemp("triton")))
        yield


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_linear(
    arch: str,
    M: int,
    N: int = 4096,
    K: int = 2560,
    dtype: torch.dtype = torch.bfloat16,
    ragged: bool = False,
    bias: bool = True,
    transposed: bool = False,
    rows_per_lam: int = 1,
) -> list[Compiled]:
    end = meta(K, N, dtype=dtype).t() if transposed else meta(N, K, dtype=dtype)
    row_to_lam = meta(M, dtype=torch.int32) if ragged else None
    lam = meta(M, dtype=torch.float32)
    with compiling_for(arch) as launched:
        bias_ends = [meta(N, dtype=dtype)] * 2 if bias else []
        kernels.lerp_linear(meta(M, K, dtype=dtype), [end] * 2, bias_ends, lam, row_to_lam, rows_per_lam, "pair", False)
    return launched


def compile_rows(arch: str, D: int, dtype: torch.dtype = torch.bfloat16, ragged: bool = False) -> list[Compiled]:
    """The norms, without and with bias, and the embedding."""
    x, vector, lam = meta(9, D, dtype=dtype), [meta(D, dtype=dtype)] * 2, meta(9, dtype=torch.float32)
    rows = (lam, meta(9, dtype=torch.int32) if ragged else None, 1)
    with compiling_for(arch) as launched:
        kernels.lerp_rms_norm(x, vector, *rows, 1e-6, 0.0)
        kernels.lerp_layer_norm(x, vector, [], *rows, 1e-5)
        kernels.lerp_layer_norm(x, vector, vector, *rows, 1e-5)
        kernels.lerp_embedding(meta(9, dtype=torch.int64), [meta(50, D, dtype=dtype)] * 2, *rows, "pair", dtype, D)
    return launched


def assert_fits(arch: str, launched: list[Compiled]) -> None:
    for kernel in launched:
        kernel.assert_keeps_its_registers()
        assert kernel.shared <= DEVICES[arch].shared, kernel.name
        assert kernel.tensor_memory <= 512, kernel.name  # columns


@every_arch
def test_every_kernel_fits(arch: str) -> None:
    """No spills, and no more shared and tensor memory than the device has; and no kernel is forgotten here."""
    launched = compile_rows(arch, 2560)
    launched += compile_linear(arch, DECODE)
    launched += compile_linear(arch, DECODE, N=512)
    launched += compile_linear(arch, PREFILL)
    launched += compile_linear(arch, PREFILL, dtype=torch.float32)
    assert_fits(arch, launched)
    modules = (embedding, layer_norm, linear, rms_norm)
    written = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {kernel.name for kernel in launched} == written


MMA = {
    "sm_80": {DECODE: "mma.sync.aligned.m16n8k16", PREFILL: "mma.sync.aligned.m16n8k16"},
    "sm_90": {DECODE: "mma.sync.aligned.m16n8k16", PREFILL: "wgmma.mma_async.sync.aligned.m64n256k16"},
    "sm_100": {DECODE: "mma.sync.aligned.m16n8k16", PREFILL: "tcgen05.mma.cta_group::1.kind::f16"},
    "gfx942": {DECODE: "v_mfma_f32_16x16x16_bf16", PREFILL: "v_mfma_f32_32x32x8_bf16"},
}


@every_arch
@pytest.mark.parametrize("M", [DECODE, PREFILL])
def test_tensor_cores_do_the_work(arch: str, M: int) -> None:
    assert MMA[arch][M] in compile_linear(arch, M)[0].code


@every_arch
def test_float32_is_not_rounded_to_tf32(arch: str) -> None:
    code = compile_linear(arch, PREFILL, dtype=torch.float32)[0].code
    assert "tf32" not in code
    assert ("v_mfma_f32_32x32x2_f32" if arch == "gfx942" else "fma.rn.f32") in code


def count(loop: str, instruction: str) -> int:
    return len(re.findall(rf"^\s*(?:@!?%p\d+ )?{instruction}", loop, re.MULTILINE))


@pytest.mark.parametrize(("arch", "mma"), [("sm_80", r"mma\.sync"), ("sm_90", r"wgmma\.mma_async")])
def test_only_mixed_tiles_multiply_twice(arch: str, mma: str) -> None:
    """A prefill kernel has four loops: base, target, their blend, and both, which alone has twice the instructions."""
    counts = sorted(count(loop, mma) for loop in compile_linear(arch, PREFILL)[0].loops)
    assert counts == [counts[0]] * 3 + [2 * counts[0]]
    counts = sorted(count(loop, mma) for loop in compile_linear(arch, 128)[0].loops)
    assert counts == [counts[0]] * 2 + [2 * counts[0]]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_blended_weight_stays_in_registers(arch: str, ragged: bool, dtype: torch.dtype) -> None:
    """It is rounded two at a time, never stored, and multiplied from registers, wgmma's left operand included."""
    pack = rf"cvt\.rn\.{'bf16' if dtype == torch.bfloat16 else 'f16'}x2\.f32"
    (blend,) = (
        loop for loop in compile_linear(arch, PREFILL, dtype=dtype, ragged=ragged)[0].loops if count(loop, pack)
    )
    assert not count(blend, r"st\.shared|stmatrix")
    if arch == "sm_90":
        from_registers = r"wgmma\.mma_async\S+ \{[^}]*\}, \{"
        assert count(blend, from_registers) == count(blend, r"wgmma\.mma_async") > 0


def test_a_blended_weight_goes_to_tensor_memory() -> None:
    """On sm_100 tcgen05 takes its left operand, in square brackets, from there."""
    kernel = compile_linear("sm_100", PREFILL)[0]
    assert re.search(r"tcgen05\.mma\S+ \[[^]]*\], \[", kernel.code)
    assert "tcgen05.st.sync" in kernel.code


@every_arch
def test_weights_stream_past_the_registers(arch: str) -> None:
    """On NVIDIA every loop copies global to shared memory asynchronously, 16 bytes a thread, and loads nothing else."""
    if arch == "gfx942":
        assert "buffer_load_dwordx4" in compile_linear(arch, DECODE)[0].code
        return
    for M in (DECODE, PREFILL):
        kernel = compile_linear(arch, M)[0]
        assert "cp.async.cg.shared.global" in kernel.code
        assert not any(count(loop, r"ld\.global") for loop in kernel.loops)


@every_arch
def test_nothing_is_atomic(arch: str) -> None:
    for kernel in [*compile_linear(arch, DECODE, N=512), *compile_linear(arch, PREFILL), *compile_rows(arch, 2560)]:
        assert not re.search(r"^\s*(?:@\S+ )?(?:atom|red)\.|_atomic_", kernel.code, re.MULTILINE)


def test_a_new_batch_compiles_nothing() -> None:
    """Not its size, within one tile's sizes, nor its rows per λ: only shapes of the weight and dtypes do."""
    first = compile_linear("sm_90", 4096, rows_per_lam=1)[0]
    for M, rows_per_lam in ((4097, 1), (5000, 16), (16384, 4096)):
        assert compile_linear("sm_90", M, rows_per_lam=rows_per_lam)[0].asm is first.asm


def linear_cases() -> Iterator[dict[str, Any]]:
    """Every tile the plan takes for the benchmarks' models, and the variants that compile to different code."""
    for dtype in DTYPES:
        seen = set()
        for arch, (N, K), M in itertools.product(ARCHS, SHAPES, ROWS):
            config = replace(plan(M, N, K, dtype, DEVICES[arch]), split_k=1)  # splits run the same code
            if (arch, config) not in seen:
                seen.add((arch, config))
                yield {"arch": arch, "M": M, "N": N, "K": K, "dtype": dtype}
    for arch, M in itertools.product(ARCHS, (DECODE, 32, 64, 128, 256, PREFILL)):
        yield {"arch": arch, "M": M, "ragged": True}
        yield {"arch": arch, "M": M, "bias": False}
        yield {"arch": arch, "M": M, "transposed": True}
        for dtype in DTYPES:
            yield {"arch": arch, "M": M, "N": 4097, "K": 2561, "dtype": dtype}


@pytest.mark.slow
@pytest.mark.parametrize("case", list(linear_cases()), ids=lambda case: "-".join(str(value) for value in case.values()))
def test_every_linear_fits(case: dict[str, Any]) -> None:
    assert_fits(case["arch"], compile_linear(**case))


@pytest.mark.slow
@every_arch
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [64, 128, 576, 2561, 4096, 65536])
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
def test_every_row_kernel_fits(arch: str, dtype: torch.dtype, D: int, ragged: bool) -> None:
    assert_fits(arch, compile_rows(arch, D, dtype, ragged))
