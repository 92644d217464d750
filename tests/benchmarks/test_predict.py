"""The model of the machine: what it reads from machine code, and what it makes of that."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("nothing is compiled in the interpreter", allow_module_level=True)

from benchmarks import __main__, predict, tables  # noqa: E402
from benchmarks.codegen import Compiled, product_loops, read  # noqa: E402
from benchmarks.gpus import GPUS  # noqa: E402
from benchmarks.machine import Cpu  # noqa: E402
from benchmarks.predict import Case, Work  # noqa: E402
from benchmarks.record import load  # noqa: E402

H100, H200, B200, MI300X = GPUS
GATE_UP = (19456, 2560)

# Two loops that multiply. The first is entered in its middle and has a part set apart at the end of the code. Within
# the second lies a loop that only waits, and its copy has an alternative. Around both is another.
SASS = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0020*/                   LDSM.16.M88.4 R4, [R2] ;
.L_x_2:
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0040*/              @!P0 BRA `(.L_x_6) ;
.L_x_3:
        /*0048*/              @!P4 BRA `(.L_x_8) ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R12.64] ;
.L_x_5:
        /*0060*/                   HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;
.L_x_4:
        /*0070*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R9], R5 ;
        /*0080*/              @!P1 BRA `(.L_x_4) ;
        /*0090*/                   BRA.U UP0, `(.L_x_3) ;
        /*00a0*/               @P2 BRA `(.L_x_0) ;
        /*00b0*/                   EXIT ;
.L_x_6:
        /*00c0*/                   I2F.S8 R5, R6 ;
        /*00d0*/               @P3 BRA `(.L_x_1) ;
        /*00e0*/                   BRA `(.L_x_3) ;
.L_x_8:
        /*00e8*/                   LDG.E.U16 R3, desc[UR4][R12.64] ;
        /*00f0*/                   STS.U16 [R3], R3 ;
        /*00f8*/                   BRA `(.L_x_5) ;
.L_x_7:
        /*0100*/                   BRA `(.L_x_7) ;
"""


def names(loop: list[str]) -> list[str]:
    return [instruction.split()[0].split(".")[0] for instruction in loop]


def test_loops_that_multiply_are_found_however_the_code_lies() -> None:
    assert len(read(SASS)[0]) == 20
    first, second = product_loops(SASS)
    assert names(first) == ["LDSM", "HMMA", "BRA", "I2F", "BRA"]
    assert names(second) == ["BRA", "LDGSTS", "HGMMA", "SYNCS", "BRA", "BRA"]  # not what runs instead of the copy


def test_amd_s_assembly_is_read_too() -> None:
    code = (
        "kernel:\n\ts_mov_b32 s0, 0\n.LBB0_1:\n\tds_read2_b64 v[0:3], v4\n\tv_mfma_f32_16x16x16_bf16 a[0:3], v[0:1]\n"
    )
    code += "\ts_cbranch_scc1 .LBB0_1\n; %bb.2:\n\ts_endpgm\n"
    assert [names(loop) for loop in product_loops(code)] == [
        ["ds_read2_b64", "v_mfma_f32_16x16x16_bf16", "s_cbranch_scc1"]
    ]


@pytest.mark.parametrize(
    ("instruction", "lane"),
    [
        ("LDS", 4), ("LDS.U8", 1), ("LDS.U16", 2), ("LDS.64", 8), ("LDS.128", 16), ("LDSM.16.M88.4", 16),
        ("LDSM.16.M88", 4), ("STSM.16.M88.2", 8), ("LDGSTS.E.BYPASS.128", 16), ("STS", 4), ("ds_read_u8", 1),
        ("ds_read_u16", 2), ("ds_read_b64", 8), ("ds_read2_b64", 16), ("ds_write2st64_b64", 16), ("ds_write_b16", 2),
        ("ds_read_b32", 4), ("ds_write_b8_d16_hi", 1),
    ],
)  # fmt: skip
def test_bytes_of_shared_memory(instruction: str, lane: int) -> None:
    assert predict.lane_bytes(instruction) == lane


def test_instructions_are_counted_by_the_pipe_that_takes_them() -> None:
    code = ["FFMA R1, R2, R3", "IMAD.WIDE R2", "LOP3.LUT R1", "F2FP.BF16.F32.PACK_AB R1", "I2F.S8 R1", "LDS.128 R4"]
    code += ["HGMMA.64x16x16.F32.BF16 R1", "UIADD3 UR4", "LDGDEPBAR", "LDGSTS.E.BYPASS.128 [R1]", "FFMA2 R2"]
    counts, cycles = predict.count(code, H200)
    assert {pipe: counts[pipe] for pipe in predict.PIPES} == {"fma": 3, "alu": 2, "convert": 1, "shared": 2}
    assert counts["other"] == 3
    expected = {"issue": 11 / 4, "fma": 0.25 + 0.5 + 0.5, "alu": 1.0, "convert": 2.0, "shared": 4 + 4}
    assert cycles == expected
    counts, cycles = predict.count(["v_mfma_f32_32x32x8_bf16 a[0:15]", "v_add_u32_e32 v1", "s_nop 0"], MI300X)
    assert (counts["alu"], counts["other"], cycles["alu"], cycles["issue"]) == (1, 2, 1.0, 0)


def test_the_longest_limit_is_of_the_processor_with_most_programs() -> None:
    work = Work(memory=4_800_000, l2=0, programs=133, loops=10, operations=8192)
    seconds = predict.times(work, 4, {"issue": 1.0, "fma": 0.5, "alu": 0, "convert": 0, "shared": 0}, H200)
    assert seconds["memory"] == pytest.approx(1e-6)
    assert seconds["issue"] == pytest.approx(2 * 4 * 10 / H200.clock)
    assert seconds["fma"] == seconds["issue"] / 2
    assert seconds["matrix"] == pytest.approx(2 * 2 / H200.clock)


def test_the_limits_are_those_of_the_data_sheets() -> None:
    peaks = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "MI300X": 1307e12}
    for gpu in GPUS:
        assert gpu.peak == pytest.approx(peaks[gpu.name], rel=0.002)


def test_blocks_that_fit_on_a_processor() -> None:
    def kernel(asm: dict[str, Any], shared: int, warps: int) -> Compiled:
        return Compiled("k", asm, shared, 0, 1, warps)

    sm_90 = kernel({"cubin": b""}, 30_000, 4)
    sm_90.__dict__["_resources"] = {"REG": 97, "STACK": 0, "LOCAL": 0}  # taken as 104
    assert predict.resident(sm_90, H200) == 65536 // (104 * 128)
    sm_90.shared = 100_000
    assert predict.resident(sm_90, H200) == 2
    gfx = kernel({"amdgcn": "    .agpr_count:     32\n    .vgpr_count:     96\n.private_segment_fixed_size: 0"}, 0, 4)
    assert (gfx.registers, gfx.spills) == (96, 0)  # which the 32 are part of
    assert predict.resident(gfx, MI300X) == 131072 // (96 * 64 * 4)


@pytest.mark.parametrize(("arch", "format"), [("sm_90", "pair"), ("sm_100", "int4"), ("gfx942", "pair")])
def test_the_loop_of_each_path_is_told_from_the_others(arch: str, format: str) -> None:
    for rows, paths in ((1, ("base", "both")), (4096, ("base", "blend", "both"))):
        case = Case("lerp_linear", "gate_up", *GATE_UP, rows, format, "distinct")
        kernel = predict.compiled(case, arch)
        loops = [predict.chosen(kernel, path, case) for path in paths]
        assert len({*map(tuple, loops)}) == len(paths)
        assert predict.matrix_work(loops[-1]) >= predict.matrix_work(loops[0])
        assert kernel.spills == 0
        assert len(kernel.machine_loops[0]) == min(map(len, kernel.products))


def test_a_kernel_of_another_shape_is_no_longer_told_apart() -> None:
    kernel = Compiled("kernel", {"amdgcn": "\ts_endpgm\n"}, 0, 0, 1, 4)
    with pytest.raises(ValueError, match=r"0 loops multiply, expected one for each of \['base', 'blend', 'both'\]"):
        predict.chosen(kernel, "base", Case("lerp_linear", "o", 64, 64, 1, "int4", "zero"))


def test_bytes_and_operations_of_a_product() -> None:
    n, k = GATE_UP
    decode = predict.work_of(Case("lerp_linear", "gate_up", n, k, 1, "pair", "distinct"), "sm_90")
    assert decode.memory == 4 * n * k + 2 * (n + k)
    assert decode.programs * decode.operations >= 2 * 2 * n * k  # both ends, and rows that only fill the tile
    one = predict.work_of(Case("lerp_linear", "gate_up", n, k, 4096, "pair", "identical"), "sm_90")
    mixed = predict.work_of(Case("lerp_linear", "gate_up", n, k, 4096, "pair", "distinct"), "sm_90")
    assert one.programs * one.operations == 2 * 4096 * n * k
    assert mixed.programs * mixed.operations == 2 * 2 * 4096 * n * k
    assert (one.tile[:10], mixed.tile[:10]) == ("256x128x64", "128x128x64")
    assert mixed.l2 > one.l2 > one.memory == mixed.memory
    split = predict.work_of(Case("lerp_linear", "", 512, 8192, 1, "pair", "zero"), "sm_90")
    assert split.l2 > 2 * 512 * 8192 + 2 * (512 + 8192)  # and the parts
    experts = predict.work_of(Case("lerp_experts", "", 1536, 2048, 1, "int8", "zero"), "sm_90")
    assert experts.memory == 8 * (2 * 1536 * 2048 + 2 * (1536 + 2048))  # eight experts


def test_the_route_that_is_taken_without_a_table_is_told_with_its_least_time() -> None:
    def told(rows: int, kind: str, gpu: Any = H100, format: str = "pair") -> tuple[str, float]:
        case = Case("lerp_linear", "gate_up", *GATE_UP, rows, format, kind)
        way, seconds = predict.by_route(case, gpu)
        return way.value, seconds / predict.merged(case, gpu)

    assert told(4096, "identical") == ("blend", pytest.approx(1 + 6 * 19456 * 2560 / 3.35e12 / 412.4e-6, rel=0.01))
    assert told(1, "identical")[0] == told(4096, "distinct")[0] == told(4096, "zero", format="w8d4")[0] == "kernel"
    way, ratio = told(4096, "distinct", B200)
    moved = 4 * 19456 * 2560 + 26 * 4096 * 19456
    assert (way, ratio) == ("products", pytest.approx(2 + moved / 8e12 / 181.3e-6, rel=0.01))


def test_the_cuda_kernel_s_work() -> None:
    n, k = GATE_UP
    work = predict.work_of(Case(predict.CUDA, "gate_up", n, k, 8, "pair", "distinct"), "sm_90")
    assert work.programs == n // 16
    assert work.programs * work.operations == 2 * 2 * 8 * n * k
    assert work.memory == 4 * n * k + 2 * 8 * (n + k)
    assert work.l2 == work.memory + 2 * 8 * k * (n // 16 - 1)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs CUDA's nvcc")
@pytest.mark.parametrize("format", ["pair", "int8", "int4", "w8d4"])
def test_the_cuda_kernel_is_counted(format: str) -> None:
    case = Case(predict.CUDA, "gate_up", *GATE_UP, 1, format, "distinct")
    row = predict.row(case, H200, None)
    assert row["spills"] == 0
    assert row["convert_instructions"] == 0  # codes become numbers under a power of two
    assert len(predict.compiled(case, "sm_90").products) == (3 if format == "pair" else 2)


def test_what_fails_costs_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = predict.row

    def fails(case: Case, *rest: Any) -> dict[str, object]:
        if case.format == "int8":
            raise ValueError("loops")
        return row(case, *rest)

    monkeypatch.setattr(predict, "row", fails)
    options = ["--gpus", "MI300X", "--layers", "o", "--rows", "1", "--lams", "zero", "--no-others"]
    assert predict.main([*options, "--formats", "pair", "int8", "--results", str(tmp_path)]) == 1
    assert [row["format"] for row in load(tmp_path / "predict.csv")] == ["pair"]
    assert "FAILED: MI300X: Case(kernel='lerp_linear', layer='o'" in capsys.readouterr().out


def test_it_prints_and_stores_predictions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(predict, "cuda_kernels", lambda arch: {})
    options = ["--gpus", "H200", "--layers", "o", "--formats", "pair", "--rows", "1", "--lams", "zero", "distinct"]
    assert __main__.main(["predict", *options, "--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Predicted from counts, not measured.\n\nH200 (sm_90), predicted:\n")
    rows = load(tmp_path / "predict.csv")
    assert {row["kernel"] for row in rows} == {*predict.kernels.__all__} - {"lerp_linears"}  # none needs nvcc here
    for row in rows:
        assert float(row["predicted_us"]) == max(float(row[f"{name}_us"]) for name in predict.LIMITS)
        assert row["predicted_us"] == row[f"{row['limit']}_us"]
        assert row["measured_us"] == ""
        assert row["command"].startswith("python -m benchmarks predict --gpus H200")


def test_on_a_gpu_the_measured_time_stands_beside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class StandIn(Cpu):
        cold_bytes = 2**18

        def stopwatch(self, call: Any, copies: int) -> Any:
            assert call(copies).shape == (4, 64)
            return lambda: 12.34e-6

    monkeypatch.setattr(predict, "Gpu", StandIn)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setitem(predict.LAYERS, "Qwen3-4B", {"o": (64, 512)})
    options = ["--layers", "o", "--formats", "int4", "--rows", "4", "--lams", "distinct", "--no-others"]
    assert predict.main([*options, "--gpus", "H100", "H200", "--results", str(tmp_path)]) == 0
    assert [(row["gpu"], row["measured_us"]) for row in load(tmp_path / "predict.csv")] == [
        ("H100", ""),
        ("H200", "12.34"),
    ]
    row = load(tmp_path / "predict.csv")[1] | {"predicted_us": "2.0", "merged_us": "1.0"}
    assert tables.told(row).startswith("2.00 (")
    assert tables.told(row).endswith("), measured 12.34")
