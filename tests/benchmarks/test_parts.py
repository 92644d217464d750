"""The parts run: small shapes, a few milliseconds, on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dami.generation import compiled

from benchmarks import __main__, decode, generate, host, lams, linear, measure, operators, shapes, step
from benchmarks.machine import Cpu
from benchmarks.record import load
from benchmarks.weights import FORMATS, Copies
from dami_kernels import cuda, lerp_linear, native
from dami_kernels.ops import library
from dami_kernels.tuning import H100
from tests.dami.test_patching import counting

pytestmark = [
    pytest.mark.skipif(native.WHY_NOT is not None, reason="the compiled part is missing"),
    pytest.mark.filterwarnings("default"),  # the parts turn the warnings that matter into errors themselves
]
KERNELS = [format for format in FORMATS if format != "lowrank"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "machine", Cpu)
    monkeypatch.setattr(Cpu, "cold_bytes", 2**18)
    monkeypatch.setattr(native, "peak_flops", lambda dtype: 1e11)
    monkeypatch.setitem(shapes.LAYERS, "square", {"3072": (96, 64)})
    monkeypatch.setattr(operators, "VOCABULARY", (500, 64))
    monkeypatch.setattr(operators, "EXPERT_LAYERS", {"down": (32, 64)})
    small = {"HIDDEN": 64, "INNER": 96, "VOCABULARY": 5000, "HEADS": 4, "KEY_HEADS": 2, "HEAD": 32}
    for name, value in small.items():
        monkeypatch.setattr(step, name, value)


def run(part: str, tmp_path: Path, *arguments: str) -> tuple[int, list[dict[str, str]]]:
    code = __main__.main([part, "--results", str(tmp_path), "--seconds", "0.01", *arguments])
    return code, load(tmp_path / f"{part}.csv")


def test_linear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = run("linear", tmp_path, "-m", "3", "--lams", *lams.KINDS)
    assert code == 0
    for kind in lams.KINDS:
        assert [row["format"] for row in rows if row["lam"] == kind and row["method"] == linear.OURS] == FORMATS
    rivals = {linear.MERGED, linear.TWO, linear.BLEND, linear.COPIES, linear.MERGED_FLOAT32}
    assert {row["method"] for row in rows} - {linear.HUGE} == {linear.OURS, *rivals}
    for row in rows:
        assert 0 < float(row["p10_ms"]) <= float(row["median_ms"]) <= float(row["p90_ms"])
        assert float(row["limit_ms"]) > 0
        assert (row["model"], row["n"], row["k"], row["m"], row["dtype"]) == ("square", "96", "64", "3", "bf16")
    assert "of the limit" in capsys.readouterr().out


@pytest.mark.parametrize("chosen", [False, True])
def test_few_rows_are_timed_with_the_kernel_that_is_not_chosen(
    chosen: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a GPU; here the CPU's kernels stand in for both."""
    kernels = pytest.importorskip("dami_kernels.triton")
    monkeypatch.setattr(linear, "has_cuda_kernel", lambda x: True)
    monkeypatch.setattr(cuda, "takes", lambda *_: chosen)
    monkeypatch.setattr(kernels if chosen else cuda, "lerp_linears" if chosen else "lerp_linear", native.lerp_linear)
    code, rows = run("linear", tmp_path, "-m", "3", "--lams", "distinct")
    assert code == 0
    other = linear.TRITON if chosen else linear.CUDA
    for method in (linear.OURS, other):
        assert {row["format"] for row in rows if row["method"] == method} >= {*KERNELS}
    assert {row["method"] for row in rows if row["format"]} - {linear.HUGE} == {linear.OURS, other}


def test_the_kernel_is_timed_beside_the_library_s_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, whose operator takes that route; tensors without memory stand for its."""
    pytest.importorskip("dami_kernels.triton")
    meta = torch.device("meta")
    monkeypatch.setattr(linear, "device_of", lambda _: H100)
    copies = Copies((19456, 2560), torch.bfloat16, meta, ["pair", "w8d4"], 1)

    def methods(rows: int, kind: str) -> list[tuple[str, str]]:
        x = torch.empty(rows, 2560, dtype=torch.bfloat16, device=meta)
        batch = lams.Lams(torch.rand(1), rows) if kind == "one" else lams.make(kind, rows)
        return [(method.name, method.format) for method in linear.ours(x, batch, copies, [])]

    ours = [(linear.OURS, "pair"), (linear.OURS, "w8d4")]
    assert methods(4096, "one") == [ours[0], (linear.TRITON, "pair"), ours[1]]
    assert methods(4096, "ragged") == methods(64, "one") == ours


def test_many_lams_are_not_asked_of_what_launches_each(tmp_path: Path) -> None:
    _, rows = run("linear", tmp_path, "-m", "65", "--lams", "distinct", "--formats", "pair")
    assert not {linear.BLEND, linear.COPIES} & {row["method"] for row in rows}


def test_the_head_sees_few_rows() -> None:
    options = measure.parser("linear", None).parse_args([])
    options.models, options.layers, options.rows, options.lams = ["Qwen3-4B"], ["lm_head", "o"], [16, 4096], ["zero"]
    assert [(case.layer, case.rows) for case in linear.cases(options)] == [("o", 16), ("o", 4096), ("lm_head", 16)]


def test_a_wrong_result_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def bad(x: torch.Tensor, weight: object, *rest: object, **more: object) -> torch.Tensor:
        return lerp_linear(x, weight, *rest, **more) * (1.01 if weight.format == "int4" else 1)  # type: ignore

    monkeypatch.setattr(linear, "lerp_linear", bad)
    code, rows = run("linear", tmp_path, "-m", "3", "--lams", "distinct")
    assert code == 1
    assert "int4" not in {row["format"] for row in rows}
    assert "int8" in {row["format"] for row in rows}
    assert "REFUSED: lerp_linear int4: error" in capsys.readouterr().out


def test_a_format_without_a_kernel_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object) -> None:
        raise NotImplementedError("no kernel today")

    monkeypatch.setattr(native, "lerp_linear", none)
    monkeypatch.setattr(torch.ops.dami, "lerp_linear", library.CHECKED["lerp_linear"])  # the dispatcher knows another
    with native.bypassed():
        code, rows = run("linear", tmp_path, "-m", "3", "--lams", "distinct", "zero")
    assert code == 0
    assert {row["format"] for row in rows} == {""}
    assert capsys.readouterr().out.count("int8: dami: dami::lerp_linear runs as plain torch") == 1  # asked but once


def test_checking_alone_times_nothing(tmp_path: Path) -> None:
    assert run("linear", tmp_path, "--check-only", "-m", "2") == (0, [])


def test_operators(tmp_path: Path) -> None:
    code, rows = run("operators", tmp_path, "-m", "2")
    assert code == 0
    found = {(row["operator"], row["format"]) for row in rows if row["format"]}
    assert found == {
        *(("experts", format) for format in KERNELS),
        *(("embedding", format) for format in FORMATS),
        ("rms_norm", "pair"),
        ("layer_norm", "pair"),
    }
    experts = {row["format"]: int(row["moved_bytes"]) for row in rows if row["operator"] == "experts"}
    assert experts["pair"] > experts["int8"] > experts["int4"] > experts["w8d4"]


def test_rows_of_a_routing_are_sorted_by_expert() -> None:
    offsets, token = operators.routing(5)
    assert offsets.shape == (128,)
    assert offsets[-1] == len(token) == 40
    assert bool((offsets.diff() >= 0).all())
    assert token.bincount().tolist() == [8] * 5


def test_step(tmp_path: Path) -> None:
    code, rows = run("step", tmp_path, "-m", "3", "--layers", "2")
    assert code == 0
    assert [row["format"] for row in rows if row["method"] == "lerp"] == KERNELS
    assert {row["method"] for row in rows} >= {"one merged model", "two merged models, half of the rows each"}
    one = next(row for row in rows if row["method"] == "one merged model")
    weights = 64 * (4 * 32 + 2 * 2 * 32 + 4 * 32 + 3 * 96)  # of a layer
    assert int(one["moved_bytes"]) == 2 * (2 * weights + 5000 * 64)


def test_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = __main__.main(["host", "--on", "cpu", "--results", str(tmp_path), "--seconds", "0.01", "--calls", "3"])
    rows = load(tmp_path / "host.csv")
    assert code == 0
    assert {row["case"] for row in rows} >= {"linear pair", "linear w8d4", "rms_norm", "a call of linear pair", "model"}
    assert all(0 < float(row["p10_us"]) <= float(row["median_us"]) <= float(row["p90_us"]) for row in rows)
    assert all(float(row["ratio"]) == 1 for row in rows if row["method"] == host.TORCH)
    assert "is anybody watching?" in capsys.readouterr().out


@pytest.mark.parametrize("missing", [False, True])
def test_host_of_launches_on_a_gpu(
    missing: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(host, "FORMATS", ("pair",))
    if missing:
        monkeypatch.setattr("shutil.which", lambda name: None)
    code = __main__.main(["host", "--on", "gpu", "--results", str(tmp_path), "--seconds", "0.01", "--calls", "3"])
    assert code == 0
    assert ("no launches on a GPU: they need Triton and a C compiler, cc" in capsys.readouterr().out) == missing
    if not missing:
        rows = load(tmp_path / "host.csv")
        operators = {row["case"].removeprefix(host.GPU).split()[0] for row in rows if row["method"] == host.OURS}
        assert operators == {"linear", "linears", "experts", "embedding", "rms_norm", "layer_norm"}
        assert {row["case"] for row in rows if row["method"] == "whole"} == {host.GPU_STEPS}


def test_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(generate.SHAPE, "vocab_size", 200)
    small = ["--layers", "1", "--batch", "2", "--dtypes", "fp32", "--formats", "pair", "--tokens", "2"]
    assert __main__.main(["generate", "--results", str(tmp_path), "--seconds", "0.01", *small]) == 0
    rows = load(tmp_path / "generate.csv")
    methods = ["plain", "pair, one λ", "pair, mixed λ", "plain, huge pages", "pair, mixed λ, huge pages"]
    assert [row["method"] for row in rows] in (methods, methods[:3])
    assert float(rows[0]["ratio"]) == 1
    for row in rows:  # a difference of two times, which for so few tokens may be below zero
        assert float(row["tokens_per_s"]) == pytest.approx(2e3 / float(row["median_ms"]), rel=0.2, abs=0.2)
    assert "tokens/s" in capsys.readouterr().out


def test_decode(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(generate.SHAPE, "vocab_size", 200)
    monkeypatch.setattr(compiled, "how", lambda device: {"backend": counting()[0], "fullgraph": True})
    small = ["--layers", "1", "--formats", "pair", "--tokens", "4"]
    assert __main__.main(["decode", "--results", str(tmp_path), "--seconds", "0.01", *small]) == 0
    rows = load(tmp_path / "decode.csv")
    by = {(row["method"], row["part"]): row for row in rows}
    methods = ["plain", "plain, compiled", "pair", "pair, compiled", "pair, compiled, huge pages"]
    found = list(dict.fromkeys(row["method"] for row in rows))
    assert found in (methods, methods[:4])
    assert float(by["plain", decode.STEP]["speedup"]) == 1
    parts = {decode.STEP, decode.LEAST, *decode.PARTS, decode.PYTHON}
    for method in found:
        assert {part for of, part in by if of == method} == parts
        assert bool(by[method, decode.STEP]["compile_s"]) == method.endswith("compiled")
        assert float(by[method, decode.LEAST]["ms"]) > 0
    assert float(by["pair, compiled", decode.LEAST]["ms"]) > float(by["plain", decode.LEAST]["ms"])
    assert float(by["plain", decode.GUARDS]["ms"]) == 0
    assert "tokens/s" in capsys.readouterr().out
