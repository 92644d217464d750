"""A pytest plugin that makes the operators on the CPU run the Triton kernels, in Triton's interpreter.

    TRITON_INTERPRET=1 python -m pytest -p tests.dami_kernels.triton_interpreter tests/dami_kernels/test_ops.py

The interpreter replaces `triton.jit` itself, so it needs a process of its own; test_triton.py starts one.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, InterpreterOptions, TensorHandle

from dami_kernels import formats, native
from dami_kernels import triton as kernels

assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1"

BYPASSED = ExitStack()
if native.WHY_NOT is None:
    BYPASSED.enter_context(native.bypassed())  # for as long as the process lasts
native.WHY_NOT = None
native.LINEAR_FORMATS = {name for name in formats.names() if isinstance(formats.get(name), formats.Matrices)}
for name in kernels.__all__:
    setattr(native, name, getattr(kernels, name))


# Four faults of the interpreter stand between its numbers and a GPU's. It holds bfloat16 as bits in uint16, and
# calculates with the bits; it rounds to bfloat16 towards zero; its `tl.dot` is NumPy's matmul, whose BLAS may sum an
# element in another order by its place in the tile; and NumPy 2.4 refuses its loop bounds.
def _float32(handle: TensorHandle) -> Any:
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)


def _cast(builder: InterpreterBuilder, source: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
    kinds = (source.dtype.scalar, dst_type.scalar)
    if kinds == (tl.bfloat16, tl.float32):
        return TensorHandle(_float32(source), tl.float32)
    if dst_type.scalar == tl.bfloat16 != source.dtype.scalar:
        return _bfloat16(source.data)
    return _plain_cast(builder, source, dst_type)


def _bfloat16(data: Any) -> TensorHandle:
    rounded = torch.from_numpy(np.asarray(data, np.float32)).bfloat16()
    return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)


def _binary(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, op: Any) -> TensorHandle:
    if a.dtype.scalar == tl.bfloat16:
        return _bfloat16(op(_float32(a), _float32(b)))
    return _plain_binary(builder, a, b, op)


def _dot(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *_: Any) -> TensorHandle:
    product = np.zeros_like(d.data)
    left, right = _float32(a), _float32(b)
    for k in range(left.shape[-1]):
        product += left[..., :, k, None] * right[..., k, None, :]
    return TensorHandle(product + d.data, d.dtype.scalar)


def _patch(tensor: type, scope: Any) -> None:
    _plain_patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _call(function: InterpretedFunction, *args: Any, **options: Any) -> Any:
    """Calls a device function. The interpreter's own patches triton.language again at every call, for half its time."""
    if function.fn.__module__ not in _patched:
        _patched.add(function.fn.__module__)
        interpreter._patch_lang(function.fn)
    return function.rewrite()(*args, **options)


def _block_type(block: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
    """Makes a type of a few that come again and again: a third of the interpreter's time went into making them."""
    key = (element_ty.name, *shape)
    if key not in _types:
        _plain_block_type(block, element_ty, shape)
        _types[key] = vars(block) | {"constants": tl.tuple([tl.constexpr(size) for size in block.shape])}
    vars(block).update(_types[key])


def _tensor(tensor: tl.tensor, handle: TensorHandle, type: tl.dtype) -> None:
    """Makes a tensor, whose shape comes with its type."""
    tensor.handle, tensor.type, tensor.dtype = handle, type, type.scalar
    tensor.shape, tensor.numel = (type.constants, tl.constexpr(type.numel)) if type.is_block() else _scalar


def _numpy_type(type: tl.dtype) -> np.dtype:
    """NumPy's type for one of Triton's. The interpreter makes a table of all of them at every call."""
    if type.name not in _numpy_types:
        _numpy_types[type.name] = _plain_numpy_type(type)
    return _numpy_types[type.name]


_numpy_types: dict[str, np.dtype] = {}
_scalar = tl.tuple([]), tl.constexpr(1)
_types: dict[Any, dict[str, Any]] = {}
_plain_block_type, tl.block_type.__init__ = tl.block_type.__init__, _block_type
tl.tensor.__init__ = _tensor
_plain_numpy_type, interpreter._get_np_dtype = interpreter._get_np_dtype, _numpy_type
_patched: set[str] = set()
InterpretedFunction.__call__ = _call
_plain_cast, InterpreterBuilder.cast_impl = InterpreterBuilder.cast_impl, _cast
InterpreterBuilder.get_bf16 = lambda builder, value: _bfloat16([value])
_plain_binary, InterpreterBuilder.binary_op = InterpreterBuilder.binary_op, _binary
_plain_patch, interpreter._patch_lang_tensor = interpreter._patch_lang_tensor, _patch
InterpreterBuilder.create_dot = _dot
# Checking every integer sum for overflow takes a third of the time; test_offsets_beyond_32_bits has those that count.
interpreter.interpreter_builder.options = InterpreterOptions(sanitize_overflow=False)
