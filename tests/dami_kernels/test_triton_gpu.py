"""What only a GPU shows of the kernels, through the public operators: graphs, memory, numbers at full size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dami_kernels import LerpWeight, launching, lerp_embedding, lerp_layer_norm, lerp_linear, lerp_rms_norm, reference
from tests.tolerance import assert_as_accurate

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS = [1, 3, 16, 17, 64, 118, 128, 129, 512, 2047]
# (N, K): q and down of Qwen3-4B, k of SmolLM2-135M, and sizes that no tile divides.
SHAPES = [(4096, 2560), (2560, 9728), (192, 576), (2049, 1000), (77, 2561)]


def pair(*shape: int, dtype: torch.dtype = torch.bfloat16, distance: float = 0.03) -> LerpWeight:
    base = torch.randn(shape, device="cuda")
    return LerpWeight.pack(*((0.02 * end).to(dtype) for end in (base, base + distance * torch.randn_like(base))))


def lambdas(rows: int) -> dict[str, Tensor]:
    """The ways in which a batch can be mixed."""
    kinds = {
        "base": torch.zeros(rows),
        "target": torch.ones(rows),
        "identical": torch.full((rows,), 0.3),
        "distinct": torch.linspace(-0.2, 1.2, rows),
        "sequences": torch.tensor([0.0, 0.25, 0.5, 1.0]).repeat_interleave(-(-rows // 4))[:rows],
        "skewed": torch.where(torch.arange(rows) % 7 == 0, 0.8, 0.0),
    }
    return {kind: lam.cuda() for kind, lam in kinds.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_linear_is_accurate(dtype: torch.dtype, shape: tuple[int, int], rows: int) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    N, K = shape
    weight, bias = pair(N, K, dtype=dtype), pair(N, dtype=dtype)
    x = torch.randn(rows, K, device="cuda", dtype=dtype)
    for lam in lambdas(rows).values():
        y = lerp_linear(x, weight, lam, bias)
        oracle = reference.lerp_linear(x, weight.unpack(), lam, bias.unpack())
        plain = torch.empty_like(y)
        for value in lam.unique():
            of = lam == value
            plain[of] = F.linear(x[of], weight.materialize(value.item()), bias.materialize(value.item()))
        assert_as_accurate(y, oracle, plain)


def test_uniform_and_mixed_tiles_agree_with_the_ends_bit_for_bit() -> None:
    weight = pair(4096, 2560)
    x = torch.randn(300, 2560, device="cuda", dtype=torch.bfloat16)
    lam = torch.tensor([0.0, 1.0, 0.4], device="cuda").repeat(100)
    y = lerp_linear(x, weight, lam)
    for end in (0, 1):
        alone = LerpWeight.pack(weight.tensors[end], weight.tensors[end])
        assert torch.equal(y[lam == end], lerp_linear(x, alone, torch.tensor(0.0, device="cuda"))[lam == end])


def test_a_graph_replays_with_any_lam() -> None:
    """Captured with one λ for all rows; replayed mixed, at both ends, into an output of NaN, and with fewer rows."""
    weight, norm, table = pair(2560, 2560), pair(2560), pair(1000, 2560)
    ids = torch.randint(0, 1000, (40,), device="cuda")
    lam = torch.full((40,), 0.3, device="cuda")
    row_to_lam = torch.arange(40, device="cuda", dtype=torch.int32)

    def step() -> Tensor:
        x = lerp_embedding(ids, table, lam, row_to_lam=row_to_lam)
        x = lerp_linear(lerp_rms_norm(x, norm, lam, row_to_lam=row_to_lam), weight, lam, row_to_lam=row_to_lam)
        return lerp_layer_norm(x, norm, lam, norm, row_to_lam=row_to_lam)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for values in (torch.rand(40), torch.zeros(40), torch.ones(40), torch.full((40,), 0.3), torch.linspace(0, 1, 40)):
        lam.copy_(values)
        ids.copy_(torch.randint(0, 1000, (40,)))
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, step())
    expected = y[:11].clone()
    row_to_lam[11:] = 0  # as an engine pads: rows beyond the last take some λ and some token
    ids[11:] = 0
    graph.replay()
    assert torch.equal(y[:11], expected)


@pytest.mark.parametrize("format", ["pair", "int8", "int4", "w8d4"])
def test_a_repeated_call_gives_the_first_ones_bits(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other tensors than those that were launched first, on the default stream, on another one, and in a graph."""
    monkeypatch.setattr("dami_kernels.cuda.takes", lambda *_: False)  # the other kernel is not launched by Triton
    calls = []
    for _ in range(2):
        base = torch.randn(192, 2560, device="cuda")
        ends = (base.bfloat16(), (base + 0.1 * torch.randn_like(base)).bfloat16())
        weight, bias = LerpWeight.pack(*ends, format), pair(192)
        x, lam = torch.randn(3, 2560, device="cuda", dtype=torch.bfloat16), torch.rand(3, device="cuda")
        calls.append((x, weight, lam, bias))
    with torch.no_grad():
        launching.forget()
        expected = lerp_linear(*calls[1])
        launching.forget()
        lerp_linear(*calls[0])
        assert len(launching._calls) == len(launching._steps) == 1
        assert torch.equal(lerp_linear(*calls[1]), expected)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            other = lerp_linear(*calls[1])
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(other, expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = lerp_linear(*calls[1])
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, expected)
        assert len(launching._calls) == len(launching._steps) == 1


@pytest.mark.parametrize("rows", [4, 512])
def test_no_merged_copy(rows: int) -> None:
    """Peak memory is what was there, the output, and in decode the splits' parts: far below one weight."""
    weight = pair(8192, 8192)
    x = torch.randn(rows, 8192, device="cuda", dtype=torch.bfloat16)
    lam = torch.rand(rows, device="cuda")
    lerp_linear(x, weight, lam)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = lerp_linear(x, weight, lam)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= y.nbytes + 16 * rows * 8192 * 4
    assert torch.cuda.max_memory_allocated() - before < weight.nbytes / 2


def test_a_poisoned_row_stays_alone() -> None:
    weight = pair(2560, 2560)
    x = torch.randn(200, 2560, device="cuda", dtype=torch.bfloat16)
    for lam in (torch.full((200,), 0.3, device="cuda"), torch.rand(200, device="cuda")):
        expected = lerp_linear(x, weight, lam)
        poisoned = x.clone()
        poisoned[70] = torch.nan
        poisoned[71] = torch.inf
        y = lerp_linear(poisoned, weight, lam)
        others = torch.arange(200) // 2 != 35
        assert torch.equal(y[others], expected[others])
        assert not y[70:72].isfinite().any()


def test_compiles_in_one_graph_for_every_lam() -> None:
    weight, x = pair(256, 256), torch.randn(8, 256, device="cuda", dtype=torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda lam: lerp_linear(x, weight, lam), fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lam in lambdas(8).values():
            assert torch.equal(compiled(lam), lerp_linear(x, weight, lam))


def test_runs_on_the_device_of_its_input() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    base, target = (torch.randn(64, 64, device="cuda:1") for _ in range(2))
    x, lam = torch.randn(3, 64, device="cuda:1"), torch.rand(3, device="cuda:1")
    y = lerp_linear(x, LerpWeight.pack(base, target), lam)
    assert_as_accurate(y, reference.lerp_linear(x, (base, target), lam), F.linear(x, base))
