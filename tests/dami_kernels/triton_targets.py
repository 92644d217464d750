"""Compiles the Triton kernels for GPUs that are not there, and reads from the machine code what there is to read."""

from __future__ import annotations

import io
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from dami_kernels.tuning import Device

NVDISASM = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DEVICES = {  # A100 SXM, H100 SXM, B200, MI300X
    "sm_80": Device("sm_80", processors=108, shared=166912),
    "sm_90": Device("sm_90", processors=132, shared=232448),
    "sm_100": Device("sm_100", processors=148, shared=232448),
    "gfx942": Device("gfx942", processors=304, shared=65536),
}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def stored(
    *shape: int, dtype: torch.dtype = torch.bfloat16, format: str = "pair", transposed: bool = False
) -> list[Tensor]:
    """The tensors of a weight [..., N, K], as `format` lays them out; an end may be the transpose of what is stored."""
    *rows, K = shape
    *experts, N = rows
    groups = -(-K // 32)
    end = meta(*experts, K, N, dtype=dtype).mT if transposed else meta(*shape, dtype=dtype)
    int8, int4 = meta(*rows, groups * 32, dtype=torch.int8), meta(*rows, groups * 16, dtype=torch.uint8)
    scale = meta(*rows, groups)
    return {
        "pair": [end, end],
        "int8": [end, int8, scale],
        "int4": [end, int4, scale],
        "w8d4": [int8, scale, int4, scale],
    }[format]


class _Driver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)  # the key under which a kernel keeps what is compiled

    def get_current_stream(self, device: str) -> int:
        return 0


@dataclass
class Compiled:
    """One kernel compiled for one target, for a launch of `programs` programs."""

    name: str
    asm: dict[str, Any]
    shared: int
    tensor_memory: int
    programs: int

    @property
    def code(self) -> str:
        """PTX, or AMD's assembly."""
        return self.asm["ptx"] if "ptx" in self.asm else self.asm["amdgcn"]

    @cached_property
    def loops(self) -> list[str]:
        """The bodies of the innermost loops of the PTX that multiply on tensor cores."""
        loop = re.compile(
            r"^(\$\w+):(?:[^\n]*\n\s*//)?[^\n]*Inner Loop Header[^\n]*\n(.*?)bra[^\n]*\1;", re.MULTILINE | re.DOTALL
        )
        return [match[2] for match in loop.finditer(self.code) if "mma" in match[2]]

    @cached_property
    def machine_loops(self) -> list[list[str]]:
        """The instructions of the innermost loops of the machine code that multiply, the shortest first."""
        if "cubin" in self.asm:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                Path(file.name).write_bytes(self.asm["cubin"])
                code = subprocess.run([NVDISASM, "-c", file.name], check=True, capture_output=True, text=True).stdout
            line = re.compile(r"^\s*(?:(\.L\w+):|/\*[0-9a-f]{4,}\*/\s+(.*?);)", re.MULTILINE)
        else:
            code = self.asm["amdgcn"]
            line = re.compile(r"^(?:(\.L\w+):|\t([a-z]\w+.*?)(?:;.*)?$)", re.MULTILINE)
        instructions: list[str] = []
        labels: dict[str, int] = {}
        loops: list[range] = []
        for label, instruction in line.findall(code):
            if label:
                labels[label] = len(instructions)
                continue
            instructions.append(instruction)
            jump = re.search(r"branch\w* (\.L\w+)|BRA\b.*`\((\.L\w+)\)", instruction)
            if jump and (begin := labels.get(jump[1] or jump[2])) is not None:
                loops.append(range(begin, len(instructions)))
        inner: list[range] = []
        for loop in sorted(loops, key=len):  # a longer one around or across one of these is code set apart from it
            if not any(set(loop) & set(other) for other in inner):
                inner.append(loop)
        bodies = [instructions[loop.start : loop.stop] for loop in inner]
        return [body for body in bodies if re.search("MMA|mfma", "".join(body))]

    @property
    def registers(self) -> int:
        """Registers of a thread, on NVIDIA."""
        used = re.search(r"Used (\d+) registers", self.ptxas)
        assert used
        return int(used[1])

    @property
    def ptxas(self) -> str:
        """What the assembler said of the PTX: registers, spills, warnings."""
        return self.asm["ptxas"]

    def assert_keeps_its_registers(self) -> None:
        """No register is spilled to memory."""
        if "ptx" in self.asm:
            assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in self.ptxas
            assert "warning" not in self.ptxas  # such as wgmma instructions run one by one
        else:
            assert ".vgpr_spill_count: 0" in self.code
            assert ".private_segment_fixed_size: 0" in self.code


@contextmanager
def compiling_for(arch: str) -> Iterator[list[Compiled]]:
    """Inside, the kernels' launching functions take tensors on "meta", compile for `arch` and launch nothing.

    Yields the list of what they would have launched.
    """
    launched: list[Compiled] = []
    plain_run, before = JITFunction.run, driver._active

    def run(kernel: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        with redirect_stdout(io.StringIO()) as said:
            compiled = plain_run(kernel, *args, grid=grid, warmup=True, **options)
        compiled.asm.setdefault("ptxas", said.getvalue())
        tensor_memory = getattr(compiled.metadata, "tmem_size", 0)
        programs = grid[0] * (grid[1] if len(grid) > 1 else 1)
        launched.append(Compiled(kernel.__name__, compiled.asm, compiled.metadata.shared, tensor_memory, programs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        patch.setattr(triton.knobs.nvidia, "dump_ptxas_log", True)
        for module in ("linear", "experts"):
            patch.setattr(f"dami_kernels.triton.{module}.device_of", lambda device: DEVICES[arch])
        driver.set_active(_Driver(TARGETS[arch]))
        try:
            yield launched
        finally:
            driver._active = before
