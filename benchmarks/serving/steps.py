"""Where the time of a step of `dami serve` goes: the engine without HTTP, many rows at five λ by turns, decoding.

First without a profiler: the CPU's time of the generating thread, per step. Then under one, which slows down Python but
no kernel: each part's share of that thread's time. What torch and the kernels compute counts where they are called.

    python -m benchmarks.serving.steps
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import dami
import torch
from dami.generation.batching import StepLoad
from dami.generation.sampling import Sampling
from dami.serving.engine import Engine, Limits

from benchmarks.machine import Cpu, about
from benchmarks.record import RESULTS, store, text_table
from benchmarks.serving.questions import questions

LAMS = (0.0, 0.25, 0.5, 0.75, 1.0)
PARTS = {  # the first of these that is in a function's file or name
    "dami_kernels._C": "our kernels",
    "dami_kernels": "calling our kernels",
    "dami/layers": "patched modules",
    "dami/generation/attention": "attention",
    "dami/generation/sampling": "sampling",
    "continuous_batching/cache": "transformers: the KV cache",
    "continuous_batching": "transformers: batching",
    "transformers/": "transformers: the model",
    "dami/": "the rest of dami",
}
REST = "torch and Python: calling modules"


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
    seconds, shares = asyncio.run(measure(engine, prompts, options.tokens, options.repeats))
    whole = 1e3 * median(seconds)
    parts = [("whole", whole)] + [(part, whole * share) for part, share in shares.most_common()]
    facts = about(Cpu()) | {"threads": 1, "model": "shipped", "rows": options.rows}
    rows = [facts | {"part": part, "ms": f"{ms:.3f}", "share": f"{ms / whole:.3f}"} for part, ms in parts]
    store(rows, options.results / "serving_steps.csv")
    print(text_table([("part", "ms", "share"), *((row["part"], row["ms"], row["share"]) for row in rows)]))
    return 0


async def measure(
    engine: Engine, prompts: list[list[int]], tokens: int, repeats: int
) -> tuple[list[float], Counter[str]]:
    """Returns the seconds of each step without a profiler, and each part's share of the time under one."""
    seconds, moments, profile = list[float](), list[float](), cProfile.Profile(time.thread_time)
    profiled = False

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
                if profiled and len(moments) == 2:
                    profile.enable()
                if profiled and len(moments) == tokens // 2:
                    profile.disable()

        engine.manager.on_step = after_step
        await answer()
        for _ in range(repeats):
            await answer()
            seconds += [after - before for before, after in pairwise(moments)]
        profiled = True
        await answer()
    return seconds, shares_of(pstats.Stats(profile))


def shares_of(stats: Any) -> Counter[str]:
    """Returns the share of the profiled time of each part. Compiled functions count for the Python that calls them."""
    found: Counter[str] = Counter()
    for (file, _, name), (_, _, own, _, callers) in stats.stats.items():
        if file == "~" and "dami_kernels._C" not in name:
            for (caller, _, caller_name), (_, _, share, _) in callers.items():
                found[part_of(f"{caller} {caller_name}")] += share
        else:
            found[part_of(f"{file} {name}")] += own
    total = found.total()
    return Counter({part: seconds / total for part, seconds in found.items()})


def part_of(function: str) -> str:
    return next((part for place, part in PARTS.items() if place in function), REST)


if __name__ == "__main__":
    raise SystemExit(main())
