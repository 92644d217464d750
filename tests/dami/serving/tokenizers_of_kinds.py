"""Tokenizers of each way to spell text, and texts that are hard to cut."""

from __future__ import annotations

from functools import cache
from typing import Any

import dami
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

WORDS = ["a", "b ", "\n", "  ", "é", "日本", "🙂", "7", "\N{REPLACEMENT CHARACTER}"]
text = st.lists(st.sampled_from(WORDS), max_size=8).map("".join)


@cache
def byte_level() -> Any:
    return AutoTokenizer.from_pretrained(dami.example_pair()[0])


@cache
def byte_fallback() -> Any:
    """As SentencePiece makes them: pieces of characters with marks for spaces, and bytes for what is no piece."""
    return _pieces()


@cache
def stripping() -> Any:
    """The same, but for the first space of a text, as Llama 2 has it."""
    return _pieces(decoders.Strip(" ", 1, 0))


def _pieces(*last: Any) -> Any:
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", "</s>", *bytes_, "▁", "a", "b", "é", "▁a", "7"]
    model = models.BPE({piece: id_ for id_, piece in enumerate(pieces)}, [("▁", "a")], unk_token="<unk>")
    model.byte_fallback = True
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@cache
def in_python() -> Any:
    """Of bytes, without a fast backend."""
    return ByT5Tokenizer()


@cache
def cleans_up() -> Any:
    """Of words, whose texts transformers rewrites once they are decoded."""
    words = {"<unk>": 0, "do": 1, "not": 2, "n't": 3, ".": 4, "</s>": 5}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", clean_up_tokenization_spaces=True
    )
