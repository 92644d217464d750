"""Building the compiled parts: what is built, what is said of it, what DAMI_CUDA changes. The compilers are shams."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER = """#!/bin/sh
if [ "$1" = --list-gpu-arch ]; then printf 'compute_80\\ncompute_90\\n'; exit; fi
while [ $# -gt 0 ]; do
    case $1 in -o) out=$2 ;; -MF) : > "$2" ;; esac
    shift
done
: > "$out"
"""
SAID = "for sm_80, sm_90 and what comes after: this can take minutes; DAMI_CUDA=0 leaves it out"


class Build:
    """`python setup.py build_ext`, with what compilers there are in `bin`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bin = directory / "bin"
        self.bin.mkdir()
        self.compiler("c++")

    def compiler(self, name: str, script: str = COMPILER) -> None:
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def command(self, cuda: str | None) -> tuple[list[str], dict[str, str]]:
        environment = {
            name: value for name, value in os.environ.items() if name not in ("CXX", "CUDA_HOME", "DAMI_CUDA")
        }
        environment["PATH"] = f"{self.bin}:/usr/bin:/bin"
        if cuda is not None:
            environment["DAMI_CUDA"] = cuda
        places = [f"--build-lib={self.directory / 'lib'}", f"--build-temp={self.directory / 'temp'}"]
        return [sys.executable, "setup.py", "-q", "build_ext", *places], environment

    def run(self, cuda: str | None = None) -> subprocess.CompletedProcess[str]:
        """Without a terminal, as in continuous integration."""
        command, environment = self.command(cuda)
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, start_new_session=True
        )

    def built(self) -> list[str]:
        return sorted(path.name.partition(".")[0] for path in (self.directory / "lib").glob("dami_kernels/*"))


@pytest.fixture
def build(tmp_path: Path) -> Build:
    for package in ("setuptools", "pybind11", "ninja"):
        pytest.importorskip(package)
    return Build(tmp_path)


def test_without_nvcc_the_cpu_s_part_is_built(build: Build) -> None:
    done = build.run()
    assert done.returncode == 0, done.stderr
    assert build.built() == ["_C"]
    assert "Building dami_kernels._C with c++" in done.stdout
    assert "compiling scalar.o" in done.stdout


@pytest.mark.parametrize("cuda", [None, "", "1"])
def test_with_nvcc_it_says_what_takes_long(build: Build, cuda: str | None) -> None:
    build.compiler("nvcc")
    done = build.run(cuda)
    assert done.returncode == 0, done.stderr
    assert build.built() == ["_C", "_cuda"]
    assert f"Building dami_kernels._cuda with {build.bin / 'nvcc'} {SAID}" in done.stdout
    assert "compiling decode.o" in done.stdout


def test_nvcc_can_be_left_alone(build: Build) -> None:
    build.compiler("nvcc")
    done = build.run("0")
    assert done.returncode == 0, done.stderr
    assert build.built() == ["_C"]
    assert "_cuda" not in done.stdout


def test_an_nvcc_that_fails_is_told_and_left_out_unless_it_is_asked_for(build: Build) -> None:
    build.compiler("nvcc", COMPILER.replace(': > "$out"', "exit 3"))
    for cuda, fails in ((None, False), ("1", True)):
        done = build.run(cuda)
        assert (done.returncode != 0) == fails, done.stderr
        assert "dami_kernels._cuda could not be built" in done.stdout
        assert build.built() == ["_C"]


@pytest.mark.parametrize(
    ("cuda", "message"),
    [
        ("1", "DAMI_CUDA=1 asks for the CUDA kernels, and there is no nvcc in CUDA_HOME/bin or in PATH"),
        ("no", "DAMI_CUDA must be 0 (without the CUDA kernels) or 1 (not without them), got 'no'"),
    ],
)
def test_what_cannot_be_is_refused(build: Build, cuda: str, message: str) -> None:
    done = build.run(cuda)
    assert done.returncode != 0
    assert message in done.stderr


def test_what_the_compiler_does_not_know_is_left_out(build: Build) -> None:
    shell, rest = COMPILER.split("\n", 1)
    build.compiler("c++", f'{shell}\ncase " $* " in *" -mamx"*) exit 1 ;; esac\n{rest}')
    assert build.run("0").returncode == 0
    assert build.built() == ["_C"]


def test_windows_gets_no_kernels_and_says_so(build: Build) -> None:
    """As without a compiler, the build goes on and the package installs; test_packaging.py has that."""
    code = """
import runpy, sys, setuptools
setuptools.setup = lambda **options: None
script = runpy.run_path("setup.py")
sys.platform = "win32"
try:
    script["write_cpu"](None, "", [])
except setuptools.errors.CompileError as error:
    print(error)
print(script["wants_cuda"]())
"""
    build.compiler("nvcc")
    _, environment = build.command(None)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "there are no kernels for Windows, where operators run as plain torch\nFalse\n", done.stderr


@pytest.mark.skipif(not Path("/dev/tty").exists(), reason="needs terminals")
def test_progress_goes_to_the_terminal_where_the_output_is_hidden(build: Build) -> None:
    """As with pip, which shows the output of a build with -v only."""
    build.compiler("nvcc")
    command, environment = build.command(None)
    child, terminal = pty.fork()
    if child == 0:  # with the terminal as its own
        os.chdir(ROOT)
        os.dup2(os.open(build.directory / "output", os.O_WRONLY | os.O_CREAT), 1)
        os.execve(command[0], command, environment)
    text = b""
    try:
        while piece := os.read(terminal, 4096):
            text += piece
    except OSError:  # Linux's end of file
        pass
    _, status = os.waitpid(child, 0)
    assert status == 0, text
    assert SAID in text.decode()
    assert "linking" in text.decode()
    assert "Building" not in (build.directory / "output").read_text()
