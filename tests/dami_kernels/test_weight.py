"""LerpWeight and the storage formats."""

from __future__ import annotations

import re

import pytest
import torch

from dami_kernels import LerpWeight


def test_pair_shares_memory_with_what_it_was_packed_from() -> None:
    base, target = torch.randn(4, 6), torch.randn(4, 6)
    weight = LerpWeight.pack(base, target)
    assert [tensor.data_ptr() for tensor in weight.tensors] == [base.data_ptr(), target.data_ptr()]
    assert (weight.shape, weight.dtype, weight.device) == (base.shape, base.dtype, base.device)
    assert weight.nbytes == base.nbytes + target.nbytes
    assert weight.bytes_per_weight == 8.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_materialize_blends_in_float32_and_rounds_once(dtype: torch.dtype) -> None:
    base, target = torch.randn(40, 60).to(dtype), torch.randn(40, 60).to(dtype)
    weight = LerpWeight.pack(base, target)
    exact = base.double() + 0.3 * (target.double() - base.double())
    error = (weight.materialize(0.3).double() - exact).abs()
    assert weight.materialize(0.3).dtype == dtype
    own = torch.finfo(torch.float32).eps * (target.double() - base.double()).abs()  # of the difference and its product
    assert (error <= 0.51 * torch.finfo(dtype).eps * exact.abs() + own).all()
    assert torch.equal(weight.materialize(0.0), base)
    assert torch.equal(weight.materialize(1.0), target)


@pytest.mark.parametrize(
    ("base", "target", "format", "kind", "message"),
    [
        ([1.0], torch.zeros(1), "pair", TypeError, "base must be a Tensor, got list"),
        (torch.zeros(1), None, "pair", TypeError, "target must be a Tensor, got NoneType"),
        (torch.zeros(1), torch.zeros(1).half(), "pair", TypeError, "got torch.float32 and torch.float16"),
        (torch.zeros(1).int(), torch.zeros(1).int(), "pair", TypeError, "got torch.int32 and torch.int32"),
        (torch.zeros(2, 3), torch.zeros(3, 2), "pair", ValueError, "one shape, got (2, 3) and (3, 2)"),
        (torch.zeros(1), torch.zeros(1, device="meta"), "pair", ValueError, "one device, got cpu and meta"),
        (torch.zeros(1), torch.zeros(1), "half", ValueError, "'w8d4'], got 'half'"),
        (torch.zeros(3), torch.zeros(3), "int4", ValueError, "must be 'pair' for a weight of shape [3], got 'int4'"),
    ],
)
def test_pack_names_what_is_wrong(base: object, target: object, format: str, kind: type, message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        LerpWeight.pack(base, target, format)  # type: ignore[arg-type]
