"""Thoughts within a budget, bent or cut: python -m benchmarks.budgets PAIR

Every question is answered at some λ with each budget, in these ways. All have as many tokens: those of the budget, and
the same number for the answer.

    stop   generation ends when all tokens are used up, wherever it is: max_tokens alone
    cut    the end tag is written when a thought has used up its budget
    bend   as cut; before, λ slides toward the Instruct end, by `dami.schedules.bend`: over the whole budget, and over
           as many tokens as answers at λ=1 have, by the pair's frontier

Rows go to `results/budgets_PAIR.csv`.

    shipped   the shipped pair and its questions
    smollm2   SmolLM2-135M and its thinking adapter, sums and facts by halves
    zoo/NAME  a pair of python -m benchmarks.zoo
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import dami
import numpy as np
import torch
from dami.chat import answers_of, encode
from dami.dial.patch import patch_of
from dami.evaluation.statistics import Interval, bootstrap, proportions
from dami.evaluation.tasks import spread
from dami.generation.budget import ThoughtLimit
from dami.schedules import bend
from dami.thoughts import Reader
from rich.progress import track
from transformers import LogitsProcessorList

from benchmarks.machine import commit
from benchmarks.record import RESULTS, store, text_table
from benchmarks.subjects import Subject, names, subject

BUDGETS = {"shipped": (8, 16, 24, 32, 48, 64), "smollm2": (16, 32, 48, 64, 96), "zoo": (4, 8, 16, 24)}
ANSWER = {"shipped": 16, "smollm2": 32, "zoo": 8}  # tokens for the answer
ROWS = {"shipped": 256, "smollm2": 60, "zoo": 240}  # questions of a batch


@dataclass(frozen=True)
class Way:
    """How thoughts are kept within a budget.

    Attributes:
        name: stop, cut or bend.
        span: as in `bend`.
    """

    name: str
    span: float | None = None

    def __str__(self) -> str:
        return self.name if self.span is None else f"{self.name} over {self.span:g}"


CUT = Way("cut")


@dataclass(frozen=True)
class Trial:
    """What came of a question.

    Attributes:
        right: its score.
        empty: whether there was no answer.
        tokens, thought: number of all tokens, and of those of the thought.
        ended: whether the thought ended before its budget, or there was none.
    """

    right: float
    empty: bool
    tokens: int
    thought: int
    ended: bool


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", choices=[name for name in names() if not name.endswith("-sampled")])
    parser.add_argument("--budgets", type=int, nargs="+", help="tokens of a thought")
    parser.add_argument("--intensities", type=float, nargs="+", default=[0.5, 1.0], help="λ (%(default)s)")
    parser.add_argument("--span", type=float, help="tokens over which λ bends; by default, as many as thoughts take")
    parser.add_argument("--count", type=int, help="number of questions; all by default")
    parser.add_argument("--samples", type=int, default=1, help="answers to each (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("budgets-run"), help="where a pair of the zoo is trained")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    options = parser.parse_args(argv)
    work, sort = options.work / options.pair, options.pair.partition("/")[0]
    asked = subject(options.pair, None if sort == "zoo" else work, work)  # of a pair of the zoo it trains the estimator
    span = options.span or max(point["tokens"][0] for point in patch_of(asked.model).frontier["points"])
    ways = [Way("stop"), CUT, Way("bend"), Way("bend", round(span))]
    about = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, dami {dami.__version__}",
    }
    cases = [(lam, budget) for lam in options.intensities for budget in options.budgets or BUDGETS[sort]]
    asked.task.questions = spread(asked.task.questions, options.count or len(asked.task.questions))  # type: ignore[misc]
    rows = [
        about | row
        for case in track(cases, "answers")
        for row in measured(asked, *case, ways, options.samples, ROWS[sort], ANSWER[sort])
    ]
    store(rows, options.results / f"budgets_{options.pair.replace('/', '_')}.csv")
    keys = ("intensity", "budget", "way", "accuracy", "gain", "empty", "tokens", "thought", "ended")
    print(text_table([keys, *([row[key] for key in keys] for row in rows)]))


def measured(
    asked: Subject, lam: float, budget: int, ways: Sequence[Way], samples: int, size: int, room: int
) -> list[dict[str, object]]:
    """Answers the questions in every way, `size` at a time, and returns what came of it; gains are over the cut."""
    questions = [index for index in range(len(asked.task.questions)) for _ in range(samples)]
    batches = [questions[start : start + size] for start in range(0, len(questions), size)]
    found: list[list[Trial]] = []
    for way in ways:
        torch.manual_seed(7)
        found.append([trial for batch in batches for trial in answered(asked, batch, lam, budget, room, way)])
    right = np.array([[trial.right for trial in trials] for trials in found])
    scores = right.reshape(len(ways), -1, samples).mean(2).T  # [questions, ways]
    cut = ways.index(CUT)
    gains = bootstrap(lambda rows: scores[rows].mean(0) - scores[rows, cut].mean(), len(scores))
    return [
        {
            "intensity": lam,
            "budget": budget,
            "way": str(way),
            "questions": len(scores),
            "samples": samples,
            **rounded("accuracy", accuracy),
            **rounded("gain", gain),
            "empty": round(statistics.fmean(trial.empty for trial in trials), 4),
            "tokens": round(statistics.fmean(trial.tokens for trial in trials), 2),
            "thought": round(statistics.fmean(trial.thought for trial in trials), 2),
            "ended": round(statistics.fmean(trial.ended for trial in trials), 4),
        }
        for way, trials, accuracy, gain in zip(ways, found, proportions(scores), gains, strict=True)
    ]


def rounded(name: str, interval: Interval) -> dict[str, object]:
    """Returns the columns of a value and its interval."""
    return {f"{name}{end}": round(value, 4) for end, value in zip(("", "_low", "_high"), interval, strict=True)}


@torch.inference_mode()
def answered(asked: Subject, questions: Sequence[int], lam: float, budget: int, room: int, way: Way) -> list[Trial]:
    """Answers a batch of questions."""
    model, tokenizer, reader = asked.model, asked.tokenizer, Reader.of(asked.tokenizer)
    prompts = [asked.task.questions[index].question for index in questions]
    texts, batch = encode(tokenizer, prompts)
    length = batch["input_ids"].shape[1]
    start, end = (tokenizer.encode(tag, add_special_tokens=False) for tag in (reader.tags.start, reader.tags.ends[0]))
    [inside] = {reader.opens(text) for text in texts}
    limits = [] if way.name == "stop" else [ThoughtLimit(length, budget, start, end, inside)]
    course = bend(lam, budget, start, end, inside, way.span) if way.name == "bend" else lam
    options = {name: value for name, value in asked.options.items() if name != "max_new_tokens"}
    ids = model.generate(
        **batch, intensity=course, logits_processor=LogitsProcessorList(limits), max_new_tokens=budget + room, **options
    )[:, length:]
    found = []
    for row, answer in enumerate(answers_of(model, reader, ids, prompts, None, texts)):
        said = reader.read(ids[row, : answer.tokens].tolist(), inside=inside, finished=answer.finished)
        thought = sum(len(segment.ids) for segment in said.segments if segment.kind == "thought")
        score = asked.task.score(questions[row], answer.text)
        found.append(Trial(score, not answer.text, answer.tokens, thought, said.closed and thought < budget))
    return found


if __name__ == "__main__":
    main()
