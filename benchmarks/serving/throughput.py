"""Answers and tokens a second at many λ in one process, at one λ, and with one process for each λ, and the memory.

The same questions are asked greedily, by so many users at once: in `mixed` and `processes` at five λ by turns, in
`one λ` at λ=0.5. None is asked twice, so that no prompt is cached but for its beginning. Of `processes`, each serves
one λ, has a fifth of the users and of the KV cache, and its part of the cores. The pair is the shipped one, or as
`--serve` says:

    python -m benchmarks.serving.throughput --users 25 --questions 50 --max-tokens 48 --serve PAIR --dtype bfloat16

    memory_gb  of all server processes after the last answer; what they share is counted once
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import gevent

from benchmarks.record import RESULTS, store, text_table
from benchmarks.serving.client import Said, ask, chat
from benchmarks.serving.questions import questions
from benchmarks.serving.server import about, quantile, serving

LAMS = (0.0, 0.25, 0.5, 0.75, 1.0)
MODES = ("mixed", "one λ", "processes")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer (%(default)s)")
    parser.add_argument("--kv-memory", type=float, default=0.5, help="GiB of the KV cache, of all processes together")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="all that follows is for dami serve")
    options = parser.parse_args(argv)
    asked = [question.text for question in questions(options.questions)]
    rows = [
        measure(mode, asked, options.max_tokens, options.users, options.kv_memory, options.serve)
        for mode in options.modes
    ]
    columns = (
        "model",
        "mode",
        "processes",
        "answers_per_second",
        "tokens_per_second",
        "tokens",
        "p50",
        "p95",
        "memory_gb",
    )
    print(text_table([columns, *([row[column] for column in columns] for row in rows)]))
    store(rows, options.results / "serving_throughput.csv")
    return 0


def measure(
    mode: str, questions: Sequence[str], max_tokens: int, users: int, kv_memory: float, serve: Sequence[str]
) -> dict[str, object]:
    cores = os.cpu_count() or 1
    shares = len(LAMS) if mode == "processes" else 1
    threads = max(1, cores // shares)
    asked = [
        chat(text, intensity=0.5 if mode == "one λ" else LAMS[i % len(LAMS)], temperature=0, max_tokens=max_tokens)
        for i, text in enumerate(questions)
    ]
    bodies = [asked[i::shares] for i in range(shares)]
    with ExitStack() as stack:
        options = (*serve, "--kv-memory", str(kv_memory / shares))
        servers = [stack.enter_context(serving(*options, threads=threads)) for _ in range(shares)]
        for server in servers:
            ask(server.url, [chat("2 + 2 =", max_tokens=1)])
        start = time.perf_counter()
        jobs = [
            gevent.spawn(ask, server.url, part, users // shares) for server, part in zip(servers, bodies, strict=True)
        ]
        said: list[Said] = [answer for job in gevent.joinall(jobs, raise_error=True) for answer in job.value[0]]
        seconds = time.perf_counter() - start
        memory = sum(server.memory() for server in servers)
        model = servers[0].get("/v1/models")["data"][0]["id"]
    if lost := [answer.error for answer in said if answer.error]:
        raise RuntimeError(f"{len(lost)} of {len(said)} answers did not come: {lost[0]}")
    tokens = sum(answer.tokens for answer in said)
    return {
        **about(threads),
        "model": model,
        "mode": mode,
        "processes": shares,
        "users": users,
        "answers": len(said),
        "answers_per_second": f"{len(said) / seconds:.2f}",
        "tokens_per_second": f"{tokens / seconds:.0f}",
        "tokens": f"{tokens / len(said):.1f}",
        "p50": f"{quantile([answer.seconds for answer in said], 0.5):.2f}",
        "p95": f"{quantile([answer.seconds for answer in said], 0.95):.2f}",
        "memory_gb": f"{memory / 1e9:.2f}",
    }


if __name__ == "__main__":
    raise SystemExit(main())
