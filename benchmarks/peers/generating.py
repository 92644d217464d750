"""transformers' `generate` in a process of its own: one batch of all questions, by a merged copy or a patched pair.

Reads a job from standard input, in JSON, and prints what `asking.py` does, for each round, and the process's memory.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import dami
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.models import padded


def model_of(job: dict[str, Any]) -> Any:
    dtype = getattr(torch, job["dtype"])
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval() for path in job["checkpoints"]]
    return models[0] if job["lams"] is None else dami.patch_model(*models)


@torch.inference_mode()
def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    model, tokenizer = model_of(job), AutoTokenizer.from_pretrained(job["checkpoints"][0])
    inputs = padded(job["prompts"])
    if job["lams"] is not None:
        inputs["intensity"] = job["lams"]

    def answers(tokens: int) -> Any:
        return model.generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)

    answers(job["warmup"])
    rounds = []
    for _ in range(job["repeats"]):
        start = time.perf_counter()
        ids = answers(job["tokens"])[:, inputs["input_ids"].shape[1] :]
        seconds = time.perf_counter() - start
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        rounds.append({"seconds": seconds, "answers": [{"text": text, "tokens": ids.shape[1]} for text in texts]})
    rollup = Path("/proc/self/smaps_rollup").read_text()
    memory = 1024 * int(rollup.partition("\nPss:")[2].split()[0])
    json.dump({"rounds": rounds, "memory": memory}, sys.stdout)


if __name__ == "__main__":
    main()
