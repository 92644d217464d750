"""Turns each new token into text of the row's thought or answer, while the row is still being generated.

It follows the rule of `dami.thoughts` as far as possible without looking ahead: text that has been emitted cannot be
taken back. At the end the row is parsed as a whole, and the rest of the answer is emitted. The result differs in one
case: if an end tag comes without a start tag, or after a call of a tool inside the thought, the answer begins with text
that turns out to be a thought.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from dami.serving.detokenizing import Detokenizer
from dami.thoughts import ParsedRow, Reader


class Delta(NamedTuple):
    """New text of a row's thought and of its answer."""

    thought: str = ""
    answer: str = ""


class Stop:
    """A stop string, matched in a stream of text by Knuth–Morris–Pratt: two steps per character on average."""

    def __init__(self, string: str) -> None:
        self.string = string
        self.borders = [0]  # for each prefix, the length of the longest shorter prefix that it ends with
        for char in string[1:]:
            self.borders.append(self.after(self.borders[-1], char))

    def after(self, matched: int, char: str) -> int:
        """Returns how many characters of the string match after `char`, given that `matched` (not all) did before."""
        while matched and self.string[matched] != char:
            matched = self.borders[matched - 1]
        return matched + (self.string[matched] == char)


class Part:
    """The text of a row's thought or answer, up to a stop string."""

    def __init__(self, stops: Sequence[Stop], strip: bool) -> None:
        self.stops, self.strip = stops, strip
        self.matched = [0] * len(stops)  # for each stop string, how many of its characters the text ends with
        self.text = ""  # all text emitted so far
        self.held = ""  # possibly the beginning of a stop string, or trailing space
        self.stopped = False
        self.fresh = True  # this segment has no text yet

    def new_segment(self) -> None:
        if self.strip:
            held, self.held, self.fresh = self.held.rstrip(), "", True
            self.matched = [0] * len(self.stops)
            self._hold(held)

    def push(self, text: str) -> str:
        """Adds text, and returns the text that can be emitted."""
        if self.strip and self.fresh:
            text = text.lstrip()
            if text and (self.text or self.held):
                text = "\n" + text
        if not text or self.stopped:
            return ""
        self.fresh = False
        begin = self._hold(text)
        if begin is not None:
            self.stopped, self.held = True, self.held[:begin]
            return self.flush()
        end = len(self.held) - max(self.matched, default=0)
        if self.strip:
            end = len(self.held[:end].rstrip())
        return self._give(end)

    def flush(self) -> str:
        """Emits the text held back, at the end."""
        return self._give(len(self.held.rstrip() if self.strip else self.held))

    def _hold(self, text: str) -> int | None:
        """Adds to the held text, and returns where in it the first stop string begins, or None if there is none."""
        begins, before = [], len(self.held)
        self.held += text
        for place, stop in enumerate(self.stops):
            matched = self.matched[place]
            for at, char in enumerate(text, before + 1):
                matched = stop.after(matched, char)
                if matched == len(stop.string):
                    begins.append(at - matched)
                    break
            self.matched[place] = matched
        return min(begins, default=None)

    def _give(self, end: int) -> str:
        given, self.held = self.held[:end], self.held[end:]
        self.text += given
        return given


class Deltas:
    """Turns the tokens of a row into text.

    Args:
        tokenizer: the model's tokenizer.
        reader: separates thoughts from answers; None if all text is answer, unchanged.
        inside: whether the prompt ends inside a thought.
        stops: the text ends before the first of these strings.
    """

    def __init__(self, tokenizer: Any, reader: Reader | None, inside: bool = False, stops: Sequence[Stop] = ()) -> None:
        self.tokenizer, self.reader = tokenizer, reader
        self.given_inside = self.inside = inside
        self.ids: list[int] = []
        self.thought, self.answer = (Part(stops, strip=reader is not None) for _ in range(2))
        self.detokenizer = Detokenizer(tokenizer)
        self.said: ParsedRow | None = None  # the whole row, parsed at its end
        self.held: list[tuple[int, str]] = []  # tokens that may be part of a tag, with their texts
        if reader is not None:
            tags = (reader.tags.start, *reader.tags.ends)
            self.tags = {False: tags, True: (*tags, *reader.tags.instead)}  # those that matter outside and inside

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self.thought.stopped or self.answer.stopped

    def push(self, token: int) -> Delta:
        """Adds a token, and returns the text that can be emitted."""
        self.ids.append(token)
        if self.reader is None:
            return Delta(answer=self.answer.push(self.detokenizer.push(token)))
        self.held.append((token, self.reader.text(token)))
        given = Delta()
        while self.held and not self.stopped:
            text = "".join(text for _, text in self.held)
            match = self._tag().search(text)
            if match is None:
                return _sum(given, self._give_tokens(len(text) - self._tag_prefix(text)))
            given = _sum(given, self._give_tokens(match.start()))
            given = _sum(given, self._change_side(match[0]))
        return given

    def finish(self, finished: bool) -> Delta:
        """Returns the remaining text at the end of the row.

        Args:
            finished: whether the row ended by itself.
        """
        if self.stopped:
            return Delta()
        if self.reader is None:
            rest = self.answer.push(self.detokenizer.rest())
            return Delta(answer=rest + self.answer.flush())
        said = self.said = self.reader.read(self.ids, inside=self.given_inside, finished=finished)
        if not said.answer.startswith(self.answer.text):  # an end tag without a start tag has made it a thought
            rest = self._give_tokens(sum(len(text) for _, text in self.held))
            rest = _sum(rest, self._give_text(self.detokenizer.rest()))
            return _sum(rest, Delta(self.thought.flush(), self.answer.flush()))
        return Delta(_complete(self.thought, said.thought), _complete(self.answer, said.answer))

    def _part(self) -> Part:
        return self.thought if self.inside else self.answer

    def _give_text(self, text: str) -> Delta:
        given = self._part().push(text)
        return Delta(thought=given) if self.inside else Delta(answer=given)

    def _give_tokens(self, length: int) -> Delta:
        """Emits the first `length` held characters. Keeps a token that extends past them, unless a tag begins there."""
        given, at = Delta(), 0
        while self.held and at + len(self.held[0][1]) <= length:
            token, text = self.held.pop(0)
            at += len(text)
            whole = token >= 0
            given = _sum(given, self._give_text(self.detokenizer.push(token) if whole else text))
        if at < length and self.held:
            match = self._tag().match("".join(text for _, text in self.held), length - at)
            if match is not None:  # the token holds text and the beginning of a tag
                token, text = self.held[0]
                given = _sum(given, self._give_text(self.detokenizer.rest() + text[: length - at]))
                self.held[0] = (-1, text[length - at :])
        return given

    def _change_side(self, tag: str) -> Delta:
        """Drops a tag from the beginning of the held text, and switches between thought and answer.

        A tag that ends a thought because it belongs to the answer is kept.
        """
        given = self._give_text(self.detokenizer.rest())
        self.detokenizer = Detokenizer(self.tokenizer)
        assert self.reader is not None
        left = 0 if tag in self.reader.tags.instead else len(tag)
        while left:
            _, text = self.held.pop(0)
            if len(text) > left:
                self.held.insert(0, (-1, text[left:]))
                break
            left -= len(text)
        self.inside = tag == self.reader.tags.start
        self._part().new_segment()
        return given

    def _tag_prefix(self, text: str) -> int:
        """Returns how many characters at the end of a text may be the beginning of a tag."""
        tags = self.tags[self.inside]
        return max((n for tag in tags for n in range(1, len(tag)) if text.endswith(tag[:n])), default=0)

    def _tag(self) -> re.Pattern[str]:
        """Returns what finds the next tag."""
        return pattern_of(self.tags[self.inside])


@cache
def pattern_of(tags: tuple[str, ...]) -> re.Pattern[str]:
    """Returns what finds one of these tags, the longest of those that begin at a place."""
    return re.compile("|".join(map(re.escape, sorted(tags, key=len, reverse=True))))


def _sum(first: Delta, second: Delta) -> Delta:
    return Delta(first.thought + second.thought, first.answer + second.answer)


def _complete(part: Part, whole: str) -> str:
    """Emits the rest of a part's whole text, if that begins with the text emitted so far."""
    if not whole.startswith(part.text):
        return ""
    rest, part.held, part.fresh, part.strip = whole[len(part.text) :], "", False, False
    part.matched = [0] * len(part.stops)
    return part.push(rest) + part.flush()
