"""The CUDA kernels on a GPU: numbers at full size, graphs, streams, devices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dami_kernels import cuda, formats, reference
from tests.dami_kernels.cuda_on_cpu import FORMATS
from tests.tolerance import assert_as_accurate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(cuda.WHY_NOT is not None, reason=str(cuda.WHY_NOT))]

# (N, K): q and down of Qwen3-4B, k of SmolLM2-135M, and sizes that no tile, no step and no load divides.
SHAPES = [(4096, 2560), (2560, 9728), (192, 576), (2049, 1000), (77, 2561)]
every_format = pytest.mark.parametrize("format", FORMATS)


def pair(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    base = torch.randn(shape, device="cuda")
    return (0.02 * base).to(dtype), (0.02 * (base + 0.1 * torch.randn_like(base))).to(dtype)


def pack(format: str, N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return list(formats.get(format).pack(*pair(N, K, dtype=dtype)))


def lambdas(rows: int) -> list[Tensor]:
    values = [torch.zeros(rows), torch.ones(rows), torch.full((rows,), 0.3), torch.linspace(-0.2, 1.2, rows)]
    return [lam.cuda() for lam in [*values, (torch.arange(rows) % 2).float()]]


def linear(x: Tensor, weight: list[Tensor], lam: Tensor, format: str, bias: tuple[Tensor, ...] = ()) -> Tensor:
    return cuda.lerp_linear(x, weight, list(bias), lam, None, 1, format, False)


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_as_accurate_as_a_merged_copy(format: str, dtype: torch.dtype, shape: tuple[int, int], rows: int) -> None:
    N, K = shape
    weight, bias = pack(format, N, K, dtype), pair(N, dtype=dtype)
    base, target = (end.float() for end in formats.get(format).unpack(*weight, columns=K))
    x = torch.randn(rows, K, device="cuda", dtype=dtype)
    for lam in lambdas(rows):
        y = linear(x, weight, lam, format, bias)
        oracle = reference.lerp_linear(x, (base, target), lam, bias)
        plain = torch.empty_like(y)
        for value in lam.unique():
            merged = torch.lerp(base, target, value.item()).to(dtype)
            merged_bias = torch.lerp(bias[0].float(), bias[1].float(), value.item()).to(dtype)
            plain[lam == value] = F.linear(x[lam == value], merged, merged_bias)
        assert_as_accurate(y, oracle, plain)


@every_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_as_triton(format: str, shape: tuple[int, int]) -> None:
    """But for the order of the sums: no further from it than one rounding of the result."""
    pytest.importorskip("triton")
    from dami_kernels import triton

    N, K = shape
    weight, bias = pack(format, N, K), pair(N)
    x = torch.randn(8, K, device="cuda", dtype=torch.bfloat16)
    index = torch.tensor([1, 0, 2, 2, 1, 0, 1, 2], dtype=torch.int32, device="cuda")
    for args in ((torch.tensor([0.0, 0.3, 1.0], device="cuda"), index, 1), (torch.rand(4, device="cuda"), None, 2)):
        y = cuda.lerp_linear(x, weight, list(bias), *args, format, False)
        other = triton.lerp_linear(x, weight, list(bias), *args, format, False)
        difference = (y.float() - other.float()).square().mean().sqrt()
        assert difference <= torch.finfo(torch.bfloat16).eps * other.float().square().mean().sqrt()


@every_format
def test_a_graph_replays_with_any_lam(format: str) -> None:
    """Captured with all rows at the base, so that a kernel chosen on the host would never read the other operand."""
    weight, x = pack(format, 2560, 4096), torch.randn(8, 4096, device="cuda", dtype=torch.bfloat16)
    lam, stream = torch.zeros(8, device="cuda"), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        linear(x, weight, lam, format)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, weight, lam, format)
    for values in lambdas(8):
        lam.copy_(values)
        x.normal_()
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, linear(x, weight, lam, format))


@every_format
def test_a_row_has_the_same_bits_in_any_company_and_at_any_time(format: str) -> None:
    weight, x = pack(format, 4096, 2560), torch.randn(8, 2560, device="cuda", dtype=torch.bfloat16)
    for lam in lambdas(8):
        together = linear(x, weight, lam, format)
        for _ in range(20):
            assert torch.equal(linear(x, weight, lam, format), together)
        for row in range(8):
            assert torch.equal(linear(x[row : row + 1], weight, lam[row : row + 1], format)[0], together[row])


@every_format
def test_the_other_operand_is_selected_away(format: str) -> None:
    weight, x = pack(format, 512, 2560), torch.randn(4, 2560, device="cuda", dtype=torch.bfloat16)
    lam = torch.tensor([0.0, 0.5, 0.0, 1.0], device="cuda")
    clean = linear(x, weight, lam, format)
    weight[-1] = torch.full_like(weight[-1], torch.nan)  # the target, or the delta's scales
    y = linear(x, weight, lam, format)
    assert torch.equal(y[lam == 0], clean[lam == 0])
    assert y[lam != 0].isnan().all()


def test_it_runs_on_the_current_stream() -> None:
    """After work on it that takes a while, and that it must wait for."""
    weight, x = pack("pair", 512, 512), torch.zeros(2, 512, device="cuda", dtype=torch.bfloat16)
    lam, ones = torch.rand(2, device="cuda"), torch.ones_like(x)
    expected = linear(ones, weight, lam, "pair")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        x.copy_(ones)
        y = linear(x, weight, lam, "pair")
    stream.synchronize()
    assert torch.equal(y, expected)


def test_it_runs_on_the_device_of_its_input() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    weight, x, lam = pack("int4", 256, 512), torch.randn(3, 512, device="cuda").bfloat16(), torch.rand(3, device="cuda")
    there = linear(x.to("cuda:1"), [tensor.to("cuda:1") for tensor in weight], lam.to("cuda:1"), "int4")
    assert there.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(there.cpu(), linear(x, weight, lam, "int4").cpu())
