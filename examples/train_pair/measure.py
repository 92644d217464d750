"""Measure the pair that ships with dami on its held-out questions, append to a CSV, and plot.

python examples/train_pair/measure.py                # measure and plot
python examples/train_pair/measure.py --plot-only    # plot the CSV's latest run
"""

import argparse
import csv
import datetime
import json
import math
import platform
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import dami
import torch
import transformers
from dami.chat import Answer, ask
from dami.evaluation.frontier import Point
from dami.evaluation.plots import Reached, draw_frontier
from dami.evaluation.statistics import Interval, wilson
from dami.evaluation.style import BLUE, VERMILION, panels, save, styled
from rich.console import Console
from rich.table import Table
from tasks import score
from tqdm import tqdm
from transformers import set_seed

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ["commit", "date", "device", "versions", "intensity", "task", "level", "n", "accuracy", "acc_low", "acc_high"]
COLUMNS += ["tokens_mean", "tokens_low", "tokens_high", "well_formed", "sampling"]
PRICES = ("0.2", "0.5", "1")  # at which the estimator is shown, the default first


def measure(pair: Path, csv_path: Path, intensities: list[float], batch_size: int, limit: int | None) -> None:
    """Append one row for every intensity, task, level and way of sampling.

    A batch holds every question at all intensities, each row at its own.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = dami.load_pair(pair / "instruct", pair / "thinking", device_map=device)
    questions = questions_of(pair, limit)
    per_batch = max(batch_size // len(intensities), 1)
    run = facts(device)
    sampled = f"temperature {model.generation_config.temperature}, top_p {model.generation_config.top_p}"
    new = not csv_path.exists()
    csv_path.parent.mkdir(parents=True, exist_ok=True)
    with csv_path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        for sampling, options in ((sampled, {}), ("greedy", {"do_sample": False, "temperature": None, "top_p": None})):
            set_seed(0)
            results = defaultdict(list)
            for start in tqdm(range(0, len(questions), per_batch), desc=sampling):
                batch = [(q, intensity) for q in questions[start : start + per_batch] for intensity in intensities]
                answers = ask(model, tokenizer, [q["question"] for q, _ in batch], [i for _, i in batch], **options)
                for (question, intensity), answer in zip(batch, answers, strict=True):
                    group = (intensity, question["task"], question["level"])
                    results[group].append((is_right(question, answer), answer))
            for group, answered in results.items():
                writer.writerow(run | csv_row(group, answered) | {"sampling": sampling})
            file.flush()


def questions_of(pair: Path, limit: int | None) -> list[dict]:
    """The pair's questions, those of one level together: their answers have like lengths, which wastes least."""
    by_group = defaultdict(list)
    for line in (pair / "questions.jsonl").read_text().splitlines():
        question = json.loads(line)
        by_group[question["task"], question["level"]].append(question)
    return [q for group in sorted(by_group, key=lambda group: group[1]) for q in by_group[group][:limit]]


def facts(device: str) -> dict[str, str]:
    """What is told of the run."""
    commit = ["git", "describe", "--always", "--dirty"]
    return {
        "commit": subprocess.run(commit, cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, dami {dami.__version__}",
    }


def is_right(question: dict, answer: Answer) -> bool:
    """Whether an answer is right, on which reasoning-gym has to agree."""
    right = answer.text == question["answer"]
    if right != (score(question["task"], answer.text, question["answer"]) == 1.0):
        raise ValueError(f"reasoning-gym scores {answer.text!r} otherwise, for {question}")
    return right


def csv_row(group: tuple[float, str, int], answered: Sequence[tuple[bool, Answer]]) -> dict[str, object]:
    """What is told of the answers to one task and level at one intensity."""
    n, tokens = len(answered), [answer.tokens for _, answer in answered]
    accuracy, length = fmean(right for right, _ in answered), fmean(tokens)
    margin = 1.96 * stdev(tokens) / math.sqrt(n) if n > 1 else math.nan  # one answer has no interval
    well_formed = fmean(answer.finished and bool(answer.text) for _, answer in answered)
    numbers = (accuracy, *wilson(accuracy, n), length, length - margin, length + margin, well_formed)
    return dict(zip(COLUMNS[4:-1], (*group, n, *(round(number, 4) for number in numbers)), strict=True))


def pool(intensity: float, rows: list[dict]) -> Point:
    """Pool rows of several tasks or levels, each counting by its number of questions."""
    n = sum(int(row["n"]) for row in rows)

    def mean(column: str) -> float:
        return sum(int(row["n"]) * float(row[column]) for row in rows) / n

    margins = (int(row["n"]) * (float(row["tokens_high"]) - float(row["tokens_low"])) / 2 for row in rows)
    accuracy, tokens, margin = mean("accuracy"), mean("tokens_mean"), math.hypot(*margins) / n
    return Point(
        intensity,
        Interval(accuracy, *wilson(accuracy, n)),
        Interval(tokens, tokens - margin, tokens + margin),
        math.nan,  # thoughts are not counted
        mean("well_formed"),
    )


def latest(csv_path: Path, greedy: bool) -> dict[float, list[dict]]:
    """The rows of the CSV's latest run, by intensity."""
    with open(csv_path, newline="") as file:
        rows = list(csv.DictReader(file))
    by_intensity = defaultdict(list)
    for row in rows:
        if row["date"] == rows[-1]["date"] and (row["sampling"] == "greedy") == greedy:
            by_intensity[float(row["intensity"])].append(row)
    return dict(sorted(by_intensity.items()))


def print_table(csv_path: Path) -> None:
    """Print accuracy and tokens by intensity and level."""
    for greedy in (False, True):
        curve = latest(csv_path, greedy)
        levels = sorted({int(row["level"]) for rows in curve.values() for row in rows})
        table = Table(title=f"{'greedy' if greedy else 'sampled'}: accuracy in % / tokens per answer", box=None)
        for head in ("λ", *(f"level {level}" for level in levels), "all", "well formed, %"):
            table.add_column(head, justify="right")
        for intensity, rows in curve.items():
            parts = [[row for row in rows if int(row["level"]) == level] for level in levels]
            points = [pool(intensity, part) for part in (*parts, rows)]
            cells = [f"{100 * point.accuracy.value:.0f} / {point.tokens.value:.0f}" for point in points]
            table.add_row(f"{intensity:g}", *cells, f"{100 * points[-1].well_formed:.0f}")
        Console().print(table)


def estimated(estimators_path: Path) -> list[Reached]:
    """What the pair's estimator reached in the latest run, at several prices of a token."""
    with open(estimators_path, newline="") as file:
        rows = list(csv.DictReader(file))
    newest = max(row["date"] for row in rows)
    by_policy = {row["policy"]: row for row in rows if row["date"] == newest}
    found = []
    for price in PRICES:
        row = by_policy[f"preference, price {price}"]
        accuracy = Interval(*(float(row[name]) for name in ("accuracy", "accuracy_low", "accuracy_high")))
        name = f"auto, price {price}" + (" (default)" if price == PRICES[0] else "")
        found.append(Reached(name, Interval(*[float(row["tokens"])] * 3), accuracy))
    return found


@styled()
def plot(csv_path: Path, estimators_path: Path, image_path: Path) -> None:
    """Plot accuracy against tokens: a point for every λ, and what the pair's estimator reaches at three prices.

    Bands and bars are 95 % intervals.
    """
    curve = latest(csv_path, greedy=False)
    figure, (axes,) = panels(8, 4.7)
    draw_frontier(axes, [pool(intensity, rows) for intensity, rows in curve.items()], estimated(estimators_path))
    count = sum(int(row["n"]) for row in curve[0.0])
    axes.set_title(f"The shipped pair, {count} held-out questions: λ = 0 is Instruct, λ = 1 is Thinking")
    key = (
        ("one λ for every question", BLUE),
        ('intensity="auto": a λ for each question, by the price of a token', VERMILION),
    )
    for place, (text, color) in enumerate(key):
        axes.text(0.98, 0.12 - 0.07 * place, text, color=color, ha="right", transform=axes.transAxes)
    image_path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, image_path)


def main() -> None:
    """Measure, print the table, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, default=ROOT / "python/dami/data/pair")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks/results/pair_curve.csv")
    parser.add_argument("--estimators", type=Path, default=ROOT / "benchmarks/results/estimators_shipped.csv")
    parser.add_argument("--image", type=Path, default=ROOT / "docs/images/pair-curve.svg")
    parser.add_argument("--intensities", type=float, nargs="+", default=[i / 10 for i in range(11)])
    parser.add_argument("--batch-size", type=int, default=440, help="rows (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="questions of each task and level (default: all)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--plot-only", action="store_true", help="measure nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.plot_only:
        measure(args.pair, args.csv, args.intensities, args.batch_size, args.limit)
    print_table(args.csv)
    plot(args.csv, args.estimators, args.image)


if __name__ == "__main__":
    main()
