"""Pieces of a stream put together give what `dami.thoughts` reads in the whole."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import dami
import pytest
from dami.serving.deltas import Deltas, Part, Stop
from dami.thoughts import Reader
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(dami.example_pair()[0])


@cache
def reader() -> Reader:
    return Reader.of(tokenizer())


def ids_of(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def streamed(ids: list[int], inside: bool = False, finished: bool = True, stop: Any = ()) -> tuple[str, str]:
    deltas = Deltas(tokenizer(), reader(), inside, [*map(Stop, stop)])
    pieces = [deltas.push(token) for token in ids] + [deltas.finish(finished)]
    thought, answer = ("".join(part) for part in zip(*pieces, strict=True))
    assert (thought, answer) == (deltas.thought.text, deltas.answer.text)
    return thought, answer


words = st.sampled_from(
    [" a", "b ", "\n", " ", "<", "think", "<th", "ink>", "</", "é", "日本", "🙂", "7", "<tool_call>"]
)
text = st.lists(words, max_size=6).map("".join)
thoughts = st.tuples(text, text).map(lambda pair: f"<think>{pair[0]}</think>{pair[1]}")
rows = st.lists(st.one_of(text, thoughts), max_size=4).map("".join)


@settings(max_examples=150, deadline=None)
@given(rows, st.booleans(), st.booleans(), st.randoms())
def test_a_stream_says_what_the_whole_row_says(row: str, inside: bool, finished: bool, random: Any) -> None:
    """Wherever every end tag has a start tag before it, and however the text is cut into tokens."""
    ids = [id_ for piece in _cut(row, random) for id_ in ids_of(piece)]
    texts = "".join(reader().text(token) for token in ids)
    prefix, _, _ = texts.partition("</think>")
    if "</think>" in texts and not inside and "<think>" not in prefix:
        return
    said = reader().read(ids, inside=inside, finished=finished)
    if inside and not said.thought and said.answer:  # the thought was never taken up: it is known at the end only
        assert streamed(ids, inside, finished)[1] == said.answer
    elif re.search(r"<tool_call>.*</?think>", texts, re.DOTALL):  # it may turn out to stand in a thought
        assert streamed(ids, inside, finished)[1].endswith(said.answer[-1:])
    else:
        assert streamed(ids, inside, finished) == (said.thought, said.answer)


def _cut(row: str, random: Any) -> list[str]:
    places = sorted(random.sample(range(len(row) + 1), min(len(row), 3)))
    return [row[a:b] for a, b in zip([0, *places], [*places, len(row)], strict=True)]


def test_an_end_tag_alone_cannot_take_back_what_was_said() -> None:
    assert streamed(ids_of("so it is 7</think>7")) == ("", "so it is 7\n7")
    assert reader().read(ids_of("so it is 7</think>7"), finished=True).thought == "so it is 7"


def test_a_call_ends_a_thought_that_no_end_tag_closes() -> None:
    assert streamed(ids_of("<think>I need it.<tool_call>{}")) == ("I need it.", "<tool_call>{}")
    assert streamed(ids_of("I need it.<tool_call>{}"), inside=True) == ("I need it.", "<tool_call>{}")
    assert streamed(ids_of("<think>a<tool_call>b</think>c<")) == ("a", "<tool_call>b\nc<")


def test_a_thought_that_was_never_taken_up_becomes_the_answer_at_its_end() -> None:
    deltas = Deltas(tokenizer(), reader(), inside=True)
    pieces = [deltas.push(token) for token in ids_of("it is 7")]
    assert "".join(piece.thought for piece in pieces) == "it is 7"
    assert deltas.finish(finished=True) == ("", "it is 7")
    cut_off = Deltas(tokenizer(), reader(), inside=True)
    for token in ids_of("it is 7"):
        cut_off.push(token)
    assert cut_off.finish(finished=False) == ("", "")


def test_pieces_come_as_soon_as_they_are_sure() -> None:
    deltas = Deltas(tokenizer(), reader())
    said = [deltas.push(token) for token in ids_of("<think>ab</think>c<")]
    assert said[0] == ("", "")
    assert "".join(piece.thought for piece in said) == "ab"
    assert "".join(piece.answer for piece in said) == "c"
    assert deltas.finish(True) == ("", "<")


@pytest.mark.parametrize(
    ("row", "stop", "wanted"),
    [
        ("one two three", ["two"], ("", "one")),
        ("one two three", ["four", "e two"], ("", "on")),
        ("<think>one two</think>three", ["two"], ("one", "")),
        ("<think>one</think>two three", [" three"], ("one", "two")),
        ("<think>one</think>two", ["onetwo", "zzz"], ("one", "two")),
        ("one tw", ["two"], ("", "one tw")),
        ("one two", ["o", "one"], ("", "")),
        ("aab", ["ab"], ("", "a")),
        ("abababac", ["ababac"], ("", "ab")),
        ("one aab", ["aac", "ab", "b"], ("", "one a")),
        ("<think>one </think>a<think>two</think>b", ["one t"], ("one\ntwo", "a\nb")),
    ],
)
def test_stop_strings(row: str, stop: list[str], wanted: tuple[str, str]) -> None:
    assert streamed(ids_of(row), stop=stop) == wanted


@given(st.text("ab", min_size=1, max_size=6), st.text("ab", max_size=30), st.text("ab", max_size=30))
def test_a_stop_string_is_found_where_str_find_finds_it(string: str, first: str, second: str) -> None:
    part = Part([Stop(string)], strip=False)
    pieces = part.push(first), part.push(second), part.flush()
    text, found, _ = (first + second).partition(string)
    assert ("".join(pieces), part.stopped) == (text, bool(found))
    if string in first:
        assert pieces == (text, "", "")


def test_a_long_stop_string_costs_no_more_than_its_length_and_the_text_s() -> None:
    class Counted(Stop):
        steps = 0

        def after(self, matched: int, char: str) -> int:
            self.steps += 1
            return super().after(matched, char)

    stop = Counted("a" * 500 + "b")
    part = Part([stop], strip=False)
    for _ in range(200):
        part.push("a" * 5)
    assert stop.steps == 500 + 1000
    assert part.push("b") == ""
    assert part.stopped
    assert part.text == "a" * 500


def test_without_a_reader_text_stands_as_it_is() -> None:
    deltas = Deltas(tokenizer(), None, stops=[Stop("zz")])
    row = " <think>a b</think> z "
    answer = "".join(deltas.push(token).answer for token in ids_of(row)) + deltas.finish(True).answer
    assert answer == tokenizer().decode(ids_of(row), skip_special_tokens=True)
