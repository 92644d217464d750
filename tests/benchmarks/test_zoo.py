"""The zoo's questions against plain arithmetic, and a pair trained for two steps."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import dami
import pytest
from dami.chat import ask
from dami.thoughts import Reader

from benchmarks.subjects import names, subject
from benchmarks.zoo import __main__ as zoo
from benchmarks.zoo.recipes import ANCESTORS, PAIRS
from benchmarks.zoo.tasks import HELD_OUT, KNOWN, SEEN, STYLES, Asked, distinct, draw, draw_from, facts_of, solved
from benchmarks.zoo.train import batches, tokenizer


def truth(asked: Asked) -> str:
    """The answer, computed from the prompt's text alone."""
    said = asked.prompt[1:-1]
    if asked.task == "sum":
        return str(sum(map(int, said)) % 10)
    if asked.task == "product":
        return "0123456789a"[math.prod(int(digit, 11) for digit in said) % 11]
    if asked.task == "least":
        return min(said)
    if asked.task == "fact":
        return facts_of(1)[said]
    cups = [place == int(said[0]) for place in range(1, 6)]
    for move in said[1:]:
        if move == "e":
            cups = cups[-1:] + cups[:-1]
        else:
            first = "abcd".index(move)
            cups[first], cups[first + 1] = cups[first + 1], cups[first]
    return str(cups.index(True) + 1)


@pytest.mark.parametrize("task", ["sum", "product", "cups", "least", "fact"])
def test_answers_are_right_in_every_style(task: str) -> None:
    rng, words = random.Random(0), tokenizer()
    for _ in range(50):
        asked = draw(task, rng, 1)
        assert asked.answer == truth(asked)
        for style in STYLES:
            text = solved(asked, style)
            ids = words(text, add_special_tokens=False).input_ids
            assert words.decode(ids) == text
            read = Reader.of(words).read(ids, finished=True)
            assert (read.answer, bool(read.thought)) == (asked.answer, style != "direct")
    assert asked.steps[-1][-1] == asked.answer or task == "fact"


def test_what_is_asked_was_not_trained_on() -> None:
    """But for what can only be known by heart."""
    rng = random.Random(0)
    seen = {draw_from("sum", rng, 1, SEEN, by_heart=True).prompt for _ in range(500)}
    held_out, known = (distinct(("sum", "cups"), 60, random.Random(1), 1, part) for part in (HELD_OUT, KNOWN))
    assert {asked.task for asked in held_out} == {"sum", "cups"}
    assert not {asked.prompt for asked in held_out} & {asked.prompt for asked in known}
    assert not {asked.prompt for asked in held_out if not asked.by_heart} & seen


def test_only_answers_are_learned() -> None:
    words = tokenizer()
    batch = next(batches(ANCESTORS["sums"], words, 0))
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        learned = words.decode(ids[labels != -100])
        prompt = words.decode(ids).split("<|assistant|>")[0].removeprefix("<|user|>")
        assert learned.endswith("<|end|>")
        assert prompt[0] in "+m?"
        assert "<|" not in learned.removesuffix("<|end|>")


def test_every_pair_has_its_ancestors() -> None:
    assert {each for pair in PAIRS.values() for each in (pair.ancestor, pair.other) if each} <= {*ANCESTORS}
    assert len(PAIRS) >= 6
    assert 2 <= sum(pair.tuned_on for pair in PAIRS.values()) < len(PAIRS) - 2
    for pair in PAIRS.values():
        assert pair.instruct.facts == ANCESTORS[pair.ancestor].facts
    assert {f"zoo/{name}" for name in PAIRS} < {*names()}


@pytest.mark.parametrize("name", ["adapter", "unrelated"])
def test_a_pair_is_made_once_and_loads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if PAIRS[name].rank:
        pytest.importorskip("peft")
    short = {key: replace(end, steps=2) for key, end in ANCESTORS.items()}
    monkeypatch.setattr(zoo, "ANCESTORS", short)
    pair = PAIRS[name]
    pair = replace(pair, instruct=replace(pair.instruct, steps=2), thinking=replace(pair.thinking, steps=2))
    zoo.make(name, pair, tmp_path)
    model, words = dami.load_pair(tmp_path / name / "instruct", tmp_path / name / "thinking")
    line = json.loads((tmp_path / name / "questions.jsonl").read_text().splitlines()[0])
    answers = ask(model, words, [line["question"]] * 2, [0.0, 1.0], max_new_tokens=3)
    assert [answer.intensity for answer in answers] == [0, 1]
    monkeypatch.setattr(zoo, "fit", lambda *_: pytest.fail("trained again"))
    zoo.make(name, pair, tmp_path)


def test_a_training_is_given_where_it_is_needed(tmp_path: Path) -> None:
    for name, training in (("zoo/sums", tmp_path), ("shipped", None)):
        with pytest.raises(ValueError, match="--training must be given for pairs outside the zoo only, got"):
            subject(name, training, tmp_path)
