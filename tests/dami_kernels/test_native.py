"""The compiled CPU kernels: every instruction set this machine has, every path through them, at awkward shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dami_kernels import LerpWeight, lerp_embedding, lerp_layer_norm, lerp_linear, lerp_rms_norm, native, reference
from tests.tolerance import assert_as_accurate

pytestmark = pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))

ISAS = native.supported_isas() if native.WHY_NOT is None else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows: one tile and less, two, the first that are blended, several blocks. N and K: less than a vector, whole steps,
# tails, more than one block along K, more than one tile of outputs, and more than one task. At last, a short block, and
# rows that AVX2 would take as few if it did not blend them; for AMX, whole rows of a weight, and blends in pieces.
SHAPES = [
    (1, 1, 1),
    (2, 5, 31),
    (4, 64, 256),
    (9, 33, 70),
    (13, 70, 1056),
    (40, 67, 2049),
    (300, 9, 129),
    (35, 600, 544),
    (3, 21, 576),
    (7, 5, 2080),
    (20, 48, 2112),
    (160, 40, 1090),
]
LAMS = {
    "mixed": lambda rows: torch.rand(rows) * 1.4 - 0.2,
    "one": lambda rows: torch.full((rows,), 0.3),
    "base": torch.zeros,
    "target": torch.ones,
    "groups": lambda rows: torch.tensor([0.0, 0.3, 0.8, 1.0, 1.0])[torch.randint(5, (rows,))],
}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pair(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two ends as near to each other as the published Instruct and Thinking checkpoints are."""
    base = torch.randn(shape)
    scale = shape[-1] ** -0.5
    return (scale * base).to(dtype), (scale * (base + 0.03 * torch.randn(shape))).to(dtype)


def merged(weight: tuple[Tensor, Tensor], lam: float) -> Tensor:
    return LerpWeight.pack(*weight).materialize(lam)


def plain_linear(x: Tensor, weight: tuple[Tensor, Tensor], lam: Tensor, bias: tuple[Tensor, Tensor]) -> Tensor:
    """F.linear on one merged copy for each λ."""
    y = x.new_empty(x.shape[0], weight[0].shape[0])
    for one in lam.unique().tolist():
        y[lam == one] = F.linear(x[lam == one], merged(weight, one), merged(bias, one))
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_is_as_accurate_as_a_merged_copy(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, n, k = shape
    x, weight, bias = torch.randn(rows, k).to(dtype), pair(n, k, dtype=dtype), pair(n, dtype=dtype)
    seen = torch.linspace(0, rows - 1, min(rows, 12)).long()  # a merged copy per row takes its time
    for lams in LAMS.values():
        lam = lams(rows)
        y = lerp_linear(x, LerpWeight.pack(*weight), lam, LerpWeight.pack(*bias))
        assert y.isfinite().all()
        oracle = reference.lerp_linear(x[seen], weight, lam[seen], bias)
        assert_as_accurate(y[seen], oracle, plain_linear(x[seen], weight, lam[seen], bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 4, 12, 30, 260])
def test_at_the_ends_the_bits_are_those_of_one_weight_alone(isa: str, rows: int, dtype: torch.dtype) -> None:
    """In a block of its own, among other λ (two sums), and in a group of its own within a block."""
    k, n = 1100, 37
    x, weight, bias = torch.randn(rows, k).to(dtype), pair(n, k, dtype=dtype), pair(n, dtype=dtype)
    both, both_bias = LerpWeight.pack(*weight), LerpWeight.pack(*bias)
    patterns = {"alone": lambda end: [end] * rows, "among others": lambda end: ([end, 0.3, 0.6] * rows)[:rows]}
    patterns["in a group"] = lambda end: [end] * (rows // 2) + torch.rand(rows - rows // 2).tolist()
    for end in (0, 1):
        alone, alone_bias = LerpWeight.pack(weight[end], weight[end]), LerpWeight.pack(bias[end], bias[end])
        for name, pattern in patterns.items():
            lam = torch.tensor(pattern(float(end)))
            chosen = lam == end
            y, expected = lerp_linear(x, both, lam, both_bias), lerp_linear(x, alone, lam, alone_bias)
            assert torch.equal(y[chosen], expected[chosen]), (end, name)
            blended = lerp_linear(x, alone, torch.tensor(0.37), alone_bias)
            assert torch.equal(blended[chosen], expected[chosen]), (end, name, "any λ between equal ends")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 7, 50])
def test_no_row_reaches_another(isa: str, rows: int, dtype: torch.dtype, bad: float) -> None:
    k, n = 75, 21
    x, weight = torch.randn(rows, k).to(dtype), LerpWeight.pack(*pair(n, k, dtype=dtype))
    for lam in (torch.rand(rows), torch.full((rows,), 0.6)):
        clean = lerp_linear(x, weight, lam)
        poisoned = x.clone()
        poisoned[rows // 2] = bad
        y = lerp_linear(poisoned, weight, lam)
        assert not y[rows // 2].isfinite().any()
        others = torch.arange(rows) != rows // 2
        assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("rows", [3, 9, 50])
def test_a_row_at_one_end_does_not_see_what_is_wrong_with_the_other(isa: str, rows: int) -> None:
    base, target = pair(21, 75, dtype=torch.bfloat16)
    x = torch.randn(rows, 75).bfloat16()
    broken = target.clone()
    broken[3, 5], broken[7] = float("inf"), float("nan")
    lam = torch.rand(rows)
    lam[::2] = 0
    whole, y = (lerp_linear(x, LerpWeight.pack(base, end), lam) for end in (target, broken))
    assert torch.equal(y[::2], whole[::2])
    assert not y[1::2, [3, 7]].isfinite().any()
    whole, y = (lerp_linear(x, LerpWeight.pack(end, base), 1 - lam) for end in (target, broken))
    assert torch.equal(y[::2], whole[::2])


def test_a_nan_lam_stays_in_its_row(isa: str) -> None:
    x, weight = torch.randn(40, 64), LerpWeight.pack(*pair(20, 64, dtype=torch.float32))
    lam = torch.rand(40)
    clean = lerp_linear(x, weight, lam)
    lam[[3, 17]] = float("nan")
    y = lerp_linear(x, weight, lam)
    rest = ~lam.isnan()
    assert y[~rest].isnan().all()
    assert torch.equal(y[rest], clean[rest])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_does_not_change_a_bit(isa: str, dtype: torch.dtype, threads: None) -> None:
    weight, embedding = (LerpWeight.pack(*pair(300, 520, dtype=dtype)) for _ in range(2))
    norm = LerpWeight.pack(*pair(520, dtype=dtype))
    results = []
    for count in (1, 2, 5):
        torch.manual_seed(1)
        torch.set_num_threads(count)
        x, lam = torch.randn(300, 520).to(dtype), torch.rand(300)
        results.append(
            [lerp_linear(x[:rows], weight, lam[:rows]) for rows in (1, 4, 50, 300)]
            + [lerp_rms_norm(x, norm, lam), lerp_layer_norm(x, norm, lam, norm)]
            + [lerp_embedding(torch.randint(300, (300,)), embedding, lam)]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "d"), [(1, 1), (3, 7), (5, 64), (200, 1000)])
def test_norms_and_embedding_are_as_accurate_as_plain_torch(isa: str, rows: int, d: int, dtype: torch.dtype) -> None:
    lam = LAMS["groups"](rows)
    per_row = lam.unsqueeze(1)
    x = (torch.randn(rows, d) + 0.5).to(dtype)
    weight, bias = ((1 + end.float()).to(dtype) for end in pair(d, dtype=dtype)), pair(d, dtype=dtype)
    weight = tuple(weight)
    w, b = (torch.lerp(ends[0].float(), ends[1].float(), per_row) for ends in (weight, bias))
    packed, packed_bias = LerpWeight.pack(*weight), LerpWeight.pack(*bias)

    y = lerp_rms_norm(x, packed, lam, 1e-6, offset=1.0)
    plain = (F.rms_norm(x.float(), (d,), eps=1e-6) * (1 + w)).to(dtype)
    assert_as_accurate(y, reference.lerp_rms_norm(x, weight, lam, 1e-6, 1.0), plain)

    y = lerp_layer_norm(x, packed, lam, packed_bias, 1e-5)
    plain = (F.layer_norm(x.float(), (d,), eps=1e-5) * w + b).to(dtype)
    assert_as_accurate(y, reference.lerp_layer_norm(x, weight, lam, 1e-5, bias), plain)

    table = pair(50, d, dtype=dtype)
    for ids in (torch.randint(50, (rows,)), torch.randint(50, (rows,), dtype=torch.int32)):
        y = lerp_embedding(ids, LerpWeight.pack(*table), lam)
        plain = torch.lerp(table[0][ids].float(), table[1][ids].float(), per_row).to(dtype)
        assert_as_accurate(y, reference.lerp_embedding(ids, table, lam), plain)
        assert torch.equal(y[lam == 0], table[0][ids][lam == 0])
        assert torch.equal(y[lam == 1], table[1][ids][lam == 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_a_short_type_is_read_and_rounded_as_torch_does(isa: str, dtype: torch.dtype) -> None:
    """All 65,536 bit patterns through a λ that blends nothing, then float32 values between them rounded to the type."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(256, 256)
    ids = torch.arange(256)
    y = lerp_embedding(ids, LerpWeight.pack(every, every), torch.tensor(0.5))
    finite = every.isfinite()
    assert torch.equal(y[finite], every[finite])
    assert y[every.isnan()].isnan().all()
    base, target = torch.zeros(256, 256, dtype=dtype), torch.where(finite, every, 0)
    y = lerp_embedding(ids, LerpWeight.pack(base, target), torch.tensor(0.3))
    assert torch.equal(y, (target.float() * torch.tensor(0.3)).to(dtype))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_linear_at_any_shape(isa: str, data: st.DataObject) -> None:
    rows, n, k = (data.draw(st.integers(0, most), label) for label, most in (("M", 70), ("N", 150), ("K", 1300)))
    dtype = data.draw(st.sampled_from(DTYPES))
    lam = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 1.0, 0.2, 0.7, 1.5, -0.5]), min_size=1, max_size=5)))
    row_to_lam = torch.randint(len(lam), (rows,), dtype=torch.int32)
    torch.manual_seed(data.draw(st.integers(0, 99)))
    x, weight = torch.randn(rows, k).to(dtype), pair(n, max(k, 1), dtype=dtype)
    weight = (weight[0][:, :k], weight[1][:, :k])
    y = lerp_linear(x, LerpWeight.pack(*weight), lam, row_to_lam=row_to_lam)
    per_row = lam[row_to_lam]
    oracle = reference.lerp_linear(x, weight, per_row)
    # Of every weight the rounding of one multiplication, of every output that of the result; in the worst case.
    base, target = (x.abs().double() @ end.abs().double().T for end in weight)
    ends = (1 - per_row).abs().unsqueeze(1) * base + per_row.abs().unsqueeze(1) * target
    eps = torch.finfo(dtype).eps
    assert ((y.double() - oracle).abs() <= eps * ends + k * 2**-24 * ends + 1e-7 + eps * oracle.abs()).all()


def test_strided_operands_are_read_in_place(isa: str) -> None:
    whole_x, whole = torch.randn(9, 3, 64), pair(40, 200, dtype=torch.float32)
    x, weight = whole_x[:, 1], tuple(end[::2, 10:74] for end in whole)
    lam = torch.rand(9)
    y = lerp_linear(x, LerpWeight.pack(*weight), lam)
    dense = tuple(end.contiguous() for end in weight)
    assert torch.equal(y, lerp_linear(x.contiguous(), LerpWeight.pack(*dense), lam))
    norm = LerpWeight.pack(*pair(64, dtype=torch.float32))
    assert torch.equal(lerp_rms_norm(x, norm, lam), lerp_rms_norm(x.contiguous(), norm, lam))


def test_a_weight_that_must_be_copied_is_warned_about() -> None:
    native._warn_of_copies.cache_clear()
    base, target = pair(64, 40, dtype=torch.float32)
    x, lam = torch.randn(3, 64), torch.tensor(0.5)
    with pytest.warns(UserWarning, match=r"copied at every call.*contiguous\(\)"):
        y = lerp_linear(x, LerpWeight.pack(base.T, target.T), lam)
    assert torch.equal(y, lerp_linear(x, LerpWeight.pack(base.T.contiguous(), target.T.contiguous()), lam))


def test_an_index_out_of_range_is_refused() -> None:
    x, weight = torch.randn(2, 8), LerpWeight.pack(*pair(6, 8, dtype=torch.float32))
    for bad in (-1, 2):
        index = torch.tensor([0, bad], dtype=torch.int32)
        message = rf"row_to_lam must be in \[0, 2\), got {bad}"
        with pytest.raises(IndexError, match=message):
            lerp_linear(x, weight, torch.rand(2), row_to_lam=index)
        with pytest.raises(IndexError, match=message):
            lerp_embedding(torch.tensor([1, 1]), weight, torch.rand(2), row_to_lam=index)
    for bad in (-1, 6):
        with pytest.raises(IndexError, match=rf"ids must be in \[0, 6\), got {bad}"):
            lerp_embedding(torch.tensor([1, bad]), weight, torch.tensor(0.5))


def test_an_instruction_set_that_cannot_be_had_is_refused() -> None:
    with pytest.raises(ValueError, match=r"isa must be one of scalar.* on this machine, got 'mmx'"):
        native.use_isa("mmx")


def test_the_environment_chooses_the_instruction_set() -> None:
    def run(name: str) -> subprocess.CompletedProcess[str]:
        code = "from dami_kernels import native; print(native.isa())"
        environment = {**os.environ, "DAMI_CPU_ISA": name, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert run("scalar").stdout.strip() == "scalar"
    assert "ValueError: DAMI_CPU_ISA must be one of scalar" in run("mmx").stderr


def test_opcheck() -> None:
    rows, lam = torch.randn(6, 32), torch.rand(2)
    index = torch.tensor([0, 1, 1, 0, 0, 1], dtype=torch.int32)
    weight, bias, norm = (list(pair(*shape, dtype=torch.float32)) for shape in ((10, 32), (10,), (32,)))
    ids = torch.randint(10, (6,))
    torch.library.opcheck(torch.ops.dami.lerp_linear, (rows, weight, bias, lam, index, 1, "pair", False))
    torch.library.opcheck(torch.ops.dami.lerp_embedding, (ids, weight, lam, None, 3, "pair", torch.float32, 32))
    torch.library.opcheck(torch.ops.dami.lerp_rms_norm, (rows, norm, lam, None, 3, 1e-6, 0.0))
    torch.library.opcheck(torch.ops.dami.lerp_layer_norm, (rows, norm, norm, lam, index, 1, 1e-5))


def test_rates_are_measured() -> None:
    assert native.peak_flops(torch.float32) > 1e8
    assert native.read_bandwidth(torch.zeros(2**22)) > 1e8
