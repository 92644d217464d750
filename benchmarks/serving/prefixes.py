"""What it saves to read prompts at one λ, with the engine of `dami serve` and without HTTP; the shipped pair.

beginning   many requests at twenty λ whose prompts begin alike, all at once
auto        requests one after the other at the λ that the pair's estimator chooses, prompts read at λ=0

mode        of `beginning`, same: prompts at the λ of their answers; λ=0: prompts at 0 except for one token. Of
            `auto`, given: λ is known; before: the estimator reads the prompt by itself; in passing: it looks at
            what the request reads anyway
tokens      that the requests read, answers included, without those that an estimator reads by itself
cpu         seconds of CPU time of the process, with one thread: of all requests of `beginning`, and in the middle
            of those of `auto`
overhead    of the CPU time, over that of the first mode
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import dami
import torch
from dami.generation.batching import StepLoad
from dami.generation.sampling import Sampling
from dami.serving.engine import Auto, Engine, Limits

from benchmarks.machine import Cpu, about
from benchmarks.record import RESULTS, store, text_table
from benchmarks.serving.questions import questions

GREEDY = Sampling(temperature=0)
PROMPT, ANSWER, SHORT = 60, 30, 8  # tokens: of the prompts and answers of `auto`, and of the answers of `beginning`
LAMS = 20


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200, help="of `beginning`")
    parser.add_argument("--common", type=int, default=500, help="tokens with which their prompts begin")
    parser.add_argument("--repeats", type=int, default=40, help="requests of `auto` in each mode")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIRECTORY", help="of serving_prefixes.csv")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    model, tokenizer = dami.load_pair(*dami.example_pair())
    texts = [f"<|user|>{question.text}<|assistant|>" for question in questions(max(options.requests, options.repeats))]
    ends = [tokenizer(text)["input_ids"] for text in texts]
    words = [token for end in ends for token in end] * (1 + options.common // PROMPT)
    common = words[: options.common]
    measured = asyncio.run(beginnings(model, [common + end for end in ends[: options.requests]]))
    measured += asyncio.run(autos(model, [words[place : place + PROMPT] for place in range(options.repeats)]))
    first = {measure: cpu for measure, _, _, _, cpu in reversed(measured)}
    rows = [
        about(Cpu()) | {"threads": 1, "model": "shipped", "measure": measure, "mode": mode, "requests": requests,
        "tokens": tokens, "cpu": f"{cpu:.4f}", "overhead": f"{cpu / first[measure] - 1:.3f}"}
        for measure, mode, requests, tokens, cpu in measured
    ]  # fmt: skip
    store(rows, options.results / "serving_prefixes.csv")
    columns = ("measure", "mode", "requests", "tokens", "cpu", "overhead")
    print(text_table([columns, *([row[column] for column in columns] for row in rows)]))
    return 0


Measured = tuple[str, str, int, int, float]  # measure, mode, requests, tokens, CPU seconds


@dataclass
class Spent:
    """What requests have cost."""

    steps: list[StepLoad] = field(default_factory=list)
    cpu: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(step.tokens for step in self.steps)


@asynccontextmanager
async def spending(engine: Engine) -> AsyncIterator[Spent]:
    """Measures what requests cost inside the block."""
    before, spent = engine.manager.on_step, Spent()
    assert before is not None

    def after_step(step: StepLoad) -> None:
        spent.steps.append(step)
        before(step)

    engine.manager.on_step = after_step
    start = time.process_time()
    yield spent
    spent.cpu = time.process_time() - start
    while not spent.steps or spent.steps[-1].rows:  # until the engine is idle
        await asyncio.sleep(0.01)
    engine.manager.on_step = before


async def answer(engine: Engine, prompt: list[int], lam: float | Auto, tokens: int, read: float | None) -> None:
    sampling: Any = (lambda _: GREEDY) if isinstance(lam, Auto) else GREEDY
    async for _ in engine.submit(prompt, lam, sampling, tokens, frozenset(), read):
        pass


async def beginnings(model: Any, prompts: list[list[int]]) -> list[Measured]:
    measured = []
    lams = [place % LAMS / (LAMS - 1) for place in range(len(prompts))]
    for mode, read in (("same", None), ("λ=0", 0.0)):
        async with Engine(model, Limits(kv_memory=0.5)) as engine, spending(engine) as spent:
            asked = zip(prompts, lams, strict=True)
            await asyncio.gather(*(answer(engine, prompt, lam, SHORT, read) for prompt, lam in asked))
        measured.append(("beginning", mode, len(prompts), spent.tokens, spent.cpu))
    return measured


async def autos(model: Any, prompts: list[list[int]]) -> list[Measured]:
    """The modes take turns, so that whatever else the machine does meets all of them."""
    found: dict[str, list[Spent]] = {"given": [], "before": [], "in passing": []}
    async with Engine(model, Limits(kv_memory=0.1, share_prefixes=False)) as engine:
        for prompt in prompts:
            known = await engine.estimate(prompt)
            for mode, each in found.items():
                async with spending(engine) as spent:
                    lam = await engine.estimate(prompt) if mode == "before" else known
                    await answer(engine, prompt, Auto(-1.0, 2.0) if mode == "in passing" else lam, ANSWER, 0.0)
                each.append(spent)
    return [
        ("auto", mode, len(each), each[0].tokens, median(spent.cpu for spent in each)) for mode, each in found.items()
    ]


if __name__ == "__main__":
    raise SystemExit(main())
