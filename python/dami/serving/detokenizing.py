"""Decodes a row's tokens as they arrive, and finds where in the text each of them begins.

`tokenizers.decoders.DecodeStream` does most of the work. This module adds two things. It returns the text that the
stream holds back. And it recovers where the stream raises because a tokenizer rewrites text already emitted, as byte
fallback does when a run of bytes turns out not to be UTF-8.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer, models
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # ends a text whose last character is incomplete


class Detokenizer:
    """Decodes a stream of tokens in whole characters, without special tokens.

    Args:
        tokenizer: any tokenizer. If `tokenizers` alone does not decode as it does, a `PythonStream` does the work.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.backend, self.special = fast_backend(tokenizer), special_ids(tokenizer)
        self.held: list[int] = []  # tokens whose text has not been emitted
        self._begin()

    def push(self, token: int) -> str:
        """Adds a token, and returns the text that it completes."""
        if token in self.special:  # a stream would keep it, and decode all that it keeps at each step
            return ""
        self.held.append(token)
        try:
            text = self.stream.step(self.backend or self.tokenizer, token)
        except Exception as error:  # `step` raises nothing more specific
            if "Invalid prefix" not in str(error):
                raise
            return self.rest()
        if text is None:
            return ""
        self.held.clear()
        return text

    def rest(self) -> str:
        """Returns the text held back, even if its last character is incomplete."""
        text = self.tokenizer.decode(self.held, skip_special_tokens=True) if self.held else ""
        if not text:
            return ""
        self._begin(() if text.endswith(REPLACEMENT) else self.held)  # else the stream would emit it again
        self.held.clear()
        return text

    def _begin(self, before: Sequence[int] = ()) -> None:
        """Starts a stream after tokens whose text has been emitted; spaces depend on them."""
        kind = PythonStream if self.backend is None else DecodeStream
        self.stream = kind(ids=list(before), skip_special_tokens=True)


class PythonStream:
    """`DecodeStream` for tokenizers that decode in Python: each step decodes the last few tokens, twice."""

    def __init__(self, ids: list[int], skip_special_tokens: bool) -> None:
        self.ids, self.given, self.skip_special_tokens = ids, len(ids), skip_special_tokens

    def step(self, tokenizer: Any, token: int) -> str | None:
        before = self._decode(tokenizer, self.ids[: self.given])
        self.ids.append(token)
        text = self._decode(tokenizer, self.ids)
        if len(text) <= len(before) or text.endswith(REPLACEMENT):
            return None
        self.ids = self.ids[self.given :]
        self.given = len(self.ids)
        return text[len(before) :]

    def _decode(self, tokenizer: Any, ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=self.skip_special_tokens) if ids else ""


def fast_backend(tokenizer: Any) -> Tokenizer | None:
    """Returns the `tokenizers` tokenizer that decodes like this one of transformers, or None if there is none."""
    if getattr(type(tokenizer), "_decode", None) is not PreTrainedTokenizerFast._decode:
        return None
    backend = tokenizer.backend_tokenizer
    cleans_up = tokenizer.clean_up_tokenization_spaces and (
        not isinstance(backend.model, models.BPE)
        or tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    )
    return None if cleans_up else backend


@lru_cache(maxsize=8)
def special_ids(tokenizer: Any) -> frozenset[int]:
    """Returns the ids that decoding without special tokens leaves out."""
    backend = fast_backend(tokenizer)
    if backend is None:
        return frozenset(tokenizer.all_special_ids)
    return frozenset(token for token, added in backend.get_added_tokens_decoder().items() if added.special)


class Offsets:
    """Computes where tokens begin in their text, in characters.

    Args:
        tokenizer: as for `Detokenizer`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.detokenizer, self.length = Detokenizer(tokenizer), 0

    def push(self, token: int) -> int:
        """Adds a token, and returns how many characters were complete before it."""
        before = self.length
        self.length += len(self.detokenizer.push(token))
        return before
