"""A part on a device that is not there: python -m tests.benchmarks.fake_part METHOD:BEHAVIOUR … --budget …

The cases, each with all of the methods, are "first" and "second", or what --cases names.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import measure
from benchmarks.check import WrongResult
from benchmarks.machine import Cpu, Machine
from benchmarks.measure import Method


class Device(Cpu):
    """Tells facts and times of its own."""

    lost = False

    def __init__(self) -> None:
        Device.lost = False

    def about(self) -> dict[str, object]:
        return {"device": "fake", "isa": "sm_90"}

    def bandwidth(self) -> float:
        return 1e9

    def peak(self, dtype: torch.dtype) -> float:
        return 1e9

    def stopwatch(self, call: Callable[[int], Any], copies: int) -> Callable[[], float]:
        call(1)

        def seconds() -> float:
            call(2)
            return 1e-3

        return seconds

    def is_lost(self) -> bool:
        return Device.lost


class Case:
    def __init__(self, name: str) -> None:
        self.name = name

    def columns(self) -> dict[str, object]:
        return {"model": self.name, "m": 1, "lam": "distinct"}

    def __str__(self) -> str:
        return self.name


class OutOfResources(Exception):
    """As Triton's: no RuntimeError."""


def method(name: str, behaviour: str) -> Method:
    """Behaviours: right, wrong, or what happens, at call 0 (the check), 1 (the capture) or 2 (the timing)."""
    what, _, when = behaviour.partition("@")

    def call(i: int) -> str:
        if i == int(when or 0):
            if what == "resources":
                raise OutOfResources("out of resource: shared memory")
            if what == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            if what == "lost":
                Device.lost = True
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            if what == "crash":
                ctypes.string_at(0)
            if what == "hang":
                time.sleep(1000)
        return what

    def check(result: str) -> None:
        if result == "wrong":
            raise WrongResult("error 1, that of plain PyTorch 0")

    return Method(name.replace("_", " "), "" if name == "one_merged" else "pair", call, 8, 8, torch.bfloat16, check)


def main(argv: list[str]) -> int:
    described = [argument for argument in argv if ":" in argument]
    measure.machine = Device
    parser = measure.parser("linear", None)
    parser.add_argument("--cases", nargs="+", default=["first", "second"])
    options = parser.parse_args([argument for argument in argv if ":" not in argument])
    options.seconds = 0.01

    def prepare(case: Case, here: Machine) -> tuple[list[Method], int]:
        return [method(*argument.split(":")) for argument in described], 1

    return measure.run("linear.csv", options, map(Case, options.cases), prepare)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
