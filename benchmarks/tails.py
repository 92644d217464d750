"""How much of a prompt a pair must read at the λ of the answer: python -m benchmarks.tails PAIR

Accuracy and tokens over `prompt_tail`, the prompts' beginnings read at λ=0, on held-out questions. Rows go to
`results/tails_PAIR.csv`; with --record, the least tail that costs nothing goes to the shipped pair's own files.

    shipped   the shipped pair and its questions, sampled
    smollm2   SmolLM2-135M and its thinking adapter, sums and facts by halves, greedily
    zoo/NAME  a pair of python -m benchmarks.zoo, sampled
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import dami
import torch
from dami.callers import TURN
from dami.estimators.files import StoredIntensity
from dami.evaluation.tails import INTENSITIES, Tails, measure_tails
from dami.evaluation.tasks import spread
from dami.loading.load import example_pair
from dami.sources import FOLDER
from rich.progress import Progress

from benchmarks.machine import commit
from benchmarks.record import RESULTS, store
from benchmarks.subjects import names, subject


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", choices=names())
    parser.add_argument("--questions", type=int, default=256, help="how many to ask (%(default)s)")
    parser.add_argument("--samples", type=int, default=1, help="answers to each, at every λ (%(default)s)")
    parser.add_argument("--intensities", type=float, nargs="+", default=INTENSITIES)
    parser.add_argument("--tails", nargs="+", default=["1", "8", TURN], help="tokens, or turn (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("tails-run"), help="where answers go (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--record", action="store_true", help="write the least tail to the shipped pair")
    options = parser.parse_args()
    work = options.work / options.pair
    asked = subject(options.pair, None if options.pair.startswith("zoo/") else work, work)
    asked.task.questions = spread(asked.task.questions, options.questions)  # type: ignore[misc]
    tails = [tail if tail == TURN else int(tail) for tail in options.tails]
    with Progress() as bars:
        bar = bars.add_task("answers", total=None)
        found = measure_tails(
            asked.model, asked.tokenizer, asked.task, work, tails, options.intensities,
            samples=options.samples, rows=asked.rows, **asked.options,
            on_batch=lambda news: bars.advance(bar, len(news)),
        )  # fmt: skip
    store(rows_of(found, options.samples), options.results / f"tails_{options.pair.replace('/', '_')}.csv")
    for tail, loss in found.losses.items():
        print(f"tail {tail}: loses {loss.worth} of worth, {loss.accuracy} of the accuracy at the λ farthest from 0")
    print("the least that costs nothing:", found.least)
    if options.record and options.pair == "shipped":
        folder = example_pair()[1] / FOLDER
        replace(StoredIntensity.load(folder), prompt_tail=found.least).save(folder)


def rows_of(found: Tails, samples: int) -> list[dict[str, object]]:
    """Returns a row for every tail and λ; `tail` is "all" where whole prompts are read at that λ."""
    about: dict[str, object] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, dami {dami.__version__}",
        "questions": found.questions,
        "samples": samples,
        "prompt_intensity": found.prompt_intensity,
        "least": found.least,
    }
    rows = []
    for point in found.points:
        lost = [(0.0,) * 3] * 2 if point.tail is None else found.losses[point.tail]
        numbers = [number for value in (point.accuracy, point.tokens, *lost) for number in value]
        whats = ("accuracy", "tokens", "worth_lost", "accuracy_lost")
        names = [f"{what}{end}" for what in whats for end in ("", "_low", "_high")]
        row = {"tail": "all" if point.tail is None else point.tail, "intensity": point.intensity}
        rows.append(about | row | dict(zip(names, (round(number, 4) for number in numbers), strict=True)))
    return rows


if __name__ == "__main__":
    main()
