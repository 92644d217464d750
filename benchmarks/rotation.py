"""Whether a pair whose ends have different rotary embeddings can be interpolated: python -m benchmarks.rotation

No such pair is small enough to ship, so one is made of the shipped pair. Its thinking end is trained further under
another rotary base, on its own answers to random sums, until it answers as before. Then every λ is measured under four
rotations: that of either end, and two that change with λ, as the inverse frequencies (1 − λ) f₀ + λ f₁ (linear) or
f₀^(1 − λ) f₁^λ (geometric). A row at λ would need its own rotation; here a batch has one λ, so the model has one.

    accuracy  right answers, greedy, of the shipped pair's held-out questions
    tokens    mean tokens of an answer
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import dami
import torch
from dami.chat import ask, encode
from dami.evaluation.tasks import JsonLines, spread
from dami.evaluation.verifiers import verify
from dami.sources import QUESTIONS
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from benchmarks.machine import commit
from benchmarks.record import RESULTS, store

LAMS = (0.0, 0.25, 0.5, 0.75, 1.0)
ROTATIONS = ("instruct", "thinking", "linear", "geometric")
LENGTH = 160  # tokens of an answer, at most


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=float, default=1e5, help="of the rotary embedding of the new thinking end")
    parser.add_argument("--answers", type=int, default=2000, help="to train on")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    instruct, thinking = (AutoModelForCausalLM.from_pretrained(end).float() for end in dami.example_pair())
    tokenizer = dami.load_pair(*dami.example_pair())[1]
    frequencies = [thinking.model.rotary_emb.inv_freq.clone()]
    other = with_base(thinking, options.base)
    frequencies.append(other.model.rotary_emb.inv_freq.clone())
    train(other, *answered(thinking, tokenizer, options.answers), options.steps)
    common = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "base": options.base,
        "steps": options.steps,
        "questions": options.questions,
    }
    other.config.rope_parameters = (
        instruct.config.rope_parameters
    )  # patch_model compares them; the rotation is set below
    rows = []
    for pair, ends in (("shipped", (instruct, thinking)), ("another base", (instruct, other))):
        model = dami.patch_model(copy.deepcopy(ends[0]), copy.deepcopy(ends[1]))
        for rotation in ROTATIONS if pair != "shipped" else ROTATIONS[:1]:
            for lam in LAMS:
                model.model.rotary_emb.inv_freq = rotated(rotation, lam, *frequencies)
                accuracy, tokens = measured(model, tokenizer, lam, options.questions)
                values = {"lam": lam, "accuracy": round(accuracy, 4), "tokens": round(tokens, 1)}
                rows.append({**common, "pair": pair, "rotation": rotation, **values})
                print(*rows[-1].values(), flush=True)
    store(rows, options.results / "rotation.csv")


def with_base(model: Any, base: float) -> Any:
    """Returns a copy of a model with another rotary base."""
    config = copy.deepcopy(model.config)
    config.rope_parameters = {**config.rope_parameters, "rope_theta": base}
    other = AutoModelForCausalLM.from_config(config).float()
    other.load_state_dict(model.state_dict())
    return other


def answered(model: Any, tokenizer: Any, count: int) -> tuple[Tensor, Tensor]:
    """Returns a model's greedy answers to random sums: tokens [N, T], and whether each is part of an answer."""
    random.seed(1)
    rows = []
    for _ in range(0, count, 100):
        prompts = []
        for _ in range(100):
            terms = [str(random.randint(1, 99)) for _ in range(random.randint(2, 5))]
            chain = "".join(f" {random.choice('+-')} {term}" if i else term for i, term in enumerate(terms))
            prompts.append(f"State the final answer to the following arithmetic problem: {chain} =")
        _, batch = encode(tokenizer, prompts)
        with torch.no_grad():
            out = model.generate(**batch, max_new_tokens=LENGTH, do_sample=False)
        start = batch["input_ids"].shape[1]
        for ids, mask in zip(out, batch["attention_mask"], strict=True):
            prompt, answer = ids[:start][mask.bool()], ids[start:]
            ends = (answer == model.config.eos_token_id).nonzero()
            rows.append((prompt, answer[: int(ends[0]) + 1] if len(ends) else answer))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    wanted = torch.zeros(len(rows), longest, dtype=torch.bool)
    for place, (prompt, answer) in enumerate(rows):
        tokens[place, : len(prompt) + len(answer)] = torch.cat((prompt, answer))
        wanted[place, len(prompt) : len(prompt) + len(answer)] = True
    return tokens, wanted


def train(model: Any, tokens: Tensor, wanted: Tensor, steps: int) -> None:
    """Trains a model to give these answers."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for step in range(steps):
        rows = torch.randint(len(tokens), (16,))
        length = int(wanted[rows].any(0).nonzero().max()) + 1
        ids, answer = tokens[rows, :length], wanted[rows, 1:length]
        loss = cross_entropy(model(ids).logits[:, :-1][answer], ids[:, 1:][answer])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: {loss.item():.3f}", flush=True)
    model.eval()


def rotated(rotation: str, lam: float, instruct: Tensor, thinking: Tensor) -> Tensor:
    """Returns the inverse frequencies of a rotation at λ."""
    if rotation == "linear":
        return instruct.lerp(thinking, lam)
    if rotation == "geometric":
        return instruct.log().lerp(thinking.log(), lam).exp()
    return thinking if rotation == "thinking" else instruct


def measured(model: Any, tokenizer: Any, lam: float, count: int) -> tuple[float, float]:
    """Returns the share of right answers at λ, and the mean number of tokens."""
    asked = spread(JsonLines(QUESTIONS).questions, count)
    prompts = [question.question for question in asked]
    answers = ask(model, tokenizer, prompts, lam, max_new_tokens=LENGTH, do_sample=False)
    right = [verify(q.verifier, a.text, q.answer) for q, a in zip(asked, answers, strict=True)]
    return sum(right) / count, sum(answer.tokens for answer in answers) / count


if __name__ == "__main__":
    main()
