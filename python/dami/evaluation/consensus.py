"""Compares answers to a prompt with each other: without labels, what most of them say counts as right."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dami.evaluation.verifiers import import_optional

if TYPE_CHECKING:
    from dami.evaluation.sweeps import Record

Comparable = Callable[[str], str]  # an answer's text → what two answers must share to say the same; "" for nothing

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def last_number_or_word(text: str) -> str:
    """Returns the last number of a text, or its last word, in small letters, if there is no number."""
    found = NUMBER.findall(re.sub(r"(?<=\d),(?=\d{3})", "", text)) or re.findall(r"\w+", text.lower())
    return found[-1] if found else ""


def whole_text(text: str) -> str:
    """Returns a text in small letters, with single spaces."""
    return " ".join(text.lower().split())


def mathematics(text: str) -> str:
    """Returns what math-verify reads in a text as its answer; of an equation, the right-hand side."""
    parsed = import_optional("math_verify").parse(text)
    return str(getattr(parsed[0], "rhs", parsed[0])) if parsed else ""


COMPARABLE: dict[str, Comparable] = {"word": last_number_or_word, "text": whole_text, "math": mathematics}


def check_comparable(compare: str) -> None:
    """Raises ValueError unless answers can be compared by this name."""
    if compare not in COMPARABLE:
        raise ValueError(f"compare must be one of {sorted(COMPARABLE)}, got {compare!r}")


def agreed(records: Sequence[Record], comparable: Comparable, voters: Collection[float]) -> list[Record]:
    """Scores every answer by what most answers to its prompt say: 1 if it says the same, otherwise 0.

    Each complete answer at one of the λ of `voters` has a vote. Of answers with equally many votes, the one that was
    given at greater λ on average counts: the thinking end is the better judge. If no two votes say the same, no answer
    to the prompt counts as right.

    Args:
        records: answers to prompts at several λ.
        comparable: what two answers must share to say the same.
        voters: λ.
    """
    said = [comparable(record.text) if record.well_formed else "" for record in records]
    votes: dict[int, dict[str, list[float]]] = {}
    for record, key in zip(records, said, strict=True):
        if key and record.intensity in voters:
            votes.setdefault(record.index, {}).setdefault(key, []).append(record.intensity)
    right = {}
    for index, lams in votes.items():
        key = max(lams, key=lambda key: (len(lams[key]), sum(lams[key]), key))
        if len(lams[key]) > 1:
            right[index] = key
    return [
        replace(record, score=float(key != "" and right.get(record.index) == key))
        for record, key in zip(records, said, strict=True)
    ]
