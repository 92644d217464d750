"""Tokens and answers a second of a pair, beside what you would run instead, all in one run on this machine.

Every method answers the same questions, all at once, with the same number of tokens, greedily and without end tokens.
Methods at five λ give them to the questions by turns, the others answer all at λ=0.5. "Copies" are five processes,
each with a merged copy at one λ, a fifth of the questions, and its share of the cores. The client is a process of its
own. Every answer must be that of a plain merged model in float32, up to the rounding of bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from transformers.utils.logging import disable_progress_bar

from benchmarks.check import WrongResult
from benchmarks.machine import Cpu, about
from benchmarks.peers.engines import ENGINES, Job, Missing
from benchmarks.peers.models import Expected, Pair, Question, expected, shipped, smollm2
from benchmarks.record import RESULTS, store, text_table
from benchmarks.serving.server import ROOT

FIVE, ONE = (0.0, 0.25, 0.5, 0.75, 1.0), (0.5,)
WARMUP = 4  # tokens of each answer before the first round


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        engine: a name of `ENGINES`, or "generate" for transformers' `generate` without a server.
        lams: λ of the questions.
        merged: whether merged copies answer, each in a process of its own, instead of the pair.
        dtype: to compute in, as torch calls it.
    """

    engine: str
    lams: tuple[float, ...]
    merged: bool
    dtype: str = "bfloat16"

    @property
    def processes(self) -> int:
        return len(self.lams) if self.merged else 1

    @property
    def title(self) -> str:
        what = "merged copy" if self.merged else "λ"
        return f"{self.engine}, {'one ' + what if len(self.lams) == 1 else 'five ' + what.replace('copy', 'copies')}"


METHODS = {
    "dami": Method("dami serve", FIVE, False),
    "dami-one": Method("dami serve", ONE, False),
    "transformers-copies": Method("transformers serve", FIVE, True),
    "llama-copies": Method("llama.cpp", FIVE, True),
    "llama": Method("llama.cpp", ONE, True),
    "vllm-plugin": Method("vLLM with the plugin", FIVE, False),
    "vllm-float32": Method("vLLM", ONE, True, "float32"),
    "vllm-bfloat16": Method("vLLM", ONE, True),
    "generate-patched": Method("generate", FIVE, False),
    "generate-float32": Method("generate", ONE, True, "float32"),
    "generate-bfloat16": Method("generate", ONE, True),
}
MODELS = {"shipped": shipped, "smollm2": smollm2}


@dataclass(frozen=True)
class Measured:
    """What one method did: the seconds of each round, whether each answer is exactly the oracle's, and the memory."""

    seconds: list[float]
    equal: list[bool]
    memory: int


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=METHODS, default=[*METHODS], metavar="METHOD", help=f"of {', '.join(METHODS)}"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--questions", type=int, default=20, help="all asked at once")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIRECTORY", help="of peers.csv")
    options = parser.parse_args(argv)
    disable_progress_bar()
    facts, failed = about(Cpu()), 0
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            pair = MODELS[name](Path(folder))
            failed += measure_all(pair, options, facts)
    return min(failed, 1)


def measure_all(pair: Pair, options: argparse.Namespace, facts: dict[str, object]) -> int:
    """Measures, stores and prints all methods for one pair. Returns how many failed."""
    print(f"\n{pair.name}, {options.questions} questions, {options.tokens} tokens each", flush=True)
    failed, right, lines = 0, dict[Question, Expected](), list[list[object]]()
    for name in options.only:
        method, load = METHODS[name], os.getloadavg()[0]
        questions = pair.questions(method.lams, options.questions)
        try:
            version = ENGINES["transformers serve" if method.engine == "generate" else method.engine].version()
            right |= expected(pair, [each for each in questions if each not in right], options.tokens)
            start = time.perf_counter()
            found = (generated if method.engine == "generate" else served)(method, pair, questions, right, options)
        except Missing as why:
            print(f"{name} is left out: {why}", flush=True)
            continue
        except (WrongResult, RuntimeError, OSError, subprocess.SubprocessError) as error:
            print(f"{name} FAILED: {error}", flush=True)
            failed += 1
            continue
        rates = [len(questions) / seconds for seconds in found.seconds]
        row = {
            "model": pair.name,
            "method": method.title,
            "engine": version,
            "dtype": method.dtype,
            "lams": len(method.lams),
            "processes": method.processes,
            "questions": len(questions),
            "tokens": options.tokens,
            "repeats": options.repeats,
            "answers_per_second": f"{median(rates):.3f}",
            "lowest": f"{min(rates):.3f}",
            "highest": f"{max(rates):.3f}",
            "tokens_per_second": f"{median(rates) * options.tokens:.1f}",
            "equal": f"{sum(found.equal) / len(found.equal):.2f}",
            "memory_gb": f"{found.memory / 1e9:.2f}",
            "load_before": f"{load:.1f}",
        }
        store([facts | row], options.results / "peers.csv")
        took = time.perf_counter() - start
        print(f"{name}: {row['tokens_per_second']} tokens/s ({took:.0f} s, load before {load:.1f})", flush=True)
        lines.append([name, *(row[key] for key in ("tokens_per_second", "answers_per_second", "equal", "memory_gb"))])
    print(text_table([["method", "tokens/s", "answers/s", "equal to the oracle's", "memory, GB"], *lines]), flush=True)
    return failed


def served(
    method: Method, pair: Pair, questions: list[Question], right: dict[Question, Expected], options: argparse.Namespace
) -> Measured:
    engine, threads = ENGINES[method.engine], max(1, (os.cpu_count() or 1) // method.processes)
    with ExitStack() as stack:
        servers = {}  # by the λ that they are merged at
        for lam in method.lams if method.merged else [None]:
            users = len(questions) if lam is None else sum(question.lam == lam for question in questions)
            servers[lam] = stack.enter_context(engine.start(Job(pair, lam, method.dtype, users, threads)))

        def ask(tokens: int) -> dict[str, Any]:
            chosen = [servers[question.lam if method.merged else None] for question in questions]
            requests = [[server.url, engine.body(each, tokens)] for server, each in zip(chosen, questions, strict=True)]
            return told([str(Path(__file__).with_name("asking.py"))], requests)

        ask(WARMUP)
        rounds = [ask(options.tokens) for _ in range(options.repeats)]
        memory = sum(server.memory() for server in servers.values())
    return checked(rounds, memory, questions, right, options.tokens)


def generated(
    method: Method, pair: Pair, questions: list[Question], right: dict[Question, Expected], options: argparse.Namespace
) -> Measured:
    job = {
        "checkpoints": [str(pair.copy(method.lams[0]))] if method.merged else [*map(str, pair.ends)],
        "lams": None if method.merged else [question.lam for question in questions],
        "dtype": method.dtype,
        "threads": os.cpu_count(),
        "prompts": [question.ids for question in questions],
        "tokens": options.tokens,
        "warmup": WARMUP,
        "repeats": options.repeats,
    }
    found = told(["-m", "benchmarks.peers.generating"], job)
    return checked(found["rounds"], found["memory"], questions, right, options.tokens)


def told(program: list[str], job: Any) -> Any:
    """Runs a program of ours with a job, in JSON, and returns what it prints. Raises RuntimeError if it fails."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}
    command = [sys.executable, *program]
    done = subprocess.run(command, input=json.dumps(job), env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout)


def checked(
    rounds: list[dict[str, Any]], memory: int, questions: list[Question], right: dict[Question, Expected], tokens: int
) -> Measured:
    """Returns what was measured. Raises WrongResult if an answer is wrong or has another number of tokens."""
    equal = []
    for each in rounds:
        for question, answer in zip(questions, each["answers"], strict=True):
            if answer["tokens"] != tokens:
                raise WrongResult(f"an answer has {answer['tokens']} tokens, not {tokens}")
            equal.append(right[question].check(answer["text"]))
    return Measured([each["seconds"] for each in rounds], equal, memory)
