"""The C++ of the CPU kernels by itself: under the sanitizers, for ARM in an emulator, and as the linker sees it."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

CPU = Path(__file__).resolve().parents[2] / "csrc" / "cpu"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512_BF16 = [*AVX512, "-mavx512bf16", "-mavx512vnni"]
X86 = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": AVX512_BF16,
    "amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
}
PLAIN = ["isa", "operators", "parallel", "scalar"]

pytestmark = pytest.mark.slow


def compile(compiler: str, directory: Path, isas: dict[str, list[str]], *flags: str) -> list[Path]:
    sources = {CPU / f"{name}.cpp": isas.get(name, []) for name in (*PLAIN, *isas)}
    sources[Path(__file__).with_name("native_check.cpp")] = []
    objects = [directory / f"{source.stem}.o" for source in sources]
    for (source, isa), to in zip(sources.items(), objects, strict=True):
        always = ["-std=c++17", "-ffp-contract=off", "-c", str(source), "-o", str(to)]
        subprocess.run([compiler, *always, *isa, *flags], check=True)
    return objects


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="needs g++ on x86-64")
def test_nothing_is_read_or_written_where_it_must_not_be(tmp_path: Path) -> None:
    sanitize = "-fsanitize=address,undefined"
    objects = compile("g++", tmp_path, X86, "-O1", sanitize, "-fno-sanitize-recover=undefined")
    program = tmp_path / "check"
    subprocess.run(["g++", sanitize, *objects, "-o", program, "-pthread", "-ldl"], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif(
    not shutil.which("aarch64-linux-gnu-g++") or not shutil.which("qemu-aarch64"),
    reason="needs a compiler for ARM and an emulator: apt install g++-aarch64-linux-gnu qemu-user",
)
def test_neon(tmp_path: Path) -> None:
    objects = compile("aarch64-linux-gnu-g++", tmp_path, {"neon": []}, "-O3")
    program = tmp_path / "check"
    subprocess.run(["aarch64-linux-gnu-g++", "-static", *objects, "-o", program, "-pthread"], check=True)
    result = subprocess.run(["qemu-aarch64", program], capture_output=True, text=True)
    assert "neon: 0 wrong" in result.stdout, result.stdout + result.stderr


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="needs g++ on x86-64")
def test_no_code_of_one_instruction_set_can_replace_that_of_another(tmp_path: Path) -> None:
    """A weak symbol would: the linker keeps one of them, and that could be one the machine cannot run."""
    compile("g++", tmp_path, X86, "-O3")
    for name in X86:
        symbols = subprocess.run(
            ["nm", "-C", tmp_path / f"{name}.o"], check=True, capture_output=True, text=True
        ).stdout
        assert not [line for line in symbols.splitlines() if " W " in line]


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="needs g++ on x86-64")
@pytest.mark.parametrize(
    ("isa", "right", "wrong", "error"),
    [
        ("scalar", "Vec zero()", "Vec nothing()", "zero"),
        ("scalar", "tile_m = 2", "tile_m = 7", "tile_m: rows of x in a register tile"),
        ("scalar", "W = 4", "W = 12", "W: float32 lanes, of which two vectors divide a group"),
        ("scalar", "Vec load_odd(const bf16* p) {", "float load_odd(const bf16* p) {", "load_odd(bfloat16)"),
        ("scalar", "Vec load_even(const uint8_t* p)", "int load_even(const uint8_t* p)", "load_even(codes)"),
        ("avx2", "friend Vec max(", "friend Vec larger(", "max"),
        ("avx2", "any_rows = true;", "any_rows = 1, more = 0;", ""),  # harmless: what a contract does not name is free
        ("avx2", "const int16_t* x, const Operand& w", "const float* x, const Operand& w", "multiply_add"),
        ("avx512", "Operand partial_operand(", "Operand some(", "partial_operand"),
        ("avx512_bf16", "step = 32, parts = 1", "step = 64, parts = 1", "step: in bytes"),
        ("avx512_bf16", "parts = 1", "parts = 3", "parts: in which a step is loaded"),
    ],
)
def test_a_vector_or_dot_that_breaks_its_contract_does_not_compile(
    tmp_path: Path, isa: str, right: str, wrong: str, error: str
) -> None:
    """And the compiler says which of its promises is broken."""
    texts = {
        name: (CPU / name).read_text() for name in (f"{isa}.cpp", "avx512.h", "avx512_bf16.h")
    }  # what a Dot may be written in
    assert any(right in text for text in texts.values())
    for name, text in texts.items():
        (tmp_path / name).write_text(text.replace(right, wrong))
    command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{CPU}", *X86.get(isa, []), tmp_path / f"{isa}.cpp"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode == 0) == (error == "")
    assert error in result.stderr
