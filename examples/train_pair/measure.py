"""Measure the pair that ships with dami on its held-out questions, append to a CSV, and plot.

python examples/train_pair/measure.py                # measure and plot
python examples/train_pair/measure.py --plot-only    # plot the CSV's latest run
"""

import argparse
import csv
import datetime
import itertools
import json
import math
import platform
import subprocess
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

import matplotlib

matplotlib.use("Agg")
import dami
import matplotlib.pyplot as plt
import torch
import transformers
from dami.chat import ask
from dami.evaluation.frontier import wilson
from tasks import score
from tqdm import tqdm
from transformers import set_seed

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ["commit", "date", "device", "versions", "intensity", "task", "level", "n", "accuracy", "acc_low", "acc_high"]
COLUMNS += ["tokens_mean", "tokens_low", "tokens_high", "well_formed", "sampling"]


def measure(pair: Path, csv_path: Path, intensities: list[float], batch_size: int, limit: int | None) -> None:
    """Append one row for every intensity, task, level and way of sampling.

    A batch holds every question at all intensities, each row at its own.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = dami.load_pair(pair / "instruct", pair / "thinking", device_map=device)
    by_group = defaultdict(list)
    for line in (pair / "questions.jsonl").read_text().splitlines():
        question = json.loads(line)
        by_group[question["task"], question["level"]].append(question)
    # Questions of one level have answers of like length, which wastes least of a batch.
    questions = [q for group in sorted(by_group, key=lambda group: group[1]) for q in by_group[group][:limit]]
    per_batch = max(batch_size // len(intensities), 1)

    commit = ["git", "describe", "--always", "--dirty"]
    run = {
        "commit": subprocess.run(commit, cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, dami {dami.__version__}",
    }
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
                    right = answer.text == question["answer"]
                    if right != (score(question["task"], answer.text, question["answer"]) == 1.0):
                        raise ValueError(f"reasoning-gym scores {answer.text!r} otherwise, for {question}")
                    well_formed = answer.finished and bool(answer.text)
                    results[intensity, question["task"], question["level"]].append((right, answer.tokens, well_formed))
            for group, rows in results.items():
                n, (rights, tokens, well_formed) = len(rows), zip(*rows, strict=True)
                accuracy, length, margin = fmean(rights), fmean(tokens), 1.96 * stdev(tokens) / math.sqrt(n)
                numbers = (
                    accuracy,
                    *wilson(accuracy, n),
                    length,
                    length - margin,
                    length + margin,
                    fmean(well_formed),
                )
                values = (*group, n, *(round(number, 4) for number in numbers), sampling)
                writer.writerow(run | dict(zip(COLUMNS[4:], values, strict=True)))
            file.flush()


def pool(rows: list[dict]) -> dict[str, float]:
    """Pool rows of several tasks or levels, each counting by its number of questions."""
    n = sum(int(row["n"]) for row in rows)

    def mean(column: str) -> float:
        return sum(int(row["n"]) * float(row[column]) for row in rows) / n

    margins = (int(row["n"]) * (float(row["tokens_high"]) - float(row["tokens_low"])) / 2 for row in rows)
    accuracy, tokens, margin = mean("accuracy"), mean("tokens_mean"), math.hypot(*margins) / n
    low, high = wilson(accuracy, n)
    return {
        "n": n,
        "accuracy": accuracy,
        "acc_low": low,
        "acc_high": high,
        "tokens": tokens,
        "tokens_low": tokens - margin,
        "tokens_high": tokens + margin,
        "well_formed": mean("well_formed"),
    }


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
    """Print accuracy and tokens by intensity and level, as Markdown."""
    for greedy in (False, True):
        curve = latest(csv_path, greedy)
        levels = sorted({int(row["level"]) for rows in curve.values() for row in rows})
        print(f"\n{'greedy' if greedy else 'sampled'}: accuracy % / tokens")
        print("| λ | " + " | ".join(f"level {level}" for level in levels) + " | all | well formed % |")
        print("|---" * (len(levels) + 3) + "|")
        for intensity, rows in curve.items():
            pools = [pool([row for row in rows if int(row["level"]) == level]) for level in levels] + [pool(rows)]
            cells = [f"{100 * p['accuracy']:.0f} / {p['tokens']:.0f}" for p in pools]
            print(f"| {intensity:g} | " + " | ".join(cells) + f" | {100 * pools[-1]['well_formed']:.0f} |")


def plot(csv_path: Path, estimators_path: Path, image_path: Path) -> None:
    """Plot accuracy against tokens: a point for every λ, and what the pair's estimator reaches at three prices.

    Bands and bars are 95 % intervals.
    """
    curve = latest(csv_path, greedy=False)
    pools = [pool(rows) for rows in curve.values()]
    tokens = [p["tokens"] for p in pools]
    accuracy, low, high = ([100 * p[name] for p in pools] for name in ("accuracy", "acc_low", "acc_high"))
    static, auto = "#1f6f8b", "#d1495b"  # apart for the colour-blind too, on white and in grey
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 13})
    figure, axes = plt.subplots(figsize=(9, 5.4), layout="constrained")
    axes.fill_between(tokens, low, high, color=static, alpha=0.18, lw=0)
    axes.plot(tokens, accuracy, "o-", color=static, lw=2, ms=7, label="one λ for every question")
    names = {0.0: "λ = 0, Instruct", 1.0: "λ = 1, Thinking"}
    gaps = [after - before for before, after in itertools.pairwise(tokens)] + [math.inf]
    for intensity, x, y, gap in zip(curve, tokens, accuracy, gaps, strict=True):
        crowded = gap < 0.05 * tokens[-1]  # the next label is to be to the right of this one
        axes.annotate(
            names.get(intensity, f"{intensity:g}"),
            (x, y),
            xytext={0.0: (-8, -24), 1.0: (0, 12)}.get(intensity, (3 if crowded else 6, -18)),
            textcoords="offset points",
            ha="right" if intensity == 1 or (crowded and intensity) else "left",
            color=static,
            weight="bold" if intensity in names else None,
            fontsize=12,
        )
    with open(estimators_path, newline="") as file:
        rows = list(csv.DictReader(file))
    newest = max(row["date"] for row in rows)
    prices = {
        "preference, price 1": "tokens dear",
        "preference, price 0.5": "",
        "preference, price 0.2": "default price",
    }
    found = [row for row in rows if row["date"] == newest and row["policy"] in prices]
    points = [[100 * float(row[name]) for name in ("accuracy", "accuracy_low", "accuracy_high")] for row in found]
    x = [float(row["tokens"]) for row in found]
    y = [point[0] for point in points]
    errors = [[point[0] - point[1] for point in points], [point[2] - point[0] for point in points]]
    axes.errorbar(
        x,
        y,
        errors,
        fmt="D",
        color=auto,
        ms=8,
        capsize=3,
        label='intensity="auto": a λ for each question, by the price of a token',
    )
    for row, *at in zip(found, x, y, strict=True):
        axes.annotate(
            prices[row["policy"]], at, xytext=(-10, 6), textcoords="offset points", ha="right", color=auto, fontsize=12
        )
    axes.set(xlabel="tokens per answer", ylabel="right answers, %", xlim=(0, 1.06 * tokens[-1]), ylim=(0, 100))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    axes.set_title(f"The shipped pair, {pools[0]['n']} held-out questions", loc="left", fontsize=13)
    image_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image_path, dpi=130)


def main() -> None:
    """Measure, print the table, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, default=ROOT / "python/dami/data/pair")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks/results/pair_curve.csv")
    parser.add_argument("--estimators", type=Path, default=ROOT / "benchmarks/results/estimators_shipped.csv")
    parser.add_argument("--image", type=Path, default=ROOT / "docs/images/pair-curve.png")
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
