"""Two replicas behind HAProxy, as deploy/haproxy.cfg has them: what begins alike is read once, and one may die."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from dami.serving.engine import PAGE

from benchmarks.serving.server import Server, free_port, serving, started
from tests.dami.serving.test_server import until

HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
CONFIG = Path(__file__).resolve().parents[3] / "deploy/haproxy.cfg"
LAMS = (0.0, 0.4, 0.7, 1.0)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAPROXY, reason="no HAProxy: on Debian or Ubuntu, apt install haproxy"),
]


@pytest.fixture
def replicas() -> Iterator[list[Server]]:
    options = ("--invariant", "--prompt-intensity", "0", "--kv-memory", "0.1")
    with serving(*options, threads=1, well=False) as one, serving(*options, threads=1, well=False) as two:
        yield [one, two]


@contextmanager
def routed(replicas: list[Server], directory: Path, affinity: bool = True) -> Iterator[Server]:
    """HAProxy before the replicas."""
    port, text = free_port(), CONFIG.read_text()
    addresses = [replica.url.removeprefix("http://") for replica in replicas]
    for place, address in zip((8000, 8001, 8002), (f"127.0.0.1:{port}", *addresses), strict=True):
        assert text.count(f"127.0.0.1:{place}") == 1
        text = text.replace(f"127.0.0.1:{place}", address)
    file = directory / f"haproxy-{port}.cfg"
    file.write_text(text if affinity else text.replace("balance hash var(txn.beginning)", "balance roundrobin"))
    assert HAPROXY is not None
    with started([HAPROXY, "-W", "-f", str(file)], {}, port, 30) as router:
        yield router


def body(talk: str, lam: float, **options: Any) -> dict[str, Any]:
    message = {"role": "user", "content": f"{talk}: what is 42 + 69 - 18 + 47 + 5 - 36 + 12?"}
    return {"messages": [message], "intensity": lam, "temperature": 0, "max_tokens": 40} | options


def asked(url: str, talk: str, lam: float) -> Any:
    """What comes from a server, which must answer at the first try."""
    response = httpx.post(f"{url}/v1/chat/completions", json=body(talk, lam), timeout=60)
    return response.raise_for_status().json()


def test_what_begins_alike_is_read_once_at_any_lam(replicas: list[Server], tmp_path: Path) -> None:
    """Turn by turn instead, each replica reads it."""
    cached = {}
    for affinity, names in ((True, "ABCDEFG"), (False, "HIJKLMN")):  # an odd number, so that turns change replicas
        with routed(replicas, tmp_path, affinity) as router:
            answers = {(name, lam): asked(router.url, name, lam) for lam in LAMS for name in names}
        for (name, lam), answer in answers.items():
            assert answer["choices"] == asked(replicas[0].url, name, lam)["choices"]
        usage = {key: answer["usage"] for key, answer in answers.items()}
        cached[affinity] = [usage[key]["prompt_tokens_details"]["cached_tokens"] for key in usage]
        if affinity:
            [whole] = {(each["prompt_tokens"] - 1) // PAGE * PAGE for each in usage.values()}
            assert cached[True] == [0] * len(names) + [whole] * (len(LAMS) - 1) * len(names)
            assert all(replica.metrics()["dami_prompt_tokens_total"] for replica in replicas)
    assert sum(cached[False]) < sum(cached[True])


def test_a_replica_may_die(replicas: list[Server], tmp_path: Path) -> None:
    """Who waits for a whole answer does not notice: the router asks the other one. Who reads a stream sees it break."""
    keys = [(name, lam) for name in "ABCDEFGH" for lam in LAMS]
    broken: list[tuple[str, float]] = []

    def streamed(url: str, name: str, lam: float) -> str:
        try:
            with httpx.stream(
                "POST", f"{url}/v1/chat/completions", json=body(name, lam, stream=True), timeout=60
            ) as response:
                lines = [line.removeprefix("data: ") for line in response.raise_for_status().iter_lines() if line]
        except httpx.RemoteProtocolError:
            broken.append((name, lam))
            return streamed(url, name, lam)
        assert lines.pop() == "[DONE]"
        deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
        return "".join(delta.get("reasoning_content", "") + delta.get("content", "") for delta in deltas)

    with routed(replicas, tmp_path) as router, ThreadPoolExecutor(16) as clients:
        both = [[clients.submit(ask, router.url, *key) for ask in (streamed, asked)] for key in keys]
        until(lambda: replicas[1].metrics()["dami_requests_running"] > 2)
        os.killpg(replicas[1].process.pid, signal.SIGKILL)
        for key, (stream, whole) in zip(keys, both, strict=True):
            message = asked(replicas[0].url, *key)["choices"][0]["message"]
            assert whole.result(60)["choices"][0]["message"] == message
            assert stream.result(60) == message.get("reasoning_content", "") + message["content"]
        assert broken
