"""Searches λ of prompt, thought and answer, and of parts of the model, for the ways to answer that are worth most.

The search halves successively: all ways answer few questions, and the better half goes on to as many more again. A way
is as good as it is at the price of tokens that suits it best, so a cheap way and an accurate one both survive. What is
left answers questions that had no part in the search, together with single λ for everything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dami.dial.patch import patch_of
from dami.estimators.files import StoredIntensity
from dami.evaluation.frontier import Frontier, Point, hull_at
from dami.evaluation.plots import Reached, draw_frontier
from dami.evaluation.presets import presets_of
from dami.evaluation.statistics import Array, Interval
from dami.evaluation.style import panels, save, styled
from dami.evaluation.sweeps import Record
from dami.evaluation.tails import PRICES
from dami.evaluation.tasks import TO_TUNE, Task, check_distinct, check_enough
from dami.evaluation.ways import Way, answer_in
from dami.files import write_text

INTENSITIES = (0.0, 0.25, 0.5, 0.75, 1.0)
TUNED = "tuned.json"


@dataclass(frozen=True)
class Finalist:
    """A way to answer, scored on questions held out from the search; `gain` is over single λ of as many tokens."""

    way: Way
    accuracy: Interval
    tokens: Interval
    gain: Interval


@dataclass(frozen=True)
class Tuned:
    """What a search has found.

    Attributes:
        finalists: the ways left at the end and one for every single λ, on the held-out questions.
        presets: the cheapest of them with 50, 80 and 95 % of the accuracy that thinking adds, chosen on the questions
            of the search: "low", "medium" and "high".
        searched: numbers of ways and questions of each round.
        held_out: number of held-out questions.
    """

    finalists: Sequence[Finalist]
    presets: Mapping[str, Way]
    searched: Sequence[tuple[int, int]]
    held_out: int

    def save(self, directory: Path) -> None:
        """Writes `tuned.json`."""
        write_text(directory / TUNED, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> Tuned:
        """Reads what `save` wrote."""
        found = json.loads((Path(directory) / TUNED).read_text(encoding="utf-8"))
        finalists = [
            Finalist(_way(each["way"]), *(Interval(*each[name]) for name in ("accuracy", "tokens", "gain")))
            for each in found["finalists"]
        ]
        presets = {name: _way(way) for name, way in found["presets"].items()}
        return cls(finalists, presets, [tuple(each) for each in found["searched"]], found["held_out"])


def _way(fields: Mapping[str, Any]) -> Way:
    return Way(**{**fields, "parts": tuple((part, lam) for part, lam in fields["parts"])})


def space(intensities: Sequence[float], parts: Sequence[str] = (), tail: int | str = 1) -> list[Way]:
    """Returns all ways over some λ: those with one λ for everything first."""
    others: list[float | None] = [None, *intensities]
    ways = [
        Way(thought, answer, prompt, tail, tuple((part, lam) for part, lam in zip(parts, own) if lam is not None))  # noqa: B905
        for thought in intensities
        for answer, prompt, *own in product(others, others, *[others] * len(parts))
        if thought not in (answer, prompt, *own)
    ]
    return sorted(ways, key=lambda way: not way.is_static)


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    directory: str | Path,
    intensities: Sequence[float] = INTENSITIES,
    *,
    parts: Sequence[str] = (),
    tail: int | str = 1,
    candidates: int = 48,
    finalists: int = 6,
    first: int = 8,
    held_out: float = 0.5,
    rows: int = 64,
    seed: int = 0,
    on_batch: Callable[[list[Record]], None] = lambda records: None,
    **options: Any,
) -> Tuned:
    """Searches the ways to answer a task's questions, and saves what it finds to a directory.

    Every batch of answers is saved there too, and an interrupted search goes on where it ended. Among the files are
    `tuned.json`, `tuned.svg` and `tuned.png`, and presets of single λ for `dami.attach(model, directory)`.

    Args:
        model, tokenizer: a patched model and its tokenizer.
        task: questions and verifier, at least 16 questions.
        directory: created if missing.
        intensities: distinct λ to combine.
        parts: groups or patterns of modules whose λ in thought and answer may differ from the rest.
        tail: `prompt_tail` of the ways whose prompt has a λ of its own.
        candidates: number of ways at the start; if there are more, these are drawn, besides those of one λ.
        finalists: number of ways at the end.
        first: number of questions in the first round; the questions double from round to round.
        held_out: share of the questions that only the finalists answer.
        rows, seed, on_batch, options: as in `dami.evaluation.ways.answer_in`.

    Raises:
        ValueError: an argument is wrong, which the message names; or as in `answer_in`.
    """
    check_enough(task, TO_TUNE)
    check_distinct(intensities)
    for name, count in (("candidates", candidates), ("finalists", finalists), ("first", first)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    order = np.random.default_rng(seed).permutation(len(task.questions)).tolist()
    kept = round(held_out * len(order))
    if not 0 < kept < len(order):
        raise ValueError(f"held_out must leave questions on either side, got {held_out} of {len(order)}")
    asked, directory = order[kept:], Path(directory)
    ways = dict(enumerate(_drawn(space(intensities, parts, tail), candidates, seed)))
    how = {"rows": rows, "seed": seed, "on_batch": on_batch, **options}

    def answers(some: Mapping[int, Way], questions: Sequence[int], name: str) -> list[Record]:
        return answer_in(model, tokenizer, task, some, questions, directory / f"{name}.jsonl", **how)

    known, searched = _searched(ways, asked, finalists, first, answers)
    static = [number for number, way in ways.items() if way.is_static]
    best = [int(number) for number in known.intensities]
    final = {number: ways[number] for number in sorted({*static, *best})}
    scored = Frontier.of(answers(final, order[:kept], "held-out"), seed)
    found = Tuned(
        _scored(scored, ways),
        {name: ways[int(number)] for name, number in presets_of(known).items()},
        searched,
        kept,
    )
    found.save(directory)
    _save_presets(model, scored, ways, directory)
    figure = tuned_figure(found.finalists, f"{task.name}: {kept} questions held out, 95 % intervals")
    for suffix in ("png", "svg"):
        save(figure, directory / f"tuned.{suffix}")
    return found


def _drawn(ways: Sequence[Way], count: int, seed: int) -> list[Way]:
    """Returns as many of the ways: all of one λ, and others at random, in the order given."""
    static = sum(way.is_static for way in ways)
    drawn = np.random.default_rng(seed).permutation(np.arange(static, len(ways)))[: max(0, count - static)]
    return [*ways[:static], *(ways[place] for place in sorted(drawn.tolist()))]


def _searched(
    ways: Mapping[int, Way],
    questions: Sequence[int],
    finalists: int,
    first: int,
    answers: Callable[[Mapping[int, Way], Sequence[int], str], list[Record]],
) -> tuple[Frontier, list[tuple[int, int]]]:
    """Halves the ways until few are left or all questions are asked.

    Returns the answers of those left, and how many ways and questions there were in each round.
    """
    left, records, rounds = [*ways], list[Record](), list[tuple[int, int]]()
    start, end = 0, min(first, len(questions))
    while True:
        records += answers({number: ways[number] for number in left}, questions[start:end], f"round-{len(rounds) + 1}")
        rounds.append((len(left), end))
        frontier = Frontier.of([record for record in records if int(record.intensity) in set(left)])
        most = max(finalists, -(-len(left) // 2))
        left = [int(frontier.intensities[place]) for place in sorted(_by_regret(frontier)[:most])]
        if most == finalists or end == len(questions):
            left = [int(frontier.intensities[place]) for place in sorted(_by_regret(frontier)[:finalists])]
            return Frontier.of([record for record in records if int(record.intensity) in set(left)]), rounds
        start, end = end, min(2 * end, len(questions))


def _by_regret(frontier: Frontier) -> list[int]:
    """Returns the columns, best first: by what each is short of the best at the price that suits it most."""
    scores, tokens = frontier.scores.mean(0), frontier.tokens.mean(0)
    worth = scores - np.array(PRICES)[:, None] * tokens / tokens.max()
    regret = (worth.max(1, keepdims=True) - worth).min(0)
    return np.lexsort((tokens, regret)).tolist()


def _scored(frontier: Frontier, ways: Mapping[int, Way]) -> list[Finalist]:
    """Scores the ways that a frontier has in place of λ, against those of one λ."""
    numbers = [int(number) for number in frontier.intensities]
    static = [place for place, number in enumerate(numbers) if ways[number].is_static]

    def gains(scores: Array, tokens: Array) -> Array:
        at = np.maximum(tokens, tokens[static].min())
        return scores - np.array([hull_at(scores[static], tokens[static], each) for each in at])

    points = zip(numbers, frontier.points, frontier.interval(gains), strict=True)
    return [Finalist(ways[number], point.accuracy, point.tokens, gain) for number, point, gain in points]


def _save_presets(model: PreTrainedModel, frontier: Frontier, ways: Mapping[int, Way], directory: Path) -> None:
    """Saves presets of single λ, with the pair's estimator, as `dami.attach` takes them."""
    static = [place for place, number in enumerate(frontier.intensities) if ways[int(number)].is_static]
    lams = tuple(ways[int(frontier.intensities[place])].thought for place in static)
    tables = {name: getattr(frontier, name)[:, static] for name in ("scores", "tokens", "thinking", "well_formed")}
    patch = patch_of(model)
    presets = presets_of(replace(frontier, intensities=lams, **tables))
    StoredIntensity(patch.estimator, presets, patch.frontier, patch.prompt_tail).save(directory)


@styled()
def tuned_figure(finalists: Sequence[Finalist], title: str) -> Figure:
    """Returns the picture: accuracy against tokens of single λ, and of the ways that the search has found."""
    static = [each for each in finalists if each.way.is_static]
    points = [Point(each.way.thought, each.accuracy, each.tokens, np.nan, np.nan) for each in static]
    others = [Reached(each.way.name, each.tokens, each.accuracy) for each in finalists if each not in static]
    figure, (axes,) = panels(8, 4.7)
    draw_frontier(axes, points, others)
    axes.set_title(title)
    return figure
