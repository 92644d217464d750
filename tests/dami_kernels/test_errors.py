"""Every error message of the operators: it names the argument, what came and what was wanted."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from dami_kernels import (
    LerpWeight,
    formats,
    lerp_embedding,
    lerp_experts,
    lerp_layer_norm,
    lerp_linear,
    lerp_linears,
    lerp_rms_norm,
)


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", grad: bool = False) -> LerpWeight:
    end = torch.zeros(shape, dtype=dtype, device=device, requires_grad=grad)
    return LerpWeight.pack(end, end)


def as_int4(weight: LerpWeight) -> LerpWeight:
    layout = formats.get("int4").layout(weight.shape, weight.dtype)
    return replace(weight, tensors=tuple(torch.zeros(*size, dtype=dtype) for size, dtype in layout), format="int4")


X, W, V, LAM = torch.zeros(2, 3, 8), zeros(4, 8), zeros(8), torch.tensor(0.5)
IDS = torch.zeros(2, 3, dtype=torch.int64)
LONG = torch.zeros(6, dtype=torch.int64)

LINEAR: list[tuple[dict[str, Any], type, str]] = [
    ({"x": [1.0]}, TypeError, "x must be a Tensor, got list"),
    ({"x": torch.zeros(2, 7)}, ValueError, "x must have a last dimension of 8, weight's K, got shape [2, 7]"),
    ({"x": torch.tensor(1.0)}, ValueError, "x must have a last dimension of 8, weight's K, got shape []"),
    ({"weight": X}, TypeError, "weight must be a LerpWeight, got Tensor"),
    ({"weight": zeros(8)}, ValueError, "weight must have 2 dimensions, got shape [8]"),
    ({"weight": zeros(4, 8, dtype=torch.float16)}, TypeError, "input's dtype torch.float32, got torch.float16"),
    ({"weight": zeros(4, 8, device="meta")}, ValueError, "weight must be on cpu as the input is, got meta"),
    ({"weight": zeros(4, 8, grad=True)}, ValueError, "weight requires grad, but the ends are frozen"),
    ({"bias": torch.zeros(4)}, TypeError, "bias must be a LerpWeight, got Tensor"),
    ({"bias": zeros(8)}, ValueError, "bias must have a last dimension of 4, weight's N, got shape [8]"),
    (
        {"bias": as_int4(zeros(4))},
        ValueError,
        "bias must have format 'pair', got 'int4'",
    ),
    ({"lam": 0.5}, TypeError, "lam must be a float32 Tensor, got float"),
    ({"lam": LAM.double()}, TypeError, "lam must have dtype torch.float32, got torch.float64"),
    ({"lam": LAM.to("meta")}, ValueError, "lam must be on cpu as the input is, got meta"),
    ({"lam": torch.zeros(2, 3)}, ValueError, "lam must have shape [] or [L], got [2, 3]"),
    ({"lam": torch.zeros(2)}, ValueError, "lam must have shape [] or [6], one λ per row, got [2]"),
    ({"rows_per_lam": 3}, ValueError, "lam must have shape [L] when rows_per_lam or row_to_lam is given, got []"),
    ({"lam": torch.zeros(2), "rows_per_lam": 2}, ValueError, "must equal the 6 rows, got 2 * 2"),
    ({"lam": torch.zeros(2), "rows_per_lam": 3, "row_to_lam": LONG.int()}, ValueError, "exclude each other"),
    ({"lam": torch.zeros(2), "row_to_lam": [0]}, TypeError, "row_to_lam must be an int32 Tensor, got list"),
    ({"lam": torch.zeros(2), "row_to_lam": LONG}, TypeError, "row_to_lam must be an int32 Tensor, got torch.int64"),
    ({"lam": torch.zeros(2), "row_to_lam": LONG.int().to("meta")}, ValueError, "row_to_lam must be on cpu"),
    ({"lam": torch.zeros(2), "row_to_lam": LONG.int()[:5]}, ValueError, "row_to_lam must have shape [6]"),
]
LINEARS: list[tuple[dict[str, Any], type, str]] = [
    ({"x": None}, TypeError, "x must be a Tensor, got NoneType"),
    ({"weights": []}, ValueError, "weights must hold at least one weight, got none"),
    (
        {"weights": [W, zeros(4, 7)]},
        ValueError,
        "x must have a last dimension of 7, weights[1]'s K, got shape [2, 3, 8]",
    ),
    ({"weights": [W, as_int4(W)]}, ValueError, "weights must share one format, got 'pair' and 'int4'"),
    ({"weights": [W, X]}, TypeError, "weights[1] must be a LerpWeight, got Tensor"),
    ({"biases": [zeros(4)]}, ValueError, "biases must hold one for each of the 2 weights, got 1"),
    ({"biases": [zeros(4), V]}, ValueError, "biases[1] must have a last dimension of 4, weights[1]'s N, got shape [8]"),
    ({"lam": torch.zeros(2)}, ValueError, "lam must have shape [] or [6], one λ per row, got [2]"),
]
NORM: list[tuple[dict[str, Any], type, str]] = [
    ({"x": 1.0}, TypeError, "x must be a Tensor, got float"),
    ({"x": torch.tensor(1.0)}, ValueError, "x must have at least one dimension, got shape []"),
    ({"weight": zeros(4)}, ValueError, "weight must have a last dimension of 8, x's size, got shape [4]"),
    ({"weight": zeros(4, 8)}, ValueError, "weight must have 1 dimensions, got shape [4, 8]"),
    (
        {"weight": as_int4(V)},
        ValueError,
        "weight must have format 'pair', got 'int4'",
    ),
]
EMBEDDING: list[tuple[dict[str, Any], type, str]] = [
    ({"ids": [1]}, TypeError, "ids must be an int64 or int32 Tensor, got list"),
    ({"ids": X}, TypeError, "ids must be an int64 or int32 Tensor, got torch.float32"),
    ({"weight": V}, ValueError, "weight must have 2 dimensions, got shape [8]"),
    ({"weight": zeros(4, 8, device="meta")}, ValueError, "weight must be on cpu as the input is, got meta"),
    ({"ids": IDS + 4}, IndexError, "ids must be in [0, 4), got 4"),
    ({"ids": IDS - 1}, IndexError, "ids must be in [0, 4), got -1"),
]
OFFSETS = torch.tensor([2, 2, 5], dtype=torch.int32)
BEYOND, BACK = OFFSETS + 2, OFFSETS.flip(0)
EXPERTS: list[tuple[dict[str, Any], type, str]] = [
    ({"x": [1.0]}, TypeError, "x must be a Tensor, got list"),
    ({"x": X}, ValueError, "x must have shape [rows, 8], weight's K, got [2, 3, 8]"),
    ({"x": torch.zeros(6, 7)}, ValueError, "x must have shape [rows, 8], weight's K, got [6, 7]"),
    ({"weight": W}, ValueError, "weight must have 3 dimensions, got shape [4, 8]"),
    ({"weight": zeros(3, 4, 8, device="meta")}, ValueError, "weight must be on cpu as the input is, got meta"),
    ({"weight": zeros(3, 4, 8, dtype=torch.float16)}, TypeError, "input's dtype torch.float32, got torch.float16"),
    ({"weight": zeros(3, 4, 8, grad=True)}, ValueError, "weight requires grad, but the ends are frozen"),
    ({"expert_offsets": [2, 2, 5]}, TypeError, "expert_offsets must be an int32 Tensor, got list"),
    ({"expert_offsets": OFFSETS.long()}, TypeError, "expert_offsets must be an int32 Tensor, got torch.int64"),
    ({"expert_offsets": OFFSETS[:2]}, ValueError, "expert_offsets must have shape [3], one per expert, got [2]"),
    ({"expert_offsets": OFFSETS.to("meta")}, ValueError, "expert_offsets must be on cpu as the input is, got meta"),
    ({"expert_offsets": BEYOND}, IndexError, "must not decrease and end within 6 rows, got [4, 4, 7]"),
    ({"expert_offsets": BACK}, IndexError, "must not decrease and end within 6 rows, got [5, 2, 2]"),
    ({"expert_offsets": -OFFSETS}, IndexError, "must not decrease and end within 6 rows, got [-2, -2, -5]"),
    ({"bias": torch.zeros(3, 4)}, TypeError, "bias must be a LerpWeight, got Tensor"),
    ({"bias": zeros(4)}, ValueError, "bias must have 2 dimensions, got shape [4]"),
    (
        {"bias": zeros(4, 4)},
        ValueError,
        "bias must be a 'pair' of shape [3, 4], weight's E and N, got 'pair' of [4, 4]",
    ),
    (
        {"bias": as_int4(zeros(3, 4))},
        ValueError,
        "bias must be a 'pair' of shape [3, 4], weight's E and N, got 'int4' of [3, 4]",
    ),
    ({"lam": torch.zeros(2)}, ValueError, "lam must have shape [] or [6], one λ per row, got [2]"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), LINEAR)
def test_linear(wrong: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        lerp_linear(**{"x": X, "weight": W, "lam": LAM, **wrong})


@pytest.mark.parametrize(("wrong", "kind", "message"), LINEARS)
def test_linears(wrong: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        lerp_linears(**{"x": X, "weights": [W, W], "lam": LAM, **wrong})


@pytest.mark.parametrize(("wrong", "kind", "message"), NORM)
@pytest.mark.parametrize("norm", [lerp_rms_norm, lerp_layer_norm])
def test_norms(norm: Any, wrong: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        norm(**{"x": X, "weight": V, "lam": LAM, **wrong})


def test_layer_norm_bias() -> None:
    with pytest.raises(ValueError, match="bias must have a last dimension of 8"):
        lerp_layer_norm(X, V, LAM, zeros(4))


@pytest.mark.parametrize(("wrong", "kind", "message"), EMBEDDING)
def test_embedding(wrong: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        lerp_embedding(**{"ids": IDS, "weight": W, "lam": LAM, **wrong})


@pytest.mark.parametrize(("wrong", "kind", "message"), EXPERTS)
def test_experts(wrong: dict[str, Any], kind: type, message: str) -> None:
    good = {"x": torch.zeros(6, 8), "weight": zeros(3, 4, 8), "lam": LAM, "expert_offsets": OFFSETS}
    with pytest.raises(kind, match=re.escape(message)):
        lerp_experts(**{**good, **wrong})


@pytest.mark.parametrize("index", [-1, 2])
def test_row_to_lam_out_of_range(index: int) -> None:
    with pytest.raises(IndexError, match=re.escape(f"row_to_lam must be in [0, 2), got {index}")):
        lerp_linear(X, W, torch.zeros(2), row_to_lam=torch.full((6,), index, dtype=torch.int32))
