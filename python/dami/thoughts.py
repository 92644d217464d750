"""Separates thoughts from answers, given the token ids that a model generated.

Tags are found in the texts of the tokens, including special tokens. It therefore does not matter whether a tag is one
special token or several tokens, nor whether a token contains more than the tag.

The rules, applied to tags in the order in which they appear:

1. Outside a thought, a start tag opens one. A row begins inside a thought if its prompt ends with a start tag.
2. An end tag closes the thought. If none is open, the text between it and the previous tag is a thought nevertheless:
   its start tag was left out, or it was closed too early and went on.
3. Inside a thought, another start tag is ignored.
4. A thought that no end tag closes ends before the first `instead` of its tags, such as a call of a tool.
5. Otherwise, if the row ended by itself and only its prompt opened the thought, the model never began to think, and
   all of the text is the answer. Thinking templates give such rows at a low λ.
6. Otherwise all of the text is a thought, and there is no answer.
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
        start: the tag that opens a thought.
        ends: tags, each of which closes it.
        instead: tags, each of which ends a thought that no end tag closes; they belong to the answer.
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
    """The tags of a tokenizer's family, which its chat template or vocabulary contains; otherwise `<think>`."""
    templates = getattr(tokenizer, "chat_template", None) or ""
    text = "".join(templates.values()) if isinstance(templates, dict) else templates
    vocabulary = tokenizer.get_vocab()
    return next((tags for tags in FAMILIES if tags.start in vocabulary or tags.start in text), FAMILIES[0])


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of one kind.

    Attributes:
        kind: whether they are a thought, an answer or a tag.
        ids: the tokens. One that contains a tag and more counts as the tag; its other text goes to the neighbour.
        text: their text, without special tokens.
    """

    kind: Kind
    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class ParsedRow:
    """The segments of a row.

    Attributes:
        segments: in order; together they hold every token.
        closed: whether the row ends outside a thought.
    """

    segments: tuple[Segment, ...]
    closed: bool

    @property
    def thought(self) -> str:
        """The text of all thoughts, stripped."""
        return self._all("thought")

    @property
    def answer(self) -> str:
        """The text outside of thoughts, stripped."""
        return self._all("answer")

    def _all(self, kind: Kind) -> str:
        texts = (segment.text.strip() for segment in self.segments if segment.kind == kind)
        return "\n".join(text for text in texts if text)


Reading = ParsedRow  # its old name


@dataclass(frozen=True)
class Reader:
    """Reads rows of token ids.

    Attributes:
        tokenizer: the tokenizer of the model that generated them.
        tags: the tags of its family.
    """

    tokenizer: Any
    tags: Tags
    _texts: dict[int, str] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, tokenizer: Any) -> Reader:
        """A reader of what a tokenizer decodes, with the tags of the tokenizer's family."""
        return cls(tokenizer, tags_of(tokenizer))

    def opens(self, prompt: str) -> bool:
        """Whether a prompt ends with a start tag, as some thinking templates do."""
        return prompt.rstrip().endswith(self.tags.start)

    def leaves_open(self, text: str) -> bool:
        """Whether a text ends inside a thought."""
        return not _spans(text, self.tags, False, False)[1]

    def read(self, ids: Sequence[int], *, inside: bool = False, finished: bool = False) -> ParsedRow:
        """Splits generated tokens into thoughts, answers and tags, by the module's rules.

        Args:
            ids: tokens of one row, up to its end token or as far as it has been generated.
            inside: whether its prompt ends inside a thought.
            finished: whether the row ended by itself.
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


class ThoughtMeter:
    """Follows a row while it is generated: whether it is inside a thought, and how long its thoughts are.

    It applies the module's rules without looking ahead: a tag of `instead` ends a thought as soon as it comes.

    Args:
        reader: gives the tags, and the texts of tokens.
        inside: whether the prompt ends inside a thought.

    Attributes:
        inside: whether the next token belongs to a thought.
        ended: whether a thought has ended.
        tokens: number of tokens that came while the row was inside a thought, end tags included.
    """

    def __init__(self, reader: Reader, inside: bool = False) -> None:
        self.inside, self.ended, self.tokens = inside, False, 0
        self._reader, self._tail = reader, ""
        tags = sorted((reader.tags.start, *reader.tags.ends, *reader.tags.instead), key=len, reverse=True)
        self._tag, self._most = re.compile("|".join(map(re.escape, tags))), len(tags[0]) - 1

    def push(self, token: int) -> None:
        """Adds a token."""
        self.tokens += self.inside
        text, end = self._tail + self._reader.text(token), 0
        for tag in self._tag.finditer(text):
            opens, end = tag[0] == self._reader.tags.start, tag.end()
            self.ended |= (self.inside and not opens) or tag[0] in self._reader.tags.ends
            self.inside = opens
        self._tail = text[max(end, len(text) - self._most) :]


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
