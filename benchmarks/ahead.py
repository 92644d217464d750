"""Compiles the Triton kernels of the parts before these ask for them, beside what is being timed.

A part goes through its cases with tensors that have no memory, and what would be launched is only compiled, into
Triton's cache: no device memory is taken and the device is left alone. Of the kernels each process compiles its share.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
PROCESSES = max(1, min(12, (os.cpu_count() or 1) - 4))  # leaves some for the part that is being timed


class Ahead:
    """A machine whose tensors have no memory and which times nothing."""

    device = META
    cold_bytes = 1
    has_fast_float32 = False


class _Kernels(TorchDispatchMode):
    """Routes our operators on any device to the functions that launch Triton's kernels."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "dami":
            return func(*args, **(kwargs or {}))
        from dami_kernels import triton, upstream

        name = func._schema.name.split("::")[1]
        # Not `lerp_linear`, which may choose the CUDA C++ kernel.
        return getattr(triton, "lerp_linears" if name == "lerp_linear" else name)(
            *upstream.without_none(func, args), **(kwargs or {})
        )


def share(text: str) -> tuple[int, int]:
    """Parses a share such as "2/8", the third of eight."""
    index, _, count = text.partition("/")
    return int(index), int(count)


def attempt(what: object, call: Callable[[], object]) -> None:
    """Calls a function and prints its error, so that a kernel that fails to compile does not stop the others."""
    try:
        call()
    except NotImplementedError:  # a format without a kernel
        pass
    except Exception as error:
        print(f"FAILED: {what}: {described(error)}", flush=True)


def described(error: Exception) -> str:
    """Describes an error in one line, because compilers' messages contain the whole source."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


@contextmanager
def compiling(share: tuple[int, int] = (0, 1)) -> Iterator[None]:
    """Makes the operators take tensors on "meta" and compile this share of the kernels for the current GPU."""
    from triton import knobs
    from triton.runtime.jit import JITFunction

    launch, properties = JITFunction.run, torch.cuda.get_device_properties
    index, count = share

    def compile_only(kernel: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        return launch(kernel, *args, warmup=True, **options)

    def is_of_others(*, key: str, fn: Any, **_: Any) -> bool:
        return zlib.crc32(f"{fn.name}{key}".encode()) % count != index

    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "run", compile_only))
        stack.enter_context(patch.object(knobs.runtime, "jit_cache_hook", is_of_others))
        stack.enter_context(patch.object(torch.cuda, "get_device_properties", lambda device=None: properties(0)))
        stack.enter_context(torch.inference_mode())
        stack.enter_context(_Kernels())
        yield
