"""The rule that tells thoughts from answers, on made-up tokens and on what the shipped pair says between its ends."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dami
import pytest
from dami.thoughts import FAMILIES, ParsedRow, Reader, Tags, ThoughtMeter, tags_of
from hypothesis import given
from hypothesis import strategies as st

THINK = FAMILIES[0]


class Pieces:
    """A tokenizer whose tokens are the pieces it is given; those in ⟨⟩ are special."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = list(pieces)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        said = (self.pieces[token] for token in ids)
        return "".join(piece for piece in said if not (skip_special_tokens and piece.startswith("⟨")))


def read(pieces: Sequence[str], tags: Tags = THINK, **state: bool) -> ParsedRow:
    ids = range(len(pieces))
    reading = Reader(Pieces(pieces), tags).read(ids, **state)
    assert [token for segment in reading.segments for token in segment.ids] == list(ids)
    return reading


@pytest.mark.parametrize(
    ("said", "thought", "answer", "closed"),
    [
        ("", "", "", True),
        ("73", "", "73", True),
        ("<think>|1 + 1| = 2|</think>|2", "1 + 1 = 2", "2", True),
        ("<think>|\n\n|</think>|\n\n|2", "", "2", True),
        ("1 + 1 = 2|</think>|2", "1 + 1 = 2", "2", True),  # rule 2: the start tag is missing
        ("<think>|a|</think>|b|</think>|2", "a\nb", "2", True),  # closed too early
        ("<think>|a|</think>|no|<think>|b|</think>|2", "a\nb", "no\n2", True),  # two thoughts
        ("<think>|a|<think>|b|</think>|2", "a\nb", "2", True),  # rule 3
        ("<think>|1 + 1 =", "1 + 1 =", "", False),  # rule 6
        ("<think>|a|</think>|2|<think>|b", "a\nb", "2", False),
        ("<think>|a|<tool_call>|f(2)", "a", "<tool_call>f(2)", True),  # rule 4
        ("<think>|a|<tool_call>|f(2)|</think>|2", "a<tool_call>f(2)", "2", True),  # an end tag does follow
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_the_rule(said: str, thought: str, answer: str, closed: bool, finished: bool) -> None:
    reading = read(said.split("|"), finished=finished)
    assert (reading.thought, reading.answer, reading.closed) == (thought, answer, closed)


@pytest.mark.parametrize(
    ("said", "finished", "thought", "answer"),
    [
        ("1 + 1|</think>|2", True, "1 + 1", "2"),
        ("1 + 1", False, "1 + 1", ""),
        ("2", True, "", "2"),  # rule 5
        ("<think>|1 + 1", True, "1 + 1", ""),  # it took the thought up
        ("a|<tool_call>|f(2)", True, "a", "<tool_call>f(2)"),
    ],
)
def test_a_prompt_that_opens_the_thought(said: str, finished: bool, thought: str, answer: str) -> None:
    reading = read(said.split("|"), inside=True, finished=finished)
    assert (reading.thought, reading.answer) == (thought, answer)


@pytest.mark.parametrize(
    "pieces",
    [
        ["<th", "ink>", "a", "</", "think", ">", "2"],
        ["<think>a", "</think>2"],
        ["<think>\n", "a", "\n</think>\n\n", "2"],
        ["<thi", "nk>a</th", "ink>2"],
        ["<think>a</think>2"],
        ["", "<think>", "", "a", "", "</think>", "", "2", ""],
    ],
    ids=repr,
)
def test_tags_may_be_split_over_tokens_and_share_them(pieces: list[str]) -> None:
    reading = read(pieces)
    assert (reading.thought, reading.answer) == ("a", "2")


def test_a_thought_without_a_tag_at_its_end_shares_a_token_with_the_answer() -> None:
    reading = read(["<think>", "a", "b<tool", "_call>c", "d"])
    assert (reading.thought, reading.answer) == ("ab", "<tool_call>cd")


def test_special_tokens_are_read_as_tags_and_never_shown() -> None:
    tags = Tags("⟨think⟩", ("⟨/think⟩",))
    reading = read(["⟨user⟩", "⟨think⟩", "a", "⟨/think⟩", "2", "⟨end⟩"], tags, finished=True)
    assert (reading.thought, reading.answer) == ("a", "2")


@pytest.mark.parametrize(
    ("said", "thought", "answer"),
    [
        ("[THINK]|a|[/THINK]|2", "a", "2"),
        ("<|channel|>;analysis;<|message|>;a;<|end|>;<|start|>;assistant;<|channel|>;final;<|message|>;2", "a", "2"),
        ("<|channel|>;final;<|message|>;2", "", "2"),
        ("<|channel|>;analysis;<|message|>;a", "a", ""),
    ],
)
def test_other_families(said: str, thought: str, answer: str) -> None:
    pieces = said.split(";" if ";" in said else "|")
    (tags,) = (family for family in FAMILIES if family.start[:6] == said[:6])
    reading = read(pieces, tags, finished=True)
    assert (reading.thought, reading.answer) == (thought, answer)


def test_tags_are_found_in_the_vocabulary_or_the_chat_template() -> None:
    def tokenizer(template: Any, *vocabulary: str) -> Any:
        return SimpleNamespace(chat_template=template, get_vocab=lambda: dict.fromkeys(vocabulary, 0))

    assert tags_of(tokenizer(None, "[THINK]")) == FAMILIES[1]
    assert tags_of(tokenizer("… <|channel|>analysis<|message|> …")) == FAMILIES[2]
    assert tags_of(tokenizer({"default": "…", "thinking": "… <|START_THINKING|>"})) == FAMILIES[3]
    assert tags_of(tokenizer(None, "hello")) == THINK


def test_a_prompt_opens_a_thought_only_at_its_end() -> None:
    reader = Reader(Pieces([]), THINK)
    assert reader.opens("<|assistant|><think>\n")
    assert not reader.opens("What does <think> mean?<|assistant|>")
    assert not reader.opens("<|assistant|><think>\n\n</think>\n\n")


TAGS = ("<think>", "</think>", "<th", "ink>", "</", "think", ">", ">\n", "<tool_call>", "k>a<")
PIECES = (*TAGS, "12", " ", "\n", "é", "")


@given(st.lists(st.sampled_from(PIECES), max_size=12), st.booleans(), st.booleans())
def test_nothing_is_lost(pieces: list[str], inside: bool, finished: bool) -> None:
    """Every token is in one segment, in order; and of the text all but the tags is in thoughts and answers."""
    reading = read(pieces, inside=inside, finished=finished)
    said = "".join(segment.text for segment in reading.segments)
    assert said == re.sub("</?think>", "", "".join(pieces))
    assert {segment.kind for segment in reading.segments} <= {"thought", "answer", "tag"}
    if not inside and "<think>" not in "".join(pieces) and "</think>" not in "".join(pieces):
        assert not reading.thought


def test_samples_of_the_transition_band() -> None:
    """What the shipped pair said at λ = 0.3 to 0.6, one row for each pattern of tags that came up, read by hand."""
    tokenizer = dami.load_pair(*dami.example_pair())[1]
    reader = Reader.of(tokenizer)
    lines = (Path(__file__).parent / "transition.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 10
    for sample in map(json.loads, lines):
        reading = reader.read(sample["ids"], finished=sample["finished"])
        assert (reading.thought, reading.answer) == (sample["thought"], sample["answer"]), tokenizer.decode(
            sample["ids"]
        )
        assert [token for segment in reading.segments for token in segment.ids] == sample["ids"]


@given(
    st.lists(
        st.sampled_from(["a", "<think>", "</think>", "<th", "ink>", "</th", "x</think>y", "<tool_call>", "b<think>"]),
        max_size=12,
    ),
    st.booleans(),
)
def test_a_meter_knows_where_a_row_stands_without_looking_ahead(pieces: list[str], inside: bool) -> None:
    reader = Reader(Pieces(pieces), THINK)
    meter, tokens = ThoughtMeter(reader, inside), 0
    for token in range(len(pieces)):
        tokens += meter.inside
        meter.push(token)
        so_far = "".join(pieces[: token + 1])
        tags = re.findall("</?think>|<tool_call>", so_far)
        assert meter.inside == (tags[-1] == "<think>" if tags else inside)
        assert meter.ended == ("</think>" in tags or any(a != "<tool_call>" == b for a, b in pairwise(tags, inside)))
        if "<tool_call>" not in tags:
            assert meter.inside != reader.read(range(token + 1), inside=inside).closed
    assert meter.tokens == tokens


def pairwise(tags: list[str], inside: bool) -> list[tuple[str, str]]:
    """Each tag with the one before it; before the first is a start tag if the prompt ends inside a thought."""
    return [
        (before, after)
        for before, after in zip(["<think>" if inside else "<tool_call>", *tags], tags, strict=False)
        if before != "</think>"
    ]


def test_where_a_text_ends() -> None:
    reader = Reader(Pieces([]), THINK)
    assert [reader.leaves_open(text) for text in ("", "a", "<think>a", "<think>a</think>", "a</think>b<think>")] == [
        False, False, True, False, True,
    ]  # fmt: skip
