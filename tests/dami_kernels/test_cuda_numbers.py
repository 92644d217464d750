"""The numbers of the CUDA kernels, as the C++ compiler's program on the CPU computes them, against float64."""

from __future__ import annotations

import itertools
import os
import random
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dami_kernels import LerpWeight, cuda, formats, lerp_linear, native, reference
from dami_kernels.tuning import cuda as tuning
from tests.dami_kernels.cuda_on_cpu import DECODE, FORMATS, Module
from tests.dami_kernels.test_views import view, view_of
from tests.tolerance import assert_as_accurate

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

DTYPES = [torch.bfloat16, torch.float16]
every_format = pytest.mark.parametrize("format", FORMATS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# (M, N, K, warps): a whole step; a tile and a little more, groups beyond the last step; K that is no multiple of 8 nor
# of 32; a K shorter than a group; more steps than two for each warp.
SHAPES = [(1, 16, 128, 1), (8, 33, 576, 2), (3, 17, 100, 2), (5, 3, 30, 1), (2, 7, 1000, 3)]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Module:
    flags = shlex.split(os.environ.get("CUDA_ON_CPU_FLAGS", ""))  # test_cuda.py asks for sanitizers
    return Module(tmp_path_factory.mktemp("cuda_on_cpu"), *flags)


@pytest.fixture
def kernel(compiled: Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[Module]:
    """`dami_kernels.cuda` calls this."""
    monkeypatch.setattr(cuda, "_cuda", compiled, raising=False)
    monkeypatch.setattr(cuda, "WHY_NOT", None)
    monkeypatch.setattr(cuda, "_stream_of", lambda x: 0)
    yield compiled
    compiled.warps, compiled.copies_are_late = None, True


def ends(*shape: int, dtype: torch.dtype, distance: float = 0.3) -> tuple[Tensor, Tensor]:
    base = torch.randn(shape)
    scale = shape[-1] ** -0.5
    return (scale * base).to(dtype), (scale * (base + distance * torch.randn(shape))).to(dtype)


def pack(format: str, N: int, K: int, dtype: torch.dtype, distance: float = 0.3) -> list[Tensor]:
    return [tensor.clone() for tensor in formats.get(format).pack(*ends(N, K, dtype=dtype, distance=distance))]


def unpack(format: str, weight: list[Tensor], K: int) -> tuple[Tensor, Tensor]:
    base, target = formats.get(format).unpack(*weight, columns=K)
    return base.float(), target.float()


def linear(x: Tensor, weight: list[Tensor], lam: Tensor, format: str, bias: tuple[Tensor, ...] = ()) -> Tensor:
    return cuda.lerp_linear(x, weight, list(bias), lam, None, 1, format, False)


def merged_rows(x: Tensor, weight: tuple[Tensor, Tensor], lam: Tensor, bias: tuple[Tensor, Tensor]) -> Tensor:
    """F.linear of each row with a weight merged in float32 and rounded once."""

    def merged(pair: tuple[Tensor, Tensor], value: float) -> Tensor:
        return torch.lerp(pair[0].float(), pair[1].float(), value).to(x.dtype)

    rows = [F.linear(row, merged(weight, v), merged(bias, v)) for row, v in zip(x, lam.tolist(), strict=True)]
    return torch.stack(rows)


def lambdas(rows: int) -> list[Tensor]:
    """Mixed, also beyond the ends; one for all; all at one end or the other."""
    mixed = torch.tensor([0.3, 0.0, 1.0, -0.2, 0.6, 1.3, 0.5, 0.9])[:rows]
    return [mixed, torch.full((rows,), 0.3), torch.zeros(rows), torch.ones(rows)]


@every_format
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_a_merged_copy(kernel: Module, format: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    M, N, K, kernel.warps = shape
    x, weight, bias = torch.randn(M, K).to(dtype), pack(format, N, K, dtype), ends(N, dtype=dtype)
    unpacked = unpack(format, weight, K)
    for lam in lambdas(M):
        y = linear(x, weight, lam, format, bias)
        oracle = reference.lerp_linear(x, unpacked, lam, bias)
        assert_as_accurate(y, oracle, merged_rows(x, unpacked, lam, bias))


@pytest.mark.slow
@every_format
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(compiled: Module, format: str, data: st.DataObject) -> None:
    M, N, K = (data.draw(st.integers(1, most), name) for name, most in (("M", 8), ("N", 60), ("K", 1500)))
    dtype, gap = data.draw(st.sampled_from(DTYPES), "dtype"), data.draw(st.integers(0, 9), "gap")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_cuda", compiled, raising=False)
        patch.setattr(cuda, "WHY_NOT", None)
        patch.setattr(cuda, "_stream_of", lambda x: 0)
        compiled.warps = data.draw(st.integers(1, 8), "warps")
        compiled.copies_are_late = data.draw(st.booleans(), "late")
        torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
        x, bias = torch.randn(M, K + gap).to(dtype)[:, gap:], ends(N, dtype=dtype)
        weight = pack(format, N, K, dtype)
        lam = data.draw(st.sampled_from(lambdas(M)), "lam")
        y = linear(x, weight, lam, format, bias)
        unpacked = unpack(format, weight, K)
        oracle = reference.lerp_linear(x, unpacked, lam, bias)
        assert_as_accurate(y, oracle, merged_rows(x, unpacked, lam, bias))


@every_dtype
def test_every_code_is_decoded_exactly(kernel: Module, dtype: torch.dtype) -> None:
    """With one-hot rows of x and scales of one, y is what a code stands for."""
    x = torch.eye(256, dtype=dtype)
    base = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).expand(2, 256).contiguous()
    delta = torch.arange(0, 128, dtype=torch.uint8).mul(37).expand(2, 128).contiguous()  # every pair of nibbles' halves
    ones = torch.ones(2, 8, dtype=torch.bfloat16)
    codes = torch.stack((delta[0] & 15, delta[0] >> 4), 1).flatten().to(torch.int16) - 8
    for first in range(0, 256, 8):
        rows = x[first : first + 8]
        for lam, expected in ((0.0, base[0].to(dtype)), (1.0, (base[0].to(torch.int16) + codes).to(dtype))):
            y = linear(rows, [base, ones, delta, ones], torch.full((8,), lam), "w8d4")
            assert torch.equal(y, expected[first : first + 8, None].expand(8, 2))


@every_dtype
def test_the_ends_of_a_pair_come_out_bit_for_bit(kernel: Module, dtype: torch.dtype) -> None:
    kernel.warps = 2
    weight, bias = pack("pair", 20, 300, dtype), ends(20, dtype=dtype)
    x = torch.randn(6, 300).to(dtype)
    lam = torch.tensor([0.0, 1.0, 0.4, 1.0, 0.0, 0.7])
    y = linear(x, weight, lam, "pair", bias)
    for end in (0, 1):
        alone = linear(x, [weight[end]] * 2, torch.full((6,), float(end)), "pair", (bias[end],) * 2)
        assert torch.equal(y[lam == end], alone[lam == end])
        blended = linear(x, [weight[end]] * 2, torch.full((6,), 0.37), "pair", (bias[end],) * 2)
        assert torch.equal(blended, alone)


@every_format
def test_a_row_at_base_does_not_see_the_other_operand(kernel: Module, format: str) -> None:
    """It is not even read where all rows are at base, and selected away where other rows are not."""
    kernel.warps = 2
    x, weight = torch.randn(4, 290).bfloat16(), pack(format, 18, 290, torch.bfloat16)
    lam = torch.tensor([0.0, 0.5, 0.0, 1.0])
    clean = linear(x, weight, lam, format)
    assert torch.equal(linear(x, weight, torch.zeros(4), format)[lam == 0], clean[lam == 0])
    weight[-1] = torch.full_like(weight[-1], torch.nan)  # the target, or the delta's scales
    y = linear(x, weight, lam, format)
    assert torch.equal(y[lam == 0], clean[lam == 0])
    assert y[lam != 0].isnan().all()
    assert torch.equal(linear(x, weight, torch.zeros(4), format)[lam == 0], clean[lam == 0])


def test_a_row_at_the_target_does_not_see_the_base(kernel: Module) -> None:
    x, (base, target) = torch.randn(3, 290).bfloat16(), pack("pair", 18, 290, torch.bfloat16)
    broken = torch.full_like(base, torch.inf)
    for lam in (torch.ones(3), torch.tensor([1.0, 0.4, 1.0])):
        clean = linear(x, [base, target], lam, "pair")
        assert torch.equal(linear(x, [broken, target], lam, "pair")[lam == 1], clean[lam == 1])


@every_format
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_no_row_reaches_another(kernel: Module, format: str, bad: float) -> None:
    kernel.warps = 3
    x, weight, lam = torch.randn(7, 300).bfloat16(), pack(format, 17, 300, torch.bfloat16), torch.rand(7)
    clean = linear(x, weight, lam, format)
    others = torch.arange(7) != 3
    poisoned = x.clone()
    poisoned[3] = bad
    y = linear(poisoned, weight, lam, format)
    assert torch.equal(y[others], clean[others])
    assert not y[3].isfinite().any()
    lam[3] = torch.nan
    y = linear(x, weight, lam, format)
    assert torch.equal(y[others], clean[others])
    assert y[3].isnan().all()


@every_format
def test_a_row_has_the_same_bits_in_any_company(kernel: Module, format: str) -> None:
    """Whatever the other rows and their λ are, how many there are, and where this one stands."""
    kernel.warps = 2
    x, weight = torch.randn(8, 520).bfloat16(), pack(format, 17, 520, torch.bfloat16)
    for lam in lambdas(8):
        together = linear(x, weight, lam, format)
        for row in (0, 1, 2, 7):
            assert torch.equal(linear(x[row : row + 1], weight, lam[row : row + 1], format)[0], together[row])
        order = torch.randperm(8)
        assert torch.equal(linear(x[order], weight, lam[order], format), together[order])


def test_which_lam_a_row_takes(kernel: Module) -> None:
    x, weight, bias = torch.randn(6, 64).bfloat16(), pack("int4", 9, 64, torch.bfloat16), []
    lam = torch.tensor([0.0, 0.3, 1.0])
    index = torch.tensor([2, 0, 1, 1, 0, 2], dtype=torch.int32)
    ragged = cuda.lerp_linear(x, weight, bias, lam, index, 1, "int4", False)
    assert torch.equal(ragged, linear(x, weight, lam[index.long()], "int4"))
    padded = cuda.lerp_linear(x, weight, bias, lam, None, 2, "int4", False)
    assert torch.equal(padded, linear(x, weight, lam.repeat_interleave(2), "int4"))


@every_format
def test_rows_that_are_not_aligned(kernel: Module, format: str) -> None:
    """The same bits from operands with gaps between rows, that begin anywhere."""
    kernel.warps = 2
    M, N, K = 3, 18, 264
    weight, lam = pack(format, N, K, torch.bfloat16), torch.rand(M)
    x = torch.randn(M, K).bfloat16()
    expected = linear(x, weight, lam, format)
    for gap in (1, 8):

        def apart(tensor: Tensor, gap: int = gap) -> Tensor:
            rows, columns = tensor.shape
            wide = torch.empty(rows, columns + gap, dtype=tensor.dtype)
            wide[:, gap:] = tensor
            return wide[:, gap:]

        assert torch.equal(linear(apart(x), weight, lam, format), expected)
        assert torch.equal(linear(x, [apart(tensor) for tensor in weight], lam, format), expected)
    columns = torch.empty(M, 2 * K, dtype=x.dtype)[:, ::2].copy_(x)
    assert torch.equal(linear(columns, weight, lam, format), expected)


@settings(max_examples=25, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    dtype=st.sampled_from(DTYPES),
    sizes=st.tuples(st.integers(1, 8), st.integers(1, 40), st.sampled_from([1, 30, 128, 264, 576])),
    ragged=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_views_give_the_bits_of_their_copies(
    compiled: Module, format: str, dtype: torch.dtype, sizes: tuple[int, int, int], ragged: bool, seed: int
) -> None:
    """Of all operands, through the operator; weights must be dense along K."""
    M, N, K = sizes
    torch.manual_seed(seed)
    draw = random.Random(seed)
    shape = torch.Size((N, K))
    weight = LerpWeight(tuple(pack(format, N, K, dtype)), format, shape, dtype)
    bias = LerpWeight(ends(N, dtype=dtype), "pair", shape[:1], dtype)
    x, lam = torch.randn(M, K).to(dtype), torch.rand(M)
    index = torch.randint(M, (M,), dtype=torch.int32) if ragged else None
    with pytest.MonkeyPatch.context() as patch, nullcontext() if native.WHY_NOT else native.bypassed():
        patch.setattr(cuda, "_cuda", compiled, raising=False)
        patch.setattr(cuda, "WHY_NOT", None)
        patch.setattr(cuda, "_stream_of", lambda x: 0)
        patch.setattr(native, "WHY_NOT", None)
        patch.setattr(native, "lerp_linear", cuda.lerp_linear)
        expected = lerp_linear(x, weight, lam, bias, row_to_lam=index)
        views = view_of(weight, draw, dense=True), view(lam, draw), view_of(bias, draw)
        y = lerp_linear(view(x, draw), *views, row_to_lam=None if index is None else view(index, draw))
    assert torch.equal(y, expected)


@every_format
def test_the_order_in_which_copies_arrive_does_not_matter(kernel: Module, format: str) -> None:
    kernel.warps = 2
    x, weight, lam = torch.randn(4, 900).bfloat16(), pack(format, 16, 900, torch.bfloat16), torch.rand(4)
    late = linear(x, weight, lam, format)
    kernel.copies_are_late = False
    assert torch.equal(linear(x, weight, lam, format), late)


def test_nothing_to_do(kernel: Module) -> None:
    weight, bias, lam = pack("pair", 5, 40, torch.bfloat16), ends(5, dtype=torch.bfloat16), torch.rand(3)
    assert linear(torch.empty(0, 40).bfloat16(), weight, lam[:0], "pair", bias).shape == (0, 5)
    assert linear(torch.randn(3, 40).bfloat16(), [end[:0] for end in weight], lam, "pair").shape == (3, 0)
    y = linear(torch.empty(3, 0).bfloat16(), [end[:, :0] for end in weight], lam, "pair", bias)
    assert torch.equal(y, torch.lerp(bias[0].float(), bias[1].float(), lam[:, None]).bfloat16())


def test_the_plan_knows_the_kernels(compiled: Module) -> None:
    for format in FORMATS:
        both = formats.matrices(format)
        assert compiled.shared_per_warp(both.base.bits or 0, both.second.bits or 0) == tuning.shared_bytes(format)
    for bits in itertools.product((None, 8, 4), repeat=2):
        assert (compiled.shared_per_warp(bits[0] or 0, bits[1] or 0) > 0) == (bits in cuda._BITS)
    source = DECODE.read_text() + DECODE.with_name("api.h").read_text()
    numbers = {name: int(value) for name, value in re.findall(r"constexpr int (\w+) = (\d+);", source)}
    assert (numbers["max_rows"], numbers["max_warps"]) == (tuning.MAX_ROWS, tuning.MAX_WARPS)
    assert (numbers["tile"], numbers["groups"] * numbers["group"]) == (tuning.TILE, tuning.STEP)
    assert numbers["stages"] == tuning.STAGES
    assert numbers["carveout"] == round(100 * tuning.CARVEOUT)
