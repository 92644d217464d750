"""The CUDA kernels' machine code, compiled for GPUs that are not there: registers, copies, matrix instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")  # which brings a disassembler

from benchmarks.codegen import product_loops, with_file  # noqa: E402
from dami_kernels.tuning import cuda as tuning  # noqa: E402
from tests.dami_kernels.cuda_on_cpu import DECODE, FORMATS  # noqa: E402
from tests.dami_kernels.test_triton_plan import DEVICES  # noqa: E402

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs CUDA's nvcc")
every_arch = pytest.mark.parametrize(
    "arch", ["sm_90", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("sm_80", "sm_100"))]
)
ENCODINGS = {"pair": ("Numbers", "Numbers"), "int8": ("Numbers", "Codes8"), "int4": ("Numbers", "Codes4")}
ENCODINGS["w8d4"] = ("Codes8", "Codes4")
# Of a step of 16 features by 128 weights, 16 bytes a lane.
COPIES = {"Numbers": 8, "Codes8": 4, "Codes4": 2}


@dataclass
class Kernel:
    resources: str  # what the assembler says of it
    code: str

    @property
    def loops(self) -> list[str]:
        """The innermost loops that multiply."""
        return ["\n".join(loop) for loop in product_loops(self.code)]


@cache
def kernels(arch: str) -> dict[tuple[str, str], Kernel]:
    """By (type, format)."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/decode.cubin"
        options = ["-std=c++17", "-O3", "-cubin", "-Xptxas", "-v", f"-arch={arch}"]
        said = subprocess.run(["nvcc", *options, DECODE, "-o", cubin], check=True, capture_output=True, text=True)
        code = with_file(Path(cubin).read_bytes(), triton.knobs.nvidia.nvdisasm.path, "-c")
    resources = re.findall(r"Compiling entry function '(\w+)'[^\n]*\n(.*?Used[^\n]*)", said.stderr, re.DOTALL)
    found = {}
    for name, resource in resources:
        body = re.search(rf"^\.text\.{name}:\n(.*?)(?=^\.text\.|\Z)", code, re.MULTILINE | re.DOTALL)
        encodings = re.findall(r"Numbers|Codes8|Codes4", name) * 2  # the second of two equal ones is not spelled out
        format = next(format for format, pair in ENCODINGS.items() if list(pair) == encodings[:2])
        found[re.search(r"Bf16|F16", name)[0], format] = Kernel(resource, body[1])
    return found


@every_arch
def test_every_kernel_keeps_its_registers(arch: str) -> None:
    """No spills, and registers for as many warps as shared memory holds."""
    found = kernels(arch)
    assert set(found) == {(type, format) for type in ("Bf16", "F16") for format in FORMATS}
    for (_, format), kernel in found.items():
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in kernel.resources
        warps = tuning.warps_at_once(format, DEVICES[arch])
        assert 32 * warps * int(re.search(r"Used (\d+) registers", kernel.resources)[1]) <= 65536
        assert not re.search(r"\b(LDL|STL|ATOM|ATOMG|ATOMS|RED)\b", kernel.code)


@every_arch
def test_a_loop_keeps_its_loads_in_flight(arch: str) -> None:
    """Of every loop, one for each set of operands that is read: as many 16-byte copies as its operands need, none of
    them awaited before the next step's are under way, and a matrix instruction for every 16 weights of 16 features."""
    for (_, format), kernel in kernels(arch).items():
        base, other = (COPIES[encoding] for encoding in ENCODINGS[format])
        expected = [(base + other, 16), (base, 8)] + [(other, 8)] * (format == "pair")
        loops = kernel.loops
        counted = [
            (len(re.findall(r"LDGSTS\S*\.128", loop)), len(re.findall("HMMA.16816.F32", loop))) for loop in loops
        ]
        assert sorted(counted) == sorted(expected)
        for loop in loops:
            (wait,) = re.findall(r"DEPBAR\.LE SB0, (0x\w)", loop)
            assert int(wait, 16) == 1  # the youngest group, a whole step, stays under way
            assert loop.index("LDGDEPBAR") > loop.rindex("LDGSTS")
