"""Thin calls into the compiled CPU kernels (csrc/cpu): the operators, with their torch schemas' arguments.

The kernels receive only addresses, so the arguments must be as `ops.library` has checked them: λ, its map, ids and
offsets are dense, and weights are what their format says.

The instruction set is chosen when this module is loaded: the best that the CPU has, or the one that the environment
variable DAMI_CPU_ISA names.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from functools import cache

import torch
from torch import Tensor

from dami_kernels.installation import AGAIN

try:
    _C = importlib.import_module("dami_kernels._C")
except ImportError as error:
    WHY_NOT: str | None = (
        "there are no kernels for Windows; Linux inside WSL has them"
        if sys.platform == "win32"
        else f"the compiled part is missing ({error}): install a C++ compiler, then {AGAIN}"
    )
else:
    WHY_NOT = None
    _TYPES = {torch.float32: _C.Type.f32, torch.bfloat16: _C.Type.bf16, torch.float16: _C.Type.f16}
    _C.isa()  # a DAMI_CPU_ISA that cannot be had is refused here, not at the first call

_NO_MATRIX = (0, 0)
_NO_PAIR = (_NO_MATRIX, _NO_MATRIX)


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
    """y_i = x_i · W(λ_i)ᵀ + b(λ_i): x [rows, K], weight [N, K] as `format` stores it, bias [] or a pair of [N]."""
    return lerp_linears(x, weight, bias, lam, row_to_lam, rows_per_lam, format, invariant)


def lerp_linears(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    format: str,
    invariant: bool,
) -> Tensor:
    """`lerp_linear` with several weights, the tensors of one after those of the other: [rows, ΣN_i], side by side."""
    each = _tensors_of(format)
    x, weights, biases = _dense(x), _in_place(weights), _in_place(biases)
    outputs = [weight.shape[0] for weight in weights[::each]]
    y = x.new_empty(x.shape[0], sum(outputs))
    _C.linear(
        _TYPES[x.dtype], _matrix(x), *x.shape, format, [_stack(weight) for weight in weights],
        [_pair(biases[i : i + 2]) for i in range(0, len(biases), 2)], outputs, _matrix(y),
        _lams(lam, row_to_lam, rows_per_lam), invariant, torch.get_num_threads(),
    )  # fmt: skip
    return y


def lerp_experts(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    offsets: Tensor,
    format: str,
    invariant: bool,
) -> Tensor:
    """`lerp_linear` of each row with its expert's weight: weight [E, N, K], bias [] or a pair of [E, N].

    IndexError if the offsets, the ends of the experts' rows, decrease or pass the rows.
    """
    _tensors_of(format)
    x, weight, bias = _dense(x), _in_place(weight), _in_place(bias)
    experts, outputs = weight[0].shape[:2]
    y = x.new_empty(x.shape[0], outputs)
    _C.experts(
        _TYPES[x.dtype], _matrix(x), *x.shape, format, [_stack(tensor) for tensor in weight], _pair(bias),
        offsets.data_ptr(), experts, outputs, y.data_ptr(), _lams(lam, row_to_lam, rows_per_lam), invariant,
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def lerp_embedding(
    ids: Tensor,
    weight: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    format: str,
    dtype: torch.dtype,
    columns: int,
) -> Tensor:
    """y_i = W(λ_i)[id_i]: ids [rows] int64 or int32, weight [V, D] as `format` stores it. IndexError for a bad id."""
    _tensors_of(format)
    weight = _in_place(weight)
    y = torch.empty(ids.shape[0], columns, dtype=dtype)
    _C.embedding(
        _TYPES[dtype], ids.data_ptr(), ids.dtype == torch.int64, ids.shape[0], format,
        [_stack(tensor) for tensor in weight], weight[0].shape[0], columns, y.data_ptr(),
        _lams(lam, row_to_lam, rows_per_lam), torch.get_num_threads(),
    )  # fmt: skip
    return y


def lerp_rms_norm(
    x: Tensor,
    weight: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    eps: float,
    offset: float,
) -> Tensor:
    """y_i = x_i / sqrt(mean(x_i²) + eps) · (offset + w(λ_i)): x [rows, D], weight a pair of [D]."""
    x, weight = _dense(x), _in_place(weight)
    y = torch.empty(x.shape, dtype=x.dtype)
    _C.rms_norm(
        _TYPES[x.dtype], _matrix(x), _pair(weight), y.data_ptr(), *x.shape, eps, offset,
        _lams(lam, row_to_lam, rows_per_lam), torch.get_num_threads(),
    )  # fmt: skip
    return y


def lerp_layer_norm(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    eps: float,
) -> Tensor:
    """y_i = (x_i − mean(x_i)) / std(x_i) · w(λ_i) + b(λ_i): x [rows, D], weight a pair of [D], bias [] or the same."""
    x, weight, bias = _dense(x), _in_place(weight), _in_place(bias)
    y = torch.empty(x.shape, dtype=x.dtype)
    _C.layer_norm(
        _TYPES[x.dtype], _matrix(x), _pair(weight), _pair(bias), y.data_ptr(), *x.shape, eps,
        _lams(lam, row_to_lam, rows_per_lam), torch.get_num_threads(),
    )  # fmt: skip
    return y


def isa() -> str:
    """The instruction set in use."""
    return _C.isa()


def supported_isas() -> list[str]:
    """The instruction sets this machine has, best last."""
    return _C.supported_isas()


def use_isa(name: str) -> None:
    """Changes the instruction set, for tests and measurements. ValueError if this machine lacks it."""
    _C.use_isa(name)


def peak_flops(dtype: torch.dtype) -> float:
    """Operations per second if torch's threads do nothing but the multiply-adds of `lerp_linear` on `dtype`."""
    return _C.peak_flops(_TYPES[dtype], torch.get_num_threads())


def read_bandwidth(data: Tensor) -> float:
    """Bytes per second at which torch's threads read `data`, which should be larger than the caches."""
    return _C.read_bandwidth(data.data_ptr(), data.nbytes, torch.get_num_threads())


def _is_dense(tensor: Tensor) -> bool:
    """Whether the last dimension lies dense in memory."""
    return tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 or tensor.numel() == 0


def _dense(tensor: Tensor) -> Tensor:
    return tensor if _is_dense(tensor) else tensor.contiguous()


def _tensors_of(format: str) -> int:
    """How many tensors a weight of this format has."""
    if format not in _C.FORMATS:
        raise NotImplementedError(f"no kernel reads the format {format!r}")
    return _C.FORMATS[format]


def _in_place(stored: list[Tensor]) -> list[Tensor]:
    """The tensors themselves if each is dense along its last dimension, else dense copies, with one warning."""
    if all(map(_is_dense, stored)):
        return stored
    _warn_of_copies()
    return list(map(_dense, stored))


def _matrix(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.stride(0)


def _stack(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(-2)


def _pair(ends: list[Tensor]) -> tuple[tuple[int, int], tuple[int, int]]:
    return (_matrix(ends[0]), _matrix(ends[1])) if ends else _NO_PAIR


@cache
def _warn_of_copies() -> None:
    warnings.warn(
        "dami: a weight is copied at every call, as its last dimension is not dense: pack contiguous() tensors",
        UserWarning,
        stacklevel=4,
    )


def _lams(lam: Tensor, row_to_lam: Tensor | None, rows_per_lam: int) -> tuple[int, int, int, int]:
    return lam.data_ptr(), lam.shape[0], 0 if row_to_lam is None else row_to_lam.data_ptr(), rows_per_lam
