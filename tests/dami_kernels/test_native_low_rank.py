"""The compiled CPU kernels on a difference stored as two factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dami_kernels import LerpWeight, lerp_linear, lerp_linears, native, reference
from dami_kernels.ops import library
from tests.dami_kernels.test_native import DTYPES, LAMS
from tests.dami_kernels.test_native_formats import isa, pack, plain  # noqa: F401  # a fixture
from tests.tolerance import assert_as_accurate

pytestmark = pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))

# Rows, N, K and R: ends that agree; less than a group; not whole groups, and more rows than lie in a block.
SHAPES = [(1, 33, 70, 0), (1, 5, 40, 1), (3, 66, 1090, 40), (4, 9, 2100, 16), (40, 21, 129, 3), (300, 9, 64, 7)]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def low_rank(n: int, k: int, rank: int, dtype: torch.dtype) -> LerpWeight:
    base, down, up = torch.randn(n, k), torch.randn(rank, k), 0.1 * torch.randn(n, rank)
    return LerpWeight(tuple(each.to(dtype) for each in (base, down, up)), "lowrank", torch.Size((n, k)), dtype)


@every_dtype
def test_it_is_as_accurate_as_a_merged_copy(isa: str, dtype: torch.dtype) -> None:  # noqa: F811
    for rows, n, k, rank in SHAPES:
        x, weight = torch.randn(rows, k).to(dtype), low_rank(n, k, rank, dtype)
        bias = pack(n, dtype=dtype, format="pair")
        seen = torch.linspace(0, rows - 1, min(rows, 3)).long()
        for lams in ("mixed", "one", "groups"):
            lam = LAMS[lams](rows)
            y = lerp_linear(x, weight, lam, bias)
            assert y.isfinite().all()
            oracle = reference.lerp_linear(x[seen], weight.unpack(), lam[seen], bias.unpack())
            assert_as_accurate(y[seen], oracle, plain(x[seen], weight, lam[seen], bias))


@every_dtype
def test_invariant_rows_have_the_same_bits_in_any_batch(isa: str, dtype: torch.dtype) -> None:  # noqa: F811
    x, lam = torch.randn(300, 1100).to(dtype), torch.rand(300)
    weights = [low_rank(n, 1100, rank, dtype) for n, rank in ((37, 19), (5, 3))]
    every = lerp_linears(x, weights, lam, invariant=True)
    for weight, y in zip(weights, every, strict=True):
        for rows in (slice(0, 1), slice(7, 9), slice(290, 300), slice(0, 60)):
            assert torch.equal(lerp_linear(x[rows], weight, lam[rows], invariant=True), y[rows])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_no_row_reaches_another_and_no_difference_a_row_at_zero(
    isa: str,  # noqa: F811
    dtype: torch.dtype,
    bad: float,
) -> None:
    for rows in (2, 7, 50):
        x, lam, weight = torch.randn(rows, 75).to(dtype), torch.rand(rows), low_rank(21, 75, 5, dtype)
        lam[0] = 0
        clean, others = lerp_linear(x, weight, lam), torch.arange(rows) != rows // 2
        poisoned, mixed = x.clone(), lam.clone()
        poisoned[rows // 2, 3] = mixed[rows // 2] = bad
        for y in (lerp_linear(poisoned, weight, lam), lerp_linear(x, weight, mixed)):
            assert torch.equal(y[others], clean[others])
            assert not y[rows // 2].isfinite().all()
        for factor in weight.tensors[1:]:
            factor[:] = bad
        assert torch.equal(lerp_linear(x, weight, lam)[0], clean[0])


@pytest.mark.filterwarnings("ignore:dami. a weight is copied")
def test_weights_that_do_not_lie_dense(isa: str) -> None:  # noqa: F811
    weight, lam = low_rank(9, 70, 6, torch.bfloat16), torch.rand(4)
    x, expected = torch.randn(4, 140).bfloat16()[:, ::2], None
    spread: list[Tensor] = [torch.stack((each, each), 1).flatten(0, 1)[::2] for each in weight.tensors]
    for tensors in (weight.tensors, tuple(spread), tuple(each.t().contiguous().t() for each in weight.tensors)):
        y = lerp_linear(x, LerpWeight(tensors, "lowrank", weight.shape, weight.dtype), lam)
        assert expected is None or torch.equal(y, expected)
        expected = y


def test_the_dispatcher_runs_no_python(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, lam = torch.randn(3, 40), low_rank(9, 40, 3, torch.float32), torch.rand(3)
    expected = lerp_linear(x, weight, lam)

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("Python was asked")

    monkeypatch.setitem(library.CHECKED, "lerp_linear", refuse)
    op = torch.ops.dami.lerp_linear.default
    assert torch.equal(op(x, list(weight.tensors), [], lam, None, 1, "lowrank", False), expected)
    for place, bad in enumerate(weight.tensors):
        for wrong in (bad[:-1], bad[:, :-1], bad.double(), bad[0]):
            tensors = [*weight.tensors[:place], wrong, *weight.tensors[place + 1 :]]
            with pytest.raises(Exception, match="Python was asked"):
                op(x, tensors, [], lam, None, 1, "lowrank", False)
