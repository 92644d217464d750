"""Train the estimator that ships with the pair: λ by preference, on questions that neither end was trained on.

python examples/train_pair/estimator.py        # five minutes on one core; goes on where it was interrupted
"""

import argparse
import json
from pathlib import Path

import dami
import torch
from dami.cli.terminal import outcome_table
from dami.evaluation import load_task
from dami.evaluation.training import train_estimator
from rich.console import Console
from tasks import ELEMENTS, LEVELS, TASKS, draw, is_reserved
from tqdm import tqdm

PAIR = Path(dami.example_pair()[0]).parent
SEED = 3_000_000_000


def draw_unseen(count: int) -> list[dict]:
    """Up to `count` questions of each task and level that train.py keeps off and questions.jsonl has not; by level.

    There are only so many questions for two small numbers: of the first levels of some tasks there are fewer.
    """
    held_out = {json.loads(line)["question"] for line in (PAIR / "questions.jsonl").read_text().splitlines()}
    unseen = []
    for task in TASKS:
        for level in LEVELS:
            drawn = {q.text: q for q in draw(task, level, 3000, SEED + level * 10_000_000)}
            kept = [q for q in drawn.values() if (is_reserved(q) or task == ELEMENTS) and q.text not in held_out]
            unseen += kept[:count]
    return [
        {"task": q.task, "level": q.level, "question": q.text, "answer": q.answer}
        for q in sorted(unseen, key=lambda q: q.level)
    ]


def main() -> None:
    """Draw the questions, answer them at six λ, fit, measure, save beside the thinking end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=70, help="questions of a task and level (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("estimator-run"), help="directory (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / "unseen.jsonl"
    if not file.exists():
        file.write_text("".join(json.dumps(question) + "\n" for question in draw_unseen(args.count)))
    model, tokenizer = dami.load_pair(*dami.example_pair())
    task = load_task(str(file), verifier="word")
    with tqdm(total=len(task.questions) * 12, desc="answers") as bar:
        trained = train_estimator(
            model, tokenizer, task, args.work, rows=440, seed=1, on_batch=lambda news: bar.update(len(news))
        )
    Console().print(outcome_table(trained.outcomes, trained.stored.estimator.price))
    trained.stored.save(PAIR / "thinking" / "intensity")


if __name__ == "__main__":
    main()
