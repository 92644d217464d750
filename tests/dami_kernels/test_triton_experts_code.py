"""The machine code of `lerp_experts`, compiled for GPUs that are not there: registers, shared memory, instructions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("there is no machine code in the interpreter", allow_module_level=True)

from dami_kernels import triton as kernels  # noqa: E402
from dami_kernels.triton import experts, product  # noqa: E402
from tests.dami_kernels.test_triton_code import _fresh_cache, assert_fits, atomics, count  # noqa: E402, F401
from tests.dami_kernels.test_triton_experts_plan import DTYPES, FORMATS, SHAPES, TOKENS, Experts, plan  # noqa: E402
from tests.dami_kernels.triton_targets import DEVICES, Compiled, compiling_for, meta, stored  # noqa: E402
from tests.marks import slow  # noqa: E402

ARCHS = list(DEVICES)
QWEN, GPT_OSS = SHAPES[0], SHAPES[2]
DECODE, PREFILL = 1, 8192


def compile_experts(
    arch: str,
    tokens: int,
    shape: Experts = QWEN,
    dtype: torch.dtype = torch.bfloat16,
    format: str = "pair",
    ragged: bool = False,
    bias: bool = False,
    transposed: bool = False,
) -> list[Compiled]:
    E, _, N, K = shape
    M = tokens * shape.active
    row_to_lam = meta(M, dtype=torch.int32) if ragged else None
    biases = [meta(E, N, dtype=dtype)] * 2 if bias else []
    weight, offsets = stored(E, N, K, dtype=dtype, format=format, transposed=transposed), meta(E, dtype=torch.int32)
    rows = (meta(M, dtype=torch.float32), row_to_lam, 1)
    with compiling_for(arch) as launched:
        kernels.lerp_experts(meta(M, K, dtype=dtype), weight, biases, *rows, offsets, format, False)
    return launched


MMA = {
    "sm_80": {DECODE: "mma.sync.aligned.m16n8k16", PREFILL: "mma.sync.aligned.m16n8k16"},
    "sm_90": {DECODE: "wgmma.mma_async.sync.aligned.m64n16k16", PREFILL: "wgmma.mma_async.sync.aligned.m64n128k16"},
    "sm_100": {DECODE: "tcgen05.mma.cta_group::1.kind::f16", PREFILL: "tcgen05.mma.cta_group::1.kind::f16"},
    "gfx942": {DECODE: "v_mfma_f32_16x16x16_bf16", PREFILL: "v_mfma_f32_32x32x8_bf16"},
}


@pytest.mark.parametrize("arch", ["sm_90", "gfx942", *slow("sm_80", "sm_100")])
@pytest.mark.parametrize("tokens", [DECODE, PREFILL])
def test_fits_and_uses_tensor_cores(arch: str, tokens: int) -> None:
    launched = compile_experts(arch, tokens)
    assert_fits(arch, launched)
    assert MMA[arch][tokens] in launched[0].code
    assert ("buffer_load_dwordx4" if arch == "gfx942" else "cp.async.cg.shared.global") in launched[0].code
    assert atomics(launched[0]) <= {"global_atomic_add", "atom.global.gpu.acq_rel.add.u32"}  # the count of splits


def test_nothing_but_one_kernel_is_launched() -> None:
    launched = compile_experts("sm_90", 1, Experts(1, 1, 512, 4096))
    written = {name for name in vars(experts) | vars(product) if name.endswith("_kernel")}
    assert {kernel.name for kernel in launched} == written
    assert_fits("sm_90", launched)


@pytest.mark.parametrize("transposed", [True, *slow(False)], ids=["transposed", ""])
@pytest.mark.parametrize("arch", ["sm_90", *slow("sm_80")])
def test_a_blended_weight_stays_in_registers(arch: str, transposed: bool) -> None:
    """It is rounded two at a time, never stored, and multiplied from registers, wgmma's left operand included."""
    loops = compile_experts(arch, PREFILL, GPT_OSS, bias=True, transposed=transposed)[0].loops
    (blend,) = (loop for loop in loops if count(loop, r"cvt\.rn\.bf16x2\.f32"))
    assert not count(blend, r"st\.shared|stmatrix")
    if arch == "sm_90":
        from_registers = r"wgmma\.mma_async\S+ \{[^}]*\}, \{"
        assert count(blend, from_registers) == count(blend, r"wgmma\.mma_async") > 0


@pytest.mark.parametrize("arch", ["sm_90", *slow("sm_80")])
@pytest.mark.parametrize("transposed", [True, *slow(False)], ids=["transposed", ""])
def test_weights_stream_past_the_registers(arch: str, transposed: bool) -> None:
    """Every loop copies global to shared memory asynchronously, 16 bytes a thread, and loads nothing else."""
    for tokens in (DECODE, PREFILL):
        kernel = compile_experts(arch, tokens, GPT_OSS, bias=True, transposed=transposed)[0]
        assert len(kernel.loops) == (3 if tokens == DECODE else 4)
        assert all(count(loop, r"cp\.async\.cg\.shared\.global") for loop in kernel.loops)
        assert not any(count(loop, r"ld\.global|cp\.async\.ca") for loop in kernel.loops)


def test_a_new_batch_compiles_nothing() -> None:
    first = compile_experts("sm_90", 1)[0]
    assert compile_experts("sm_90", 7)[0].asm is first.asm


def test_programs_are_as_many_as_any_routing_needs() -> None:
    """A pure function of the shapes: the offsets here have no values at all."""
    config = plan(64, QWEN)
    tiles = (64 * 8 + 129 * (config.block_m - 1)) // config.block_m
    assert compile_experts("sm_90", 64)[0].programs == tiles * QWEN.N // config.block_n


def cases() -> Iterator[dict[str, Any]]:
    """Every tile the plan takes for the models, in every format, and the variants that compile to different code."""
    kinds = [*((dtype, "pair") for dtype in DTYPES), *((torch.bfloat16, format) for format in FORMATS[1:])]
    for (dtype, format), arch in itertools.product(kinds, ARCHS):
        seen = set()
        for shape, tokens in itertools.product(SHAPES, TOKENS):
            config = replace(plan(tokens, shape, dtype, format, DEVICES[arch]), split_k=1)
            key = (config, shape.K % config.block_k == 0)
            if key not in seen:
                seen.add(key)
                yield {"arch": arch, "tokens": tokens, "shape": shape, "dtype": dtype, "format": format}
    for arch, tokens in itertools.product(ARCHS, (DECODE, 256, 1024, PREFILL)):
        yield {"arch": arch, "tokens": tokens, "ragged": True}
        yield {"arch": arch, "tokens": tokens, "shape": GPT_OSS, "bias": True, "transposed": True}
        for dtype in DTYPES:
            yield {"arch": arch, "tokens": tokens, "shape": Experts(5, 2, 1025, 513), "dtype": dtype}


@pytest.mark.slow
@pytest.mark.parametrize("case", list(cases()), ids=lambda case: "-".join(str(value) for value in case.values()))
def test_every_expert_fits(case: dict[str, Any]) -> None:
    assert_fits(case["arch"], compile_experts(**case))
