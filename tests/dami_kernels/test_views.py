"""Operands need not be contiguous: views of any strides give the bits of their contiguous copies, on every device.

test_triton.py runs this file in Triton's interpreter too, test_cuda_numbers.py has the same for the CUDA kernels.
"""

from __future__ import annotations

import os
import random
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dami_kernels import (
    LerpWeight,
    formats,
    lerp_embedding,
    lerp_experts,
    lerp_layer_norm,
    lerp_linear,
    lerp_linears,
    lerp_rms_norm,
)

FORMATS = ["pair", "int8", "int4", "w8d4", "lowrank"]
OPERATORS = ["linear", "linears", "experts", "embedding", "rms_norm", "layer_norm"]
EXAMPLES = 15 if os.environ.get("TRITON_INTERPRET") else 150


def view(tensor: Tensor, draw: random.Random, dense: bool = False) -> Tensor:
    """The same numbers with gaps and offsets in every dimension, in any order in memory, among others that mean a lot.

    If `dense`, those of the last dimension lie side by side.
    """
    order = list(range(tensor.dim()))
    last = order.pop() if dense else None
    draw.shuffle(order)
    order += [last] if last is not None else []
    steps = [1 if i == last else draw.choice([1, 1, 2, 3]) for i in order]
    begins = [draw.randrange(4) for _ in order]
    sizes = [
        begin + tensor.shape[i] * step + draw.randrange(4) for i, step, begin in zip(order, steps, begins, strict=True)
    ]
    fill = float("nan") if tensor.is_floating_point() else 113
    wide = torch.full(sizes, fill, dtype=tensor.dtype)
    inside = wide
    for at, (i, step, begin) in enumerate(zip(order, steps, begins, strict=True)):
        inside = inside.narrow(at, begin, tensor.shape[i] * step)[(slice(None),) * at + (slice(None, None, step),)]
    inside = inside.permute([order.index(i) for i in range(tensor.dim())])
    return inside.copy_(tensor)


def view_of(weight: LerpWeight, draw: random.Random, dense: bool = False) -> LerpWeight:
    return replace(weight, tensors=tuple(view(tensor, draw, dense) for tensor in weight.tensors))


def packed(*shape: int, dtype: torch.dtype, format: str = "pair") -> LerpWeight:
    base = torch.randn(shape)
    delta = 0.03 * torch.randn(shape)
    if format == "lowrank":
        down, up = torch.randn(2, shape[1]), 0.03 * torch.randn(shape[0], 2)
        return LerpWeight((base.to(dtype), down.to(dtype), up.to(dtype)), format, torch.Size(shape), dtype)
    return LerpWeight.pack(base.to(dtype), (base + delta).to(dtype), format)


@pytest.mark.filterwarnings("ignore:dami. a weight is copied at every call")
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    operator=st.sampled_from(OPERATORS),
    format=st.sampled_from(FORMATS[:4]),  # of low rank are plain products of the library, which sums views as it likes
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    k=st.sampled_from([1, 9, 64, 70, 128, 192, 600]),
    rows=st.sampled_from([1, 3, 20]),
    ragged=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_views_give_the_bits_of_their_copies(
    operator: str, format: str, dtype: torch.dtype, k: int, rows: int, ragged: bool, seed: int
) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    n, experts = draw.choice([1, 5, 33]), 3
    x, lam = torch.randn(rows, k).to(dtype), torch.rand(rows)
    lam[::3] = 0
    index = torch.randint(rows, (rows,), dtype=torch.int32) if ragged else None
    if operator in ("rms_norm", "layer_norm"):
        format, weights = "pair", [packed(k, dtype=dtype), packed(k, dtype=dtype)]
    elif operator == "experts":
        weights = [packed(experts, n, k, dtype=dtype, format=format), packed(experts, n, dtype=dtype)]
    else:
        weights = [
            packed(n, k, dtype=dtype, format=format),
            packed(n, dtype=dtype),
            packed(7, k, dtype=dtype, format=format),
        ]
    ids = torch.randint(n, (rows,), dtype=draw.choice([torch.int32, torch.int64]))
    offsets = torch.tensor([0, rows // 2, rows], dtype=torch.int32)

    def run(
        x: Tensor, weights: list[LerpWeight], lam: Tensor, index: Tensor | None, ids: Tensor, offsets: Tensor
    ) -> Tensor:
        which = {"row_to_lam": index}
        if operator == "linear":
            return lerp_linear(x, weights[0], lam, weights[1], **which)
        if operator == "linears":
            return torch.cat(lerp_linears(x, [weights[0], weights[2]], lam, **which), 1)
        if operator == "experts":
            return lerp_experts(x, weights[0], lam, offsets, weights[1], **which)
        if operator == "embedding":
            return lerp_embedding(ids, weights[0], lam, **which)
        if operator == "rms_norm":
            return lerp_rms_norm(x, weights[0], lam, **which)
        return lerp_layer_norm(x, weights[0], lam, weights[1], **which)

    expected = run(x, weights, lam, index, ids, offsets)
    assert expected.isfinite().all()
    strided = run(
        view(x, draw),
        [view_of(weight, draw, dense=draw.random() < 0.5) for weight in weights],
        view(lam, draw),
        None if index is None else view(index, draw),
        view(ids, draw),
        view(offsets, draw),
    )
    assert torch.equal(strided, expected)


def test_a_column_of_a_map_is_a_map() -> None:
    """The first report of it: every second number was taken for the next row's."""
    x, weight, lam = torch.randn(6, 40), packed(5, 40, dtype=torch.float32), torch.tensor([0.0, 0.5, 1.0])
    both = torch.tensor([[2, 0], [2, 1], [2, 2], [2, 2], [2, 1], [2, 0]], dtype=torch.int32)
    assert torch.equal(
        lerp_linear(x, weight, lam, row_to_lam=both[:, 1]), lerp_linear(x, weight, lam[both[:, 1].long()])
    )


@pytest.mark.parametrize("format", ["int8", "int4", "w8d4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [7, 8], ids=["odd stride", "even stride"])
def test_some_groups_of_a_coded_weight(format: str, dtype: torch.dtype, groups: int) -> None:
    """Views along K, from an even group on and from an odd one; scales of rows lie an odd or an even stride apart."""
    whole = packed(21, 32 * groups, dtype=dtype, format=format)
    experts = packed(3, 9, 32 * groups, dtype=dtype, format=format)
    for first, count in ((0, 4), (1, 4), (2, 2)):

        def part(weight: LerpWeight, first: int = first, count: int = count) -> LerpWeight:
            tensors = []
            for tensor in weight.tensors:
                each = tensor.shape[-1] // groups
                tensors.append(tensor[..., first * each : (first + count) * each])
            return LerpWeight(tuple(tensors), format, torch.Size((*weight.shape[:-1], 32 * count)), dtype)

        def copied(weight: LerpWeight) -> LerpWeight:
            return replace(weight, tensors=tuple(tensor.contiguous() for tensor in weight.tensors))

        x, lam, ends = torch.randn(9, 32 * count).to(dtype), torch.rand(9), torch.tensor([1, 2, 9]).int()
        assert torch.equal(lerp_linear(x, part(whole), lam), lerp_linear(x, copied(part(whole)), lam))
        assert torch.equal(lerp_experts(x, part(experts), lam, ends), lerp_experts(x, copied(part(experts)), lam, ends))
        ids, lam = torch.arange(21), torch.rand(21)
        assert torch.equal(lerp_embedding(ids, part(whole), lam), lerp_embedding(ids, copied(part(whole)), lam))


@pytest.mark.parametrize("format", FORMATS[:4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [1, 2, 8, 16, 17])
def test_embeddings_of_few_columns(format: str, dtype: torch.dtype, d: int) -> None:
    weight, ids, lam = packed(11, d, dtype=dtype, format=format), torch.randint(11, (9,)), torch.rand(9)
    base, target = (end.float() for end in weight.unpack())
    expected = torch.lerp(base[ids].double(), target[ids].double(), lam.double().unsqueeze(1))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(lerp_embedding(ids, weight, lam).double(), expected, rtol=eps, atol=2e-7)


# What a kernel would read beside a tensor is refused, by a weight when it is made and by an operator when it runs.


@pytest.mark.parametrize("format", FORMATS)
def test_a_weight_of_tensors_that_do_not_fit_cannot_be_made(format: str) -> None:
    weight = packed(6, 70, dtype=torch.bfloat16, format=format)
    for i, tensor in enumerate(weight.tensors):
        for bad in (tensor[:-1], tensor[:, :-1], torch.cat((tensor, tensor)), tensor[0], tensor.unsqueeze(0)):
            if format == "lowrank" and (i, bad.dim()) in ((1, 2), (2, 2)) and bad.shape[i - 1] == tensor.shape[i - 1]:
                continue  # another rank, which shows at the other factor
            with pytest.raises(ValueError, match=rf"tensors\[\d\] of '{format}' with ends of shape \[6, 70\] must be"):
                replace(weight, tensors=(*weight.tensors[:i], bad, *weight.tensors[i + 1 :]))
        others = (*weight.tensors[:i], tensor.to("meta"), *weight.tensors[i + 1 :])
        with pytest.raises(
            ValueError, match=rf"tensors\[{max(i, 1)}\] of '{format}' .* on (cpu|meta), got .* on (meta|cpu)"
        ):
            replace(weight, tensors=others)
        wrong = tensor.to(torch.float64)
        with pytest.raises(
            TypeError, match=rf"tensors\[{i}\] of '{format}' .* must be {tensor.dtype} .* got torch.float64"
        ):
            replace(weight, tensors=(*weight.tensors[:i], wrong, *weight.tensors[i + 1 :]))
    count = len(formats.get(format).TENSORS)
    with pytest.raises(ValueError, match=f"tensors of '{format}' must be {count}, got {count - 1}"):
        replace(weight, tensors=weight.tensors[:-1])
    with pytest.raises(ValueError, match="format must be one of"):
        replace(weight, format="int5")


def test_the_right_tensor_is_named() -> None:
    message = "tensors[1] of 'pair' with ends of shape [6, 8] must be torch.float32 of shape [6, 8] on cpu, "
    message += "got torch.float32 of shape [5, 8] on cpu"
    with pytest.raises(ValueError, match=re.escape(message)):
        LerpWeight((torch.zeros(6, 8), torch.zeros(5, 8)), "pair", torch.Size((6, 8)), torch.float32)


@pytest.mark.parametrize("format", FORMATS[:4])
def test_a_weight_that_was_changed_since_is_refused_by_every_operator(format: str) -> None:
    lam, ends = torch.rand(4), torch.tensor([1, 2, 4], dtype=torch.int32)
    for i in range(len(formats.get(format).TENSORS)):
        for spoil, message in (
            (lambda t: t.set_(t[..., :-1].clone()), "must be .* of shape .* got .* of shape"),
            (
                lambda t: t.untyped_storage().resize_(0),
                r"must have \d+ bytes of memory, got 0: its storage was resized",
            ),
        ):

            def spoilt(weight: LerpWeight, i: int = i, spoil: object = spoil) -> LerpWeight:
                spoil(weight.tensors[i])  # type: ignore[operator]
                return weight

            x = torch.randn(4, 70)
            matrix = [packed(6, 70, dtype=torch.float32, format=format) for _ in range(3)]
            with pytest.raises(ValueError, match=message):
                lerp_linear(x, spoilt(matrix[0]), lam)
            with pytest.raises(ValueError, match=message):
                lerp_linears(x, [matrix[1], matrix[0]], lam)
            with pytest.raises(ValueError, match=message):
                lerp_embedding(torch.arange(4), spoilt(matrix[2]), lam)
            with pytest.raises(ValueError, match=message):
                lerp_experts(x, spoilt(packed(3, 6, 70, dtype=torch.float32, format=format)), lam, ends)
            if format == "pair":
                sound = packed(70, dtype=torch.float32)
                for norm in (lerp_rms_norm, lerp_layer_norm):
                    with pytest.raises(ValueError, match=message):
                        norm(x, spoilt(packed(70, dtype=torch.float32)), lam)
                with pytest.raises(ValueError, match=message):
                    lerp_layer_norm(x, sound, lam, spoilt(packed(70, dtype=torch.float32)))
                with pytest.raises(ValueError, match=message):
                    lerp_linear(x, matrix[1], lam, spoilt(packed(6, dtype=torch.float32)))
                experts = packed(3, 6, 70, dtype=torch.float32)
                with pytest.raises(ValueError, match=message):
                    lerp_experts(x, experts, lam, ends, spoilt(packed(3, 6, dtype=torch.float32)))


X, LAM, MAP = torch.randn(4, 8), torch.rand(4), torch.zeros(4, dtype=torch.int32)
W = [torch.randn(6, 8), torch.randn(6, 8)]
FLAT = "the input must have 2 dimensions, got shape [8]"
ONE, EPS = (LAM, None, 1), (1e-6,)
DIRECT = [
    ("linear", (X, [W[0], W[1][:5]], [], *ONE, "pair", False), "tensors[1] of 'pair' with ends of shape [6, 8]"),
    ("linear", (X, [W[0]], [], *ONE, "pair", False), "tensors of 'pair' must be 2, got 1"),
    ("linear", (X, W, [W[0][:, 0]], *ONE, "pair", False), "tensors of 'pair' must be 2, got 1"),
    ("linear", (X[0], W, [], *ONE, "pair", False), "the input must have 2 dimensions, got shape [8]"),
    ("linear", (X, W, [], LAM[:3], None, 1, "pair", False), "must equal the 4 rows, got 3 * 1"),
    ("linear", (X, W, [], LAM.double(), None, 1, "pair", False), "lam must be torch.float32 [L] on cpu, got"),
    ("linear", (X, W, [], LAM, MAP[:3], 1, "pair", False), "row_to_lam must be torch.int32 [4] on cpu, got"),
    ("linears", (X, [*W, W[0], W[1][:, :7]], [], *ONE, "pair", False), "tensors[1] of 'pair'"),
    ("linears", (X, [], [], *ONE, "pair", False), "there must be one weight at least, got none"),
    (
        "experts",
        (X, [W[0].expand(3, 6, 8)] * 2, [], *ONE, MAP, "pair", False),
        "expert_offsets must be torch.int32 [3]",
    ),
    ("embedding", (MAP, W, *ONE, "pair", torch.float32, 9), "with ends of shape [6, 9] must be"),
    ("embedding", (MAP.half(), W, *ONE, "pair", torch.float32, 8), "ids must be an int64 or int32 Tensor"),
    ("rms_norm", (X, [W[0][0], W[1][0, :7]], *ONE, *EPS, 0.0), "tensors[1] of 'pair' with ends of shape [8]"),
    ("layer_norm", (X, [W[0][0]] * 2, [W[0][0, :7]] * 2, *ONE, *EPS), "tensors[0] of 'pair' with ends of shape [8]"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), DIRECT)
def test_torch_ops_check_what_they_are_given(name: str, arguments: tuple[object, ...], message: str) -> None:
    """Also where they are called without the functions that check first."""
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        getattr(torch.ops.dami, f"lerp_{name}")(*arguments)
