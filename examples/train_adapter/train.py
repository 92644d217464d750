"""Train one LoRA adapter for the whole dial: it changes how a pair answers, at every λ alike.

    pip install peft
    python examples/train_adapter/train.py            # two minutes on one CPU core
    python examples/train_adapter/train.py --help

The shipped pair answers "133". Here it learns to say "The answer is 133.", and to think as before. It answers questions
itself, each at a λ drawn at random, and its answers are put into the new words. The adapter learns each of them at the
λ that it was given at. Both ends of the pair stay frozen. All that transformers' Trainer needs is a collator that adds
λ to a batch.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dami
import torch
from dami.chat import ask, render
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

LAMS = (0.0, 0.25, 0.5, 0.75, 1.0)  # the learned style is measured at these
IGNORED = -100  # label of a token that is not learned


def in_new_words(text: str) -> str:
    return f"The answer is {text}."


def teach(model: Any, tokenizer: Any, questions: Sequence[str], chance: random.Random) -> list[dict[str, Any]]:
    """Asks each question at a λ of its own, and returns what is to be learned: tokens, labels and that λ."""
    lams = [chance.random() for _ in questions]
    examples = []
    for prompt, lam, answer in zip(
        render(tokenizer, questions), lams, ask(model, tokenizer, questions, lams, do_sample=False), strict=True
    ):
        thought = f"<think>{answer.thought}</think>" if answer.thought else ""
        end = tokenizer.eos_token if answer.finished else ""
        before = tokenizer(prompt, add_special_tokens=False).input_ids
        learned = tokenizer(thought + in_new_words(answer.text) + end, add_special_tokens=False).input_ids
        labels = [IGNORED] * len(before) + learned
        examples.append({"input_ids": before + learned, "labels": labels, "intensity": lam})
    return examples


def collate(examples: Sequence[dict[str, Any]], padding: int) -> dict[str, Tensor]:
    """Pads a batch on the right, and gives each sequence its λ."""
    length = max(len(each["input_ids"]) for each in examples)

    def padded(name: str, value: int) -> Tensor:
        return torch.tensor([each[name] + [value] * (length - len(each[name])) for each in examples])

    return {
        "input_ids": padded("input_ids", padding),
        "labels": padded("labels", IGNORED),
        "attention_mask": torch.tensor([[int(i < len(each["input_ids"])) for i in range(length)] for each in examples]),
        "intensity": torch.tensor([each["intensity"] for each in examples]),  # [B], as forward takes it
    }


def train(adapted: PeftModel, examples: Sequence[dict[str, Any]], padding: int, **settings: Any) -> list[float]:
    """Trains the adapter with activation checkpointing, and returns the losses that were logged.

    Args:
        adapted: a patched model with a LoRA adapter.
        examples: as `teach` returns them.
        padding: the token to pad with.
        settings: further arguments of transformers' TrainingArguments.
    """
    arguments = TrainingArguments(
        **settings, lr_scheduler_type="cosine", gradient_checkpointing=True, remove_unused_columns=False,
        save_strategy="no", report_to="none",
    )  # fmt: skip
    trainer = Trainer(adapted, arguments, train_dataset=examples, data_collator=lambda some: collate(some, padding))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def style(model: Any, tokenizer: Any, questions: Sequence[str]) -> dict[float, float]:
    """Returns the share of answers in the new words, by λ. All λ of a question are rows of one batch."""
    lams = [lam for lam in LAMS for _ in questions]
    answers = ask(model, tokenizer, [*questions] * len(LAMS), lams, do_sample=False)
    new = [answer.text.startswith("The answer is ") and answer.text.endswith(".") for answer in answers]
    count = len(questions)
    return {lam: sum(new[i * count : (i + 1) * count]) / count for i, lam in enumerate(LAMS)}


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Trains and measures an adapter, and returns the losses that were logged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("adapter"), help="directory of the adapter")
    parser.add_argument("--questions", type=int, default=128, help="to learn from (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=32, help="questions to measure with (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="sequences (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    chance = random.Random(args.seed)

    model, tokenizer = dami.load_pair(*dami.example_pair(), dtype=torch.float32)
    lines = (dami.example_pair()[0].parent / "questions.jsonl").read_text().splitlines()
    questions = [json.loads(line)["question"] for line in lines]
    chance.shuffle(questions)
    held_out, questions = questions[: args.held_out], questions[args.held_out :][: args.questions]
    before = style(model, tokenizer, held_out)
    examples = teach(model, tokenizer, questions, chance)

    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=8, lora_alpha=16))
    losses = train(
        adapted, examples, tokenizer.pad_token_id, output_dir=str(args.out / "trainer"), max_steps=args.steps,
        per_device_train_batch_size=args.batch, learning_rate=5e-3, seed=args.seed, logging_steps=20,
    )  # fmt: skip
    adapted.save_pretrained(args.out)  # dami.load_pair(…), then PeftModel.from_pretrained(model, OUT)
    after = style(adapted.eval(), tokenizer, held_out)
    for lam in LAMS:
        print(f"λ = {lam:g}: {before[lam]:.0%} of answers in the new words before, {after[lam]:.0%} after")
    return losses


if __name__ == "__main__":
    main()
