"""Time and memory of packing a pair and of loading it: python -m benchmarks.loading --model Qwen3-4B --ways pack

Random checkpoints of the model's shapes are written to a temporary folder first. Each way runs in a
process of its own, with the files in the system's cache: two models by transformers, for comparison; two checkpoints by
dami.load_pair; the packed pair that dami.pack makes of them. A load is timed until every weight has been read once, as
transformers only maps the files on the CPU.

    seconds   until then
    rss_gb    memory at the peak beyond that before, pages of mapped files included
    own_gb    the same without them: the system takes such pages back when it needs them
    stored_gb what is loaded or written; shard_gb, the largest file of it
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.machine import commit
from benchmarks.record import RESULTS, store, text_table
from benchmarks.weights import KERNEL_FORMATS

# layers, width, inner width and heads of each
MODELS = {"Qwen3-0.6B": (28, 1024, 3072, 16), "Qwen3-4B": (36, 2560, 9728, 32)}
WAYS = ("pack", "two models", "two checkpoints", "packed pair")

TIMED = """
import json, re, sys, threading, time, torch, dami, dami.loading.packing
from transformers import AutoModelForCausalLM as Auto
def memory():
    status = open("/proc/self/status").read()
    return [1024 * int(re.search(name + r":\\s+(\\d+)", status)[1]) for name in ("VmRSS", "RssAnon")]
way, instruct, thinking, packed, format = sys.argv[1:]
before, seen, done = memory(), [memory()], threading.Event()
def watch():
    while not done.wait(0.005):
        seen.append(memory())
watching = threading.Thread(target=watch)
watching.start()
start = time.perf_counter()
if way == "pack":
    dami.pack(instruct, thinking, packed, format)
    models = []
elif way == "two models":
    models = [Auto.from_pretrained(end) for end in (instruct, thinking)]
elif way == "two checkpoints":
    models = [dami.load_pair(instruct, thinking, format)[0]]
else:
    models = [dami.load_pair(packed)[0]]
for parameter in {parameter for model in models for parameter in model.parameters()}:
    parameter.view(-1)[:: 4096 // parameter.element_size()].amax()  # a number of every page
seconds = time.perf_counter() - start
done.set(), watching.join()
seen.append(memory())
print(json.dumps([seconds, *(max(each) - at for each, at in zip(zip(*seen), before))]))
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="Qwen3-0.6B", help="whose shapes")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="the packed pair needs pack before it")
    parser.add_argument("--formats", nargs="+", choices=KERNEL_FORMATS, default=KERNEL_FORMATS)
    parser.add_argument("--repeats", type=int, default=3, help="the quickest counts")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        ends = [write(Path(folder) / name, options.model, seed) for seed, name in enumerate(("instruct", "thinking"))]
        for format in options.formats:
            packed = Path(folder) / format
            for way in options.ways:
                runs = [measure(way, *ends, packed, format) for _ in range(1 if way == "pack" else options.repeats)]
                sizes = [
                    file.stat().st_size
                    for end in (ends if way[:3] == "two" else [packed])
                    for file in end.glob("*.safetensors")
                ]
                rows.append(
                    {
                        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                        "commit": commit(),
                        "threads": torch.get_num_threads(),
                        "model": options.model,
                        "format": format,
                        "way": way,
                        "seconds": f"{min(run[0] for run in runs):.2f}",
                        "rss_gb": f"{max(run[1] for run in runs) / 1e9:.3f}",
                        "own_gb": f"{max(run[2] for run in runs) / 1e9:.3f}",
                        "stored_gb": f"{sum(sizes) / 1e9:.3f}",
                        "shard_gb": f"{max(sizes) / 1e9:.3f}",
                    }
                )
    columns = ("format", "way", "seconds", "rss_gb", "own_gb", "stored_gb", "shard_gb")
    print(text_table([columns, *([row[column] for column in columns] for row in rows)]))
    store(rows, options.results / "loading.csv")


def measure(way: str, instruct: Path, thinking: Path, packed: Path, format: str) -> list[float]:
    """Measures seconds, and peak bytes with and without mapped files."""
    arguments = [way, *map(str, (instruct, thinking, packed)), format]
    done = subprocess.run([sys.executable, "-c", TIMED, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def write(path: Path, model_name: str, seed: int) -> Path:
    """Writes a random checkpoint in shards of 500 MB. Two seeds give ends as far apart as published pairs."""
    layers, width, inner, heads = MODELS[model_name]
    config = Qwen3Config(
        vocab_size=151936, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config).bfloat16()
    model = model.to_empty(device="cpu")
    base, delta = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(i)) for i in (10, 11))
    noise = (0.02 * (base + 0.027 * seed * delta)).bfloat16()  # repeats one block of numbers, for speed
    for parameter in model.parameters():
        parameter.data = noise.repeat(-(-parameter.numel() // len(noise)))[: parameter.numel()].reshape(parameter.shape)
    model.save_pretrained(path, max_shard_size="500MB")
    return path


if __name__ == "__main__":
    main()
