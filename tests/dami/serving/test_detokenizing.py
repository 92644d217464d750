"""Pieces of a row put together are its text, whatever decodes it; `DecodeStream` alone would not keep all of this."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from dami.serving.detokenizing import REPLACEMENT, Detokenizer, Offsets, PythonStream, fast_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream

from tests.dami.serving.tokenizers_of_kinds import byte_fallback, byte_level, cleans_up, in_python, stripping, text

KINDS = [byte_level, byte_fallback, stripping, in_python]


def ids_of(tokenizer: Any, said: str) -> list[int]:
    return tokenizer(said, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("make", KINDS)
def test_tokenizers_decodes_where_it_decodes_as_transformers_does(make: Any) -> None:
    detokenizer = Detokenizer(make())
    fast = make is not in_python
    assert isinstance(detokenizer.stream, DecodeStream if fast else PythonStream)
    assert (fast_backend(make()) is not None) == fast
    assert fast_backend(cleans_up()) is None


def test_texts_that_transformers_rewrites_come_as_it_writes_them() -> None:
    tokenizer = cleans_up()
    detokenizer, ids = Detokenizer(tokenizer), [1, 3, 2, 4]
    assert "".join(map(detokenizer.push, ids)) + detokenizer.rest() == tokenizer.decode(ids) == "don't not."


@pytest.mark.parametrize("make", KINDS)
@settings(max_examples=60, deadline=None)
@given(said=text, special=st.integers(0, 8))
def test_characters_come_whole_and_at_once(make: Any, said: str, special: int) -> None:
    """With a special token somewhere, which texts leave out and which must not change the spaces after it."""
    tokenizer = make()
    detokenizer, ids = Detokenizer(tokenizer), ids_of(tokenizer, said)
    ids.insert(special, tokenizer.eos_token_id)
    given_out, whole = "", ""
    for end, token in enumerate(ids, 1):
        given_out += detokenizer.push(token)
        decoded = tokenizer.decode(ids[:end], skip_special_tokens=True)
        whole = whole if decoded.endswith(REPLACEMENT) else decoded
        assert given_out == whole
    assert given_out + detokenizer.rest() == tokenizer.decode(ids, skip_special_tokens=True)
    assert detokenizer.rest() == ""


@pytest.mark.parametrize("make", [byte_level, byte_fallback, stripping])  # ByT5 leaves out what is no character
def test_what_is_no_character_comes_at_the_end_as_decoding_spells_it(make: Any) -> None:
    tokenizer = make()
    first = ids_of(tokenizer, "🙂")[0]
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(first), detokenizer.push(first)] == ["", ""]
    assert detokenizer.rest() == tokenizer.decode([first, first])
    assert detokenizer.rest() == ""
    assert "".join(map(detokenizer.push, ids_of(tokenizer, "7é"))) == "7é"  # and not the bytes once more


def test_bytes_that_are_no_text_after_all_stop_the_stream_and_not_us() -> None:
    """What DecodeStream alone cannot do: byte fallback rewrites a run of bytes, of which some have been given out."""
    tokenizer = byte_fallback()
    run = [*tokenizer.convert_tokens_to_ids(["<0x0F>", "<0x48>", "<0xF0>", "b"])]
    stream = DecodeStream(skip_special_tokens=True)
    assert [stream.step(tokenizer.backend_tokenizer, token) for token in run[:-1]] == ["\x0f", "H", None]
    with pytest.raises(Exception, match="Invalid prefix"):
        stream.step(tokenizer.backend_tokenizer, run[-1])
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in [*run, *ids_of(tokenizer, " a")]]
    assert pieces == ["\x0f", "H", "", REPLACEMENT + "b", " a"]


@pytest.mark.parametrize("make", KINDS)
def test_special_tokens_are_not_kept(make: Any) -> None:
    """However many come, a step decodes none of them."""
    detokenizer = Detokenizer(make())
    assert "".join(detokenizer.push(make().eos_token_id) for _ in range(1000)) == ""
    assert not detokenizer.held


def test_errors_of_decoding_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    detokenizer = Detokenizer(byte_level())
    monkeypatch.setattr(detokenizer, "backend", "no tokenizer")
    with pytest.raises(TypeError):
        detokenizer.push(ids_of(byte_level(), "7")[0])


@pytest.mark.parametrize("make", KINDS)
def test_no_sequence_of_tokens_stops_it_or_loses_a_token(make: Any) -> None:
    tokenizer = make()
    spelled = dict(enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))))
    readable = {token for token, piece in spelled.items() if tokenizer.decode([token]).isalnum() and piece[0] != "<"}
    for seed in range(200):
        random = Random(seed)
        ids = [
            random.randrange(259 if make is in_python else len(tokenizer) + 5) for _ in range(random.randrange(1, 30))
        ]
        detokenizer = Detokenizer(tokenizer)
        said = "".join(map(detokenizer.push, ids)) + detokenizer.rest()
        place = 0
        for token in ids:
            if token in readable:
                place = said.index(tokenizer.decode([token]), place) + 1


@pytest.mark.parametrize("make", KINDS)
@settings(max_examples=60, deadline=None)
@given(said=text)
def test_offsets_are_where_tokens_begin_in_the_text(make: Any, said: str) -> None:
    tokenizer = make()
    ids = ids_of(tokenizer, said)
    ids += [tokenizer.eos_token_id, *ids[-1:]]
    offsets = Offsets(tokenizer)
    whole = [0]
    for end in range(1, len(ids)):
        decoded = tokenizer.decode(ids[:end], skip_special_tokens=True)
        whole.append(whole[-1] if decoded.endswith(REPLACEMENT) else len(decoded))
    assert list(map(offsets.push, ids)) == whole
