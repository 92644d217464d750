"""The storage formats: what they lose, what they weigh, and that they can be read in parts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dami_kernels import (
    LerpWeight,
    formats,
    lerp_embedding,
    lerp_experts,
    lerp_linear,
    lerp_linears,
    native,
    reference,
    register_format,
)
from dami_kernels.ops import library
from dami_kernels.quantize import GROUP, dequantize, pack_nibbles, quantize, unpack_nibbles
from tests.tolerance import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DISTANCE = 0.027  # ‖target − base‖ / ‖base‖ of the published pairs
# What docs/formats.md states for Gaussian weights: bytes per bfloat16 weight, and the largest ‖error of W(λ)‖ / ‖W(λ)‖.
STATED = {"pair": (4.0, 0.0), "int8": (3.0625, 2e-4), "int4": (2.5625, 2.4e-3), "w8d4": (1.625, 5.5e-3)}
QUANTISED = ["int8", "int4", "w8d4"]


def ends(*shape: int, dtype: torch.dtype = torch.bfloat16, rank: int | None = None) -> tuple[Tensor, Tensor]:
    base = torch.randn(shape).to(dtype)
    if rank is None:
        delta = torch.randn(shape)
    else:
        delta = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1]) / rank**0.5
    return base, (base.float() + DISTANCE * delta).to(dtype)


def pack(format: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[LerpWeight, Tensor, Tensor]:
    base, target = ends(*shape, dtype=dtype, rank=3 if format == "lowrank" else None)
    return LerpWeight.pack(base, target, format), base, target


def relative(error: Tensor, to: Tensor) -> float:
    return (error.double().norm() / to.double().norm()).item()


def test_every_format_is_stated() -> None:
    assert {*STATED, "lowrank"} == set(formats.names())
    for name, (nbytes, _) in STATED.items():
        assert formats.matrices(name).bytes_per_weight(torch.bfloat16) == nbytes


@pytest.mark.parametrize("name", formats.names())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_knows_its_shape_and_dtype(name: str, dtype: torch.dtype) -> None:
    weight, base, _ = pack(name, 40, 150, dtype=dtype)
    assert len(weight.tensors) == len(formats.get(name).TENSORS)
    assert (weight.shape, weight.dtype, weight.device) == (base.shape, dtype, base.device)
    assert [end.shape for end in weight.unpack()] == [base.shape, base.shape]
    assert weight.materialize(0.5).dtype == dtype
    if name != "w8d4":
        assert weight.tensors[0].data_ptr() == base.data_ptr()
        assert torch.equal(weight.materialize(0.0), base)


@pytest.mark.parametrize("name", STATED)
def test_bytes_and_error_are_as_stated(name: str) -> None:
    weight, base, target = pack(name, 256, 2048)
    nbytes, error = STATED[name]
    assert weight.bytes_per_weight == nbytes
    got = [end.double() for end in weight.unpack()]
    for lam in (0.0, 0.25, 0.5, 0.75, 1.0):
        exact = torch.lerp(base.double(), target.double(), lam)
        assert relative(torch.lerp(*got, lam) - exact, exact) <= error


def test_low_rank_is_found_and_loses_no_more_than_rounding_has() -> None:
    weight, _, target = pack("lowrank", 300, 500)
    assert weight.tensors[1].shape == (3, 500)
    noise = torch.finfo(torch.bfloat16).eps / 4
    assert relative(weight.unpack()[1].double() - target.double(), target) <= noise


def test_full_rank_is_refused_by_lowrank() -> None:
    with pytest.raises(ValueError, match=r"rank of at most 25 to be stored as 'lowrank', got a higher one: use 'int4'"):
        LerpWeight.pack(*ends(64, 256), "lowrank")
    with pytest.raises(ValueError, match=r"must be matrices to be stored as 'lowrank', got shape \[2, 3, 4\]"):
        LerpWeight.pack(torch.ones(2, 3, 4), torch.ones(2, 3, 4), "lowrank")


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_cannot_be_quantised(name: str, bad: float) -> None:
    base, target = ends(3, 40)
    target[1, 7] = bad
    with pytest.raises(ValueError, match="target must be finite to be quantised, got Inf or NaN among its values"):
        LerpWeight.pack(base, target, name)


@pytest.mark.parametrize("name", formats.names())
def test_rows_can_be_read_alone(name: str) -> None:
    """By slice and by index, which is what spares the operators a whole copy."""
    weight, _, _ = pack(name, 50, 70)
    whole = weight.unpack()
    for rows in (slice(7, 20), torch.tensor([3, 3, 49, 0])):
        part = formats.get(name).unpack(*weight.tensors, columns=70, rows=rows)
        for end, expected in zip(part, whole, strict=True):
            torch.testing.assert_close(end, expected[rows], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", QUANTISED)
def test_packing_in_blocks_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, target = ends(4, 37, 90)
    whole = LerpWeight.pack(base, target, name)
    monkeypatch.setattr("dami_kernels.quantize.BLOCK", 37 * 90)
    for tensor, expected in zip(LerpWeight.pack(base, target, name).tensors, whole.tensors, strict=True):
        assert torch.equal(tensor, expected)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 5),
    columns=st.integers(0, 100),
    bits=st.integers(2, 8),
    exponent=st.integers(-30, 30),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
    seed=st.integers(0, 2**16),
)
def test_codes_are_near_what_they_code(
    rows: int, columns: int, bits: int, exponent: int, spread: float, seed: int
) -> None:
    """No group is further from its values than plain rounding to the widest value's scale would leave it."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    values = values * torch.exp(spread * torch.randn(rows, columns, generator=generator)) * 2.0**exponent
    codes, scales = quantize(values, bits)
    groups = -(-columns // GROUP)
    assert codes.shape == (rows, groups * GROUP)
    assert scales.shape == (rows, groups)
    assert (codes[:, columns:] == 0).all()
    assert codes.numel() == 0 or (codes.min() >= -(2 ** (bits - 1)) and codes.max() <= 2 ** (bits - 1) - 1)
    if bits == 4:
        assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)
    error = (dequantize(codes, scales, columns) - values).abs()
    for group in range(groups):
        inside = slice(group * GROUP, (group + 1) * GROUP)
        widest = values[:, inside].abs().amax(1, keepdim=True)
        # half a step each, and the widest code's share of the rounding of the scale to bfloat16
        step = widest / 2 ** (bits - 1) * (1 + 2**-8)
        allowed = step.square() * values[:, inside].shape[1]
        assert (error[:, inside].square().sum(1, keepdim=True) <= allowed + 1e-37).all()


def test_least_squares_scales_beat_the_widest_weights() -> None:
    values = torch.randn(64, 4096)
    groups = values.unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
    naive = (groups / scale).round().clamp(-8, 7) * scale
    fitted = dequantize(*quantize(values, 4), 4096)
    assert relative(fitted - values, values) < 0.85 * relative(naive.flatten(1) - values, values)


TWO_ROUNDINGS = 1.5  # of the base's part, and of the sum; a root of two, and room for luck


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_of_low_rank(dtype: torch.dtype) -> None:
    weight, _, _ = pack("lowrank", 45, 67, dtype=dtype)
    bias = LerpWeight.pack(torch.randn(45).to(dtype), torch.randn(45).to(dtype))
    x, lam = torch.randn(4, 67).to(dtype), torch.tensor([0.0, 0.3, 1.0, -0.5], requires_grad=True)
    y = lerp_linear(x, weight, lam, bias)
    merged = [(weight.materialize(value), bias.materialize(value)) for value in lam.tolist()]
    plain = torch.stack([F.linear(row, *parameters) for row, parameters in zip(x, merged, strict=True)])
    assert_as_accurate(
        y.detach(), reference.lerp_linear(x, weight.unpack(), lam.detach(), bias.unpack()), plain, TWO_ROUNDINGS
    )
    assert torch.autograd.grad(y.float().sum(), lam)[0].isfinite().all()


def test_embedding_of_low_rank() -> None:
    weight, _, _ = pack("lowrank", 45, 67, dtype=torch.float32)
    ids, lam = torch.randint(0, 45, (4, 2)), torch.tensor([0.0, 0.3, 1.0, -0.5], requires_grad=True)
    y = lerp_embedding(ids, weight, lam, rows_per_lam=2)
    oracle = reference.lerp_embedding(ids, weight.unpack(), lam.detach().unsqueeze(1).expand(4, 2))
    plain = torch.stack([F.embedding(a, weight.materialize(v)) for a, v in zip(ids, lam.tolist(), strict=True)])
    assert_as_accurate(y.detach(), oracle, plain, TWO_ROUNDINGS)
    assert torch.autograd.grad(y.sum(), lam)[0].isfinite().all()


class RowScaled:
    """`rows8`: the base as it is, the difference in 8 bits with one scale for every row."""

    TENSORS = ("", "_codes", "_scale")

    def pack(self, base: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        delta = target.float() - base.float()
        scale = delta.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        return base, (delta / scale).round().to(torch.int8), scale

    def unpack(self, *tensors: Tensor, columns: int, rows: formats.Rows = formats.ALL) -> tuple[Tensor, Tensor]:
        base, codes, scale = (tensor[rows] for tensor in tensors)
        return base, base.float() + codes * scale

    def layout(self, shape: Sequence[int], dtype: torch.dtype, *_: Tensor) -> Sequence[formats.Layout]:
        return (shape, dtype), (shape, torch.int8), ((*shape[:-1], 1), torch.float32)


@pytest.fixture
def own_format(monkeypatch: pytest.MonkeyPatch) -> str:
    """A format of a user."""
    monkeypatch.setattr(formats, "_FORMATS", dict(formats._FORMATS))
    register_format("rows8", RowScaled())
    return "rows8"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_operator_takes_a_format_of_ones_own(own_format: str, dtype: torch.dtype) -> None:
    """In plain torch, and each says once that no kernel reads it."""
    x, lam = torch.randn(4, 70).to(dtype), torch.tensor([0.0, 0.3, 1.0, 0.6], requires_grad=True)
    ids, offsets = torch.tensor([3, 0, 3, 7]), torch.tensor([1, 4], dtype=torch.int32)
    weight, experts = (LerpWeight.pack(*ends(*shape, dtype=dtype), own_format) for shape in ((9, 70), (2, 9, 70)))
    library._warn_once.cache_clear()

    def results() -> tuple[Tensor, ...]:
        both = lerp_linears(x, [weight, weight], lam)
        alone = lerp_linear(x, weight, lam)
        return alone, *both, lerp_embedding(ids, weight, lam), lerp_experts(x, experts, lam, offsets)

    with pytest.warns(UserWarning, match="no kernel reads the format 'rows8'") as told:
        linear, *both, rows, per_expert = results()
    assert len(told) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results()
    merged = [weight.materialize(value) for value in lam.tolist()]
    plain = torch.stack([F.linear(row, W) for row, W in zip(x, merged, strict=True)])
    lams = lam.detach()
    assert_as_accurate(linear.detach(), reference.lerp_linear(x, weight.unpack(), lams), plain)
    assert all(torch.equal(part, linear) for part in both)
    looked_up = torch.stack([W[i] for W, i in zip(merged, ids.tolist(), strict=True)])
    assert_as_accurate(rows.detach(), reference.lerp_embedding(ids, weight.unpack(), lams), looked_up)
    expert = torch.tensor([0, 1, 1, 1])
    each = torch.stack(
        [F.linear(row, experts.materialize(v)[e]) for row, v, e in zip(x, lam.tolist(), expert.tolist(), strict=True)]
    )
    assert_as_accurate(per_expert.detach(), reference.lerp_experts(x, experts.unpack(), lams, expert), each)
    assert torch.autograd.grad(linear.float().sum(), lam)[0].isfinite().all()


def test_another_dtype_of_a_format_of_ones_own(own_format: str) -> None:
    weight = LerpWeight.pack(*ends(9, 70), own_format)
    assert [tensor.dtype for tensor in weight.to(torch.float16).tensors] == [torch.float16, torch.int8, torch.float32]


def test_matrices_of_ones_own_are_a_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two matrices in 8 bits, which no kernel on the CPU reads together."""
    monkeypatch.setattr(formats, "_FORMATS", dict(formats._FORMATS))
    register_format("w8d8", formats.Matrices("Both in 8 bits.", formats.Codes("_base", 8), formats.Codes("_delta", 8)))
    weight, base, target = pack("w8d8", 64, 256)
    assert formats.get("w8d8").TENSORS == ("_base", "_base_scale", "_delta", "_delta_scale")
    assert weight.bytes_per_weight == formats.matrices("w8d8").bytes_per_weight(torch.bfloat16) == 2.125
    for end, kept in zip((base, target), weight.unpack(), strict=True):
        assert relative(kept.double() - end.double(), end) < 5.5e-3
    x, lam = torch.randn(3, 256).bfloat16(), torch.tensor([0.0, 0.5, 1.0])
    library._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="no kernel reads the format 'w8d8'"):
        y = lerp_linear(x, weight, lam)
    plain = torch.stack([F.linear(row, weight.materialize(v)) for row, v in zip(x, lam.tolist(), strict=True)])
    assert_as_accurate(y, reference.lerp_linear(x, weight.unpack(), lam), plain)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("int8", ValueError, "name must not be that of another format, got 'int8'"),
        ("two words", ValueError, "name must be an identifier, got 'two words'"),
        (8, ValueError, "name must be an identifier, got 8"),
    ],
)
def test_names_that_no_format_can_have(name: object, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        register_format(name, RowScaled())  # type: ignore[arg-type]
    assert {*STATED, "lowrank"} == set(formats.names())


@pytest.mark.parametrize(
    ("tensors", "kind", "message"),
    [
        (["", "_x"], TypeError, r"format.TENSORS must be a tuple of one string at least, got \['', '_x'\]"),
        ((), TypeError, r"format.TENSORS must be a tuple of one string at least, got \(\)"),
        (("_x", "_x"), ValueError, r"format.TENSORS must be distinct, got \('_x', '_x'\)"),
    ],
)
def test_names_that_no_tensors_can_have(tensors: object, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        register_format("mine", type("Format", (RowScaled,), {"TENSORS": tensors})())
    assert {*STATED, "lowrank"} == set(formats.names())


def test_what_is_no_format() -> None:
    with pytest.raises(TypeError, match=r"must have pack, unpack and layout, got <object .*> without pack, unpack"):
        register_format("mine", object())  # type: ignore[arg-type]


def test_registering_twice_changes_nothing() -> None:
    register_format("int8", formats.get("int8"))
    assert {*STATED, "lowrank"} == set(formats.names())


def test_what_matrices_cannot_be() -> None:
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 3"):
        formats.Codes("_delta", 3)
    with pytest.raises(ValueError, match="second must be stored as codes where base is, got numbers"):
        formats.Matrices("", formats.Codes("_base", 8), formats.Numbers("_target"))
    with pytest.raises(NotImplementedError, match="no kernel reads the format 'lowrank'"):
        formats.matrices("lowrank")


def test_the_cpu_kernels_have_the_formats_as_they_are_described() -> None:
    if native.WHY_NOT:
        pytest.skip(native.WHY_NOT)
    assert {name: len(formats.matrices(name).TENSORS) for name in STATED} == native._C.FORMATS
