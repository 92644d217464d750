"""Repeats the kernel tests as other machines would run them: python -m tests.machines

What a CPU can do decides which kernels run, ours and those of torch and NumPy that they are held against. This CPU is
made to pass for lesser ones, in a process each; one that it cannot pass for is skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass

from dami_kernels import native

FILES = ("errors", "experts", "formats", "native", "native_formats", "ops", "weight")


def kernels(*absent: str) -> list[str]:
    """The kernels' tests, without those of absent instruction sets, nor of what torch is told, the same everywhere."""
    paths = [f"tests/dami_kernels/test_{name}.py" for name in FILES]
    return [*paths, "-k", " and ".join(f"not {name}" for name in ("opcheck", "compiles", *absent))]


# In Triton's interpreter NumPy computes: the tests that compare bits.
INTERPRETED = ["-p", "tests.dami_kernels.triton_interpreter", "tests/dami_kernels/test_triton_numbers.py"]
INTERPRETED += ["-k", "neighbours or blended or tiles_end or strides"]


@dataclass(frozen=True)
class Machine:
    """A kind of CPU: the instruction set of ours that it has, and the variables that make another pass for it."""

    name: str
    isa: str
    environment: dict[str, str]
    runs: tuple[list[str], ...]


AVX2 = {"DAMI_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
MACHINES = (
    Machine("AVX2, Haswell", "avx2", {**AVX2, "OPENBLAS_CORETYPE": "Haswell"}, (kernels("avx512"), INTERPRETED)),
    Machine("AVX2, Zen", "avx2", {**AVX2, "OPENBLAS_CORETYPE": "Zen"}, (INTERPRETED,)),
    Machine("AVX-512, Skylake", "avx512", {"OPENBLAS_CORETYPE": "SkylakeX"}, (INTERPRETED,)),
    Machine(
        "no vector units",
        "scalar",
        {"DAMI_CPU_ISA": "scalar", "ATEN_CPU_CAPABILITY": "default"},
        (kernels("avx2", "avx512"),),
    ),
)


def main() -> int:
    """Runs them all, and says at the end which failed; the exit status is their number."""
    failed = []
    for machine in MACHINES:
        if machine.isa not in native.supported_isas():
            print(f"== {machine.name}: skipped, this CPU has {', '.join(native.supported_isas())}", flush=True)
            continue
        for arguments in machine.runs:
            start = time.perf_counter()
            environment = {**os.environ, **machine.environment, "TRITON_INTERPRET": str(int(arguments is INTERPRETED))}
            command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
            code = subprocess.run(command, env=environment).returncode
            what = "interpreter" if arguments is INTERPRETED else "kernels"
            print(f"== {machine.name}, {what}: {time.perf_counter() - start:.0f} s", flush=True)
            failed += [f"{machine.name}, {what}"] if code else []
    print(f"== failed: {'; '.join(failed) or 'none'}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
