"""Questions to ask a server that serves the shipped pair."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import dami


@dataclass(frozen=True)
class Question:
    """A question of the shipped pair. Only exactly `answer` is right."""

    text: str
    answer: str


def questions(count: int, seed: int = 0) -> list[Question]:
    """Returns held-out questions of the shipped pair, with all tasks and levels in random order."""
    lines = (Path(dami.__file__).parent / "data" / "pair" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    records = random.Random(seed).sample([json.loads(line) for line in lines], count)
    return [Question(record["question"], record["answer"]) for record in records]
