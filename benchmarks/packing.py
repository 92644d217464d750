"""Time and memory that loading and packing a pair takes: python -m benchmarks.packing --layers 36 (Qwen3-4B's shapes).

The checkpoints are random and written to a temporary folder first. Memory is what the process has of its own at the
peak, beyond what it has at the end. Pages of files are not counted: transformers maps the base's file instead of
reading it, and the system takes such pages back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.formats import FORMATS
from benchmarks.machine import commit
from benchmarks.record import RESULTS, store

CODE = """
import json, re, sys, threading, time, torch, dami, dami.checkpoints
own = lambda: 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
seen, done = [own()], threading.Event()
def watch():
    while not done.wait(0.005):
        seen.append(own())
watching = threading.Thread(target=watch)
watching.start()
start = time.perf_counter()
model, _ = dami.load_pair(sys.argv[1], sys.argv[2], format=sys.argv[3])
seconds = time.perf_counter() - start
done.set(), watching.join()
description = dami.describe(model)
weights = sum(row.nbytes and torch.Size(row.shape).numel() for row in description.rows)
extra = max(seen) - seen[-1]
print(json.dumps({"seconds": seconds, "extra": extra, "stored": description.nbytes, "weights": weights}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ends = [write(Path(folder) / name, options.layers, seed) for seed, name in enumerate(("instruct", "thinking"))]
        rows = []
        for format in options.formats:
            done = subprocess.run(
                [sys.executable, "-c", CODE, *ends, format], capture_output=True, text=True, check=True
            )
            used = json.loads(done.stdout)
            rows.append(
                {
                    "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    "commit": commit(),
                    "threads": torch.get_num_threads(),
                    "layers": options.layers,
                    "weights": used["weights"],
                    "format": format,
                    "stored_gb": f"{used['stored'] / 1e9:.3f}",
                    "extra_gb": f"{used['extra'] / 1e9:.3f}",
                    "seconds": f"{used['seconds']:.1f}",
                }
            )
            print(rows[-1])
    store(rows, options.results / "packing.csv")


def write(path: Path, layers: int, seed: int) -> str:
    """A random checkpoint with the shapes of Qwen3-4B; two seeds give ends at the distance of published pairs."""
    config = Qwen3Config(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config).bfloat16()
    model = model.to_empty(device="cpu")
    base, delta = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(i)) for i in (10, 11))
    noise = (0.02 * (base + 0.027 * seed * delta)).bfloat16()  # one block of numbers, again and again: it is quick
    for parameter in model.parameters():
        parameter.data = noise.repeat(-(-parameter.numel() // len(noise)))[: parameter.numel()].reshape(parameter.shape)
    model.save_pretrained(path)
    return str(path)


if __name__ == "__main__":
    main()
