"""Thoughts told apart from answers, on the token ids that a model generated.

Tags are found in the texts of the tokens, special ones included. So it does not matter whether a tag is one special
token or is spelled by several, nor whether a token holds more than the tag.

The rule, for tags in the order in which they come:

1. Outside a thought, a start tag opens one. A row is inside from the beginning if its prompt ends with a start tag.
2. An end tag closes the thought. If none is open, what stands between it and the tag before is a thought all the same:
   its start tag was left out, or it was closed too early and went on.
3. Inside a thought, another start tag is only dropped.
4. A thought that no end tag closes ends before the first `instead` of its tags, such as a call of a tool.
5. Else, if the row came to its end by itself and no tag but its prompt's opened the thought, it never took it up: all
   of it is the answer. That is what comes of a thinking template at a low λ.
6. Else it is all thought, and there is no answer.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

Kind = Literal["thought", "answer", "tag"]


@dataclass(frozen=True)
class Tags:
    """How the models of a family mark a thought.

    Attributes:
        start: opens it.
        ends: each closes it.
        instead: each ends it where no end tag follows, and belongs to the answer.
    """

    start: str
    ends: tuple[str, ...]
    instead: tuple[str, ...] = ()


FAMILIES = (
    Tags("<think>", ("</think>",), ("<tool_call>",)),  # Qwen3, DeepSeek-R1 and most others
    Tags("[THINK]", ("[/THINK]",)),  # Magistral
    Tags(
        "<|channel|>analysis<|message|>",
        ("<|end|><|start|>assistant<|channel|>final<|message|>", "<|channel|>final<|message|>"),
    ),  # gpt-oss
    Tags("<|START_THINKING|>", ("<|END_THINKING|>",)),  # Command A
    Tags("<seed:think>", ("</seed:think>",)),  # Seed-OSS
)


def tags_of(tokenizer: Any) -> Tags:
    """The tags of a tokenizer's family: those its chat template writes or its vocabulary has; else `<think>`."""
    templates = getattr(tokenizer, "chat_template", None) or ""
    text = "".join(templates.values()) if isinstance(templates, dict) else templates
    vocabulary = tokenizer.get_vocab()
    return next((tags for tags in FAMILIES if tags.start in vocabulary or tags.start in text), FAMILIES[0])


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of one kind.

    Attributes:
        kind: of what they say.
        ids: the tokens. One that holds a tag and more is counted to the tag, its other text to the neighbour.
        text: what they say, without special tokens.
    """

    kind: Kind
    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class ParsedRow:
    """What a row said.

    Attributes:
        segments: in order; together they hold every token.
        closed: whether it ends outside a thought.
    """

    segments: tuple[Segment, ...]
    closed: bool

    @property
    def thought(self) -> str:
        """All that was thought, without space at its ends."""
        return self._all("thought")

    @property
    def answer(self) -> str:
        """All that was said outside of thoughts, without space at its ends."""
        return self._all("answer")

    def _all(self, kind: Kind) -> str:
        texts = (segment.text.strip() for segment in self.segments if segment.kind == kind)
        return "\n".join(text for text in texts if text)


Reading = ParsedRow  # its old name


@dataclass(frozen=True)
class Reader:
    """Reads rows of token ids.

    Attributes:
        tokenizer: of the model that generated them.
        tags: of its family.
    """

    tokenizer: Any
    tags: Tags
    _texts: dict[int, str] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, tokenizer: Any) -> Reader:
        return cls(tokenizer, tags_of(tokenizer))

    def opens(self, prompt: str) -> bool:
        """Whether a prompt ends with a start tag, as that of some thinking templates does."""
        return prompt.rstrip().endswith(self.tags.start)

    def read(self, ids: Sequence[int], *, inside: bool = False, finished: bool = False) -> ParsedRow:
        """Splits generated tokens into thoughts, answers and tags, by the module's rule.

        Args:
            ids: of one row, up to its end token or as far as it has come.
            inside: whether its prompt ends inside a thought.
            finished: whether it came to its end by itself.
        """
        texts = [self.text(token) for token in ids]
        spans, closed = _spans("".join(texts), self.tags, inside, finished)
        return ParsedRow(tuple(self._segments(ids, texts, spans)), closed)

    def text(self, token: int) -> str:
        """A token's own text, special tokens and all."""
        if token not in self._texts:
            self._texts[token] = self.tokenizer.decode([token])
        return self._texts[token]

    def _segments(
        self, ids: Sequence[int], texts: Sequence[str], spans: Sequence[tuple[Kind, int, int]]
    ) -> Iterator[Segment]:
        """Gives the tokens to spans of the text; each to the tag that it holds a part of, or else to where it ends."""
        text = "".join(texts)
        ends = list(accumulate(map(len, texts)))
        starts = [end - len(piece) for end, piece in zip(ends, texts, strict=True)]
        first = 0
        for kind, begin, end in spans:
            last = len(ids) if end == len(text) else bisect_left(starts, end, lo=first)
            if kind != "tag" and last > first and ends[last - 1] > end:
                last -= 1  # a token that reaches into the next span
            whole = bisect_left(starts, begin, lo=first, hi=last)  # past one that reaches in from the span before
            said = ""
            if kind != "tag":
                edges = (starts[whole], ends[last - 1]) if last > whole else (end, end)
                said = self.tokenizer.decode(ids[whole:last], skip_special_tokens=True) if last > whole else ""
                said = text[begin : edges[0]] + said + text[edges[1] : end]
            yield Segment(kind, tuple(ids[first:last]), said)
            first = last


def _spans(text: str, tags: Tags, inside: bool, finished: bool) -> tuple[list[tuple[Kind, int, int]], bool]:
    """Kinds of all parts of a text, in order, and whether it ends outside a thought. Only the last may be empty."""
    spans: list[tuple[Kind, int, int]] = []
    given, begin = inside, 0
    longest_first = sorted((tags.start, *tags.ends), key=len, reverse=True)
    for tag in re.finditer("|".join(map(re.escape, longest_first)), text):
        starts = tag[0] == tags.start
        spans += [("thought" if inside or not starts else "answer", begin, tag.start()), ("tag", *tag.span())]
        inside, given, begin = starts, False, tag.end()
    closed = not inside
    rest = len(text)
    if inside and tags.instead:
        found = re.search("|".join(map(re.escape, tags.instead)), text[begin:])
        closed, rest = found is not None, begin + found.start() if found else rest
    if inside and not closed and given and finished:
        closed, rest = True, begin
    if inside:
        spans.append(("thought", begin, rest))
        begin = rest
    spans.append(("answer", begin, len(text)))
    return [span for span in spans if span[1] < span[2]] or spans[-1:], closed
