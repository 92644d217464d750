"""Converts single tokens to bytes and text, including tokens that are part of a character."""

from __future__ import annotations

import re
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

FALLBACK = re.compile("<0x([0-9A-F]{2})>")  # how character-based vocabularies spell single bytes


class TokenBytes:
    """The bytes of a tokenizer's tokens.

    Args:
        tokenizer: any tokenizer. If it neither spells bytes nor marks spaces, each token is decoded alone.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        decoder = repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))
        self._byte = {char: byte for byte, char in bytes_to_unicode().items()} if "ByteLevel" in decoder else {}
        self._space = "▁" if "▁" in decoder else None
        self._added = tokenizer.added_tokens_decoder

    def __call__(self, token: int) -> bytes:
        """Returns the bytes of a token, special or not."""
        spelled = self.tokenizer.convert_ids_to_tokens(token)
        if spelled is None or token in self._added:
            return self.tokenizer.decode([token]).encode()
        if self._byte.keys() >= set(spelled):
            return bytes(self._byte[char] for char in spelled)
        if self._space is None:
            return self.tokenizer.decode([token]).encode()
        byte = FALLBACK.fullmatch(spelled)
        return bytes.fromhex(byte[1]) if byte else spelled.replace(self._space, " ").encode()

    def text(self, token: int) -> str:
        r"""Returns a token's text, or for a part of a character OpenAI's notation: `bytes:\xf0\x9f`."""
        said = self(token)
        try:
            return said.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in said)
