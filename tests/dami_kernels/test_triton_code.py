"""The Triton kernels' machine code, compiled for GPUs that are not there: registers, shared memory, instructions."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("there is no machine code in the interpreter", allow_module_level=True)

from benchmarks.shapes import LAYERS  # noqa: E402
from dami_kernels import formats  # noqa: E402
from dami_kernels import triton as kernels  # noqa: E402
from dami_kernels.triton import embedding, linear, norms, product  # noqa: E402
from dami_kernels.tuning import LinearConfig, Route, linear_candidates, linear_config, load_table  # noqa: E402
from dami_kernels.tuning.tables import TABLES  # noqa: E402
from tests.dami_kernels.test_triton_plan import DTYPES, ROWS, SHAPES  # noqa: E402
from tests.dami_kernels.triton_targets import DEVICES, Compiled, compiling_for, meta, stored  # noqa: E402
from tests.marks import slow  # noqa: E402

ARCHS = list(DEVICES)
FORMATS = ["pair", "int8", "int4", "w8d4"]
every_arch = pytest.mark.parametrize("arch", ARCHS)
two_archs = pytest.mark.parametrize("arch", ["sm_90", "gfx942", *slow("sm_80", "sm_100")])
one_arch = pytest.mark.parametrize("arch", ["sm_90", *slow("sm_80", "sm_100", "gfx942")])
every_format = pytest.mark.parametrize("format", FORMATS)
codes_of_both_sizes = pytest.mark.parametrize("format", ["int8", "w8d4", *slow("int4")])
DECODE, PREFILL = 1, 4096
QKV = (4096, 1024, 1024)


@pytest.fixture(autouse=True, scope="module")
def _fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for this module, so that each kernel is compiled once, by this checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.cache, "dir", str(tmp_path_factory.mktemp("triton")))
        yield


def compile_linear(
    arch: str,
    M: int,
    N: int | tuple[int, ...] = 4096,
    K: int = 2560,
    dtype: torch.dtype = torch.bfloat16,
    format: str = "pair",
    invariant: bool = False,
    ragged: bool = False,
    bias: bool = True,
    transposed: bool = False,
    rows_per_lam: int | None = None,
) -> list[Compiled]:
    """`lerp_linear`, or `lerp_linears` if N is the features of several weights; of one λ if nothing else is said."""
    sizes = N if isinstance(N, tuple) else (N,)
    weights = [part for N in sizes for part in stored(N, K, dtype=dtype, format=format, transposed=transposed)]
    biases = [end for N in sizes for end in [meta(N, dtype=dtype)] * 2] if bias else []
    rows = (meta(M, dtype=torch.float32), meta(M, dtype=torch.int32) if ragged else None, rows_per_lam or M)
    kernel = kernels.lerp_linears if isinstance(N, tuple) else kernels.lerp_linear
    with compiling_for(arch) as launched, patch.object(linear, "route", lambda *_: Route.KERNEL):
        kernel(meta(M, K, dtype=dtype), weights, biases, *rows, format, invariant)
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


@two_archs
def test_every_kernel_fits(arch: str) -> None:
    """No spills, and no more shared and tensor memory than the device has; and no kernel is forgotten here."""
    launched = compile_rows(arch, 2560)
    launched += compile_linear(arch, DECODE)
    launched += compile_linear(arch, DECODE, N=512)
    launched += compile_linear(arch, PREFILL)
    launched += compile_linear(arch, PREFILL, dtype=torch.float32)
    assert_fits(arch, launched)
    modules = (embedding, linear, norms, product)
    written = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {kernel.name for kernel in launched} == written


@pytest.mark.parametrize(("D", "budgets"), [(2560, (750, 1200)), (8192, (750, 1210))])
def test_a_norm_loads_everything_before_its_warps_wait_for_each_other(D: int, budgets: tuple[int, int]) -> None:
    """On sm_90. The slow paths of a square root and a division are among the instructions, but rarely taken."""
    rms_norm, _, layer_norm, _ = compile_rows("sm_90", D)
    for norm, budget in zip((rms_norm, layer_norm), budgets, strict=True):
        assert len(norm.instructions) <= budget
        loads = [i for i, instruction in enumerate(norm.instructions) if "LDG" in instruction]
        barriers = [i for i, instruction in enumerate(norm.instructions) if "BAR" in instruction]
        assert loads[-1] < barriers[0]


@one_arch
@pytest.mark.parametrize("format", ["pair", "w8d4", *slow("int8", "int4")])
def test_an_embedding_of_less_than_a_group_fits(arch: str, format: str) -> None:
    """Codes come in whole groups of 32, whatever the number of columns."""
    with compiling_for(arch) as launched:
        for D in (1, 16):
            rows = (meta(9, dtype=torch.float32), None, 1)
            kernels.lerp_embedding(
                meta(9, dtype=torch.int64), stored(50, D, format=format), *rows, format, torch.bfloat16, D
            )
    assert_fits(arch, launched)


MMA = {
    "sm_80": {DECODE: "mma.sync.aligned.m16n8k16", PREFILL: "mma.sync.aligned.m16n8k16"},
    "sm_90": {DECODE: "mma.sync.aligned.m16n8k16", PREFILL: "wgmma.mma_async.sync.aligned.m64n256k16"},
    "sm_100": {DECODE: "mma.sync.aligned.m16n8k16", PREFILL: "tcgen05.mma.cta_group::1.kind::f16"},
    "gfx942": {DECODE: "v_mfma_f32_16x16x16_bf16", PREFILL: "v_mfma_f32_32x32x8_bf16"},
}


@one_arch
@pytest.mark.parametrize("M", [DECODE, PREFILL])
@codes_of_both_sizes
def test_codes_of_several_weights_are_multiplied_on_tensor_cores(arch: str, M: int, format: str) -> None:
    launched = compile_linear(arch, M, QKV, format=format)
    assert_fits(arch, launched)
    assert MMA[arch][M] in launched[0].code


@one_arch
def test_an_invariant_kernel_of_several_weights_never_blends(arch: str) -> None:
    launched = compile_linear(arch, PREFILL, QKV, invariant=True)
    assert_fits(arch, launched)
    assert re.search(r"mma\.sync|wgmma|tcgen05\.mma|v_mfma", launched[0].code)
    if arch in ("sm_80", "sm_90"):  # whose loops are found
        assert sum("mma" in loop for loop in launched[0].loops) == 3  # the base, the target and both


@one_arch
def test_float32_is_not_rounded_to_tf32(arch: str) -> None:
    code = compile_linear(arch, PREFILL, dtype=torch.float32)[0].code
    assert "tf32" not in code
    assert ("v_mfma_f32_32x32x2_f32" if arch == "gfx942" else "fma.rn.f32") in code


@pytest.mark.parametrize("M", [DECODE, PREFILL])
def test_float32_sums_every_step_by_itself(M: int) -> None:
    """The compiler likes to fold zeros + a sum into one chain over all of K, whose error grows with K."""
    code = compile_linear("sm_90", M, dtype=torch.float32)[0].asm["ttgir"]
    zeros = set(re.findall(r"(%\w+) = arith.constant dense<0.0+e\+00>", code))
    sums = re.findall(r"tt\.dot %\w+, %\w+, (%\w+)", code)
    assert sums
    assert set(sums) <= zeros


@pytest.mark.parametrize("M", [DECODE, *slow(PREFILL)])
def test_codes_in_float32_are_not_rounded_to_tf32(M: int) -> None:
    """On sm_100, where Triton would do so with 4 or 8 warps."""
    launched = compile_linear("sm_100", M, dtype=torch.float32, format="int8")
    assert_fits("sm_100", launched)
    assert "tf32" not in launched[0].code


def count(loop: str, instruction: str) -> int:
    return len(re.findall(rf"^\s*(?:@!?%p\d+ )?{instruction}", loop, re.MULTILINE))


@pytest.mark.parametrize("arch", ["sm_90", *slow("sm_80")])
def test_only_mixed_tiles_multiply_twice(arch: str) -> None:
    """A prefill kernel has four loops that multiply: base, target, their blend, and both, with twice the instructions.

    Other loops sum the splits of K.
    """
    mma = r"wgmma\.mma_async" if arch == "sm_90" else r"mma\.sync"
    counts = sorted(filter(None, (count(loop, mma) for loop in compile_linear(arch, PREFILL)[0].loops)))
    assert counts == [counts[0]] * 3 + [2 * counts[0]]
    counts = sorted(filter(None, (count(loop, mma) for loop in compile_linear(arch, 128)[0].loops)))
    assert counts == [counts[0]] * 2 + [2 * counts[0]]


@pytest.mark.parametrize("arch", ["sm_90", *slow("sm_80")])
@pytest.mark.parametrize("ragged", [False, *slow(True)], ids=["padded", "ragged"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, *slow(torch.float16)], ids=str)
def test_a_blended_weight_stays_in_registers(arch: str, ragged: bool, dtype: torch.dtype) -> None:
    """It is rounded two at a time, never stored, and multiplied from registers, wgmma's left operand included."""
    pack = rf"cvt\.rn\.{'bf16' if dtype == torch.bfloat16 else 'f16'}x2\.f32"
    (blend,) = (
        loop for loop in compile_linear(arch, PREFILL, dtype=dtype, ragged=ragged)[0].loops if count(loop, pack)
    )
    assert multiplies_from_registers(arch, blend)


@pytest.mark.parametrize("arch", ["sm_90", *slow("sm_80")])
@pytest.mark.parametrize("M", [DECODE, PREFILL])
@codes_of_both_sizes
def test_codes_stay_in_registers(arch: str, M: int, format: str) -> None:
    """What they stand for is computed where it is multiplied, in every loop but that of a base that has no codes."""
    loops = compile_linear(arch, M, QKV, format=format)[0].loops
    if M == DECODE:
        assert len(loops) == 2
        assert not any(count(loop, r"st\.shared|stmatrix|ld\.global|cvt\.rn") for loop in loops)
        return
    assert len(loops) == 3  # the base, its blend with the delta if there is one, and both
    with_codes = [loop for loop in loops if count(loop, r"(?:fma|mul|sub)\S*\.(?:f32|bf16x2)")]
    assert len(with_codes) == len(loops) - (format != "w8d4")  # of which both ends are codes
    assert all(multiplies_from_registers(arch, loop) for loop in with_codes)


def multiplies_from_registers(arch: str, loop: str) -> bool:
    """Whether nothing is stored to shared memory, and the left operand of wgmma is no address."""
    stored = count(loop, r"st\.shared|stmatrix")
    if arch == "sm_80":  # whose mma knows nothing else
        return not stored
    return not stored and count(loop, r"wgmma\.mma_async\S+ \{[^}]*\}, \{") == count(loop, r"wgmma\.mma_async") > 0


# Instructions of a warp for 128 columns where rows differ in λ, of 8 and of 16 rows, and 64 features; 32 for a `pair`.
# On gfx942 nothing is multiplied by group.
DECODE_BUDGETS = {
    "sm_80": {"pair": (110, 110), "int8": (256, 290), "int4": (228, 288), "w8d4": (358, 442)},
    "sm_90": {"pair": (116, 116), "int8": (242, 284), "int4": (212, 260), "w8d4": (288, 276)},
    "sm_100": {"pair": (115, 115), "int8": (270, 300), "int4": (224, 264), "w8d4": (280, 354)},
    "gfx942": {"pair": (116, 116), "int8": (330, 330), "int4": (335, 335), "w8d4": (560, 560)},
}


@one_arch
@pytest.mark.parametrize(
    ("format", "rows"),
    [*((format, 8) for format in FORMATS), ("w8d4", 16), *slow(*((format, 16) for format in FORMATS[:3]))],
)
def test_a_decode_step_stays_within_its_budget(arch: str, format: str, rows: int) -> None:
    """Of instructions, four of which a multiprocessor issues in a cycle, and of registers: three programs at a time."""
    kernel = compile_linear(arch, rows, format=format, bias=False)[0]
    assert_fits(arch, [kernel])
    columns = linear_config(rows, 4096, 2560, torch.bfloat16, format, DEVICES[arch]).block_k
    assert max(map(len, kernel.machine_loops)) <= DECODE_BUDGETS[arch][format][rows // 16] * columns / 128
    if arch != "gfx942" and rows == 8:
        assert kernel.registers <= 168


@pytest.mark.parametrize(
    ("rows", "format", "N", "share"),
    [
        (64, "w8d4", 4096, 0.405),
        (64, "w8d4", 16384, 0.39),
        *slow(
            (32, "w8d4", 4096, 0.385),
            (32, "w8d4", 65536, 0.375),
            *((64, "int8", N, 0.214) for N in (4096, 16384)),
            *((64, "int4", N, 0.25) for N in (4096, 16384)),
        ),
    ],
)
def test_reading_takes_longer_than_decoding(rows: int, format: str, N: int, share: float) -> None:
    """From 17 rows up to 64, in tiles of 64 or 128 features: instructions, as a share of what an H200 issues while it
    reads the step's weights, at 18.6 bytes a cycle and multiprocessor."""
    kernel = compile_linear("sm_90", rows, N=N, format=format, bias=False)[0]
    assert_fits("sm_90", [kernel])
    config = linear_config(rows, N, 2560, torch.bfloat16, format, DEVICES["sm_90"])
    read = config.block_n * config.block_k * formats.matrices(format).bytes_per_weight(torch.bfloat16) / 18.6
    both = kernel.machine_loops[-1]
    assert len(both) * config.num_warps / 4 <= share * read
    assert not [part for part in both if re.match(r"I2F|F2F|F2FP", part)]  # no conversion, which is slow
    assert not [
        part for part in both if re.match(r"LDS\.(U|S)8|LDSM|STS", part)
    ]  # codes are read sixteen bytes at a time


@pytest.mark.parametrize("format", ["w8d4", *slow("int8", "int4")])
def test_rows_of_many_lams_read_the_codes_once_for_256_of_them(format: str) -> None:
    """On sm_90, where one product of both ends as 128 features by 256 rows has its sums in registers."""
    kernel = compile_linear("sm_90", PREFILL, format=format, rows_per_lam=1, bias=False)[0]
    assert_fits("sm_90", [kernel])
    wide = [loop for loop in kernel.products if any(part.startswith("HGMMA.64x256x16") for part in loop)]
    assert len(wide) == 1
    assert len(wide[0]) <= 185  # of 512, in which eight warps keep the matrix unit busy for 1024 cycles
    assert not [part for part in wide[0] if part.startswith("STS")]  # codes do not go through shared memory


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", *slow("sm_100")])
def test_a_kernel_waits_for_the_last_one_and_asks_for_its_weights_before(arch: str) -> None:
    """Programmatic dependent launch: what precedes the wait reads nothing that an earlier kernel may have written."""
    (product,) = compile_linear(arch, DECODE, N=512)  # of which K is split
    norm = compile_rows(arch, 2560)[0]
    for kernel in (product, norm):
        before, wait, after = kernel.code.partition("griddepcontrol.wait")
        assert bool(wait) == (arch != "sm_80")
        if wait:
            assert not re.search(r"\b(ld|st|atom|red)\.global|cp\.async", before)
            assert "griddepcontrol.launch_dependents" in after
            assert "prefetch.global.L2" in before
            assert "prefetch" not in after
    if arch != "sm_80":  # which has no such instruction
        assert "griddepcontrol" not in compile_linear(arch, PREFILL)[0].code


@pytest.mark.parametrize(
    ("format", "dtype"),
    [
        ("int8", torch.bfloat16),
        ("int4", torch.float16),
        *slow(("int8", torch.float16), ("int4", torch.bfloat16)),
    ],
    ids=str,
)
def test_codes_become_numbers_by_few_instructions(format: str, dtype: torch.dtype) -> None:
    """64 codes a thread: by shifts and LOP3, those that read x in order and find addresses included."""
    kernel = compile_linear("sm_90", DECODE, format=format, dtype=dtype, bias=False)[0]
    base, both = kernel.machine_loops  # the shortest first

    def converting(loop: list[str]) -> int:
        return sum(bool(re.match(r"LOP3|SHF|PRMT|HADD2|HMUL2|HFMA2|I2F|F2F", part)) for part in loop)

    is_scaled_up = format == "int8" and dtype == torch.bfloat16  # by an instruction for two codes
    assert converting(both) - converting(base) <= (1.5 if is_scaled_up else 1.2) * 64
    assert not [part for part in both if re.match(r"I2F|F2F|HADD2|HMUL2" + ("" if is_scaled_up else "|HFMA2"), part)]


@pytest.mark.parametrize("format", ["pair", *slow("int8", "int4", "w8d4")])
def test_a_blended_weight_goes_to_tensor_memory(format: str) -> None:
    """On sm_100 tcgen05 takes its left operand, in square brackets, from there."""
    kernel = compile_linear("sm_100", PREFILL, 4096 if format == "pair" else QKV, format=format)[0]
    assert re.search(r"tcgen05\.mma\S+ \[[^]]*\], \[", kernel.code)
    assert "tcgen05.st.sync" in kernel.code


@one_arch
def test_weights_stream_past_the_registers(arch: str) -> None:
    """On NVIDIA every loop copies global to shared memory asynchronously, 16 bytes a thread, and loads nothing else."""
    if arch == "gfx942":
        assert "buffer_load_dwordx4" in compile_linear(arch, DECODE)[0].code
        return
    for M in (DECODE, PREFILL):
        kernel = compile_linear(arch, M)[0]
        assert "cp.async.cg.shared.global" in kernel.code
        assert not any(count(loop, r"ld\.global") for loop in kernel.loops)


def atomics(kernel: Compiled) -> set[str]:
    return set(re.findall(r"^\s*(?:@\S+ )?((?:atom|red)\.\S+|\w*_atomic_\w+)", kernel.code, re.MULTILINE))


@one_arch
def test_nothing_is_atomic_but_the_count_of_splits(arch: str) -> None:
    """No sum is, whose order would then be another in every run."""
    (split,) = compile_linear(arch, DECODE, N=512)
    assert atomics(split) == {"global_atomic_add" if arch == "gfx942" else "atom.global.gpu.acq_rel.add.u32"}
    for kernel in [*compile_linear(arch, PREFILL), *compile_rows(arch, 2560)]:
        assert not atomics(kernel)


def test_the_parts_of_an_invariant_prefill_are_bounded() -> None:
    """It splits K as it does for one row. At most 32 MB of parts are in memory, however many rows there are."""
    config = linear_config(1, 2560, 9728, torch.bfloat16, "pair", DEVICES["sm_90"], True)
    launched = compile_linear("sm_90", 8192, 2560, 9728, invariant=True)
    assert config.split_k > 1 < len(launched)
    assert all(kernel.programs * config.block_m * config.block_n * 4 <= 32 << 20 for kernel in launched)
    tiles = 8192 // config.block_m * (2560 // config.block_n)
    assert sum(kernel.programs for kernel in launched) == tiles * config.split_k


def test_a_new_batch_compiles_nothing() -> None:
    """Not its size, within one tile's sizes, nor its rows per λ, up to 255 and from there on."""
    for batches in (((4096, 1), (4097, 1), (5000, 16)), ((4096, 4096), (16384, 512))):
        assert len({id(compile_linear("sm_90", M, rows_per_lam=rows)[0].asm) for M, rows in batches}) == 1


def test_the_log_tells_what_is_compiled_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "dami_kernels"):
        for _ in range(2):
            compile_linear("gfx942", DECODE, N=64, K=64, format="int4", bias=False)
    (line,) = caplog.messages
    assert re.match(
        r"compiled _lerp_linear_kernel for gfx942 in \d+\.\d s: x=\*bf16, BASE_BITS=0, SECOND_BITS=4, EVEN_K=", line
    )
    assert "num_warps=4" in line


# The GPU of a table of measurements, by what its name holds.
ARCH_OF = {"A100": "sm_80", "H100": "sm_90", "H200": "sm_90", "GH200": "sm_90", "B200": "sm_100", "MI300": "gfx942"}
# Rows of K = 5120 + 0, 16 or 1 numbers: whole tiles, a part of one, and rows that are not aligned.
REMAINDERS = (0, 16, 1)


def remainder(K: int, config: LinearConfig) -> int:
    return 1 if K % 16 else 16 if K % config.block_k else 0


def configurations(arch: str, dtype: torch.dtype, format: str) -> Iterator[tuple[int, LinearConfig]]:
    """All that the plan takes, for the models here and in the benchmarks, all that is timed to find a table for those,
    and all that is in the tables that there are; with the remainder of K. bfloat16 stands for float16 too."""
    layers = sorted({shape for layers in LAYERS.values() for shape in layers.values()})
    of = (dtype, format, DEVICES[arch])
    for (N, K), M, invariant in itertools.product([*SHAPES, *layers], ROWS, (False, True)):
        config = linear_config(M, N, K, *of, invariant)
        yield remainder(K, config), config
    if dtype == torch.bfloat16:
        for (N, K), M in itertools.product(layers, (1, 16, 32, 64, 128, 512, 2048, 8192)):
            for config in linear_candidates(M, N, K, *of):
                yield remainder(K, config), config
    for path in TABLES.glob("*.json"):
        if arch == next(arch for name, arch in ARCH_OF.items() if name in path.name):
            for entry in itertools.chain(*load_table(path.stem).values()):
                if (entry.dtype, entry.format) == (dtype, format):
                    yield remainder(entry.K, entry.config), entry.config


@pytest.mark.slow
@every_arch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@every_format
def test_every_configuration_fits(arch: str, dtype: torch.dtype, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found in the test: to find them all, as parameters would, takes each run of the suite seconds."""
    faults = []
    for rest, config in dict.fromkeys((K, replace(each, split_k=1)) for K, each in configurations(arch, dtype, format)):
        monkeypatch.setattr(linear, "linear_config", lambda *_, config=config: config)
        try:
            launched = compile_linear(arch, PREFILL, (4096, 1024), 5120 + rest, dtype, format)
            assert_fits(arch, launched)
            assert "tf32" not in launched[0].code
        except Exception as fault:
            faults.append((rest, config, fault))
    assert not faults


def variants() -> Iterator[dict[str, Any]]:
    """Operands that compile to different code."""
    for arch, M, format in itertools.product(ARCHS, (DECODE, 128, PREFILL), FORMATS):
        yield {"arch": arch, "M": M, "format": format, "ragged": True}
        yield {"arch": arch, "M": M, "format": format, "bias": False}
        yield {"arch": arch, "M": M, "format": format, "dtype": torch.float16}
    for arch, M in itertools.product(ARCHS, (DECODE, 32, 64, 128, 256, PREFILL)):
        yield {"arch": arch, "M": M, "transposed": True}


@pytest.mark.slow
@pytest.mark.parametrize("case", list(variants()), ids=lambda case: "-".join(str(value) for value in case.values()))
def test_every_variant_fits(case: dict[str, Any]) -> None:
    assert_fits(case["arch"], compile_linear(**case))


@pytest.mark.slow
@every_arch
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [64, 128, 576, 2561, 4096, 65536])
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
def test_every_row_kernel_fits(arch: str, dtype: torch.dtype, D: int, ragged: bool) -> None:
    assert_fits(arch, compile_rows(arch, D, dtype, ragged))
