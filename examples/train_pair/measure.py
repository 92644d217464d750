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


def plot(csv_path: Path, image_path: Path) -> None:
    """Plot accuracy and tokens over the intensity by level, and accuracy over tokens, with 95 % intervals."""
    curve = latest(csv_path, greedy=False)
    intensities = list(curve)
    levels = sorted({int(row["level"]) for rows in curve.values() for row in rows})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for level in levels:
        colour = plt.get_cmap("viridis")(0.92 - 0.86 * (level - 1) / (len(levels) - 1))
        pools = [pool([row for row in rows if int(row["level"]) == level]) for rows in curve.values()]
        for axes, name, low, high, scale in (
            (left, "accuracy", "acc_low", "acc_high", 100),
            (middle, "tokens", "tokens_low", "tokens_high", 1),
        ):
            axes.plot(intensities, [scale * p[name] for p in pools], "o-", color=colour, ms=4, label=f"level {level}")
            bounds = [[scale * p[bound] for p in pools] for bound in (low, high)]
            axes.fill_between(intensities, *bounds, color=colour, alpha=0.15, lw=0)
    left.set(xlabel="intensity λ", ylabel="accuracy, %", ylim=(0, 102), title="Accuracy")
    middle.set(xlabel="intensity λ", ylabel="tokens per answer", title="Length")
    middle.set_ylim(bottom=0)
    left.legend(frameon=False, loc="lower right")
    pools = [pool(rows) for rows in curve.values()]
    tokens, accuracy = [p["tokens"] for p in pools], [100 * p["accuracy"] for p in pools]
    errors = [[100 * abs(p[bound] - p["accuracy"]) for p in pools] for bound in ("acc_low", "acc_high")]
    right.errorbar(tokens, accuracy, errors, color="0.75", fmt="-", capsize=2, zorder=1)
    points = right.scatter(tokens, accuracy, c=intensities, cmap="plasma", s=36, zorder=2)
    figure.colorbar(points, ax=right, label="intensity λ", pad=0.02)
    right.set(xlabel="tokens per answer", ylabel="accuracy, %", title="All levels: accuracy against length")
    sampling = next(iter(curve.values()))[0]["sampling"]
    figure.suptitle(f"The shipped pair on {pools[0]['n']} held-out questions ({sampling}; bands: 95 % intervals)")
    image_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image_path, dpi=150)


def main() -> None:
    """Measure, print the table, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, default=ROOT / "python/dami/data/pair")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks/results/pair_curve.csv")
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
    plot(args.csv, args.image)


if __name__ == "__main__":
    main()
