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
import torch
from dami.chat import answers_of, encode
from dami.dial.patch import patch_of
from dami.evaluation.statistics import wilson
from dami.generation.budget import ThoughtLimit
from dami.schedules import bend
from dami.serving.guidance import span_of
from dami.thoughts import Reader
from rich.progress import track
from transformers import LogitsProcessorList

from benchmarks.machine import commit
from benchmarks.record import RESULTS, store, text_table
from benchmarks.subjects import Subject, shipped, smollm2

SUBJECTS = {"shipped": shipped, "smollm2": smollm2}
BUDGETS = {"shipped": (8, 16, 24, 32, 48, 64), "smollm2": (16, 32, 48, 64, 96)}
ANSWER = {"shipped": 16, "smollm2": 32}  # tokens for the answer
ROWS = {"shipped": 256, "smollm2": 60}  # questions of a batch


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
    parser.add_argument("pair", choices=SUBJECTS)
    parser.add_argument("--budgets", type=int, nargs="+", help="tokens of a thought")
    parser.add_argument("--intensities", type=float, nargs="+", default=[0.5, 1.0], help="λ (%(default)s)")
    parser.add_argument("--span", type=float, help="tokens over which λ bends; by default, as many as thoughts take")
    parser.add_argument("--count", type=int, help="number of questions; all by default")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV file")
    options = parser.parse_args(argv)
    subject = SUBJECTS[options.pair](Path())  # nothing is trained
    span = options.span or span_of(patch_of(subject.model).frontier)
    ways = [Way("stop"), Way("cut"), Way("bend"), *([] if span is None else [Way("bend", round(span))])]
    about = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, dami {dami.__version__}",
    }
    budgets = options.budgets or BUDGETS[options.pair]
    cases = [(lam, budget, way) for lam in options.intensities for budget in budgets for way in ways]
    rows = []
    for lam, budget, way in track(cases, "answers"):
        rows.append(about | measured(options.pair, subject, lam, budget, way, options.count))
    store(rows, options.results / f"budgets_{options.pair}.csv")
    keys = ("intensity", "budget", "way", "accuracy", "empty", "tokens", "thought", "ended")
    print(text_table([keys, *([row[key] for key in keys] for row in rows)]))


def measured(pair: str, subject: Subject, lam: float, budget: int, way: Way, count: int | None) -> dict[str, object]:
    """Answers the questions in one way, and returns what came of it."""
    torch.manual_seed(7)
    questions = list(range(len(subject.task.questions)))[
        :: 1 if count is None else -(-len(subject.task.questions) // count)
    ]
    size = ROWS[pair]
    trials = [
        trial
        for start in range(0, len(questions), size)
        for trial in answered(subject, questions[start : start + size], lam, budget, ANSWER[pair], way)
    ]
    right = statistics.fmean(trial.right for trial in trials)
    low, high = wilson(right, len(trials))
    return {
        "intensity": lam,
        "budget": budget,
        "way": str(way),
        "questions": len(trials),
        "accuracy": round(right, 4),
        "acc_low": round(low, 4),
        "acc_high": round(high, 4),
        "empty": round(statistics.fmean(trial.empty for trial in trials), 4),
        "tokens": round(statistics.fmean(trial.tokens for trial in trials), 2),
        "thought": round(statistics.fmean(trial.thought for trial in trials), 2),
        "ended": round(statistics.fmean(trial.ended for trial in trials), 4),
    }


@torch.inference_mode()
def answered(subject: Subject, questions: Sequence[int], lam: float, budget: int, room: int, way: Way) -> list[Trial]:
    """Answers a batch of questions."""
    model, tokenizer, reader = subject.model, subject.tokenizer, Reader.of(subject.tokenizer)
    prompts = [subject.task.questions[index].question for index in questions]
    texts, batch = encode(tokenizer, prompts)
    length = batch["input_ids"].shape[1]
    start, end = (tokenizer.encode(tag, add_special_tokens=False) for tag in (reader.tags.start, reader.tags.ends[0]))
    [inside] = {reader.opens(text) for text in texts}
    limits = [] if way.name == "stop" else [ThoughtLimit(length, budget, start, end, inside)]
    course = bend(lam, budget, start, end, inside, way.span) if way.name == "bend" else lam
    options = {name: value for name, value in subject.options.items() if name != "max_new_tokens"}
    ids = model.generate(
        **batch, intensity=course, logits_processor=LogitsProcessorList(limits), max_new_tokens=budget + room, **options
    )[:, length:]
    found = []
    for row, answer in enumerate(answers_of(model, reader, ids, prompts, None, texts)):
        said = reader.read(ids[row, : answer.tokens].tolist(), inside=inside, finished=answer.finished)
        thought = sum(len(segment.ids) for segment in said.segments if segment.kind == "thought")
        score = subject.task.score(questions[row], answer.text)
        found.append(Trial(score, not answer.text, answer.tokens, thought, said.closed and thought < budget))
    return found


if __name__ == "__main__":
    main()
