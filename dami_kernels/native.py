"""Thin wrappers of the compiled CPU kernels (csrc/cpu), which take the arguments of the operators' torch schemas.

The compiled part checks its arguments. It returns None if it would have to copy a tensor first.

The instruction set is chosen when this module is loaded: the one named by the environment variable DAMI_CPU_ISA, or
else the best that the CPU has.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dami_kernels.installation import AGAIN

try:
    _C = importlib.import_module("dami_kernels._C")
    _C.connect(Tensor, Parameter, torch.get_num_threads)
except (ImportError, AttributeError) as error:  # AttributeError: this torch lacks the tensor exchange
    WHY_NOT: str | None = (
        "there are no kernels for Windows; Linux inside WSL has them"
        if sys.platform == "win32"
        else f"the compiled part is missing ({error}): install a C++ compiler, then {AGAIN}"
    )
else:
    WHY_NOT = None
    _TYPES = {torch.float32: _C.Type.f32, torch.bfloat16: _C.Type.bf16, torch.float16: _C.Type.f16}
    DTYPES = {dtype: int(type) for dtype, type in _TYPES.items()}
    FORMATS: dict[str, int] = _C.FORMATS  # tensors of a weight in each
    LINEAR_FORMATS = {*FORMATS, "lowrank"}  # that `lerp_linear` reads
    _C.isa()  # rejects an unsupported DAMI_CPU_ISA now rather than at the first call


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
    return _linears(x, weight, bias, lam, row_to_lam, rows_per_lam, format, invariant)[0]


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
    """`lerp_linear` with several weights, given as a flat list of tensors. Returns [rows · ΣN_i], flattened."""
    parts = _linears(x, weights, biases, lam, row_to_lam, rows_per_lam, format, invariant)
    return torch.cat([part.flatten() for part in parts])


def _linears(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    format: str,
    invariant: bool,
) -> tuple[Tensor, ...]:
    _check_format(format, LINEAR_FORMATS)
    lams = _lams(lam, row_to_lam, rows_per_lam)
    stored = _in_place(weights), _in_place(biases)
    return _taken(_C.linears(False, _dense(x), *stored, *lams, format, x.shape[1], invariant))


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

    Raises IndexError if the offsets, the ends of the experts' rows, decrease or exceed the number of rows.
    """
    _check_format(format, FORMATS)
    lams = _lams(lam, row_to_lam, rows_per_lam)
    stored = _in_place(weight), _in_place(bias)
    return _taken(_C.experts(False, _dense(x), *stored, *lams, _plain(offsets), format, x.shape[1], invariant))


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
    """y_i = W(λ_i)[id_i]: ids [rows] int64 or int32, weight [V, D] as `format` stores it. Bad ids raise IndexError."""
    _check_format(format, FORMATS)
    if not ids.shape[0]:
        return weight[0].new_empty(0, columns, dtype=dtype)
    lams = _lams(lam, row_to_lam, rows_per_lam)
    return _taken(_C.embedding(False, _plain(ids), _in_place(weight), *lams, format, DTYPES[dtype], dtype, columns))


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
    if not x.shape[0]:
        return torch.empty(x.shape, dtype=x.dtype)
    return _taken(_C.rms_norm(False, _dense(x), _in_place(weight), *_lams(lam, row_to_lam, rows_per_lam), eps, offset))


def lerp_layer_norm(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int,
    eps: float,
) -> Tensor:
    """y_i = (x_i − mean(x_i)) / std(x_i) · w(λ_i) + b(λ_i): x [rows, D], weight a pair of [D], bias [] or a pair."""
    if not x.shape[0]:
        return torch.empty(x.shape, dtype=x.dtype)
    return _taken(
        _C.layer_norm(False, _dense(x), _in_place(weight), _in_place(bias), *_lams(lam, row_to_lam, rows_per_lam), eps)
    )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    table: Tensor,
    begins: Tensor,
    key_begins: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Computes causal attention of concatenated sequences whose keys and values lie in pages.

    The keys and values of the queries' own tokens are written to their pages first. A query's bits depend on nothing
    but the keys that it sees. There is no gradient.

    Args:
        query: [1, heads, tokens, size], of all sequences.
        key, value: [1, key heads, tokens, size], of the same tokens.
        key_pages, value_pages: [pages, page, key heads, size], where `page` is the number of tokens of a page.
        table: int32 [sequences, ·], the pages of each sequence, in order.
        begins, key_begins: int32 [sequences + 1], where queries and keys of each sequence begin, and the end.
        scale: scale of the scores.
        softcap: soft cap of the scores; 0 for none.
        sinks: [tokens, heads], one more score for each query, without a value.

    Returns:
        [1, tokens, heads, size].

    Raises:
        IndexError: a sequence has fewer keys than queries, or pages that do not exist.
        NotImplementedError: shapes or dtypes are others.
    """
    operands = (_dense(query), _dense(key), _dense(value), key_pages, value_pages, table, begins, key_begins)
    return _taken(_C.attention(*operands, scale, softcap, None if sinks is None else sinks.float().contiguous()))


def register(reraise: Callable[[], None]) -> None:
    """Registers the kernels with torch's dispatcher, bypassing Python.

    Calls that the kernel of `NAME` does not take go to the Python operator `_NAME`. If that returns a scalar instead of
    a matrix, `reraise` must raise its error.
    """
    library = Path(torch.__file__).parent / "lib" / ("libtorch_cpu" + (".dylib" if sys.platform == "darwin" else ".so"))
    _C.register_kernels(str(library), reraise)


@contextmanager
def bypassed() -> Iterator[None]:
    """Routes all calls through Python, for tests that replace kernels of this module."""
    _C.take_calls(False)
    try:
        yield
    finally:
        _C.take_calls(True)


def isa() -> str:
    """Returns the instruction set in use."""
    return _C.isa()


def supported_isas() -> list[str]:
    """Returns the instruction sets that this machine supports, best last."""
    return _C.supported_isas()


def use_isa(name: str) -> None:
    """Sets the instruction set, for tests and measurements. Raises ValueError if this machine lacks it."""
    _C.use_isa(name)


def peak_flops(dtype: torch.dtype) -> float:
    """Measures operations per second with torch's threads doing only the multiply-adds of `lerp_linear` on `dtype`."""
    return _C.peak_flops(_TYPES[dtype], torch.get_num_threads())


def read_bandwidth(data: Tensor) -> float:
    """Measures bytes per second at which torch's threads read `data`, which should be larger than the caches."""
    return _C.read_bandwidth(data.data_ptr(), data.nbytes, torch.get_num_threads())


def _is_dense(tensor: Tensor) -> bool:
    """Whether the last dimension is contiguous."""
    return tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 or tensor.numel() == 0


def _plain(tensor: Tensor) -> Tensor:
    """Returns `tensor` as a plain Tensor, because subclasses have no effect below the dispatcher."""
    return tensor if type(tensor) is Tensor or type(tensor) is Parameter else tensor.as_subclass(Tensor)


def _dense(tensor: Tensor) -> Tensor:
    return _plain(tensor if _is_dense(tensor) else tensor.contiguous())


def _check_format(format: str, readable: Container[str]) -> None:
    if format not in readable:
        raise NotImplementedError(f"no kernel reads the format {format!r}")


def _in_place(stored: list[Tensor]) -> list[Tensor]:
    """Returns the tensors if all are dense along their last dimension, else dense copies, and warns once."""
    if not all(map(_is_dense, stored)):
        _warn_of_copies()
    return list(map(_dense, stored))


def _taken(y: Any) -> Any:
    if y is None:
        raise NotImplementedError("no kernel reads tensors that lie in memory as these do")
    return y


@cache
def _warn_of_copies() -> None:
    warnings.warn(
        "dami: a weight is copied at every call, as its last dimension is not dense: pack contiguous() tensors",
        UserWarning,
        stacklevel=4,
    )


def _lams(lam: Tensor, row_to_lam: Tensor | None, rows_per_lam: int) -> tuple[Tensor, Tensor | None, int | None]:
    return (_plain(lam), None, rows_per_lam) if row_to_lam is None else (_plain(lam), _plain(row_to_lam), None)
