"""Compiles the Triton kernels for GPUs that are not there, and reads from the machine code what there is to read."""

from __future__ import annotations

import io
import itertools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import networkx
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from dami_kernels.tuning import Device

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
DECODE = Path(__file__).resolve().parents[1] / "csrc" / "cuda" / "decode.cu"
MATRIX = r"[HI]MMA|HGMMA|UTC\w*MMA|v_mfma"  # instructions of the matrix unit


class Driver:
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
    """One kernel compiled for one target, for a launch of `programs` programs of `warps` warps."""

    name: str
    asm: dict[str, Any]
    shared: int
    tensor_memory: int
    programs: int
    warps: int

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

    @property
    def ptxas(self) -> str:
        """What the assembler said of the PTX: registers, spills, warnings."""
        return self.asm["ptxas"]

    @property
    def registers(self) -> int:
        """Registers of a thread, on AMD those for matrices included."""
        if "cubin" in self.asm:
            return self._resources["REG"]
        return int(re.search(r"\.vgpr_count: +(\d+)", self.code)[1])  # type: ignore[index]

    @property
    def spills(self) -> int:
        """Bytes of a thread's stack, where spilled registers go."""
        if "cubin" in self.asm:
            return self._resources["STACK"] + self._resources["LOCAL"]
        return int(re.search(r"\.private_segment_fixed_size: +(\d+)", self.code)[1])  # type: ignore[index]

    @cached_property
    def _resources(self) -> dict[str, int]:
        said = with_file(self.asm["cubin"], triton.knobs.nvidia.cuobjdump.path, "-res-usage")
        own = re.search(rf"Function {self.name}:\s*(.*)", said)
        assert own, said
        return {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", own[1])}

    @cached_property
    def instructions(self) -> list[str]:
        """All instructions of the machine code, in order."""
        return read(self.machine_code)[0]

    @cached_property
    def machine_code(self) -> str:
        """NVIDIA's SASS, or AMD's assembly."""
        if "cubin" not in self.asm:
            return self.asm["amdgcn"]
        code = with_file(self.asm["cubin"], triton.knobs.nvidia.nvdisasm.path, "-c")
        own = re.search(rf"^\.text\.{self.name}:\n(.*?)(?=^\.text\.|\Z)", code, re.MULTILINE | re.DOTALL)
        assert own, f"{self.name} is not in its cubin"
        return own[1]

    @cached_property
    def products(self) -> list[list[str]]:
        """The instructions of every innermost loop that multiplies matrices, in the order of the code."""
        return product_loops(self.machine_code)

    @property
    def machine_loops(self) -> list[list[str]]:
        """The same, the shortest first."""
        return sorted(self.products, key=len)

    def assert_keeps_its_registers(self) -> None:
        """No register is spilled to memory."""
        if "ptx" in self.asm:
            assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in self.ptxas
            assert "warning" not in self.ptxas  # such as wgmma instructions run one by one
        else:
            assert ".vgpr_spill_count: 0" in self.code
            assert ".private_segment_fixed_size: 0" in self.code


def with_file(content: bytes, *command: str) -> str:
    """Returns the output of a command on a file of this content."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        return subprocess.run([*command, file.name], check=True, capture_output=True, text=True).stdout


# How the CUDA C++ kernel's name tells the format: by its operands' types, the second of two equal ones not spelled out.
OPERANDS = {
    "pair": ["Numbers"],
    "int8": ["Numbers", "Codes8"],
    "int4": ["Numbers", "Codes4"],
    "w8d4": ["Codes8", "Codes4"],
}


@cache
def cuda_kernels(arch: str) -> dict[str, Compiled]:
    """Returns the CUDA C++ kernels for bfloat16 by format, compiled by nvcc, or none without nvcc or for AMD."""
    if arch.startswith("gfx") or shutil.which("nvcc") is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "decode.cubin"
        options = ["-std=c++17", "-O3", "-cubin", f"-arch={arch}"]
        subprocess.run(["nvcc", *options, DECODE, "-o", cubin], check=True, capture_output=True, text=True)
        content = cubin.read_bytes()
    found = {}
    said = with_file(content, triton.knobs.nvidia.cuobjdump.path, "-res-usage")
    for name in re.findall(r"Function (\w+):", said):
        operands = re.findall(r"Numbers|Codes8|Codes4", name)
        if "F16" not in name.replace("Bf16", ""):
            format = next(format for format, types in OPERANDS.items() if types == operands)
            found[format] = Compiled(name, {"cubin": content}, 0, 0, 0, 0)
    return found


LABEL = re.compile(r"(\.L\w+):")
INSTRUCTION = re.compile(r"\s+(?:/\*[0-9a-f]{4,}\*/ +)?(?P<predicate>@!?U?P\w+ +)?(?P<text>[A-Za-z][\w.]+(?: [^;/]*)?)")


def read(code: str) -> tuple[list[str], networkx.DiGraph]:
    """Returns the instructions of machine code, without predicates, and a graph of which may follow which."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    graph = networkx.DiGraph()
    is_reached = False  # whether the next instruction may follow the last one
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            at, text = len(instructions), found["text"].strip()
            instructions.append(text)
            graph.add_node(at)
            if is_reached:
                graph.add_edge(at - 1, at)
            name, _, operands = text.partition(" ")
            if target := re.search(r"\.L\w+", operands):
                jumps.append((at, target[0]))
            is_always = not found["predicate"] and not re.search(r"\bU?P\d", operands)
            is_reached = not (is_always and re.match(r"BRA|EXIT|RET|s_branch|s_endpgm|s_setpc", name))
    graph.add_edges_from((at, labels[label]) for at, label in jumps if label in labels)
    return instructions, graph


def product_loops(code: str) -> list[list[str]]:
    """Returns the instructions of every innermost loop that multiplies matrices, in the order of the code.

    A loop is found as what can follow itself, and an inner one as what still can without the places where the outer
    one is entered: compilers set parts of loops apart, at the end of the code, and enter some in the middle.
    """
    instructions, graph = read(code)

    def inner(graph: networkx.DiGraph) -> Iterator[set[int]]:
        for loop in networkx.strongly_connected_components(graph):
            if len(loop) == 1 or not any(re.match(MATRIX, instructions[i]) for i in loop):
                continue
            entries = {at for at in loop if not loop.issuperset(whole.predecessors(at))}
            within = list(inner(graph.subgraph(loop - entries))) if entries else []
            yield from within or [loop]

    whole = graph
    loops = sorted(inner(graph), key=min)
    return [[instructions[i] for i in sorted(_one_round(graph.subgraph(loop), instructions))] for loop in loops]


def _one_round(loop: networkx.DiGraph, instructions: list[str]) -> set[int]:
    """Returns what of a loop runs in a round that copies and multiplies: the shortest way through all that does.

    It leaves out what runs instead of that, such as the code for operands that are not aligned, and waiting loops.
    """
    stops = [i for i in sorted(loop) if re.match(rf"{MATRIX}|LDGSTS", instructions[i])]
    try:
        ways = [networkx.shortest_path(loop, a, b) for a, b in itertools.pairwise(stops)]
        last = networkx.shortest_path(loop, stops[-1], stops[0]) if len(stops) > 1 else sorted(loop)
    except networkx.NetworkXNoPath:
        return set(loop)
    return {node for way in [*ways, last] for node in way}


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
        warps = compiled.metadata.num_warps
        launched.append(
            Compiled(kernel.__name__, compiled.asm, compiled.metadata.shared, tensor_memory, programs, warps)
        )

    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "run", run))
        stack.enter_context(patch.object(triton.knobs.nvidia, "dump_ptxas_log", True))
        stack.enter_context(patch.object(triton.knobs.compilation, "disable_line_info", True))  # which takes time
        for module in ("linear", "experts"):
            stack.enter_context(patch(f"dami_kernels.triton.{module}.device_of", lambda device: DEVICES[arch]))
        driver.set_active(Driver(TARGETS[arch]))
        try:
            yield launched
        finally:
            driver._active = before
