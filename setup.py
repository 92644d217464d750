"""Builds dami_kernels._C with ninja: no torch needed, one set of flags per instruction set, a few seconds."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from ninja.ninja_syntax import Writer
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("csrc")
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq"
ISA_FLAGS = {  # by source file
    "x86_64": {"avx2": "-mavx2 -mfma -mf16c", "avx512": AVX512, "avx512_bf16": f"{AVX512} -mavx512bf16"},
    "aarch64": {"neon": ""},
}
MACHINE = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine())
SOURCES = {CSRC / "bindings.cpp": "-O1"} | {
    CSRC / "cpu" / f"{name}.cpp": flags
    for name, flags in {"isa": "", "operators": "", "parallel": "", "scalar": "", **ISA_FLAGS.get(MACHINE, {})}.items()
}
# No contraction: a·b + c is fused where the kernels say so and nowhere else: the same bits from every compiler.
# GCC 12 finds its own intrinsics uninitialized.
FLAGS = (
    "-std=c++17 -O3 -fPIC -pthread -fvisibility=hidden -ffp-contract=off -fno-math-errno "
    "-Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized"
)
LINK = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared -pthread -ldl"


class BuildWithNinja(build_ext):
    """Compiles the sources in parallel, again only where they or their headers have changed."""

    def build_extension(self, ext: Extension) -> None:
        compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
        if compiler is None:
            raise CompileError("there is no C++ compiler (c++, g++ or clang++; or name one in CXX)")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        includes = [pybind11.get_include(), sysconfig.get_path("include")]
        with open(build / "build.ninja", "w") as file:
            ninja = Writer(file, width=120)
            ninja.variable("flags", [FLAGS, *(f"-isystem {shlex.quote(path)}" for path in includes)])
            compile = f"{compiler} $flags $isa {os.environ.get('CXXFLAGS', '')} -MMD -MF $out.d -c $in -o $out"
            ninja.rule("compile", compile, depfile="$out.d", deps="gcc")
            ninja.rule("link", f"{compiler} $in -o $out {LINK} {os.environ.get('LDFLAGS', '')}")
            objects = [
                ninja.build(f"{source.stem}.o", "compile", str(source.resolve()), variables={"isa": flags})[0]
                for source, flags in SOURCES.items()
            ]
            ninja.build(str(target), "link", objects)
        try:
            subprocess.run([sys.executable, "-m", "ninja", "-C", str(build)], check=True)
        except subprocess.CalledProcessError as error:
            raise CompileError(f"the compiled part could not be built ({error})") from error


setup(
    ext_modules=[
        Extension(
            "dami_kernels._C",
            sources=[str(source) for source in SOURCES],
            depends=[str(path) for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp")],
            optional=True,  # without a compiler the package installs as pure Python and says so when it runs
        )
    ],
    cmdclass={"build_ext": BuildWithNinja},
)
