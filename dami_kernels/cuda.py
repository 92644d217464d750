"""Thin wrappers of the compiled CUDA kernels (csrc/cuda), for decoding with few rows."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from dami_kernels import formats
from dami_kernels.formats import Matrices, Matrix
from dami_kernels.installation import AGAIN
from dami_kernels.tuning.cuda import MAX_ROWS, decode_warps, prefers_cuda
from dami_kernels.tuning.device import Device, device_of

try:
    _cuda = importlib.import_module("dami_kernels._cuda")
except ImportError as error:
    WHY_NOT: str | None = (
        f"the compiled CUDA part is missing ({error}): install CUDA's compiler nvcc, in PATH or in CUDA_HOME/bin, then "
        f"{AGAIN}, and with DAMI_CUDA=1, which says why if it cannot be built"
    )
else:
    WHY_NOT = None

_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
_BITS = {(None, None), (None, 8), (None, 4), (8, 4)}  # bits of both matrices, None for numbers. See decode.cu


def takes(x: Tensor, weight: list[Tensor], format: str, invariant: bool, device: Device) -> bool:
    """Whether `lerp_linear` of this module supports this call and was measured to be faster than Triton's."""
    return (
        WHY_NOT is None
        and not invariant  # the kernel used for more rows sums in another order
        and x.shape[0] <= MAX_ROWS
        and x.dtype in _TYPES
        and _reads(format)
        and prefers_cuda(x.shape[0], weight[0].shape[0], x.shape[1], x.dtype, format, device)
        and all(tensor.stride(-1) == 1 for tensor in weight)
    )


def lerp_linear(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    format: str,
    invariant: bool,
) -> Tensor:
    """y_i = x_i · W(λ_i)ᵀ + b(λ_i): x [rows ≤ 8, K] bfloat16 or float16, weight [N, K] as `format` stores it.

    Args:
        bias: [] or a pair of [N].
        invariant: has no effect, because among calls of this function a row's result depends on that row only.

    Raises:
        RuntimeError: the compiled part is missing (the message says how to get it), or CUDA reports an error.
        NotImplementedError: the kernel does not support the format.
        TypeError, ValueError: the kernel does not support the dtype, number of rows or layout.
    """
    if WHY_NOT is not None:
        raise RuntimeError(WHY_NOT)
    if not _reads(format):
        raise NotImplementedError(f"no kernel reads the format {format!r}")
    if x.dtype not in _TYPES:
        raise TypeError(f"x must be bfloat16 or float16, got {x.dtype}")
    if x.shape[0] > MAX_ROWS:
        raise ValueError(f"x must have at most {MAX_ROWS} rows, got {x.shape[0]}")
    if not all(tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 for tensor in weight):
        raise ValueError(f"weight must be dense along K, got strides {[tensor.stride() for tensor in weight]}")
    x = x if x.stride(1) == 1 else x.contiguous()
    bias = [end.contiguous() for end in bias]
    (M, K), N = x.shape, weight[0].shape[0]
    y = x.new_empty(M, N)
    matrices = formats.matrices(format)
    first = len(matrices.base.suffixes)
    with torch.cuda.device_of(x):
        _cuda.decode(
            getattr(_cuda.Type, _TYPES[x.dtype]), _matrix(x), _operand(weight[:first], matrices.base),
            _operand(weight[first:], matrices.second), (bias[0].data_ptr(), bias[1].data_ptr()) if bias else (0, 0),
            (lam.data_ptr(), 0 if row_to_lam is None else row_to_lam.data_ptr(), rows_per_lam), y.data_ptr(), M, N, K,
            decode_warps(N, K, format, device_of(x.device)), _stream_of(x),
        )  # fmt: skip
    return y


def _matrix(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.stride(0)


def _reads(format: str) -> bool:
    known = formats.get(format)
    return isinstance(known, Matrices) and (known.base.bits, known.second.bits) in _BITS


def _operand(tensors: Sequence[Tensor], matrix: Matrix) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Returns a matrix's values, and its scales and bits per value if it is stored as codes."""
    return _matrix(tensors[0]), _matrix(tensors[1]) if matrix.bits else (0, 0), matrix.bits or 0


def _stream_of(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream
