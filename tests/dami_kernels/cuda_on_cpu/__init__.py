"""Runs the CUDA kernels on the CPU: csrc/cuda/decode.cu compiled by the C++ compiler against a CUDA of 200 lines."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DECODE = HERE.parents[2] / "csrc" / "cuda" / "decode.cu"
TYPES, FORMATS = ["bf16", "f16"], ["pair", "int8", "int4", "w8d4"]
STORAGES = [0, 8, 4]  # bits of a code, in the order of csrc/cuda/api.h


class _Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64)]


class _Operand(ctypes.Structure):
    _fields_ = [("storage", ctypes.c_int), ("values", _Matrix), ("scales", _Matrix)]


class _Linear(ctypes.Structure):
    """As in csrc/cuda/api.h."""

    _fields_ = [
        ("x", _Matrix),
        ("base", _Operand),
        ("other", _Operand),
        ("bias", ctypes.c_void_p * 2),
        ("lam", ctypes.c_void_p),
        ("row_to_lam", ctypes.c_void_p),
        ("rows_per_lam", ctypes.c_int64),
        ("y", ctypes.c_void_p),
        ("m", ctypes.c_int),
        ("n", ctypes.c_int),
        ("k", ctypes.c_int),
    ]


class Module:
    """In place of `dami_kernels._cuda`.

    Attributes:
        warps: of a block, rather than what the caller says, if not None.
        copies_are_late: whether an asynchronous copy happens when it is waited for, or at once.
    """

    class Type:
        bf16, f16 = range(2)

    def __init__(self, folder: Path, *flags: str) -> None:
        library = folder / "cuda_on_cpu.so"
        options = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-shared", "-fPIC"]
        sources = ["-x", "c++", str(DECODE), str(HERE / "entry.cpp")]
        subprocess.run(["g++", *options, *flags, f"-I{HERE}", *sources, "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))
        self.warps: int | None = None
        self.copies_are_late = True

    def decode(
        self, type: int, x: Any, base: Any, other: Any, bias: Any, lam: Any, y: int,
        m: int, n: int, k: int, warps: int, stream: int,
    ) -> None:  # fmt: skip
        operands = (
            _Operand(STORAGES.index(bits), _Matrix(*values), _Matrix(*scales)) for values, scales, bits in (base, other)
        )
        linear = _Linear(_Matrix(*x), *operands, (ctypes.c_void_p * 2)(*bias), *lam, y, m, n, k)
        error = self._library.decode(
            type, ctypes.byref(linear), self.warps or warps, ctypes.c_bool(self.copies_are_late)
        )
        if error:
            raise RuntimeError(f"CUDA error {error}")

    def shared_per_warp(self, base: int, other: int) -> int:
        """Of operands with codes of so many bits, 0 where they are numbers."""
        return self._library.shared_per_warp(STORAGES.index(base), STORAGES.index(other))
