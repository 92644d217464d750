"""The compiled CPU kernels on weights stored as codes, several at once, and experts; and what `invariant` promises."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dami_kernels import LerpWeight, lerp_embedding, lerp_experts, lerp_linear, lerp_linears, native, reference
from tests.dami_kernels.test_native import DTYPES, ISAS, LAMS, pair
from tests.tolerance import assert_as_accurate

pytestmark = pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))

FORMATS = ["pair", "int8", "int4", "w8d4"]
CODES = FORMATS[1:]
# Rows: one, a register tile, more than are converted in registers, several blocks. N and K: less than a group, not
# whole groups, several blocks along K and part of one, several pieces of blocks, more than one tile of outputs.
SHAPES = [(1, 3, 5), (1, 9, 2100), (2, 5, 9312), (3, 33, 70), (4, 9, 1056), (9, 66, 1090), (40, 5, 600), (300, 9, 129)]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
two_dtypes = pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)  # where no arithmetic is tested
every_format = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


def pack(*shape: int, dtype: torch.dtype, format: str) -> LerpWeight:
    return LerpWeight.pack(*pair(*shape, dtype=dtype), format)


def plain(x: Tensor, weight: LerpWeight, lam: Tensor, bias: LerpWeight) -> Tensor:
    """F.linear on one merged copy for each row."""
    return torch.cat(
        [
            F.linear(x[i : i + 1], weight.materialize(lam[i].item()), bias.materialize(lam[i].item()))
            for i in range(len(x))
        ]
    )


@every_dtype
@pytest.mark.parametrize("format", CODES)
def test_linear_is_as_accurate_as_a_merged_copy(isa: str, format: str, dtype: torch.dtype) -> None:
    for rows, n, k in SHAPES:
        x, weight = torch.randn(rows, k).to(dtype), pack(n, k, dtype=dtype, format=format)
        bias = pack(n, dtype=dtype, format="pair")
        seen = torch.linspace(0, rows - 1, min(rows, 3)).long()
        for lams in ("mixed", "one", "groups"):
            lam = LAMS[lams](rows)
            y = lerp_linear(x, weight, lam, bias)
            assert y.isfinite().all()
            oracle = reference.lerp_linear(x[seen], weight.unpack(), lam[seen], bias.unpack())
            assert_as_accurate(y[seen], oracle, plain(x[seen], weight, lam[seen], bias))


# Features that are larger in every row, as language models have them, and the massive activations of some.
OUTLIERS = [(60.0,) * 6, (1000.0,), (1e4,), (2e4,), (1e4, -300.0, 2e4), (1e6,), (4e6,)]


@pytest.mark.parametrize("format", CODES)
@pytest.mark.parametrize("outliers", OUTLIERS, ids=str)
def test_outliers_in_x_cost_no_accuracy(isa: str, outliers: tuple[float, ...], format: str) -> None:
    """Where x is rounded to integers, the largest element decides how finely: also where its weights are 0."""
    rows, n, k = 7, 192, 1600
    columns = torch.tensor([77, 208, 339, 470, 601, 732])[: len(outliers)]
    x = torch.randn(rows, k)
    x[:, columns] = torch.tensor(outliers)
    x, bias, lam = x.bfloat16(), pack(n, dtype=torch.bfloat16, format="pair"), torch.rand(rows)
    lam[0], lam[5] = 0, 1
    for is_heard in (True, False):
        base, target = pair(n, k, dtype=torch.bfloat16)
        base[:, columns] *= is_heard
        target[:, columns] *= is_heard
        weight = LerpWeight.pack(base, target, format)
        oracle = reference.lerp_linear(x, weight.unpack(), lam, bias.unpack())
        merged = plain(x, weight, lam, bias)
        for some in (slice(0, 1), slice(3), slice(rows)):
            y = lerp_linear(x[some], weight, lam[some], bias)
            assert_as_accurate(y, oracle[some], merged[some])


@pytest.mark.parametrize("format", CODES)
@pytest.mark.parametrize("unit", [2.0**-110, 1.0, 2.0**110])
def test_numbers_of_any_size_cost_no_accuracy(isa: str, unit: float, format: str) -> None:
    """All very small or large, over six powers of two; those of some features, whose weights are 0, over sixteen."""
    n, k = 192, 1100
    weight = [end.clone() for end in pair(n, k, dtype=torch.bfloat16)]
    x = torch.randn(3, k) * torch.exp2(-6 * torch.rand(k))
    x[:, ::100] *= 2**10
    for end in weight:
        end[:, ::100] = 0
    stored, lam = LerpWeight.pack(*weight, format), torch.tensor([0.0, 0.4, 1.0])
    silent = LerpWeight.pack(torch.zeros(n).bfloat16(), torch.zeros(n).bfloat16())
    x = (unit * x).bfloat16()
    oracle = reference.lerp_linear(x, stored.unpack(), lam, silent.unpack())
    assert_as_accurate(lerp_linear(x, stored, lam), oracle, plain(x, stored, lam, silent))


@pytest.mark.parametrize("format", CODES)
def test_a_row_with_outliers_changes_no_bit_of_others(isa: str, format: str) -> None:
    x, weight = torch.randn(40, 1100), pack(37, 1100, dtype=torch.bfloat16, format=format)
    x[::3, 500] = 1e4
    x, lam = x.bfloat16(), torch.rand(40)
    alone = torch.cat([lerp_linear(x[[i]], weight, lam[[i]], invariant=True) for i in range(40)])
    for rows in (2, 3, 4, 5, 40):
        assert torch.equal(lerp_linear(x[:rows], weight, lam[:rows], invariant=True), alone[:rows])
    calm = x.clone()
    calm[::3, 500] = 1
    for rows in (2, 4, 40):
        y, expected = (lerp_linear(each[:rows], weight, lam[:rows]) for each in (x, calm))
        others = torch.arange(rows) % 3 != 0
        assert torch.equal(y[others], expected[others])


@every_dtype
@every_format
def test_invariant_rows_have_the_same_bits_in_any_batch(isa: str, format: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(300, 1100).to(dtype), pack(37, 1100, dtype=dtype, format=format)
    bias = pack(37, dtype=dtype, format="pair")
    chosen = [0, 7, 16, 40, 299]
    alone_lam = torch.tensor([0.3, 0.0, 1.0, 0.6, 1.3])
    alone = [lerp_linear(x[[i]], weight, lam, bias, invariant=True) for i, lam in zip(chosen, alone_lam, strict=True)]
    for rows in (5, 17, 300):
        inside = torch.tensor([i for i in chosen if i < rows])
        for others in (torch.rand(rows), torch.full((rows,), 0.3), torch.zeros(rows)):
            others[inside] = alone_lam[: len(inside)]
            y = lerp_linear(x[:rows], weight, others, bias, invariant=True)
            assert all(torch.equal(y[[i]], alone[j]) for j, i in enumerate(inside.tolist())), rows


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every_dtype
@pytest.mark.parametrize("format", CODES)
def test_no_row_reaches_another(isa: str, format: str, dtype: torch.dtype, bad: float) -> None:
    weight = pack(21, 75, dtype=dtype, format=format)
    for rows in (2, 7, 50):
        x, lam = torch.randn(rows, 75).to(dtype), torch.rand(rows)
        clean = lerp_linear(x, weight, lam)
        poisoned = x.clone()
        poisoned[rows // 2, 3] = bad
        y = lerp_linear(poisoned, weight, lam)
        assert not y[rows // 2].isfinite().any()
        others = torch.arange(rows) != rows // 2
        assert torch.equal(y[others], clean[others])


@two_dtypes
@every_format
def test_nothing_of_an_earlier_product_is_left(isa: str, format: str, dtype: torch.dtype) -> None:
    """A product of NaN with long rows, and then one with shorter rows, whose scratch ends within a vector."""
    bad = pack(8, 2048, dtype=dtype, format=format)
    for tensor in bad.tensors:
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
    for k in (32, 70, 512, 544, 576, 1056):
        weight = pack(8, k, dtype=dtype, format=format)
        for rows in (1, 2, 4, 9):
            x, lam = torch.randn(rows, k).to(dtype), torch.rand(rows)
            clean = lerp_linear(x, weight, lam)
            assert lerp_linear(torch.full((rows, 2048), float("nan"), dtype=dtype), bad, lam).isnan().all()
            assert torch.equal(lerp_linear(x, weight, lam), clean)


@two_dtypes
@pytest.mark.parametrize("format", CODES)
def test_at_lam_0_only_the_base_is_read(isa: str, format: str, dtype: torch.dtype) -> None:
    weight = pack(21, 75, dtype=dtype, format=format)
    broken = LerpWeight(
        (*weight.tensors[:-1], torch.full_like(weight.tensors[-1], float("nan"))), format, weight.shape, weight.dtype
    )
    for rows in (1, 3, 50):
        x, lam = torch.randn(rows, 75).to(dtype), torch.rand(rows)
        lam[::2] = 0
        y = lerp_linear(x, broken, lam)
        assert torch.equal(y[::2], lerp_linear(x, weight, lam)[::2])
        assert not y[1::2].isfinite().any()
    ids = torch.tensor([3, 20])
    assert torch.equal(lerp_embedding(ids, broken, torch.zeros(2)), lerp_embedding(ids, weight, torch.zeros(2)))


@two_dtypes
@every_format
def test_nothing_beside_a_weight_is_read(isa: str, format: str, dtype: torch.dtype) -> None:
    """Every row of every tensor lies between NaN, or codes that mean a lot."""
    weight = pack(21, 75, dtype=dtype, format=format)

    def between(tensor: Tensor) -> Tensor:
        wide = torch.full(
            (tensor.shape[0] + 2, tensor.shape[1] + 7), float("nan") if tensor.is_floating_point() else 127
        )
        wide = wide.to(tensor.dtype)
        inside = wide[1:-1, 3:-4]
        inside.copy_(tensor)
        return inside

    strided = LerpWeight(tuple(map(between, weight.tensors)), format, weight.shape, weight.dtype)
    ids, lam = torch.tensor([0, 3, 20]), torch.tensor(0.4)
    assert torch.equal(lerp_embedding(ids, strided, lam), lerp_embedding(ids, weight, lam))
    for rows in (1, 4, 9, 40):
        x, lam = torch.randn(rows, 75).to(dtype), LAMS["groups"](rows)
        assert torch.equal(lerp_linear(x, strided, lam), lerp_linear(x, weight, lam))


@two_dtypes
@every_format
def test_several_weights_of_one_x_are_each_by_itself(isa: str, format: str, dtype: torch.dtype) -> None:
    sizes = (40, 1, 67)
    weights = [pack(n, 130, dtype=dtype, format=format) for n in sizes]
    biases = [pack(n, dtype=dtype, format="pair") for n in sizes]
    index = torch.tensor([2, 0, 1] * 50, dtype=torch.int32)
    lam = torch.tensor([0.3, 1.0, 0.0])
    for rows in (1, 6, 150):
        x = torch.randn(rows, 130).to(dtype)
        for some in (biases, None):
            ys = lerp_linears(x, weights, lam, some, row_to_lam=index[:rows])
            for i, y in enumerate(ys):
                one = lerp_linear(x, weights[i], lam, some[i] if some else None, row_to_lam=index[:rows])
                assert torch.equal(y, one)


@two_dtypes
@every_format
def test_an_expert_is_a_weight_by_itself(isa: str, format: str, dtype: torch.dtype) -> None:
    experts, n, k = 5, 35, 70
    weight, bias = pack(experts, n, k, dtype=dtype, format=format), pack(experts, n, dtype=dtype, format="pair")
    ends = torch.tensor([0, 3, 3, 160, 162], dtype=torch.int32)
    x, lam = torch.randn(170, k).to(dtype), LAMS["groups"](170)
    y = lerp_experts(x, weight, lam, ends, bias, invariant=True)
    assert (y[162:] == 0).all()
    begin = 0
    for e, end in enumerate(ends.tolist()):
        own = LerpWeight(tuple(t[e] for t in weight.tensors), format, weight.shape[1:], dtype)
        own_bias = LerpWeight(tuple(t[e] for t in bias.tensors), "pair", bias.shape[1:], dtype)
        alone = lerp_linear(x[begin:end], own, lam[begin:end], own_bias, invariant=True)
        assert torch.equal(y[begin:end], alone), e
        begin = end


@every_dtype
@pytest.mark.parametrize("format", CODES)
@pytest.mark.parametrize("d", [1, 70, 600])
def test_embedding_is_as_accurate_as_plain_torch(isa: str, d: int, format: str, dtype: torch.dtype) -> None:
    table = pack(20, d, dtype=dtype, format=format)
    ids, lam = torch.randint(20, (40,)), LAMS["groups"](40)
    base, target = (end[ids] for end in table.unpack())
    y = lerp_embedding(ids, table, lam)
    plain = torch.lerp(base.float(), target.float(), lam.unsqueeze(1)).to(dtype)
    assert_as_accurate(y, reference.lerp_embedding(ids, table.unpack(), lam), plain)
    assert torch.equal(y[lam == 0], base[lam == 0].to(dtype))
