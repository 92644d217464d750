"""Builds the compiled parts with ninja, no torch needed: dami_kernels._C, one set of flags per instruction set, in a
few seconds; where there is CUDA's compiler nvcc also dami_kernels._cuda, which takes minutes on a small machine.
DAMI_CUDA=0 leaves that out, DAMI_CUDA=1 makes it a fault if it cannot be built. Windows gets neither: the sources are
written for GCC and Clang.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TextIO

import pybind11
from ninja.ninja_syntax import Writer
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("csrc")
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq"
AVX512_BF16 = f"{AVX512} -mavx512bf16 -mavx512vnni"
ISA_FLAGS = {  # by source file
    "x86_64": {
        "avx2": "-mavx2 -mfma -mf16c",
        "avx512": AVX512,
        "avx512_bf16": AVX512_BF16,
        "amx": f"{AVX512_BF16} -mamx-tile -mamx-bf16",  # left out where the compiler does not know it: before GCC 11
    },
    "aarch64": {"neon": ""},
}
MACHINE = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine())
SOURCES = (
    {CSRC / "bindings.cpp": "-O1"}
    | {CSRC / "torch" / f"{name}.cpp": "" for name in ("calls", "python", "dispatcher")}
    | {
        CSRC / "cpu" / f"{name}.cpp": flags
        for name, flags in {
            "isa": "",
            "operators": "",
            "parallel": "",
            "scalar": "",
            **ISA_FLAGS.get(MACHINE, {}),
        }.items()
    }
)
# No contraction: a·b + c is fused where the kernels say so and nowhere else: the same bits from every compiler.
# GCC 12 finds its own intrinsics uninitialized.
FLAGS = (
    "-std=c++17 -O3 -fPIC -pthread -fvisibility=hidden -ffp-contract=off -fno-math-errno "
    "-Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized"
)
LINK = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared -pthread -ldl"
CUDA_SOURCES = [CSRC / "cuda" / "decode.cu", CSRC / "cuda" / "bindings.cpp"]
CUDA_ARCHITECTURES = (80, 90, 100)  # machine code for these and their minor versions, PTX for what comes after


def find_nvcc() -> str | None:
    """CUDA's compiler: the one of CUDA_HOME, or the one in PATH."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=str(Path(home) / "bin"))) or shutil.which("nvcc")


def wants_cuda() -> bool:
    """Whether to build the CUDA kernels: as DAMI_CUDA says, else where there is a compiler for them."""
    if CUDA_WISH not in ("", "0", "1"):
        sys.exit(f"DAMI_CUDA must be 0 (without the CUDA kernels) or 1 (not without them), got {CUDA_WISH!r}")
    if CUDA_WISH == "1" and NVCC is None:
        sys.exit("DAMI_CUDA=1 asks for the CUDA kernels, and there is no nvcc in CUDA_HOME/bin or in PATH")
    return NVCC is not None and CUDA_WISH != "0" and (sys.platform != "win32" or CUDA_WISH == "1")


NVCC = find_nvcc()
CUDA_WISH = os.environ.get("DAMI_CUDA", "")


def shown() -> AbstractContextManager[TextIO]:
    """Where to say what goes on: the output; but pip hides that of a build, so the terminal where there is one."""
    if not sys.stdout.isatty():
        with suppress(OSError):
            return open("/dev/tty", "w")
    return nullcontext(sys.stdout)


class BuildWithNinja(build_ext):
    """Compiles the sources in parallel, again only where they or their headers have changed."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        includes = [f"-isystem {shlex.quote(path)}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
        write = write_cuda if ext.name.endswith("._cuda") else write_cpu
        with shown() as output:
            try:
                with open(build / "build.ninja", "w") as file:
                    how = write(Writer(file, width=120), str(target), includes)
                print(f"\nBuilding {ext.name} {how}", file=output, flush=True)
                subprocess.run([sys.executable, "-m", "ninja", "-C", str(build)], check=True, stdout=output)
            except (CompileError, subprocess.CalledProcessError) as error:
                print(f"{ext.name} could not be built: {error}", file=output)
                raise CompileError(f"{ext.name} could not be built ({error})") from error


def write_cpu(ninja: Writer, target: str, includes: list[str]) -> str:
    """Writes what ninja is to do, and says it in words."""
    if sys.platform == "win32":
        raise CompileError("there are no kernels for Windows, where operators run as plain torch")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise CompileError("there is no C++ compiler (c++, g++ or clang++; or name one in CXX)")
    ninja.variable("flags", [FLAGS, *includes])
    compile = f"{compiler} $flags $isa {os.environ.get('CXXFLAGS', '')} -MMD -MF $out.d -c $in -o $out"
    ninja.rule("compile", compile, "compiling $out", depfile="$out.d", deps="gcc")
    sources = dict(SOURCES)
    if (amx := CSRC / "cpu" / "amx.cpp") in sources and not knows(compiler, sources[amx]):
        sources[amx] = ""
    ninja.rule("link", f"{compiler} $in -o $out {LINK} {os.environ.get('LDFLAGS', '')}", "linking")
    objects = [
        ninja.build(f"{source.stem}.o", "compile", str(source.resolve()), variables={"isa": flags})[0]
        for source, flags in sources.items()
    ]
    ninja.build(target, "link", objects)
    return f"with {compiler}"


def knows(compiler: str, flags: str) -> bool:
    """Whether the compiler takes these flags; not if it is not there, of which the build will tell."""
    command = [*shlex.split(compiler), *flags.split(), "-x", "c++", "-fsyntax-only", os.devnull]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True).returncode == 0
    return False


def write_cuda(ninja: Writer, target: str, includes: list[str]) -> str:
    """Writes what ninja is to do, and says it in words."""
    listed = subprocess.run(
        [str(NVCC), "--list-gpu-arch"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.split()
    known = [arch for arch in CUDA_ARCHITECTURES if f"compute_{arch}" in listed]
    if not known:
        raise CompileError(f"{NVCC} compiles for none of the compute capabilities {CUDA_ARCHITECTURES}")
    targets = [(arch, f"sm_{arch}") for arch in known] + [(known[-1], f"compute_{known[-1]}")]
    code = " ".join(f"-gencode arch=compute_{arch},code={code}" for arch, code in targets)
    nvcc = shlex.quote(str(NVCC)) + (f" -ccbin {os.environ['CXX']}" if "CXX" in os.environ else "")
    ninja.variable("flags", ["-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden --threads 0", code, *includes])
    compile = f"{nvcc} $flags -MMD -MF $out.d -c $in -o $out"
    ninja.rule("compile", compile, "compiling $out", depfile="$out.d", deps="gcc")
    # CUDA's runtime goes in and its names stay inside: torch has loaded another one.
    ninja.rule("link", f"{nvcc} -shared -cudart static -Xlinker --exclude-libs=ALL $in -o $out", "linking")
    objects = [ninja.build(f"{source.stem}.o", "compile", str(source.resolve()))[0] for source in CUDA_SOURCES]
    ninja.build(target, "link", objects)
    names = ", ".join(f"sm_{arch}" for arch in known)
    return f"with {NVCC} for {names} and what comes after: this can take minutes; DAMI_CUDA=0 leaves it out"


def extension(name: str, folders: Iterable[str], sources: Iterable[Path], optional: bool = True) -> Extension:
    """Optional: without a compiler the package installs as pure Python and says so when it runs."""
    depends = [path for folder in (CSRC, *(CSRC / name for name in folders)) for path in folder.glob("*.*")]
    return Extension(name, [str(path) for path in sources], depends=[str(path) for path in depends], optional=optional)


setup(
    ext_modules=[
        extension("dami_kernels._C", ("cpu", "torch"), SOURCES),
        *([extension("dami_kernels._cuda", ("cuda",), CUDA_SOURCES, CUDA_WISH != "1")] if wants_cuda() else []),
    ],
    cmdclass={"build_ext": BuildWithNinja},
)
