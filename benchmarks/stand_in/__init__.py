"""A machine without a GPU plays one with an H100: Triton compiles, and its own launcher launches into `libcuda.c`,
which accepts every launch and runs nothing. So what a launch costs on the host, and what it passes, is seen anywhere.

The tensors are the CPU's. Their results are whatever was in memory.
"""

from __future__ import annotations

import ctypes
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.nvidia.driver import CudaDriver, include_dirs
from triton.runtime.driver import driver

from dami_kernels import cuda, launching, native
from dami_kernels import triton as kernels
from dami_kernels.ops import direct, gpu

HERE = Path(__file__).parent
STREAM = 0x5EA  # a stream's handle
# EIATTR_KPARAM_INFO of a kernel's code. It begins with zeros; without them, instructions look like it.
_PARAMETER = re.compile(rb"\x04\x17\x0c\x00(\x00{4}.{8})", re.DOTALL)


class _Launch(ctypes.Structure):
    """As in libcuda.c."""

    _fields_ = [
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_uint),
        ("bytes", ctypes.c_int),
        ("data", ctypes.c_ubyte * 2048),
    ]


@dataclass(frozen=True)
class Launched:
    """A launch as CUDA's driver gets it: the kernel, how much of it runs, and the bytes of its parameters."""

    name: str
    function: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    attributes: int
    parameters: bytes


@cache
def _library() -> ctypes.CDLL:
    """Compiles and loads the library; what asks for libcuda.so.1 in this process then gets it."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "libcuda.so.1"
    command = ["cc", "-O2", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", *[f"-I{each}" for each in include_dirs]]
    subprocess.run([*command, str(HERE / "libcuda.c"), "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library.launch_count.restype = ctypes.c_long
    library.launch_at.restype = ctypes.POINTER(_Launch)
    library.launch_at.argtypes = [ctypes.c_long]
    library.folder = folder  # for Triton, which links its launchers with it
    return library


def _sizes(code: bytes) -> list[int]:
    """Returns the bytes of each parameter of a kernel, given its machine code."""
    found = {
        ordinal: bits >> 18 for _, ordinal, _, bits in map(struct.Struct("<IHHI").unpack, _PARAMETER.findall(code))
    }
    return [found[ordinal] for ordinal in sorted(found)]


class Driver(CudaDriver):
    """Triton's driver for CUDA, on an H100 that is not there.

    Attributes:
        device, stream: the current ones.
        names: of the kernels that are loaded, by their functions' handles.
    """

    def __init__(self) -> None:
        library = _library()
        with patch.object(triton.knobs.nvidia, "libcuda_path", library.folder.name):
            super().__init__()
        self.device, self.stream = 0, STREAM
        self.names: dict[int, str] = {}
        self.get_device_capability = lambda device: (9, 0)
        self.get_current_device = lambda: self.device
        self.get_current_stream = lambda device: self.stream
        load = self.utils.load_binary

        def load_binary(name: str, code: bytes, shared: int, device: int) -> tuple[int, ...]:
            loaded = load(name, code, shared, device)
            sizes = _sizes(code)
            library.describe(ctypes.c_void_p(loaded[1]), len(sizes), (ctypes.c_int * len(sizes))(*sizes))
            self.names[loaded[1]] = name
            return loaded

        self.utils = type("Utils", (), {**vars(self.utils), "load_binary": staticmethod(load_binary)})

    def launches(self, since: int = 0) -> list[Launched]:
        """Returns the launches after the first `since`."""
        return [self._launched(_library().launch_at(i).contents) for i in range(since, self.count())]

    def count(self) -> int:
        """Returns how many launches there have been."""
        return int(_library().launch_count())

    def _launched(self, seen: _Launch) -> Launched:
        return Launched(
            self.names[seen.function], seen.function, tuple(seen.grid), tuple(seen.block), seen.shared, seen.stream,
            seen.attributes, bytes(seen.data[: seen.bytes]),
        )  # fmt: skip


def by_triton(call: Callable[[], object]) -> Callable[[], None]:
    """Returns what makes Triton launch what a call launches."""
    made: list[tuple[launching.Launch, tuple[Any, ...]]] = []
    plain = launching.Launch.by_triton

    def noted(launch: launching.Launch, *operands: Any) -> Any:
        made.append((launch, operands))
        return plain(launch, *operands)

    launching.forget()
    with patch.object(launching.Launch, "by_triton", noted):
        call()

    def run() -> None:
        for launch, operands in made:
            launch.kernel[launch.grid](*operands, **launch.named)

    return run


@contextmanager
def playing_gpu() -> Iterator[Driver]:
    """Inside, the operators take the CPU's tensors for a GPU's: directly, through torch's dispatcher and in Triton."""
    before: Any = driver._active
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(patch.object(triton.knobs.nvidia, "libcuda_path", _library().folder.name))
        enter(patch.object(launching, "DEVICE_TYPE", 1))  # DLPack's number of the CPU
        enter(patch.object(direct, "_C", gpu))
        enter(patch.object(cuda, "takes", lambda *_: False))
        if native.WHY_NOT is None:
            enter(native.bypassed())
        for name in kernels.__all__:
            enter(patch.object(native, name, getattr(kernels, name)))
        stack.callback(driver.set_active, before)
        stack.callback(launching.forget)
        launching.forget()
        playing = Driver()
        driver.set_active(playing)
        yield playing
