"""The contracts of the operators, on the device at hand: accuracy, ends, independence, gradients, compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dami_kernels import (
    LerpWeight,
    lerp_embedding,
    lerp_layer_norm,
    lerp_linear,
    lerp_linears,
    lerp_rms_norm,
    reference,
)
from tests.marks import slow
from tests.tolerance import assert_as_accurate, factor_for

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BATCH, LENGTH, K, N = 5, 3, 67, 45
LAMBDAS = {
    "mixed": [0.0, 0.3, 0.5, 1.0, -0.4],
    "identical": [0.7] * 5,
    "all base": [0.0] * 5,
    "all target": [1.0] * 5,
    "beyond": [1.2] * 5,
    "two blocks": [0.25, 0.25, 0.25, 0.8, 0.8],
}


def pair(*shape: int, dtype: torch.dtype = torch.float32, distance: float = 0.03) -> LerpWeight:
    """Two ends as near to each other as the published Instruct and Thinking checkpoints are."""
    base = torch.randn(shape)
    target = base + distance * torch.randn(shape)
    return LerpWeight.pack((0.05 * base).to(dtype), (0.05 * target).to(dtype))


# Each operator as (inputs of a dtype, the operator on them, the oracle on them, plain torch at one λ).
class Case:
    def __init__(self, name: str, dtype: torch.dtype, bias: bool) -> None:
        self.name = name
        self.x: Tensor = torch.randn(BATCH, LENGTH, K, dtype=dtype)
        self.weight = pair(*{"linear": (N, K), "embedding": (N, K)}.get(name, (K,)), dtype=dtype)
        self.bias = pair(N if name == "linear" else K, dtype=dtype) if bias else None
        if name == "embedding":
            self.x = torch.randint(0, N, (BATCH, LENGTH))

    def run(self, x: Tensor, lam: Tensor, **rows: Any) -> Tensor:
        if self.name == "linear":
            return lerp_linear(x, self.weight, lam, self.bias, **rows)
        if self.name == "embedding":
            return lerp_embedding(x, self.weight, lam, **rows)
        if self.name == "rms_norm":
            return lerp_rms_norm(x, self.weight, lam, 1e-6, offset=1.0, **rows)
        return lerp_layer_norm(x, self.weight, lam, self.bias, 1e-5, **rows)

    def oracle(self, x: Tensor, lam: Tensor) -> Tensor:
        weight, bias = self.weight.unpack(), self.bias.unpack() if self.bias else None
        if self.name == "linear":
            return reference.lerp_linear(x, weight, lam, bias)
        if self.name == "embedding":
            return reference.lerp_embedding(x, weight, lam)
        if self.name == "rms_norm":
            return reference.lerp_rms_norm(x, weight, lam, 1e-6, 1.0)
        return reference.lerp_layer_norm(x, weight, lam, 1e-5, bias)

    def plain(self, x: Tensor, lam: float) -> Tensor:
        """PyTorch on the weights merged at one λ."""
        weight, bias = self.weight.materialize(lam), self.bias.materialize(lam) if self.bias else None
        if self.name == "linear":
            return F.linear(x, weight, bias)
        if self.name == "embedding":
            return F.embedding(x, weight)
        if self.name == "rms_norm":
            return F.rms_norm(x, (K,), 1 + weight, 1e-6)
        return F.layer_norm(x, (K,), weight, bias, 1e-5)

    def plain_rows(self, lam: list[float]) -> Tensor:
        return torch.stack([self.plain(x, value) for x, value in zip(self.x, lam, strict=True)])


CASES = [("linear", False), ("linear", True), ("embedding", False), ("rms_norm", False)]
CASES += [("layer_norm", False), ("layer_norm", True)]
every_case = pytest.mark.parametrize(("name", "bias"), CASES, ids=[f"{n}{'+bias' * b}" for n, b in CASES])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_case
@every_dtype
@pytest.mark.parametrize("lam", LAMBDAS.values(), ids=LAMBDAS.keys())
def test_accuracy(name: str, bias: bool, dtype: torch.dtype, lam: list[float]) -> None:
    case = Case(name, dtype, bias)
    y = case.run(case.x, torch.tensor(lam), rows_per_lam=LENGTH)
    oracle = case.oracle(case.x, torch.tensor(lam).unsqueeze(1).expand(BATCH, LENGTH))
    assert_as_accurate(y, oracle, case.plain_rows(lam))


@every_case
@every_dtype
def test_ends_are_bit_exact(name: str, bias: bool, dtype: torch.dtype) -> None:
    """Rows at λ=0 and λ=1, alone or among others, equal the same kernel given base or target alone."""
    case = Case(name, dtype, bias)
    alone = Case(name, dtype, bias)
    for end in (0, 1):
        ends = [LerpWeight.pack(w.unpack()[end], w.unpack()[end]) if w else None for w in (case.weight, case.bias)]
        alone.weight, alone.bias = ends  # type: ignore[assignment]
        for lam in ([float(end)] * BATCH, [0.3, float(end), 0.3, 1.0 - end, float(end)]):
            y = case.run(case.x, torch.tensor(lam), rows_per_lam=LENGTH)
            expected = alone.run(case.x, torch.tensor(lam), rows_per_lam=LENGTH)
            rows = [i for i, value in enumerate(lam) if value == end]
            assert torch.equal(y[rows], expected[rows])


@every_case
def test_the_three_ways_to_give_lam_agree(name: str, bias: bool) -> None:
    case = Case(name, torch.float32, bias)
    lam = torch.tensor(LAMBDAS["mixed"])
    padded = case.run(case.x, lam, rows_per_lam=LENGTH)
    per_row = case.run(case.x, lam.repeat_interleave(LENGTH))
    ragged = case.run(case.x, lam, row_to_lam=torch.arange(BATCH, dtype=torch.int32).repeat_interleave(LENGTH))
    assert torch.equal(padded, per_row)
    assert torch.equal(padded, ragged)
    assert torch.equal(case.run(case.x, torch.tensor(0.3)), case.run(case.x, torch.full((BATCH * LENGTH,), 0.3)))


@every_case
def test_no_rows(name: str, bias: bool) -> None:
    case = Case(name, torch.float32, bias)
    for lam, rows in ((torch.tensor(0.5), {}), (torch.empty(0), {}), (torch.empty(0), {"rows_per_lam": LENGTH})):
        y = case.run(case.x[:0], lam, **rows)
        assert y.shape == case.plain(case.x[:0], 0.5).shape


@pytest.mark.parametrize("name", ["linear", "rms_norm", "layer_norm"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
def test_rows_are_independent(name: str, poison: float) -> None:
    """A row of NaN or Inf, or a NaN λ, changes no other row."""
    case = Case(name, torch.float32, bias=name != "rms_norm")
    lam = torch.tensor(LAMBDAS["mixed"])
    expected = case.run(case.x, lam, rows_per_lam=LENGTH)
    others = [0, 1, 3, 4]
    x, bad_lam = case.x.clone(), lam.clone()
    x[2], bad_lam[2] = poison, poison
    for y in (case.run(x, lam, rows_per_lam=LENGTH), case.run(case.x, bad_lam, rows_per_lam=LENGTH)):
        torch.testing.assert_close(y[others], expected[others], rtol=1e-5, atol=1e-6)
        assert not y[2].isfinite().any()


@every_case
def test_input_need_not_be_contiguous(name: str, bias: bool) -> None:
    case = Case(name, torch.float32, bias)
    lam = torch.tensor(LAMBDAS["mixed"][:3])
    expected = case.run(case.x[::2].contiguous(), lam, rows_per_lam=LENGTH)
    assert torch.equal(case.run(case.x[::2], lam, rows_per_lam=LENGTH), expected)
    if name == "linear":
        wide = LerpWeight.pack(*(F.pad(end, (0, 5))[:, :K] for end in case.weight.unpack()))
        assert not wide.tensors[0].is_contiguous()
        assert torch.equal(lerp_linear(case.x[::2], wide, lam, case.bias, rows_per_lam=LENGTH), expected)


@every_case
@every_dtype
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
def test_gradients(name: str, bias: bool, dtype: torch.dtype, ragged: bool) -> None:
    """Gradients of x and λ against autograd of the oracle, within PyTorch's own error on the same data."""
    case = Case(name, dtype, bias)
    rows = {"row_to_lam": torch.arange(BATCH, dtype=torch.int32).repeat_interleave(LENGTH)}
    dy = torch.randn_like(case.plain(case.x, 0.0))

    def gradients(run: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> tuple[Tensor, ...]:
        lam = torch.tensor(LAMBDAS["mixed"], requires_grad=True)
        inputs = (lam,) if name == "embedding" else (lam, x.requires_grad_())
        y = run(x, lam)
        return torch.autograd.grad(y, inputs, dy.to(y.dtype))

    def oracle(x: Tensor, lam: Tensor) -> Tensor:
        return case.oracle(x, lam.unsqueeze(1).expand(BATCH, LENGTH))

    def plain(x: Tensor, lam: Tensor) -> Tensor:
        return torch.lerp(case.plain(x, 0.0).float(), case.plain(x, 1.0).float(), lam.view(-1, 1, 1)).to(dtype)

    def lerp(x: Tensor, lam: Tensor) -> Tensor:
        return case.run(x, lam, **(rows if ragged else {"rows_per_lam": LENGTH}))

    exact = case.x if name == "embedding" else case.x.double()
    for grad, expected, own in zip(
        gradients(lerp, case.x), gradients(oracle, exact), gradients(plain, case.x), strict=True
    ):
        assert_as_accurate(grad, expected.double(), own, factor_for(grad.numel()))


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(0, 40),
    n=st.integers(1, 70),
    k=st.integers(0, 130),
    dtype=st.sampled_from(DTYPES),
    values=st.lists(st.sampled_from([0.0, 1.0, 0.37, -0.5, 1.7]), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_linear_of_any_shape(rows: int, n: int, k: int, dtype: torch.dtype, values: list[float], seed: int) -> None:
    torch.manual_seed(seed)
    weight, bias = pair(n, k, dtype=dtype), pair(n, dtype=dtype)
    x, index = torch.randn(rows, k).to(dtype), torch.randint(0, len(values), (rows,))
    lam = torch.tensor(values)
    y = lerp_linear(x, weight, lam, bias, row_to_lam=index.int())
    oracle = reference.lerp_linear(x, weight.unpack(), lam[index], bias.unpack())
    if rows * n > 100:
        merged = [F.linear(x, weight.materialize(v), bias.materialize(v)) for v in values]
        return assert_as_accurate(y, oracle, torch.stack(merged, 1)[torch.arange(rows), index])
    # A few sums may all be next to zero, while their terms are not: bounded is what any order of adding may err.
    terms = [
        F.linear(*(t.abs().double() for t in (x, *end))) for end in zip(weight.unpack(), bias.unpack(), strict=True)
    ]
    added = sum(v.abs()[:, None] * each for v, each in zip((1 - lam[index], lam[index]), terms, strict=True))
    eps = torch.finfo(dtype).eps
    bound = eps * oracle.abs() + (k + 4) * torch.finfo(torch.float32).eps * added
    if dtype == torch.bfloat16 and rows >= 16:  # of one λ: their weight may be blended, and rounded as a merged one is
        bound += eps / 2 * added
    assert torch.all((y.double() - oracle).abs() <= bound)


@every_dtype
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_linears_are_linear_several_times(dtype: torch.dtype, bias: bool) -> None:
    """The same numbers in one launch, and gradients as near to the oracle's."""
    x = torch.randn(100, 2, K, dtype=dtype, requires_grad=True)
    lam = torch.rand(100, requires_grad=True)
    sizes = (N, 7, 64)
    weights = [pair(n, K, dtype=dtype) for n in sizes]
    biases = [pair(n, dtype=dtype) for n in sizes] if bias else None
    operands = list(zip(weights, biases or [None] * len(sizes), strict=True))
    ys = lerp_linears(x, weights, lam, biases, rows_per_lam=2)
    expected = [lerp_linear(x, weight, lam, own_bias, rows_per_lam=2) for weight, own_bias in operands]
    for y, one in zip(ys, expected, strict=True):
        torch.testing.assert_close(y, one)
    dys = [torch.randn_like(y) for y in ys]

    def gradients(x: Tensor, ys: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(ys, (x, lam), [dy.to(y.dtype) for dy, y in zip(dys, ys, strict=True)])

    exact_x = x.detach().double().requires_grad_()
    per_row = lam.unsqueeze(1).expand(100, 2)
    oracle = [reference.lerp_linear(exact_x, w.unpack(), per_row, b.unpack() if b else None) for w, b in operands]
    ends = [[F.linear(x, w.tensors[i], b.tensors[i] if b else None).float() for i in (0, 1)] for w, b in operands]
    plain = [torch.lerp(*both, lam.view(-1, 1, 1)).to(dtype) for both in ends]
    for grad, right, own in zip(gradients(x, list(ys)), gradients(exact_x, oracle), gradients(x, plain), strict=True):
        assert_as_accurate(grad, right.double(), own, factor_for(grad.numel()))


def test_opcheck_of_linears() -> None:
    x, lam = torch.randn(6, K, requires_grad=True), torch.rand(2, requires_grad=True)
    weights, biases = ([t for n in (N, 7) for t in pair(n, *k).tensors] for k in ((K,), ()))
    torch.library.opcheck(torch.ops.dami.lerp_linears, (x, weights, biases, lam, None, 3, "pair", False))


def test_linears_of_low_rank() -> None:
    base = torch.randn(2, N, K)
    update = torch.randn(2, N, 1).double() @ torch.randn(2, 1, K).double()
    target = (base + update).float()  # rounded once: what is rounded twice has no low rank
    weights = [LerpWeight.pack(*ends, "lowrank") for ends in zip(base, target, strict=True)]
    x, lam = torch.randn(BATCH, K), torch.rand(BATCH)
    for y, weight in zip(lerp_linears(x, weights, lam), weights, strict=True):
        torch.testing.assert_close(y, lerp_linear(x, weight, lam))


@pytest.mark.parametrize(
    ("name", "bias", "ragged"),
    [
        *((*case, False) for case in CASES),
        ("linear", True, True),
        *slow(*((*case, True) for case in CASES[:1] + CASES[2:])),
    ],
)
def test_opcheck(name: str, bias: bool, ragged: bool) -> None:
    """torch's own checks of schema, shape function, autograd registration and tracing."""
    case = Case(name, torch.float32, bias)
    x = case.x.reshape(BATCH * LENGTH, *case.x.shape[2:])
    lam = torch.tensor(LAMBDAS["mixed"], requires_grad=True)
    index = torch.arange(BATCH, dtype=torch.int32).repeat_interleave(LENGTH) if ragged else None
    rows = (lam, index, 1 if ragged else LENGTH)
    weight, biases = list(case.weight.tensors), list(case.bias.tensors) if case.bias else []
    arguments = {
        "linear": (x, weight, biases, *rows, "pair", False),
        "embedding": (x, weight, *rows, "pair", torch.float32, K),
        "rms_norm": (x, weight, *rows, 1e-6, 1.0),
        "layer_norm": (x, weight, biases, *rows, 1e-5),
    }[name]
    if name != "embedding":
        x.requires_grad_()
    torch.library.opcheck(getattr(torch.ops.dami, f"lerp_{name}"), arguments)


@every_case
def test_compiles_once_for_every_lam(name: str, bias: bool) -> None:
    case = Case(name, torch.float32, bias)
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x, lam: case.run(x, lam, rows_per_lam=LENGTH), fullgraph=True, backend=count)
    for values in LAMBDAS.values():
        lam = torch.tensor(values)
        assert torch.equal(compiled(case.x, lam), case.run(case.x, lam, rows_per_lam=LENGTH))
    assert len(graphs) == 1
