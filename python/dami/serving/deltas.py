"""What each new token adds to a row's thought and answer, as text, while the row is still being generated.

It follows the rule of `dami.thoughts` as far as that can be done without looking ahead: what has been given out cannot
be taken back. At the end the row is read as a whole, and what the answer still lacks is given out then. So only where
an end tag comes without a start tag does the answer begin with what turns out to have been a thought.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from dami.serving.detokenizing import Detokenizer
from dami.thoughts import ParsedRow, Reader


class Delta(NamedTuple):
    """Text that came to a row's thought and to its answer."""

    thought: str = ""
    answer: str = ""


class Stop:
    """A string that ends a text, looked for while the text comes: by Knuth, Morris and Pratt, two steps a character."""

    def __init__(self, string: str) -> None:
        self.string = string
        self.borders = [0]  # of each beginning: the longest shorter one that it ends with
        for char in string[1:]:
            self.borders.append(self.after(self.borders[-1], char))

    def after(self, matched: int, char: str) -> int:
        """How much of the string a text ends with, that ended with `matched` of it, less than all, before `char`."""
        while matched and self.string[matched] != char:
            matched = self.borders[matched - 1]
        return matched + (self.string[matched] == char)


class Part:
    """The text of a row's thought, or of its answer, up to a stop string."""

    def __init__(self, stops: Sequence[Stop], strip: bool) -> None:
        self.stops, self.strip = stops, strip
        self.matched = [0] * len(stops)  # how much of each the text ends with
        self.text = ""  # all that was given out
        self.held = ""  # may be the beginning of a stop string, or space at the end
        self.stopped = False
        self.fresh = True  # nothing has come yet of this segment

    def new_segment(self) -> None:
        if self.strip:
            held, self.held, self.fresh = self.held.rstrip(), "", True
            self.matched = [0] * len(self.stops)
            self._hold(held)

    def push(self, text: str) -> str:
        """Takes text and returns what can be given out."""
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
        """What is held back, at the end."""
        return self._give(len(self.held.rstrip() if self.strip else self.held))

    def _hold(self, text: str) -> int | None:
        """Adds text to what is held, and tells where in it the first stop string begins, if one has come."""
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
        tokenizer: of the model.
        reader: tells thoughts from answers; None if all is answer, as it stands.
        inside: whether the prompt ends inside a thought.
        stops: before the first of these strings the row ends.
    """

    def __init__(self, tokenizer: Any, reader: Reader | None, inside: bool = False, stops: Sequence[Stop] = ()) -> None:
        self.tokenizer, self.reader = tokenizer, reader
        self.given_inside = self.inside = inside
        self.ids: list[int] = []
        self.thought, self.answer = (Part(stops, strip=reader is not None) for _ in range(2))
        self.detokenizer = Detokenizer(tokenizer)
        self.said: ParsedRow | None = None  # the whole row, at its end
        self.held: list[tuple[int, str]] = []  # tokens that may be part of a tag, with their texts
        if reader is not None:
            tags = sorted((reader.tags.start, *reader.tags.ends), key=len, reverse=True)
            self.tags, self.tag = tags, re.compile("|".join(map(re.escape, tags)))

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self.thought.stopped or self.answer.stopped

    def push(self, token: int) -> Delta:
        """What can be given out now that this token has come."""
        self.ids.append(token)
        if self.reader is None:
            return Delta(answer=self.answer.push(self.detokenizer.push(token)))
        self.held.append((token, self.reader.text(token)))
        given = Delta()
        while self.held and not self.stopped:
            text = "".join(text for _, text in self.held)
            match = self.tag.search(text)
            if match is None:
                return _sum(given, self._give_tokens(len(text) - self._tag_prefix(text)))
            given = _sum(given, self._give_tokens(match.start()))
            given = _sum(given, self._change_side(match[0]))
        return given

    def finish(self, finished: bool) -> Delta:
        """What is left at the end of the row.

        Args:
            finished: whether it came to its end by itself.
        """
        if self.stopped:
            return Delta()
        if self.reader is None:
            rest = self.answer.push(self.detokenizer.rest())
            return Delta(answer=rest + self.answer.flush())
        said = self.said = self.reader.read(self.ids, inside=self.given_inside, finished=finished)
        if not said.answer.startswith(self.answer.text):  # an end tag alone has made a thought of it
            return Delta(self.thought.flush(), self.answer.flush())
        return Delta(_complete(self.thought, said.thought), _complete(self.answer, said.answer))

    def _part(self) -> Part:
        return self.thought if self.inside else self.answer

    def _give_text(self, text: str) -> Delta:
        given = self._part().push(text)
        return Delta(thought=given) if self.inside else Delta(answer=given)

    def _give_tokens(self, length: int) -> Delta:
        """Gives out the first `length` characters of what is held, but for a token that goes on and holds no tag."""
        given, at = Delta(), 0
        while self.held and at + len(self.held[0][1]) <= length:
            token, text = self.held.pop(0)
            at += len(text)
            whole = token >= 0
            given = _sum(given, self._give_text(self.detokenizer.push(token) if whole else text))
        if at < length and self.held:
            match = self.tag.match("".join(text for _, text in self.held), length - at)
            if match is not None:  # it holds text and the beginning of a tag
                token, text = self.held[0]
                given = _sum(given, self._give_text(self.detokenizer.rest() + text[: length - at]))
                self.held[0] = (-1, text[length - at :])
        return given

    def _change_side(self, tag: str) -> Delta:
        """Drops a tag from the beginning of what is held, and goes on on its other side."""
        given = self._give_text(self.detokenizer.rest())
        self.detokenizer = Detokenizer(self.tokenizer)
        left = len(tag)
        while left:
            _, text = self.held.pop(0)
            if len(text) > left:
                self.held.insert(0, (-1, text[left:]))
                break
            left -= len(text)
        assert self.reader is not None
        self.inside = tag == self.reader.tags.start
        self._part().new_segment()
        return given

    def _tag_prefix(self, text: str) -> int:
        """How many characters at the end of a text may be the beginning of a tag."""
        return max((n for tag in self.tags for n in range(1, len(tag)) if text.endswith(tag[:n])), default=0)


def _sum(first: Delta, second: Delta) -> Delta:
    return Delta(first.thought + second.thought, first.answer + second.answer)


def _complete(part: Part, whole: str) -> str:
    """What a part still lacks of its whole text, if that begins with what was given out."""
    if not whole.startswith(part.text):
        return ""
    rest, part.held, part.fresh, part.strip = whole[len(part.text) :], "", False, False
    part.matched = [0] * len(part.stops)
    return part.push(rest) + part.flush()
