"""What answers say of each other."""

from __future__ import annotations

import pytest
from dami.evaluation.consensus import COMPARABLE, agreed, check_comparable, last_number_or_word, whole_text
from dami.evaluation.sweeps import Record


def record(index: int, lam: float, text: str, finished: bool = True) -> Record:
    return Record("prompts", index, 0, lam, 0, 0.0, 5, "", text, finished)


def scores(*answers: Record, voters: tuple[float, ...] = (0.0, 0.5, 1.0)) -> list[float]:
    return [each.score for each in agreed(answers, last_number_or_word, voters)]


def test_most_votes_are_right() -> None:
    told = [
        record(0, 0.0, "7"),
        record(0, 0.5, "It is 8."),
        record(0, 1.0, "8"),
        record(1, 0.0, "7"),
        record(1, 1.0, "7"),
    ]
    assert scores(*told) == [0, 1, 1, 1, 1]


def test_of_equally_frequent_answers_the_thinking_ends_counts() -> None:
    told = [record(0, lam, text) for lam, text in ((0.0, "7"), (0.0, "7"), (1.0, "8"), (1.0, "8"))]
    assert scores(*told) == [0, 0, 1, 1]
    assert scores(*told[::-1]) == [1, 1, 0, 0]


def test_answers_that_all_differ_are_not_right() -> None:
    assert scores(record(0, 0.0, "7"), record(0, 0.5, "8"), record(0, 1.0, "9")) == [0, 0, 0]


def test_what_is_cut_or_empty_or_at_another_lam_has_no_vote() -> None:
    told = [record(0, 0.0, "7"), record(0, 0.0, "7"), *(record(0, 1.0, "8", finished=False) for _ in range(3))]
    assert scores(*told) == [1, 1, 0, 0, 0]
    assert scores(record(0, 0.0, ""), record(0, 1.0, "")) == [0, 0]
    told = [record(0, 0.0, "7"), record(0, 0.0, "7"), *(record(0, 0.5, "8") for _ in range(3))]
    assert scores(*told, voters=(0.0, 1.0)) == [1, 1, 0, 0, 0]
    assert scores(record(0, 0.0, "7"), record(0, 0.0, "7"), record(0, 0.5, "7"), voters=(0.0,)) == [1, 1, 1]


@pytest.mark.parametrize(
    ("text", "key"),
    [("The sum is 1,234.", "1234"), ("-3.50 degrees", "-3.50"), ("It is Paris!", "paris"), ("...", ""), ("", ""),
     ("12, then 13", "13")],
)  # fmt: skip
def test_the_last_number_or_word(text: str, key: str) -> None:
    assert last_number_or_word(text) == key


def test_whole_texts_and_mathematics() -> None:
    assert whole_text(" To  be\nor NOT ") == "to be or not"
    assert COMPARABLE["math"](r"so $x = \frac{1}{2}$") == COMPARABLE["math"](r"\boxed{0.5}")
    with pytest.raises(ValueError, match=r"compare must be one of \['math', 'text', 'word'\], got 'letters'"):
        check_comparable("letters")
