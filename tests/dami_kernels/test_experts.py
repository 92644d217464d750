"""The contracts of `lerp_experts`, on the device at hand: accuracy, ends, independence, gradients, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dami_kernels import LerpWeight, lerp_experts, lerp_linear, reference
from tests.tolerance import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = ["pair", "int8", "int4", "w8d4"]  # lowrank holds matrices only
E, N, K = 5, 45, 67
COUNTS = (3, 0, 18, 1, 4)  # rows of each expert; one has none, one more than a small tile holds
LAMBDAS = {
    "mixed": (0.0, 0.3, 0.5, 1.0, -0.4),
    "identical": (0.7,),
    "all base": (0.0,),
    "all target": (1.0,),
    "beyond": (1.2,),
}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_format = pytest.mark.parametrize("format", FORMATS)


def pack(*shape: int, dtype: torch.dtype = torch.float32, format: str = "pair", distance: float = 0.03) -> LerpWeight:
    """Two ends as near to each other as the published Instruct and Thinking checkpoints are."""
    base = torch.randn(shape)
    target = base + distance * torch.randn(shape)
    return LerpWeight.pack((0.05 * base).to(dtype), (0.05 * target).to(dtype), format)


def ends_of(counts: tuple[int, ...]) -> Tensor:
    """The offsets: where the rows of each expert end."""
    return torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)


def expert_of_row(counts: tuple[int, ...]) -> Tensor:
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def cycled(values: tuple[float, ...], rows: int) -> Tensor:
    return torch.tensor(values)[torch.arange(rows) % len(values)]


def merged(
    x: Tensor, weight: LerpWeight, lam: Tensor, counts: tuple[int, ...], bias: LerpWeight | None = None
) -> Tensor:
    """Plain PyTorch: each row by its expert's weight, merged at its λ."""
    y, expert = x.new_empty(len(x), weight.shape[1]), expert_of_row(counts).to(x.device)
    for value in lam.unique():
        w, b = weight.materialize(value.item()), bias.materialize(value.item()) if bias else None
        for e in range(len(counts)):
            rows = (lam == value) & (expert == e)
            y[rows] = F.linear(x[rows], w[e], None if b is None else b[e])
    return y


def assert_right(
    y: Tensor, x: Tensor, weight: LerpWeight, lam: Tensor, counts: tuple[int, ...], bias: LerpWeight | None = None
) -> None:
    ends = bias.unpack() if bias else None
    oracle = reference.lerp_experts(x, weight.unpack(), lam, expert_of_row(counts), ends)
    assert_as_accurate(y, oracle, merged(x, weight, lam, counts, bias))


@every_format
@every_dtype
def test_accuracy(format: str, dtype: torch.dtype) -> None:
    weight, bias = pack(E, N, K, dtype=dtype, format=format), pack(E, N, dtype=dtype)
    x = torch.randn(sum(COUNTS), K).to(dtype)
    for values in LAMBDAS.values():
        lam = cycled(values, len(x))
        assert_right(lerp_experts(x, weight, lam, ends_of(COUNTS), bias), x, weight, lam, COUNTS, bias)


@every_format
@pytest.mark.parametrize(
    "counts", [(1,), (26,), (0, 0, 26), (26, 0, 0), (0, 26, 0), (1,) * 26, (0,) * 9 + (1,)], ids=str
)
def test_any_spread_over_the_experts(format: str, counts: tuple[int, ...]) -> None:
    """One expert only, all rows with one of several, a row each, and most experts without any."""
    weight, x = pack(len(counts), 20, 40, format=format), torch.randn(sum(counts), 40)
    lam = cycled(LAMBDAS["mixed"], len(x))
    assert_right(lerp_experts(x, weight, lam, ends_of(counts)), x, weight, lam, counts)


@settings(deadline=None, max_examples=25)
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=6).map(tuple),
    n=st.integers(1, 70),
    k=st.integers(1, 130),
    dtype=st.sampled_from(DTYPES),
    format=st.sampled_from(FORMATS),
    values=st.lists(st.sampled_from([0.0, 1.0, 0.37, -0.5, 1.7]), min_size=1, max_size=4).map(tuple),
    seed=st.integers(0, 2**16),
)
def test_any_shape(
    counts: tuple[int, ...], n: int, k: int, dtype: torch.dtype, format: str, values: tuple[float, ...], seed: int
) -> None:
    torch.manual_seed(seed)
    weight, bias = pack(len(counts), n, k, dtype=dtype, format=format), pack(len(counts), n, dtype=dtype)
    x = torch.randn(sum(counts), k).to(dtype)
    lam = cycled(values, len(x))
    y = lerp_experts(x, weight, lam, ends_of(counts), bias)
    # A few sums may all be next to zero, while their terms are not: bounded is what any order of adding may err.
    expert, ends, of_bias = expert_of_row(counts), weight.unpack(), bias.unpack()
    oracle = reference.lerp_experts(x, ends, lam, expert, of_bias)
    terms = [
        reference.lerp_experts(x.abs(), (end.abs(),) * 2, torch.zeros(len(x)), expert, (b.abs(),) * 2)
        for end, b in zip(ends, of_bias, strict=True)
    ]
    size = lam.abs().unsqueeze(1)
    added = (1 + size) * terms[0] + size * terms[1]
    eps = torch.finfo(dtype).eps
    assert ((y.double() - oracle).abs() <= (eps + k * 2**-24) * added + eps * oracle.abs()).all()


@every_format
def test_rows_after_the_last_expert_s_are_zero(format: str) -> None:
    """Whatever is in them, and whatever λ they have; also if there are no others."""
    weight, bias = pack(E, N, K, format=format), pack(E, N)
    for counts in (COUNTS, (0,) * E):
        x, rows = torch.randn(sum(counts) + 40, K), sum(counts)
        x[rows:], lam = torch.nan, torch.rand(len(x))
        lam[rows + 1 :] = torch.nan
        y = lerp_experts(x, weight, lam, ends_of(counts), bias)
        assert torch.equal(y[rows:], torch.zeros(40, N))
        assert_right(y[:rows], x[:rows], weight, lam[:rows], counts, bias)


@every_dtype
def test_ends_are_bit_exact(dtype: torch.dtype) -> None:
    """Rows at λ=0 and λ=1, alone or among others, equal the same kernel given base or target alone."""
    weight, bias, x = pack(E, N, K, dtype=dtype), pack(E, N, dtype=dtype), torch.randn(sum(COUNTS), K).to(dtype)
    for end in (0, 1):
        alone = [LerpWeight.pack(w.unpack()[end], w.unpack()[end]) for w in (weight, bias)]
        for values in ((float(end),), (0.3, float(end), 1.0 - end)):
            lam = cycled(values, len(x))
            y = lerp_experts(x, weight, lam, ends_of(COUNTS), bias)
            expected = lerp_experts(x, alone[0], lam, ends_of(COUNTS), alone[1])
            assert torch.equal(y[lam == end], expected[lam == end])


def test_one_expert_is_a_linear() -> None:
    weight, bias, x = pack(1, N, K), pack(1, N), torch.randn(20, K)
    lam = cycled(LAMBDAS["mixed"], 20)
    one, one_bias = (LerpWeight.pack(*(end[0] for end in w.unpack())) for w in (weight, bias))
    expected = lerp_linear(x, one, lam, one_bias)
    torch.testing.assert_close(lerp_experts(x, weight, lam, ends_of((20,)), bias), expected, rtol=1e-5, atol=1e-6)


def test_the_ways_to_give_lam_agree() -> None:
    weight, x, offsets = pack(E, N, K), torch.randn(24, K), ends_of((3, 0, 16, 1, 4))
    lam = torch.tensor(LAMBDAS["mixed"][:4])
    per_row = lerp_experts(x, weight, lam.repeat_interleave(6), offsets)
    index = torch.arange(4, dtype=torch.int32).repeat_interleave(6)
    assert torch.equal(lerp_experts(x, weight, lam, offsets, rows_per_lam=6), per_row)
    assert torch.equal(lerp_experts(x, weight, lam, offsets, row_to_lam=index), per_row)
    one, each = torch.tensor(0.3), torch.full((24,), 0.3)
    assert torch.equal(lerp_experts(x, weight, one, offsets), lerp_experts(x, weight, each, offsets))


def test_no_rows() -> None:
    y = lerp_experts(torch.empty(0, K), pack(E, N, K), torch.tensor(0.5), ends_of((0,) * E))
    assert y.shape == (0, N)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
def test_rows_are_independent(poison: float) -> None:
    """A row of NaN or Inf, or its λ, changes no other row, of its expert or of another."""
    weight, bias, x, offsets = pack(E, N, K), pack(E, N), torch.randn(sum(COUNTS), K), ends_of(COUNTS)
    lam = cycled(LAMBDAS["mixed"], len(x))
    expected = lerp_experts(x, weight, lam, offsets, bias)
    bad = torch.arange(len(x)) == 5
    bad_x, bad_lam = x.clone(), lam.clone()
    bad_x[bad], bad_lam[bad] = poison, poison
    for y in (lerp_experts(bad_x, weight, lam, offsets, bias), lerp_experts(x, weight, bad_lam, offsets, bias)):
        torch.testing.assert_close(y[~bad], expected[~bad], rtol=1e-5, atol=1e-6)
        assert not y[bad].isfinite().any()


def test_an_expert_without_rows_is_not_read() -> None:
    weight, x, offsets = pack(E, N, K), torch.randn(sum(COUNTS), K), ends_of(COUNTS)
    lam = cycled(LAMBDAS["mixed"], len(x))
    expected = lerp_experts(x, weight, lam, offsets)
    for end in weight.tensors:
        end[COUNTS.index(0)] = torch.nan
    assert torch.equal(lerp_experts(x, weight, lam, offsets), expected)


@pytest.mark.filterwarnings("ignore:dami. a weight is copied")  # on the CPU, and said so
@every_dtype
def test_nothing_need_be_contiguous(dtype: torch.dtype) -> None:
    """Rows of x with gaps, every second offset, and a weight that is stored as [E, K, N]."""
    weight, x, offsets = pack(E, N, K, dtype=dtype), torch.randn(sum(COUNTS), K).to(dtype), ends_of(COUNTS)
    lam = cycled(LAMBDAS["mixed"], len(x))
    expected = lerp_experts(x, weight, lam, offsets)
    wide = F.pad(x, (3, 5))[:, 3 : 3 + K]
    torch.testing.assert_close(lerp_experts(wide, weight, lam, offsets.repeat_interleave(2)[::2]), expected)
    transposed = LerpWeight.pack(*(end.mT.contiguous().mT for end in weight.unpack()))
    assert transposed.tensors[0].stride() == (K * N, 1, N)
    torch.testing.assert_close(lerp_experts(x, transposed, lam, offsets), expected)


def test_invariant() -> None:
    """A row's bits depend on neither its neighbours, nor their λ, nor how many they are."""
    weight, bias = pack(E, N, K, dtype=torch.bfloat16), pack(E, N, dtype=torch.bfloat16)
    x = torch.randn(sum(COUNTS), K).bfloat16()
    expert = expert_of_row(COUNTS)
    for values in LAMBDAS.values():
        lam = cycled(values, len(x))
        y = lerp_experts(x, weight, lam, ends_of(COUNTS), bias, invariant=True)
        for row in (0, 7, 20, 25):
            counts = tuple(int(e == expert[row]) for e in range(E))
            alone = lerp_experts(x[row : row + 1], weight, lam[row], ends_of(counts), bias, invariant=True)
            assert torch.equal(alone[0], y[row])


@every_format
@every_dtype
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
def test_gradients(format: str, dtype: torch.dtype, ragged: bool) -> None:
    """Gradients of x and λ against autograd of the oracle, within PyTorch's own error on the same data."""
    counts, L = (9, 0, 36, 3, 12), 20
    # Ends far apart: the gradient of λ is a difference of the ends' products, and would show their rounding only.
    weight, bias = pack(E, N, K, dtype=dtype, format=format, distance=1.0), pack(E, N, dtype=dtype, distance=1.0)
    x, expert = torch.randn(sum(counts), K).to(dtype), expert_of_row(counts)
    index = torch.arange(L).repeat_interleave(len(x) // L)
    how = {"row_to_lam": index.int()} if ragged else {"rows_per_lam": len(x) // L}
    dy = torch.randn(len(x), N).to(dtype)

    def gradients(run: Any, x: Tensor) -> tuple[Tensor, ...]:
        inputs = cycled(LAMBDAS["mixed"], L).requires_grad_(), x.detach().requires_grad_()
        y = run(inputs[1], inputs[0])
        return torch.autograd.grad(y, inputs, dy.to(y.dtype))

    def plain(x: Tensor, lam: Tensor) -> Tensor:
        ends = [merged(x, weight, torch.full((len(x),), value), counts, bias).float() for value in (0.0, 1.0)]
        return torch.lerp(*ends, lam[index].unsqueeze(1)).to(dtype)

    actual = gradients(lambda x, lam: lerp_experts(x, weight, lam, ends_of(counts), bias, **how), x)
    ends = weight.unpack(), bias.unpack()
    oracle = gradients(lambda x, lam: reference.lerp_experts(x, ends[0], lam[index], expert, ends[1]), x.double())
    for grad, expected, own in zip(actual, oracle, gradients(plain, x), strict=True):
        assert_as_accurate(grad, expected.double(), own)


def test_rows_after_the_last_expert_s_have_no_gradient() -> None:
    weight, x = pack(E, N, K), torch.randn(sum(COUNTS) + 3, K, requires_grad=True)
    lam = torch.rand(len(x), requires_grad=True)
    lerp_experts(x, weight, lam, ends_of(COUNTS)).sum().backward()
    for leaf in (x, lam):
        assert leaf.grad is not None
        assert leaf.grad[:-3].count_nonzero() == leaf.grad[:-3].numel()
        assert leaf.grad[-3:].count_nonzero() == 0


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
def test_opcheck(bias: bool, ragged: bool) -> None:
    """torch's own checks of schema, shape function, autograd registration and tracing."""
    x, lam = torch.randn(24, K, requires_grad=True), torch.tensor(LAMBDAS["mixed"][:4], requires_grad=True)
    index = torch.arange(4, dtype=torch.int32).repeat_interleave(6) if ragged else None
    weight, biases = list(pack(E, N, K).tensors), list(pack(E, N).tensors) if bias else []
    arguments = (x, weight, biases, lam, index, 1 if ragged else 6, ends_of((3, 0, 16, 1, 4)), "pair", False)
    torch.library.opcheck(torch.ops.dami.lerp_experts, arguments)


def test_compiles_once_for_every_lam_and_every_routing() -> None:
    weight, bias, x = pack(E, N, K), pack(E, N), torch.randn(26, K)
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    run = lambda lam, offsets: lerp_experts(x, weight, lam, offsets, bias)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend=count)
    for values in LAMBDAS.values():
        for counts in (COUNTS, (26, 0, 0, 0, 0)):
            arguments = cycled(values, 26), ends_of(counts)
            assert torch.equal(compiled(*arguments), run(*arguments))
    assert len(graphs) == 1
