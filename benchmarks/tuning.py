"""Which λ prompt, thought and answer deserve on a pair: python -m benchmarks.tuning PAIR

What `dami tune` finds on the pair's questions. Rows go to `results/tuning_PAIR.csv`, one for each way to
answer that was scored on held-out questions.

    shipped   the shipped pair and its questions, sampled
    zoo/NAME  a pair of python -m benchmarks.zoo, sampled
"""

from __future__ import annotations

import argparse
import platform
from datetime import datetime, timezone
from pathlib import Path

import dami
import torch
from dami.evaluation.tuning import Tuned, tune
from rich.progress import Progress

from benchmarks.machine import commit
from benchmarks.record import RESULTS, store
from benchmarks.subjects import names, subject


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", choices=[name for name in names() if name != "smollm2"])
    parser.add_argument("--first", type=int, default=64, help="questions of the first round (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("tuning-run"), help="where answers go (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    options = parser.parse_args()
    work = options.work / options.pair
    asked = subject(options.pair, None if options.pair.startswith("zoo/") else work, work)
    with Progress() as bars:
        bar = bars.add_task("answers", total=None)
        found = tune(
            asked.model, asked.tokenizer, asked.task, work, first=options.first, rows=asked.rows, **asked.options,
            on_batch=lambda news: bars.advance(bar, len(news)),
        )  # fmt: skip
    store(rows_of(found), options.results / f"tuning_{options.pair.replace('/', '_')}.csv")


def rows_of(found: Tuned) -> list[dict[str, object]]:
    """Returns a row for every way that was scored."""
    about = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, dami {dami.__version__}",
        "searched": " ".join(f"{ways}x{questions}" for ways, questions in found.searched),
        "held_out": found.held_out,
    }
    rows = []
    for each in found.finalists:
        way = each.way
        row: dict[str, object] = {"thought": way.thought, "answer": way.answer, "prompt": way.prompt, "tail": way.tail}
        row["presets"] = " ".join(name for name, preset in found.presets.items() if preset == way)
        for name in ("accuracy", "tokens", "gain"):
            values = zip(("", "_low", "_high"), getattr(each, name), strict=True)
            row |= {f"{name}{end}": round(value, 4) for end, value in values}
        print(f"{way.name:40} {each.accuracy} right, {each.tokens} tokens, gain {each.gain} {row['presets']}")
        rows.append(about | row)
    return rows


if __name__ == "__main__":
    main()
