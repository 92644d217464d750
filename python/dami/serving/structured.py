"""Answers that obey a grammar, token by token, by llguidance."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)
# as json.dumps writes it: free to add white space, weak models go on with that instead of their answer
SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def of_json(schema: dict[str, Any]) -> str:
    """Returns what stands for an object of JSON in llguidance's dialect of Lark."""
    return f"%json {json.dumps({**schema, 'x-guidance': SPACES})}"


class Grammars:
    """Compiles grammars for a tokenizer.

    Args:
        tokenizer: the pair's tokenizer.
        vocabulary: number of scores of a token.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        self._tokens: LLTokenizer | None = None

    def of(self, rules: str) -> Grammar:
        """Compiles rules in llguidance's dialect of Lark. It may take long, so call it outside the event loop.

        Raises:
            ValueError: llguidance is missing, or does not take this tokenizer or a JSON schema in the rules.
        """
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise ValueError("this server lacks llguidance, which it needs: pip install llguidance") from None
        if self._tokens is None:
            self._tokens = self._read_tokenizer()
        text = LLMatcher.grammar_from_lark(f"%llguidance {{}}\n{rules}")
        problem = LLMatcher.validate_grammar(text, self._tokens)
        if problem:
            raise ValueError(f"the JSON schema is not supported: {problem}")
        return Grammar(text, self._tokens, self.vocabulary)

    def _read_tokenizer(self) -> LLTokenizer:
        from llguidance.hf import from_tokenizer

        try:
            return from_tokenizer(self.tokenizer, n_vocab=self.vocabulary)
        except Exception as problem:  # it raises what it likes
            raise ValueError(f"llguidance does not take the model's tokenizer: {problem}") from problem


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar."""

    text: str
    tokens: LLTokenizer
    vocabulary: int

    def matcher(self) -> Matcher:
        from llguidance import LLMatcher

        return Matcher(LLMatcher(self.tokens, self.text), self.vocabulary)


class Matcher:
    """Follows one answer through a grammar. If it fails, which it logs, the answer may only end."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher, self.vocabulary = matcher, vocabulary

    def take(self, token: int) -> None:
        """Adds a token of the answer."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
        if self._matcher.is_error():
            logger.error("a grammar failed: %s", self._matcher.get_error())

    def allowed(self, ends: frozenset[int]) -> Tensor:
        """Returns which tokens may come next, bool [vocabulary]; those in `ends` if the answer may end here."""
        matcher, mask = self._matcher, torch.zeros(self.vocabulary, dtype=torch.bool)
        done = matcher.is_error() or matcher.is_stopped()
        if not done:
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            known = min(len(bits), self.vocabulary)
            mask[:known] = torch.from_numpy(bits[:known]).bool()
        mask[sorted(ends)] = done or matcher.is_accepting()
        return mask
