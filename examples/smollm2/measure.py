"""Measure SmolLM2 and its thinking adapter on the held-out questions: append to a CSV, and write a report.

    python examples/smollm2/measure.py
    python -m benchmarks.tables             # then the tables of the docs are made anew

Every batch holds all λ of its questions. A run that was interrupted goes on where it ended. With the same --work,
`python -m benchmarks.estimators smollm2` takes these answers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import dami
import torch
import transformers
from dami.cli.terminal import point_table
from dami.evaluation.frontier import Frontier
from dami.evaluation.report import write_report
from dami.evaluation.sweeps import Record, sweep
from dami.evaluation.tasks import Question, load_task
from instruct import smollm2_file
from rich.console import Console
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.machine import about, machine
from benchmarks.record import store

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
INTENSITIES = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def parts(frontier: Frontier, questions: Sequence[Question]) -> Iterator[tuple[str, str, Frontier]]:
    """The frontier of every task and level, of every task, and of all, with the names of both."""
    groups: dict[tuple[str, str], list[int]] = {}
    for place, question in enumerate(questions):
        for key in ((question.task, str(question.level)), (question.task, "all"), ("all", "all")):
            groups.setdefault(key, []).append(place)
    for (task, level), places in sorted(groups.items()):
        yield task, level, frontier.select(places)


def csv_rows(frontier: Frontier, questions: Sequence[Question], run: dict[str, object]) -> Iterator[dict[str, object]]:
    """A row for every part and λ; intervals are Wilson's for the accuracy, a bootstrap's for tokens."""
    for task, level, part in parts(frontier, questions):
        for point in part.points:
            yield run | {
                "task": task,
                "level": level,
                "n": len(part),
                "intensity": point.intensity,
                "accuracy": round(point.accuracy.value, 4),
                "acc_low": round(point.accuracy.low, 4),
                "acc_high": round(point.accuracy.high, 4),
                "tokens_mean": round(point.tokens.value, 2),
                "tokens_low": round(point.tokens.low, 2),
                "tokens_high": round(point.tokens.high, 2),
                "thinking": round(point.thinking, 4),
                "well_formed": round(point.well_formed, 4),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, default=HERE / "adapter")
    parser.add_argument("--questions", type=Path, default=HERE / "mixed.jsonl")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks/results/smollm2_curve.csv")
    parser.add_argument("--work", type=Path, default=Path("build/smollm2/evaluation"), help="answers and their report")
    parser.add_argument("--intensities", type=float, nargs="+", default=INTENSITIES)
    parser.add_argument("--count", type=int, help="questions, at even distances in the file (default: all)")
    parser.add_argument("--rows", type=int, default=120, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, help="sample at this temperature (default: the likeliest token)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": args.temperature is not None}
    if args.temperature is not None:
        options["temperature"] = args.temperature
    model, tokenizer = dami.load_pair(smollm2_file(), args.adapter, format="lowrank", dtype=torch.bfloat16)
    task = load_task(str(args.questions), args.count, verifier="word")
    records: list[Record] = []
    with tqdm(total=len(task.questions) * len(args.intensities), unit="answer") as bar:

        def show(news: list[Record]) -> None:
            records.extend(news)
            bar.update(len(news))

        path = args.work / "records.jsonl"
        sweep(model, tokenizer, task, args.intensities, path=path, rows=args.rows, seed=7, on_batch=show, **options)
    frontier = write_report(task, records, args.work, {"pair": f"{smollm2_file().name} and {args.adapter.name}"})
    run = about(machine()) | {
        "versions": f"transformers {transformers.__version__}, dami {dami.__version__}",
        "command": " ".join(["python", "examples/smollm2/measure.py", *sys.argv[1:]]),
        "sampling": "greedy" if args.temperature is None else f"temperature {args.temperature}",
        "max_new_tokens": args.max_new_tokens,
    }
    store(list(csv_rows(frontier, task.questions, run)), args.csv)
    Console().print(point_table(frontier.points), f"All answers: {args.work / 'report.html'}")


if __name__ == "__main__":
    main()
