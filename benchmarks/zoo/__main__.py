"""Trains the zoo, small pairs that rules for λ are chosen and reported on: python -m benchmarks.zoo [PAIR]...

Each pair is a folder with an instruct and a thinking end, `questions.jsonl` to measure with, and `known.jsonl`, other
questions for estimators. Whatever is there already stays, so that a run goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from benchmarks.zoo import ZOO
from benchmarks.zoo.recipes import ANCESTORS, PAIRS, Pair
from benchmarks.zoo.tasks import HELD_OUT, KNOWN, distinct
from benchmarks.zoo.train import fit, new_model, save, tokenizer

QUESTIONS, FOR_ESTIMATORS = 240, 360


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", choices=[*PAIRS, []], help="which pairs (default: all)")
    parser.add_argument("--out", type=Path, default=ZOO, help="folder of the zoo (default: %(default)s)")
    options = parser.parse_args(argv)
    for name in options.pairs or PAIRS:
        make(name, PAIRS[name], options.out)


def make(name: str, pair: Pair, out: Path) -> None:
    """Trains what a pair lacks, and draws its questions."""
    words, folder = tokenizer(), out / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, buckets, count in (("questions", HELD_OUT, QUESTIONS), ("known", KNOWN, FOR_ESTIMATORS)):
        drawn = distinct(pair.tasks, count, random.Random(0), pair.instruct.facts, buckets)
        lines = [
            {"task": q.task, "level": q.level, "question": q.prompt, "answer": q.answer, "verifier": "word"}
            for q in drawn
        ]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    instruct, thinking = folder / "instruct", folder / "thinking"
    if not instruct.exists():
        model = ancestor(pair.ancestor, words, out)
        fit(model, pair.instruct, words, seed_of(f"{name} instruct"), f"{name}, instruct")
        save(model, words, instruct)
    if not thinking.exists():
        start = adapted(instruct, pair.rank, name) if pair.rank else ancestor(pair.other or pair.ancestor, words, out)
        fit(start, pair.thinking, words, seed_of(f"{name} thinking"), f"{name}, thinking")
        save(start, words, thinking)


def adapted(instruct: Path, rank: int, name: str) -> Any:
    """Returns the instruct end with an untrained LoRA adapter."""
    from peft import LoraConfig, get_peft_model  # optional

    torch.manual_seed(seed_of(f"{name} adapter"))
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=rank, lora_alpha=2 * rank)
    return get_peft_model(Qwen3ForCausalLM.from_pretrained(instruct), lora)


def ancestor(name: str, words: PreTrainedTokenizerFast, out: Path) -> Qwen3ForCausalLM:
    """Loads an ancestor, and trains it first if it is not there."""
    directory = out / "ancestors" / name.replace(" ", "-")
    if not directory.exists():
        model = new_model(words, seed_of(name))
        fit(model, ANCESTORS[name], words, seed_of(f"{name} questions"), f"ancestor {name}")
        directory.parent.mkdir(parents=True, exist_ok=True)
        save(model, words, directory)
    return Qwen3ForCausalLM.from_pretrained(directory)


def seed_of(name: str) -> int:
    """Returns a seed for each name, the same in every process."""
    return zlib.crc32(name.encode())


if __name__ == "__main__":
    main()
