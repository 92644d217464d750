"""The numbers of products that go by group, which the plan takes for codes and few rows, against float64.

On a GPU (`-m gpu`) these tests run the compiled kernels; without one, test_triton.py runs them in the interpreter.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

triton = pytest.importorskip("triton")

from benchmarks.tune import forced  # noqa: E402
from dami_kernels import LerpWeight, reference  # noqa: E402
from dami_kernels import triton as kernels  # noqa: E402
from dami_kernels.quantize import pack_nibbles  # noqa: E402
from dami_kernels.tuning import device_of, linear_config  # noqa: E402
from tests.marks import slow  # noqa: E402
from tests.tolerance import assert_as_accurate  # noqa: E402

INTERPRETED = triton.knobs.runtime.interpret
pytestmark = [] if INTERPRETED else pytest.mark.gpu
DEVICE = "cpu" if INTERPRETED else "cuda"
FORMATS = ["int8", "int4", "w8d4"]
FEW_ROWS = [(1, 64, 128), (7, 33, 1024), (8, 5, 256), (13, 70, 384)]
every_format = pytest.mark.parametrize("format", FORMATS)


def linear(x: Tensor, weight: LerpWeight, lam: Tensor, bias: tuple[Tensor, ...] = ()) -> Tensor:
    """`lerp_linear`, of which this asserts that it goes by group."""
    device = device_of(x.device)
    config = linear_config(len(x), *weight.shape, x.dtype, weight.format, device)
    assert config.by_group or device.is_amd or (len(x) > 16 and device.arch != "sm_90")
    return kernels.lerp_linear(x, [*weight.tensors], [*bias], lam, None, 1, weight.format, False)


def pack(format: str, N: int, K: int, dtype: torch.dtype, distance: float = 0.3) -> LerpWeight:
    base = torch.randn(N, K, device=DEVICE)
    ends = [(0.05 * end).to(dtype) for end in (base, base + distance * torch.randn(N, K, device=DEVICE))]
    return LerpWeight.pack(*ends, format)


def rows_by_materialized(x: Tensor, weight: LerpWeight, lam: Tensor, bias: tuple[Tensor, ...]) -> Tensor:
    """Plain PyTorch: every row by the weight merged at its λ and rounded once."""
    merged = [torch.lerp(*(end.float() for end in bias), v).to(x.dtype).float() if bias else None for v in lam]
    rows = zip(x, lam.tolist(), merged, strict=True)
    return torch.stack([F.linear(row.float(), weight.materialize(v).float(), b) for row, v, b in rows]).to(x.dtype)


@every_format
@pytest.mark.parametrize(
    ("dtype", "M", "N", "K"),
    [
        *((torch.bfloat16, *sizes) for sizes in FEW_ROWS),
        *slow(*((torch.float16, *sizes) for sizes in FEW_ROWS)),
        (torch.bfloat16, 17, 70, 256),
    ],
)
def test_as_accurate_as_the_merged_weight(format: str, dtype: torch.dtype, M: int, N: int, K: int) -> None:
    """With one step over K and with several, in splits and not; fewer and more features than a tile has; a bias."""
    x, weight = torch.randn(M, K, dtype=dtype, device=DEVICE), pack(format, N, K, dtype)
    bias = tuple(torch.randn(N, device=DEVICE).to(dtype) for _ in range(2)) if M > 1 else ()
    for values in (torch.zeros(M), torch.full((M,), 0.7), torch.rand(M)):
        lam = values.to(DEVICE)
        y = linear(x, weight, lam, bias)
        oracle = reference.lerp_linear(x, weight.unpack(), lam, bias or None)
        assert_as_accurate(y, oracle, rows_by_materialized(x, weight, lam, bias))


@every_format
def test_a_tile_of_twice_the_features_is_as_accurate(format: str) -> None:
    x, weight = torch.randn(40, 256, dtype=torch.bfloat16, device=DEVICE), pack(format, 150, 256, torch.bfloat16)
    lam = torch.rand(40, device=DEVICE)
    config = linear_config(40, 150, 256, x.dtype, format, device_of(x.device))
    with forced(replace(config, block_n=128, num_warps=8, num_stages=2)):
        y = linear(x, weight, lam)
    oracle = reference.lerp_linear(x, weight.unpack(), lam, None)
    assert_as_accurate(y, oracle, rows_by_materialized(x, weight, lam, ()))


@pytest.mark.parametrize(("dtype", "rows"), [(torch.bfloat16, 16), (torch.float16, 16), (torch.bfloat16, 64)])
@pytest.mark.parametrize(("format", "bits"), [("int8", 8), ("int4", 4)])
def test_every_code_at_every_place_is_its_number(format: str, bits: int, dtype: torch.dtype, rows: int) -> None:
    """Exactly: each row of x picks one column, whose scale is a power of two."""
    N, K = 1 << bits, 128
    codes = (torch.arange(N)[:, None] + torch.arange(K)) % N - N // 2
    scales = torch.tensor([1, -2, 4, 0.5], dtype=torch.bfloat16).expand(N, 4).contiguous()
    stored = pack_nibbles(codes.to(torch.int8)) if bits == 4 else codes.to(torch.int8)
    base = torch.zeros(N, K, dtype=dtype)
    tensors = tuple(tensor.to(DEVICE) for tensor in (base, stored, scales))
    weight = LerpWeight(format=format, tensors=tensors, shape=torch.Size((N, K)), dtype=dtype)
    expected = (codes * scales.repeat_interleave(32, 1)).T
    for columns in torch.arange(K).split(rows):
        x = F.one_hot(columns, K).to(DEVICE, dtype)
        assert torch.equal(linear(x, weight, torch.ones(rows, device=DEVICE)).cpu(), expected[columns].to(dtype))


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@every_format
@pytest.mark.parametrize("rows", [6, 20])
def test_a_row_at_an_end_and_its_neighbours_keep_to_themselves(rows: int, format: str) -> None:
    """Rows at λ = 0 have the same bits with and without others, also where those hold NaN, Inf and what overflows."""
    x, weight = torch.randn(rows, 256, dtype=torch.bfloat16, device=DEVICE), pack(format, 70, 256, torch.bfloat16)
    lam = torch.tensor([0, 0.3, 0, 1, torch.nan, 0] + [0.6] * (rows - 6), device=DEVICE)
    alone = linear(x, weight, torch.zeros_like(lam))
    with_others = linear(x, weight, lam)
    ends, others = lam == 0, torch.tensor([1, 3], device=DEVICE)
    assert torch.equal(with_others[ends], alone[ends])
    assert with_others[4].isnan().all()
    x[0, 5], x[2, 100], x[5, 255] = torch.nan, torch.inf, 3e38
    assert torch.equal(linear(x, weight, lam)[others], with_others[others])


@every_format
def test_views_that_words_cannot_read_are_copied(format: str) -> None:
    """Codes one byte off, rows an odd number of bytes apart, scales two bytes off."""
    x, weight = torch.randn(3, 256, dtype=torch.bfloat16, device=DEVICE), pack(format, 17, 256, torch.bfloat16)
    lam = torch.rand(3, device=DEVICE)
    views = []
    for tensor in weight.tensors:
        wide = torch.zeros(tensor.shape[0], tensor.shape[1] + 3, dtype=tensor.dtype, device=DEVICE)
        views.append(wide[:, 1:-2].copy_(tensor))
    expected = linear(x, weight, lam)
    assert torch.equal(linear(x, replace(weight, tensors=tuple(views)), lam), expected)


@pytest.mark.gpu
@every_format
def test_the_same_bits_every_time(format: str) -> None:
    x, weight = torch.randn(5, 1024, dtype=torch.bfloat16, device=DEVICE), pack(format, 33, 1024, torch.bfloat16)
    lam = torch.rand(5, device=DEVICE)
    y = linear(x, weight, lam)
    assert all(torch.equal(linear(x, weight, lam), y) for _ in range(2))
