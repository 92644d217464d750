"""Where the time of a step of `dami serve` goes: the engine without HTTP, many rows at five λ by turns, decoding.

The CPU's time of the generating thread per step is divided by what py-spy (`pip install '.[load]'`) sees it do, 500
times a second. What compiled code computes counts for the line of Python that calls it.

    python -m benchmarks.serving.steps
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median

import dami
import torch
from dami.generation.batching import StepLoad
from dami.generation.sampling import Sampling
from dami.serving.engine import Engine, Limits

from benchmarks.machine import Cpu, about
from benchmarks.record import RESULTS, store, text_table
from benchmarks.serving.questions import questions

LAMS = (0.0, 0.25, 0.5, 0.75, 1.0)
PARTS = {  # the first of these that is in the path of the file
    "dami_kernels/ops/direct": "our kernels, with the check of their operands",
    "dami_kernels/native": "attention, with its products",
    "dami_kernels/": "around the kernels: is anybody watching?",
    "dami/layers": "patched modules: λ and both ends",
    "dami/generation/attention": "attention, with its products",
    "dami/generation/sampling": "sampling",
    "continuous_batching/cache": "transformers: the KV cache",
    "continuous_batching": "transformers: batching",
    "transformers/": "transformers: the model, with its activations and rotations",
    "dami/": "the rest of dami",
}
REST = "torch: calling modules and functions"
RATE = 500  # samples a second


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=48, help="of each row")
    parser.add_argument("--repeats", type=int, default=5, help="without a profiler")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIRECTORY", help="of serving_steps.csv")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # so that the thread's time is all there is
    model, tokenizer = dami.load_pair(*dami.example_pair())
    texts = [f"<|user|>{question.text}<|assistant|>" for question in questions(options.rows)]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    engine = Engine(model, Limits(kv_memory=0.25, share_prefixes=False))
    seconds, samples = asyncio.run(measure(engine, prompts, options.tokens, options.repeats))
    whole, parts = median(seconds), parts_of(samples)
    facts = about(Cpu()) | {"threads": 1, "model": "shipped", "rows": options.rows, "samples": parts.total()}
    shares = {"whole": 1.0} | {part: count / parts.total() for part, count in parts.most_common()}
    rows = [facts | {"part": part, "ms": f"{1e3 * whole * x:.2f}", "share": f"{x:.3f}"} for part, x in shares.items()]
    store(rows, options.results / "serving_steps.csv")
    print(text_table([("part", "ms", "share"), *((row["part"], row["ms"], row["share"]) for row in rows)]))
    return 0


async def measure(engine: Engine, prompts: list[list[int]], tokens: int, repeats: int) -> tuple[list[float], list[str]]:
    """Returns the seconds of each step, and py-spy's lines: a stack of calls, and how often it was seen."""
    seconds, moments = list[float](), list[float]()

    async def answer() -> None:
        moments.clear()
        rows = [
            engine.submit(prompt, LAMS[i % len(LAMS)], Sampling(temperature=0), tokens, frozenset())
            for i, prompt in enumerate(prompts)
        ]
        for row in rows:
            async for _ in row:
                pass

    async with engine:
        hand_over = engine.manager.on_step
        assert hand_over is not None

        def after_step(step: StepLoad) -> None:
            """Runs in the generating thread. Only steps in which all rows decode count."""
            hand_over(step)
            if step.rows == step.tokens == len(prompts):
                moments.append(time.thread_time())

        engine.manager.on_step = after_step
        await answer()
        for _ in range(repeats):
            await answer()
            seconds += [after - before for before, after in pairwise(moments)]
        with tempfile.NamedTemporaryFile("r") as file:
            with watched_into(file.name):
                for _ in range(repeats):
                    await answer()
            samples = file.read().splitlines()
    return seconds, samples


@contextmanager
def watched_into(file: str) -> Iterator[None]:
    """Lets py-spy watch this process meanwhile, and write what it sees to a file."""
    program = shutil.which("py-spy", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        raise SystemExit("py-spy is needed: pip install '.[load]'")
    options = {"--pid": os.getpid(), "--rate": RATE, "--format": "raw", "--output": file, "--duration": 3600}
    command = [program, "record", "--nonblocking", *(str(part) for option in options.items() for part in option)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        time.sleep(2)  # until it watches
        yield
        process.send_signal(signal.SIGINT)


def parts_of(samples: list[str]) -> Counter[str]:
    """Returns how often the generating thread was seen in each part."""
    found = Counter[str]()
    for line in samples:
        stack, _, count = line.rpartition(" ")
        *_, last = stack.split(";")
        if "_generation_loop_body" in stack and "threading.py" not in last:  # where it waits
            found[part_of(last)] += int(count)
    return found


def part_of(function: str) -> str:
    return next((part for place, part in PARTS.items() if place in function), REST)


if __name__ == "__main__":
    raise SystemExit(main())
