"""What only a GPU shows of `lerp_experts`: graphs, waits, memory, and the numbers at full size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dami_kernels import LerpWeight, lerp_experts, reference
from tests.dami_kernels.test_experts import FORMATS, ends_of, merged
from tests.dami_kernels.test_triton_experts_plan import SHAPES, Experts
from tests.dami_kernels.test_triton_gpu import lambdas
from tests.tolerance import assert_as_accurate

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SMALL = Experts(16, 4, 512, 768)
KINDS = [*((dtype, "pair") for dtype in DTYPES), *((torch.bfloat16, format) for format in FORMATS[1:])]


def pack(
    shape: Experts, dtype: torch.dtype = torch.bfloat16, format: str = "pair", transposed: bool = False
) -> LerpWeight:
    E, _, N, K = shape
    base = 0.02 * torch.randn(E, N, K, device="cuda")
    ends = [end.to(dtype) for end in (base, base + 0.0006 * torch.randn(E, N, K, device="cuda"))]
    if transposed:
        ends = [end.mT.contiguous().mT for end in ends]
    return LerpWeight.pack(ends[0], ends[1], format)


def bias_of(shape: Experts, dtype: torch.dtype = torch.bfloat16) -> LerpWeight:
    base, delta = torch.randn(2, shape.E, shape.N, device="cuda")
    return LerpWeight.pack(base.to(dtype), (base + 0.03 * delta).to(dtype))


def routing(tokens: int, shape: Experts) -> dict[str, tuple[int, ...]]:
    """Rows of each expert, in the ways in which a router can spread them."""
    rows = tokens * shape.active
    even = torch.full((shape.E,), rows // shape.E)
    even[: rows % shape.E] += 1
    popular = torch.randint(0, shape.E, (rows,)).square() // shape.E
    return {
        "even": tuple(even.tolist()),
        "uneven": tuple(popular.bincount(minlength=shape.E).tolist()),
        "one": (0,) * (shape.E // 2) + (rows,) + (0,) * (shape.E - shape.E // 2 - 1),
    }


def oracle(x: Tensor, weight: LerpWeight, lam: Tensor, counts: tuple[int, ...], bias: LerpWeight) -> Tensor:
    """Expert by expert, for all rows' own weights at once would not fit."""
    y, begin = [], 0
    for expert, count in enumerate(counts):
        ends, biases = ([end[expert] for end in operand.unpack()] for operand in (weight, bias))
        rows = slice(begin, begin + count)
        y.append(reference.lerp_linear(x[rows], (ends[0], ends[1]), lam[rows], (biases[0], biases[1])))
        begin += count
    return torch.cat(y)


@pytest.mark.parametrize(("dtype", "format"), KINDS, ids=str)
@pytest.mark.parametrize("shape", [SMALL, Experts(7, 2, 1025, 513)], ids=str)
@pytest.mark.parametrize("tokens", [1, 17, 400])
def test_accuracy(dtype: torch.dtype, format: str, shape: Experts, tokens: int) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    weight, bias = pack(shape, dtype, format), bias_of(shape, dtype)
    x = torch.randn(tokens * shape.active, shape.K, device="cuda", dtype=dtype)
    kinds = lambdas(len(x))
    kinds["distinct"] = kinds["distinct"][torch.arange(len(x)) % 5 * len(x) // 5]  # five, for each is merged here
    for counts in routing(tokens, shape).values():
        for lam in kinds.values():
            y = lerp_experts(x, weight, lam, ends_of(counts).cuda(), bias)
            plain = merged(x, weight, lam, counts, bias)
            assert_as_accurate(y, oracle(x, weight, lam, counts, bias), plain)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("tokens", [1, 40, 2048])
def test_full_size(shape: Experts, transposed: bool, tokens: int) -> None:
    """Published mixtures' experts, also as [E, K, N] seen as [E, N, K]: some experts' rows against the oracle."""
    weight, bias = pack(shape, transposed=transposed), bias_of(shape)
    x = torch.randn(tokens * shape.active, shape.K, device="cuda", dtype=torch.bfloat16)
    counts = routing(tokens, shape)["uneven"]
    ends = ends_of(counts).tolist()
    for lam in (torch.full((len(x),), 0.3, device="cuda"), torch.rand(len(x), device="cuda").mul(4).round() / 4):
        y = lerp_experts(x, weight, lam, ends_of(counts).cuda(), bias)
        for expert in [e for e, count in enumerate(counts) if count][::5]:
            rows = slice(ends[expert] - counts[expert], ends[expert])
            one = [
                LerpWeight.pack(operand.tensors[0][expert, None], operand.tensors[1][expert, None])
                for operand in (weight, bias)
            ]
            arguments = (x[rows], one[0], lam[rows], (counts[expert],), one[1])
            assert_as_accurate(y[rows], oracle(*arguments), merged(*arguments))


def test_a_graph_replays_with_any_lam_and_any_routing() -> None:
    """Captured with one λ and even routing; replayed with others, into an output of NaN, and with fewer rows."""
    up, down = pack(SMALL), pack(Experts(SMALL.E, SMALL.active, SMALL.K, SMALL.N))
    x = torch.randn(120, SMALL.K, device="cuda", dtype=torch.bfloat16)
    lam, offsets = torch.full((120,), 0.3, device="cuda"), ends_of(routing(30, SMALL)["even"]).cuda()

    def step() -> Tensor:
        return lerp_experts(lerp_experts(x, up, lam, offsets), down, lam, offsets)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    fewer = (0, 50, *(3,) * 14)
    for counts in (*routing(30, SMALL).values(), fewer, (0,) * 16, (1,) * 16):
        for values in (torch.rand(120), torch.zeros(120), torch.ones(120), torch.full((120,), 0.7)):
            lam.copy_(values)
            offsets.copy_(ends_of(counts))
            y.fill_(torch.nan)
            graph.replay()
            assert torch.equal(y, step())
            assert y[sum(counts) :].count_nonzero() == 0


def test_the_host_waits_for_nothing() -> None:
    weight, counts = pack(SMALL), routing(30, SMALL)["uneven"]
    x, lam = torch.randn(120, SMALL.K, device="cuda", dtype=torch.bfloat16), torch.rand(120, device="cuda")
    offsets = ends_of(counts).cuda()
    lerp_experts(x, weight, lam, offsets)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        lerp_experts(x, weight, lam, offsets)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", [1, 300])
def test_no_merged_copy(tokens: int) -> None:
    """Peak memory is what was there and the output, and in decode the splits' parts."""
    weight = pack(Experts(8, 2, 4096, 4096))
    x = torch.randn(tokens * 2, 4096, device="cuda", dtype=torch.bfloat16)
    lam, offsets = torch.rand(len(x), device="cuda"), ends_of((0, len(x), 0, 0, 0, 0, 0, 0)).cuda()
    lerp_experts(x, weight, lam, offsets)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = lerp_experts(x, weight, lam, offsets)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= y.nbytes + 16 * len(x) * 4096 * 4
    assert torch.cuda.max_memory_allocated() - before < weight.nbytes / 8


@pytest.mark.parametrize("format", FORMATS)
def test_invariant(format: str) -> None:
    """A row alone has the bits that it has among others, with whatever λ, in batches of any size."""
    weight, bias = pack(SMALL, format=format), bias_of(SMALL)
    x = torch.randn(600, SMALL.K, device="cuda", dtype=torch.bfloat16)
    counts = (300, 20, *(0,) * 13, 280)
    for lam in lambdas(600).values():
        y = lerp_experts(x, weight, lam, ends_of(counts).cuda(), bias, invariant=True)
        for row, expert in ((0, 0), (299, 0), (310, 1), (599, 15)):
            alone = ends_of((*(0,) * expert, 1, *(0,) * (15 - expert))).cuda()
            own = lerp_experts(x[row : row + 1], weight, lam[row : row + 1], alone, bias, invariant=True)
            assert torch.equal(own[0], y[row])


def test_compiles_in_one_graph_for_every_lam_and_routing() -> None:
    weight, x = pack(SMALL), torch.randn(120, SMALL.K, device="cuda", dtype=torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda lam, offsets: lerp_experts(x, weight, lam, offsets), fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lam in lambdas(120).values():
            for counts in routing(30, SMALL).values():
                offsets = ends_of(counts).cuda()
                assert torch.equal(compiled(lam, offsets), lerp_experts(x, weight, lam, offsets))
