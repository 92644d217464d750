"""Attention over pages, and of a step, against the plain formula: with every instruction set, at awkward shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dami_kernels import native
from dami_kernels.ops import decode_attention
from tests.tolerance import assert_as_accurate

pytestmark = pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))

ISAS = native.supported_isas() if native.WHY_NOT is None else []
LENGTHS = [(3, 3), (1, 9), (9, 40), (1, 70), (1, 1), (21, 21), (0, 5)]  # queries and keys of each sequence
PAGE = 6
SHAPES = {  # heads, key heads, size, size of a value
    "plain": (2, 2, 64, 64),
    "grouped": (9, 3, 40, 40),
    "one key head": (8, 1, 7, 150),
    "many heads": (32, 1, 16, 16),
}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


class Case(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    key_pages: Tensor
    value_pages: Tensor
    table: Tensor
    begins: Tensor
    key_begins: Tensor

    def attend(self, scale: float = 0.3, softcap: float = 0.0, sinks: Tensor | None = None, **more: Any) -> Tensor:
        return native.attention(*self._replace(**more), scale, softcap, sinks)


def case(shape: tuple[int, int, int, int] = (4, 2, 16, 16), dtype: torch.dtype = torch.float32) -> Case:
    heads, key_heads, size, value_size = shape
    tokens = sum(queries for queries, _ in LENGTHS)
    rows = [-(-keys // PAGE) for _, keys in LENGTHS]
    numbers = iter(torch.randperm(sum(rows)).tolist())
    table = [[next(numbers) for _ in range(row)] + [-1] * (max(rows) - row) for row in rows]
    return Case(
        torch.randn(1, tokens, heads, size).to(dtype).transpose(1, 2),  # as projections give it
        torch.randn(1, key_heads, tokens, size).to(dtype),
        torch.randn(1, key_heads, tokens, value_size).to(dtype),
        torch.randn(sum(rows), PAGE, 2, key_heads, size).to(dtype)[:, :, 0],
        torch.randn(sum(rows), PAGE, key_heads, value_size).to(dtype),
        torch.tensor(table, dtype=torch.int32),
        torch.tensor([0, *accumulate(queries for queries, _ in LENGTHS)], dtype=torch.int32),
        torch.tensor([0, *accumulate(keys for _, keys in LENGTHS)], dtype=torch.int32),
    )


def plain(case: Case, dtype: torch.dtype, softcap: float = 0.0, sinks: Tensor | None = None) -> Tensor:
    """The formula, query by query, with the pages as they are after the call."""
    groups = case.query.shape[1] // case.key.shape[1]
    rows, token = [], 0
    for sequence, (queries, keys) in enumerate(LENGTHS):
        pages = case.table[sequence, : -(-keys // PAGE)].long()
        key, value = (
            x[pages].flatten(0, 1)[:keys].to(dtype).repeat_interleave(groups, 1)
            for x in (case.key_pages, case.value_pages)
        )
        for seen in range(keys - queries + 1, keys + 1):
            query = case.query[0, :, token].to(dtype)
            scores = torch.einsum("hd,khd->hk", query, key[:seen]) * 0.3
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[token, :, None].to(dtype)], 1)
            rows.append(torch.einsum("hk,khd->hd", scores.softmax(1)[:, :seen], value[:seen]))
            token += 1
    return torch.stack(rows)[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_it_is_as_accurate_as_plain_torch(isa: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    inputs = case(shape, dtype)
    for softcap, sinks in ((0.0, None), (2.0, torch.randn(inputs.query.shape[2], shape[0]))):
        y = inputs.attend(softcap=softcap, sinks=sinks)
        assert y.is_contiguous()
        oracle = plain(inputs, torch.float64, softcap, sinks)
        assert_as_accurate(y, oracle, plain(inputs, torch.float32, softcap, sinks).to(dtype))


def test_new_keys_and_values_are_written_to_their_pages() -> None:
    inputs = case()
    before = inputs.key_pages.clone(), inputs.value_pages.clone()
    inputs.attend()
    token = 0
    for sequence, (queries, keys) in enumerate(LENGTHS):
        for place in range(keys - queries, keys):
            at = inputs.table[sequence, place // PAGE], place % PAGE
            for new, old, pages in zip((inputs.key, inputs.value), before, inputs[3:5], strict=True):
                assert torch.equal(pages[at], new[0, :, token])
                old[at] = pages[at]
            token += 1
    assert torch.equal(inputs.key_pages, before[0])
    assert torch.equal(inputs.value_pages, before[1])


def test_sequences_do_not_meet_and_no_query_sees_a_later_key(isa: str) -> None:
    inputs = case()
    clean = inputs.attend()
    inputs.key[:, :, 8] = inputs.value[:, :, 8] = float("nan")  # the fifth of the nine queries of the third sequence
    inputs.key_pages[inputs.table[3, 0], 0] = float("nan")  # the first key of the fourth
    spoilt = inputs.attend()
    row = torch.arange(clean.shape[1])
    reached = (row >= 8) & (row <= 13)
    assert spoilt[0, reached].isnan().all()
    assert torch.equal(spoilt[0, ~reached], clean[0, ~reached])


def test_a_query_has_the_same_bits_alone(isa: str) -> None:
    inputs = case((6, 2, 24, 24))
    whole = inputs.attend()
    for row, seen in ((9, 37), (12, 40), (13, 70)):
        sequence = 3 if row == 13 else 2
        one = inputs.attend(
            query=inputs.query[:, :, row : row + 1],
            key=inputs.key[:, :, row : row + 1],
            value=inputs.value[:, :, row : row + 1],
            table=inputs.table[sequence : sequence + 1],
            begins=torch.tensor([0, 1], dtype=torch.int32),
            key_begins=torch.tensor([0, seen], dtype=torch.int32),
        )
        assert torch.equal(one[0, 0], whole[0, row])


def test_scores_of_any_size() -> None:
    """The largest weighs most; a score of -inf, nothing."""
    inputs = case()
    inputs.query.mul_(1e3)
    assert inputs.attend().isfinite().all()
    torch.testing.assert_close(inputs.attend().double(), plain(inputs, torch.float64), rtol=1e-4, atol=1e-4)
    sinks = torch.full((inputs.query.shape[2], 4), -torch.inf)
    assert torch.equal(inputs.attend(sinks=sinks), inputs.attend())


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        ("table", 1000, r"table must be in \[0, 28\), got 1000"),
        ("table", -1, r"table must be in \[0, 28\), got -1"),
        ("begins", 2, "begins must be from 0 to 36, got 2 to 36"),
        ("key_begins", 2, "as many keys as queries at least, and pages for all of them, got 3 queries, 1 keys"),
        ("key_begins", -1000, "got 3 queries, 1003 keys and 12 pages of 6"),
    ],
)
def test_what_lies_outside_is_refused(name: str, number: int, message: str) -> None:
    wrong = getattr(case(), name).clone()
    wrong.view(-1)[0] = number
    with pytest.raises(IndexError, match=message):
        case().attend(**{name: wrong})


def test_other_shapes_and_dtypes_are_refused() -> None:
    inputs = case()
    for name, wrong in {
        "query": inputs.query.double(),
        "key": inputs.key[:, :1],
        "value_pages": inputs.value_pages.half(),
        "table": inputs.table.long(),
        "begins": inputs.begins[:-1],
    }.items():
        with pytest.raises(NotImplementedError, match="no kernel reads tensors"):
            inputs.attend(**{name: wrong})


# decode_attention

BATCH, ROOM = 3, 21


def step(
    shape: tuple[int, int, int, int] = (4, 2, 16, 16), dtype: torch.dtype = torch.float32, rows: int = BATCH
) -> list[Any]:
    """Arguments of a step. No query sees the last keys, and each sees some of the others; the last query sees none."""
    heads, key_heads, size, value_size = shape
    mask = torch.rand(rows, 1, 1, ROOM) < 0.7
    mask[..., 15:] = False
    mask[-1] = rows == 1
    query = torch.randn(BATCH, 1, heads, size).to(dtype).transpose(1, 2)
    key, value = (torch.randn(BATCH, key_heads, ROOM, n).to(dtype) for n in (size, value_size))
    return [query, key, value, mask, 0.3]


def plain_step(
    dtype: torch.dtype, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    heads = query.shape[1] // key.shape[1]
    query, key, value = query.to(dtype), *(x.to(dtype).repeat_interleave(heads, 1) for x in (key, value))
    scores = query @ key.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(3).nan_to_num(0) @ value).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_step_is_as_accurate_as_plain_torch(isa: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    for rows in (1, BATCH):
        *operands, mask, scale = step(shape, dtype, rows)
        for seen in (mask, None):
            y = decode_attention(*operands, seen, scale)
            oracle = plain_step(torch.float64, *operands, seen, scale)
            assert_as_accurate(y, oracle, plain_step(torch.float32, *operands, seen, scale).to(dtype))
            if dtype == torch.float32:
                with native.bypassed():  # torch's own attention
                    torch.testing.assert_close(decode_attention(*operands, seen, scale), y)


def test_keys_after_the_last_that_a_query_sees_are_not_read(isa: str) -> None:
    query, key, value, mask, scale = step()
    clean = decode_attention(query, key, value, mask, scale)
    key[..., 15:, :] = value[..., 15:, :] = float("nan")
    assert torch.equal(decode_attention(query, key, value, mask, scale), clean)
    key[0, :, 2] = float("nan")
    assert torch.equal(decode_attention(query, key, value, mask, scale)[1:], clean[1:])


def test_a_step_reads_strided_tensors_in_place(isa: str) -> None:
    query, key, value, mask, scale = step()
    wide = torch.cat([key, value], 3)
    views = query, wide[..., :16], wide[..., 16:], mask.expand(BATCH, 1, 1, ROOM), scale
    assert torch.equal(decode_attention(*views), decode_attention(query, key, value, mask, scale))


def test_tensors_with_gaps_are_read_as_far_as_others(isa: str) -> None:
    query, key, value, mask, scale = step()
    key[..., 15:, :] = value[..., 15:, :] = float("nan")
    expected = decode_attention(query, key, value, mask, scale)
    assert expected.isfinite().all()
    for at in range(4):
        operands = [query, key, value, mask]
        operands[at] = operands[at].repeat_interleave(2, -1)[..., ::2]
        assert torch.equal(decode_attention(*operands, scale), expected)
        assert decode_attention(*(each[:0] for each in operands), scale).shape == (0, 1, 4, 16)


def test_a_query_that_sees_no_key_gets_0_whatever_is_there(isa: str) -> None:
    query, key, value, mask, scale = step()
    for there in (float("nan"), float("inf")):
        y = decode_attention(query, torch.full_like(key, there), torch.full_like(value, there), mask & False, scale)
        assert torch.equal(y, torch.zeros_like(y))


def test_opcheck_of_a_step() -> None:
    torch.library.opcheck(torch.ops.dami.decode_attention, tuple(step()))
    torch.library.opcheck(torch.ops.dami.decode_attention, (*step()[:3], None, 0.3))


@pytest.mark.parametrize(
    ("at", "change", "error", "message"),
    [
        (0, lambda x: x.double(), TypeError, "query must be of float32, bfloat16 or float16, got torch.float64"),
        (0, lambda x: x[:, :, 0], ValueError, r"query must be \[batch, heads, 1, size\], got shape \[3, 4, 16\]"),
        (1, lambda x: x.half(), TypeError, "key must be torch.float32 on cpu, got torch.float16 on cpu"),
        (1, lambda x: x[:2], ValueError, r"key must be \[3, key heads, keys, size\], got shape \[2, 2, 21, 16\]"),
        (
            2,
            lambda x: x[:, :, 1:],
            ValueError,
            r"value must be \[3, key heads, keys, size\], got shape \[3, 2, 20, 16\]",
        ),
        (1, lambda x: x[..., 1:], ValueError, r"key must have the size of query, 16, got shape \[3, 2, 21, 15\]"),
        (
            0,
            lambda x: x[:, 1:],
            ValueError,
            r"key must have a number of heads that divides 3, got shape \[3, 2, 21, 16\]",
        ),
        (0, lambda x: x[:, :0], ValueError, r"query must have heads, got shape \[3, 0, 1, 16\]"),
        (1, lambda x: x.to("meta"), TypeError, "key must be torch.float32 on cpu, got torch.float32 on meta"),
        (3, lambda x: x.float(), TypeError, "mask must be torch.bool on cpu, got torch.float32 on cpu"),
        (3, lambda x: x[:2], ValueError, r"mask must be \[3 or 1, 1, 1, 21\], got shape \[2, 1, 1, 21\]"),
    ],
)
def test_a_step_says_what_is_wrong(at: int, change: Callable[[Tensor], Tensor], error: type, message: str) -> None:
    arguments = step()
    arguments[at] = change(arguments[at])
    with pytest.raises(error, match=message):
        decode_attention(*arguments)
