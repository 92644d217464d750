"""Direct calls from a public function to its kernel, bypassing torch's dispatcher.

A small product takes only a fraction of the time spent in the dispatcher and the Python code below it. Each function
takes a flag that says whether gradients are recorded, then the arguments of the public function of the same name. It
returns None if it cannot handle the call: if a tensor is not a plain tensor of the CPU or a GPU, requires grad, would
have to be copied first, or does not fit. On a GPU it returns a `FirstCall` for a call like none before. The compiled
part inspects every tensor on each call, and no address is ever cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dami_kernels import native
from dami_kernels.ops import gpu
from dami_kernels.tuning import routes
from dami_kernels.weight import LerpWeight

_C: Any = getattr(native, "_C", None)  # the functions below are only called if it exists
HAS_AMX = routes.cpu().arch == "amx"  # then many rows may be torch's to multiply: `linear` asks


def lerp_linear(
    graph: bool,
    x: Tensor,
    weight: LerpWeight,
    lam: Tensor,
    bias: LerpWeight | None = None,
    *,
    rows_per_lam: int | None = None,
    row_to_lam: Tensor | None = None,
    invariant: bool = False,
) -> Any:
    if not _fits(x, weight) or _may_be_torchs(x):
        return None
    y = _kernels_of(x).linears(
        graph, x, weight.tensors, _ends(bias), lam, row_to_lam, rows_per_lam, weight.format, weight.shape[-1], invariant
    )
    return y[0] if type(y) is tuple else y


def lerp_linears(
    graph: bool,
    x: Tensor,
    weights: Sequence[LerpWeight],
    lam: Tensor,
    biases: Sequence[LerpWeight] | None = None,
    *,
    rows_per_lam: int | None = None,
    row_to_lam: Tensor | None = None,
    invariant: bool = False,
) -> Any:
    if not weights or not _fits(x, weights[0]) or (biases is not None and len(biases) != len(weights)):
        return None
    if _may_be_torchs(x):
        return None
    format, columns = weights[0].format, weights[0].shape[-1]
    tensors: list[Tensor] = []
    for weight in weights:
        if not _fits(x, weight) or weight.format != format:
            return None
        tensors += weight.tensors
    ends = [tensor for bias in biases or () for tensor in _ends(bias) or (None,)]
    return _kernels_of(x).linears(graph, x, tensors, ends, lam, row_to_lam, rows_per_lam, format, columns, invariant)


def lerp_experts(
    graph: bool,
    x: Tensor,
    weight: LerpWeight,
    lam: Tensor,
    expert_offsets: Tensor,
    bias: LerpWeight | None = None,
    *,
    rows_per_lam: int | None = None,
    row_to_lam: Tensor | None = None,
    invariant: bool = False,
) -> Any:
    if not _fits(x, weight):
        return None
    return _kernels_of(x).experts(
        graph, x, weight.tensors, _ends(bias), lam, row_to_lam, rows_per_lam, expert_offsets, weight.format,
        weight.shape[-1], invariant,
    )  # fmt: skip


def lerp_embedding(
    graph: bool,
    ids: Tensor,
    weight: LerpWeight,
    lam: Tensor,
    *,
    rows_per_lam: int | None = None,
    row_to_lam: Tensor | None = None,
) -> Any:
    if type(ids) is not Tensor or not _is_weight(weight) or not (ids.is_cpu or ids.is_cuda):
        return None
    dtype = weight.dtype
    return _kernels_of(ids).embedding(
        graph, ids, weight.tensors, lam, row_to_lam, rows_per_lam, weight.format, native.DTYPES[dtype], dtype,
        weight.shape[-1],
    )  # fmt: skip


def lerp_rms_norm(
    graph: bool,
    x: Tensor,
    weight: LerpWeight,
    lam: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    rows_per_lam: int | None = None,
    row_to_lam: Tensor | None = None,
) -> Any:
    if not _fits(x, weight):
        return None
    return _kernels_of(x).rms_norm(graph, x, weight.tensors, lam, row_to_lam, rows_per_lam, eps, offset)


def lerp_layer_norm(
    graph: bool,
    x: Tensor,
    weight: LerpWeight,
    lam: Tensor,
    bias: LerpWeight | None = None,
    eps: float = 1e-5,
    *,
    rows_per_lam: int | None = None,
    row_to_lam: Tensor | None = None,
) -> Any:
    if not _fits(x, weight):
        return None
    return _kernels_of(x).layer_norm(graph, x, weight.tensors, _ends(bias), lam, row_to_lam, rows_per_lam, eps)


def _fits(x: Tensor, weight: LerpWeight) -> bool:
    return type(x) is Tensor and _is_weight(weight) and weight.dtype is x.dtype and (x.is_cpu or x.is_cuda)


def _is_weight(weight: LerpWeight) -> bool:
    return type(weight) is LerpWeight and len(weight.shape) > 0


def _kernels_of(x: Tensor) -> Any:
    return _C if x.is_cpu else gpu


def _may_be_torchs(x: Tensor) -> bool:
    return HAS_AMX and x.is_cpu and x.shape[:-1].numel() >= routes.AMX_ROWS


def _ends(bias: LerpWeight | None) -> Sequence[Tensor] | None:
    """Returns the tensors of a bias, or None, which the kernel rejects, if it is not a `LerpWeight`."""
    return () if bias is None else bias.tensors if type(bias) is LerpWeight else None
