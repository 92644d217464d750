"""Bytes of single tokens put together are those of the text, whatever a tokenizer spells them with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from dami.generation.sampling import Logprobs
from dami.serving.detokenizing import Offsets
from dami.serving.engine import Token
from dami.serving.formatting import CompletionFormat
from dami.serving.token_bytes import TokenBytes
from hypothesis import given, settings
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.dami.serving.tokenizers_of_kinds import byte_fallback, byte_level, text


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@settings(max_examples=60, deadline=None)
@given(said=text)
def test_bytes_of_tokens_are_those_of_the_text(make: Any, said: str) -> None:
    tokenizer = make()
    token_bytes = TokenBytes(tokenizer)
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    assert b"".join(map(token_bytes, ids)) == said.encode()


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_texts_of_tokens(make: Any) -> None:
    tokenizer = make()
    token_bytes = TokenBytes(tokenizer)
    ids = tokenizer(" a🙂", add_special_tokens=False)["input_ids"]
    assert "".join(map(token_bytes.text, ids)) == " a" + "".join(
        f"bytes:\\x{byte}" for byte in ("f0", "9f", "99", "82")
    )
    assert token_bytes.text(tokenizer.eos_token_id) == tokenizer.eos_token


def test_a_tokenizer_that_spells_neither_is_asked() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "ab": 1, "<0x41>": 2}, "<unk>")), unk_token="<unk>"
    )
    token_bytes = TokenBytes(tokenizer)
    assert [token_bytes.text(id_) for id_ in range(3)] == ["<unk>", "ab", "<0x41>"]
    assert token_bytes(9) == b""


def test_tokens_of_one_text_do_not_hide_each_other() -> None:
    form = CompletionFormat("pair", TokenBytes(byte_fallback()))
    a, byte = byte_fallback().convert_tokens_to_ids(["a", "<0x61>"])
    token = Token(a, 0.0, Logprobs(-2.0, ((byte, -0.5), (a, -2.0), (0, float("nan")))))
    choice: Any = SimpleNamespace(offsets=Offsets(byte_fallback()))
    found = form.logprobs(choice, [token])
    assert found["tokens"] == ["a"]
    assert found["top_logprobs"] == [{"a": -2.0, f"token_id:{byte}": -0.5, "<unk>": -9999.0}]
