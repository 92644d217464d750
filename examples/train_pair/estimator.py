"""Train the estimator that ships with the pair: λ by preference, on questions that neither end was trained on.

python examples/train_pair/estimator.py        # a quarter of an hour on two cores; goes on where it was interrupted
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
from tasks import LEVELS, TASKS, draw
from tqdm import tqdm

PAIR = Path(dami.example_pair()[0]).parent
PAIR_QUESTIONS = 12_000  # that train.py drew of each task and level, from seeds LEVEL · 10⁷ on
SEED = 3_000_000_000


def draw_unseen(count: int) -> list[dict]:
    """Up to `count` questions of each task and level that neither train.py nor questions.jsonl has; by level.

    There are only so many questions for two small numbers, so of `gcd` few are left, and none of its first level: it
    gets half as many more of its last.
    """
    seen = {json.loads(line)["question"] for line in (PAIR / "questions.jsonl").read_text().splitlines()}
    for task in TASKS:
        for level in LEVELS:
            seen |= {question.text for question in draw(task, level, PAIR_QUESTIONS, level * 10_000_000)}
    unseen = []
    for task in TASKS:
        for level in LEVELS:
            drawn = {q.text: q for q in draw(task, level, 3000, SEED + level * 10_000_000) if q.text not in seen}
            unseen += list(drawn.values())[: count + count // 2 * (task == "gcd")]
    return [
        {"task": q.task, "level": q.level, "question": q.text, "answer": q.answer}
        for q in sorted(unseen, key=lambda q: q.level)
    ]


def main() -> None:
    """Draw the questions, answer them at six λ, fit, measure, save beside the thinking end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="questions of a task and level (default: %(default)s)")
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
