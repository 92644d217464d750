"""Calls from a public function to its launch on a GPU, in the form that the compiled part's calls for the CPU have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dami_kernels import native
from dami_kernels.launching import FirstCall, call

Results = tuple[Tensor, ...] | FirstCall | None


def linears(
    graph: bool,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int | None,
    format: str,
    columns: int,
    invariant: bool,
) -> Results:
    if biases is None:
        return None
    operands = x, _parts(weights, native.FORMATS.get(format, 1)), _parts(biases, 2) or None, lam, row_to_lam
    return call(graph, operands, rows_per_lam, linears, format, columns, bool(invariant))


def experts(
    graph: bool,
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int | None,
    offsets: Tensor,
    format: str,
    columns: int,
    invariant: bool,
) -> Any:
    if bias is None:
        return None
    weights = tuple([(tensor, *tensor.stride()[:1]) for tensor in weight])
    operands = x, weights, tuple([(end, *end.shape[1:]) for end in bias]) or None, lam, row_to_lam, offsets
    return _only(call(graph, operands, rows_per_lam, experts, format, columns, bool(invariant)))


def embedding(
    graph: bool,
    ids: Tensor,
    weight: Sequence[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int | None,
    format: str,
    type: int,
    dtype: torch.dtype,
    columns: int,
) -> Any:
    operands = ids, tuple(weight), lam, row_to_lam
    return _only(call(graph, operands, rows_per_lam, embedding, format, dtype, columns))


def rms_norm(
    graph: bool,
    x: Tensor,
    weight: Sequence[Tensor],
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int | None,
    eps: float,
    offset: float,
) -> Any:
    return _norm(graph, (x, weight, None, lam, row_to_lam), rows_per_lam, rms_norm, eps, offset)


def layer_norm(
    graph: bool,
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    lam: Tensor,
    row_to_lam: Tensor | None,
    rows_per_lam: int | None,
    eps: float,
) -> Any:
    if bias is None:
        return None
    return _norm(graph, (x, weight, bias or None, lam, row_to_lam), rows_per_lam, layer_norm, eps, 0.0)


def _norm(graph: bool, operands: Any, rows_per_lam: int | None, name: Any, eps: float, offset: float) -> Any:
    if type(eps) is not float or type(offset) is not float:
        return None
    return _only(call(graph, operands, rows_per_lam, name, eps, offset))


def _parts(tensors: Sequence[Tensor], each: int) -> tuple[tuple[Tensor, ...], ...]:
    """Returns the tensors of several weights, grouped by weight."""
    if len(tensors) == each:
        return (tuple(tensors),)
    return tuple([tuple(tensors[i : i + each]) for i in range(0, len(tensors), each)])


def _only(results: Results) -> Any:
    return results[0] if type(results) is tuple else results
