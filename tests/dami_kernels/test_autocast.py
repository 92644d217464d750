"""Under `torch.autocast` an operator takes and returns the dtypes of torch's own counterpart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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
from tests.tolerance import assert_as_accurate

LOW = torch.bfloat16
ROWS, N, K = 6, 33, 64
LAM = torch.tensor([0.0, 0.3, 1.0, 0.6, 0.5, -0.2])
HALF = torch.tensor(0.5)


def pair(*shape: int, format: str = "pair") -> LerpWeight:
    base = torch.randn(shape)
    difference = 0.1 * torch.randn(shape)
    if format == "lowrank":
        difference = torch.outer(difference[:, 0], difference[0])
    return LerpWeight.pack(base, base + difference, format)


@pytest.mark.parametrize("format", formats.names())
@pytest.mark.parametrize("x_dtype", [torch.float32, LOW], ids=str)
def test_a_product_is_of_autocast_s_dtype(format: str, x_dtype: torch.dtype) -> None:
    """And equals what operands of that dtype give without it, gradients too."""
    weight, bias = pair(N, K, format=format), pair(N)
    x, lam = torch.randn(ROWS, K, dtype=x_dtype, requires_grad=True), LAM.clone().requires_grad_()
    runs: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, lam: lerp_linear(x, weight, lam, bias),
        lambda x, lam: lerp_linears(x, [weight, weight], lam, [bias, bias])[1],
        lambda x, lam: lerp_linear(x=x, weight=weight, lam=lam, bias=bias),
    ]
    expected = lerp_linear(x.to(LOW), weight.to(LOW), lam, bias.to(LOW))
    right = torch.autograd.grad(expected.float().square().sum(), (x, lam))
    for run in runs:
        with torch.autocast("cpu", LOW):
            y = run(x, lam)
            gradients = torch.autograd.grad(y.float().square().sum(), (x, lam))
        assert y.dtype == LOW
        assert torch.equal(y, expected)
        for gradient, wanted in zip(gradients, right, strict=True):
            assert torch.equal(gradient, wanted)


def test_experts_are_products() -> None:
    weight, bias, offsets = pair(2, N, K), pair(2, N), torch.tensor([4, 6], dtype=torch.int32)
    x = torch.randn(ROWS, K)
    with torch.autocast("cpu", LOW):
        y = lerp_experts(x, weight, LAM, offsets, bias)
    assert torch.equal(y, lerp_experts(x.to(LOW), weight.to(LOW), LAM, offsets, bias.to(LOW)))


@pytest.mark.parametrize("x_dtype", [torch.float32, LOW], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, LOW], ids=str)
def test_a_norm_computes_in_float32(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """On the CPU it returns x's dtype, as torch's does; on a GPU float32."""
    x, weight, bias = torch.randn(ROWS, K).to(x_dtype), pair(K).to(weight_dtype), pair(K).to(weight_dtype)
    exact = [torch.lerp(*(end.double() for end in w.unpack()), 0.5) for w in (weight, bias)]
    with torch.autocast("cpu", LOW):
        ours = lerp_rms_norm(x, weight, HALF), lerp_layer_norm(x, weight, HALF, bias)
        plain = (
            F.rms_norm(x, (K,), weight.materialize(0.5).to(x_dtype), 1e-6),
            F.layer_norm(x, (K,), weight.materialize(0.5).to(x_dtype), bias.materialize(0.5).to(x_dtype)),
        )
    oracles = F.rms_norm(x.double(), (K,), exact[0], 1e-6), F.layer_norm(x.double(), (K,), *exact)
    for actual, own, oracle in zip(ours, plain, oracles, strict=True):
        assert_as_accurate(actual, oracle, own)


def test_a_lookup_is_left_alone() -> None:
    """And what a format multiplies for it is not rounded to autocast's dtype."""
    ids = torch.arange(ROWS)
    for format in formats.names():
        weight = pair(N, K, format=format)
        with torch.autocast("cpu", LOW):
            y = lerp_embedding(ids, weight, LAM)
        assert torch.equal(y, lerp_embedding(ids, weight, LAM))


def test_it_compiles_under_autocast() -> None:
    weight, norm, x = pair(N, K), pair(K), torch.randn(ROWS, K)

    def run(x: Tensor) -> Tensor:
        return lerp_linear(lerp_rms_norm(x, norm, LAM), weight, LAM)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", LOW):
        assert torch.equal(compiled(x), run(x))
    assert compiled(x).dtype == torch.float32


def test_codes_and_scales_are_not_cast() -> None:
    weight = pair(N, K, format="w8d4").to(torch.float16)
    assert [tensor.dtype for tensor in weight.tensors] == [torch.int8, torch.bfloat16, torch.uint8, torch.bfloat16]
    assert weight.dtype == torch.float16
