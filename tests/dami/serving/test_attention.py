"""Packed attention against the plain formula, sequence by sequence."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from dami.generation import attention
from dami.generation.attention import one_pass, packed_attention
from dami.generation.rowwise import Rowwise
from torch import Tensor, nn

LENGTHS = [(3, 3), (1, 9), (4, 11), (1, 12), (1, 1), (6, 6), (1, 10)]  # queries and keys of each sequence


def begins(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def case(heads: int = 4, key_heads: int = 2, size: int = 8, value_size: int = 8) -> dict[str, Any]:
    queries, keys = [q for q, _ in LENGTHS], [k for _, k in LENGTHS]
    return {
        "query": torch.randn(1, heads, sum(queries), size),
        "key": torch.randn(1, key_heads, sum(keys), size),
        "value": torch.randn(1, key_heads, sum(keys), value_size),
        "cu_seq_lens_q": begins(queries),
        "cu_seq_lens_k": begins(keys),
    }


def reference(case: dict[str, Any], window: int | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """In float64, by the formula, query by query."""
    groups = case["query"].shape[1] // case["key"].shape[1]
    key, value = (case[name].double().repeat_interleave(groups, 1) for name in ("key", "value"))
    rows, q, k = [], 0, 0
    for queries, keys in LENGTHS:
        for i in range(queries):
            last = keys - queries + i
            first = 0 if window is None else max(0, last - window + 1)
            seen = slice(k + first, k + last + 1)
            scores = (case["query"][0, :, q + i : q + i + 1].double() * key[0, :, seen]).sum(-1) * 0.3
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks.double()[:, None]], 1)
            weights = scores.softmax(1)[:, : last - first + 1]
            rows.append((weights[..., None] * value[0, :, seen]).sum(1))
        q, k = q + queries, k + keys
    return torch.stack(rows)[None]


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (3, 1)])
def test_it_is_the_formula(
    invariant: bool, window: int | None, softcap: float | None, sink: bool, heads: tuple[int, int]
) -> None:
    inputs, sinks = case(*heads, value_size=6), torch.randn(heads[0]) if sink else None
    result, weights = packed_attention(
        nn.Module(), attention_mask=None, scaling=0.3, sliding_window=window, softcap=softcap, s_aux=sinks,
        invariant=invariant, **inputs,
    )  # fmt: skip
    assert weights is None
    assert result.is_contiguous()
    torch.testing.assert_close(result.double(), reference(inputs, window, softcap, sinks), rtol=1e-5, atol=1e-5)


def test_sequences_do_not_meet() -> None:
    inputs = case()
    clean, _ = packed_attention(nn.Module(), attention_mask=None, **inputs)
    for name, at in (("query", slice(3, 4)), ("key", slice(3, 12)), ("value", slice(3, 12))):  # the second sequence
        inputs[name][:, :, at] = float("nan")
    spoilt, _ = packed_attention(nn.Module(), attention_mask=None, **inputs)
    assert spoilt[0, 3].isnan().all()
    others = [row for row in range(clean.shape[1]) if row != 3]
    assert torch.equal(spoilt[0, others], clean[0, others])


def test_layers_of_one_pass_share_the_grouping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with one window and one cache; and a pass knows nothing of the one before, whose tensors it may reuse."""
    found, grouped = [], attention._grouped
    monkeypatch.setattr(attention, "_grouped", lambda *args: found.append(args[2]) or grouped(*args))
    inputs = case()

    def attend(window: int | None, **more: Any) -> Tensor:
        options = {"attention_mask": None, "scaling": 0.3, "sliding_window": window}
        return packed_attention(nn.Module(), **{**inputs, **options, **more})[0]

    with one_pass():
        for window in (None, 4, None, 4):
            wanted = reference(inputs, window, None, None)
            torch.testing.assert_close(attend(window).double(), wanted, rtol=1e-5, atol=1e-5)
        assert found == [None, 4]
        attend(None, cu_seq_lens_k=inputs["cu_seq_lens_k"].clone())  # another cache's
        assert found == [None, 4, None]
    inputs["cu_seq_lens_q"].copy_(begins([q for q, _ in reversed(LENGTHS)]))
    inputs["cu_seq_lens_k"].copy_(begins([k for _, k in reversed(LENGTHS)]))
    with one_pass():
        again = attend(None)
    assert torch.equal(again, attend(None))  # outside of a pass
    assert found == [None, 4, None, None, None]


def test_many_lengths_are_padded_to_less_than_twice_their_keys() -> None:
    lengths = [1, 90, 47, 3, 46, 23, 45, 2, 300, 22]
    groups = attention._grouped(begins([1] * 10), begins(lengths), None, False, torch.device("cpu"))
    sizes = [[int(seen.sum()) for seen in group.sees] for group in groups if group.sees is not None]
    assert sizes == [[300], [90, 47, 46], [45, 23], [22], [3, 2], [1]]
    assert [row for group in groups for row in torch.as_tensor(group.rows).tolist()] == [8, 1, 2, 4, 6, 5, 9, 3, 7, 0]


def test_invariant_rows_have_the_bits_of_decoding() -> None:
    """A prompt's rows, and the same rows one after another as steps of decoding."""
    query, key, value = torch.randn(1, 4, 33, 16), torch.randn(1, 2, 33, 16), torch.randn(1, 2, 33, 16)

    def attend(first: int, end: int) -> Tensor:
        return packed_attention(
            nn.Module(), query[:, :, first:end], key[:, :, :end], value[:, :, :end], None, invariant=True,
            cu_seq_lens_q=begins([end - first]), cu_seq_lens_k=begins([end]),
        )[0]  # fmt: skip

    assert torch.equal(attend(0, 33), torch.cat([attend(row, row + 1) for row in range(33)], 1))


@pytest.mark.parametrize("function", [nn.functional.silu, nn.functional.gelu, torch.tanh, torch.sigmoid, torch.exp])
def test_functions_of_numbers_are_the_same_wherever_a_row_stands(function: Any) -> None:
    x = 3 * torch.randn(1, 64, 41)
    with Rowwise():
        whole = function(x)
        for first, end in ((0, 1), (7, 8), (3, 30), (5, 64)):
            assert torch.equal(function(x[:, first:end]), whole[:, first:end])
    torch.testing.assert_close(whole, function(x))
