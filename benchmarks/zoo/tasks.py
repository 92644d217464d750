"""Questions of the zoo's pairs, in single characters, and worked solutions of them in four styles.

    word   +384=    start 3, then +8, then +4, in the task's own table: here the last digit of the sum
    fact   ?kqz=    two letters that have to be known by heart
    least  mdgba=   the first letter by the alphabet

A word is easy with a thought, step by step, and hopeless without one if it is long. A fact and the least letter need no
thought. The styles differ in how much of each step is written down:

    direct  5
    terse   <think>15</think>5
    full    <think>381 145</think>5
    double  <think>381 381 145 145</think>5
"""

from __future__ import annotations

import random
import string
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

STYLES = ("direct", "terse", "full", "double")
LEVELS = range(1, 6)  # steps of a word, letters of the others
FACTS = 192
SEEN, KNOWN, HELD_OUT = range(8, 16), range(4, 8), range(4)  # buckets: of training, of estimators, of measurements


@dataclass(frozen=True)
class Asked:
    """A question, its answer, and the steps that lead to it: state, move and new state."""

    task: str
    level: int
    prompt: str
    answer: str
    steps: tuple[str, ...]

    @property
    def bucket(self) -> int:
        """Which of 16 parts the question belongs to, always the same."""
        return zlib.crc32(self.prompt.encode()) % 16

    @property
    def by_heart(self) -> bool:
        """Whether training may see it although it is asked later: there are too few to hold any out."""
        return self.task in ("fact", "least") or self.level < 3


def _swapped(state: str, move: str) -> str:
    """Five cups and a ball under one of them: a to d swap two neighbours, e moves every cup on by one."""
    place, swap = int(state) - 1, "abcde".index(move)
    if swap == 4:
        return str((place + 1) % 5 + 1)
    return str({swap: swap + 1, swap + 1: swap}.get(place, place) + 1)


DIGITS, PRODUCTS = string.digits, "123456789a"  # a is 10


def _multiplied(state: str, move: str) -> str:
    """The product of two of the ten numbers, mod 11."""
    return PRODUCTS[(PRODUCTS.index(state) + 1) * (PRODUCTS.index(move) + 1) % 11 - 1]


WORDS = {  # task → its sign, its states, its moves, and the next state
    "sum": ("+", DIGITS, DIGITS, lambda state, move: str((int(state) + int(move)) % 10)),
    "product": ("*", PRODUCTS, PRODUCTS, _multiplied),
    "cups": ("w", "12345", "abcde", _swapped),
}


@cache
def facts_of(seed: int) -> dict[str, str]:
    """Returns what has to be known by heart: two letters for each of many names of three letters."""
    rng = random.Random(seed)
    names = rng.sample([a + b + c for a in "bcdfgkmn" for b in "aeiou" for c in "lmnprst"], FACTS)
    return {name: rng.choice("hjqtvwxyz") + rng.choice("hjqtvwxyz") for name in names}


def draw(task: str, rng: random.Random, seed: int) -> Asked:
    """Draws a question of a task, with the facts of a seed."""
    level = rng.choice(LEVELS)
    if task == "fact":
        facts = facts_of(seed)
        name = rng.choice(list(facts))
        return Asked(task, 1, f"?{name}=", facts[name], tuple(f"{name}{rng.choice(list(facts))}" for _ in range(3)))
    if task == "least":
        letters = rng.sample(string.ascii_lowercase, level + 1)
        steps = [min(letters[: i + 1]) + letters[i + 1] + min(letters[: i + 2]) for i in range(level)]
        return Asked(task, level, f"m{''.join(letters)}=", min(letters), tuple(steps))
    sign, states, moves, step = WORDS[task]
    state = start = rng.choice(states)
    said, steps = "", []
    for move in rng.choices(moves, k=level):
        new = step(state, move)
        steps.append(state + move + new)
        state, said = new, said + move
    return Asked(task, level, f"{sign}{start}{said}=", state, tuple(steps))


def draw_from(task: str, rng: random.Random, seed: int, buckets: Sequence[int], by_heart: bool = False) -> Asked:
    """Draws until a question is of one of the buckets, or, with `by_heart`, may be of any."""
    while True:
        asked = draw(task, rng, seed)
        if asked.bucket in buckets or (by_heart and asked.by_heart):
            return asked


def solved(asked: Asked, style: str) -> str:
    """Writes the answer in a style."""
    if style == "direct":
        return asked.answer
    steps = asked.steps
    if style == "terse":
        return f"<think>{''.join(step[-1] for step in steps)}</think>{asked.answer}"
    if style == "double":
        steps = tuple(step for step in steps for _ in range(2))
    return f"<think>{' '.join(steps)}</think>{asked.answer}"


def distinct(tasks: Sequence[str], count: int, rng: random.Random, seed: int, buckets: Sequence[int]) -> list[Asked]:
    """Draws about `count` different questions, evenly over tasks."""
    found: dict[str, Asked] = {}
    for task in tasks:
        drawn = (draw_from(task, rng, seed, buckets) for _ in range(20 * count))
        some = {asked.prompt: asked for asked in drawn}
        found |= dict(list(some.items())[: count // len(tasks)])
    return sorted(found.values(), key=lambda asked: asked.level)
