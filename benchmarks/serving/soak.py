"""Whether `dami serve` stays up: thousands of requests in random order, of which some are abandoned, wrong or giant.

    ordinary    a question, whole or as a stream; half of them with prompts read at λ=0
    giant       a prompt as long as the server takes, for two tokens
    leaving     a long answer, whose client leaves within half a second
    wrong       invalid in one of many ways

After these, small requests come one by one, alone and beside giant ones; then more requests at once than the server
takes; then long answers, during which it gets SIGTERM.

    answered, lost      ordinary and giant requests with status 200, and with any other
    wrong, other        wrong requests with status 400 to 499, and with any other
    memory_mb, growth   of the server after a tenth of the requests and at the end, and by what share it has grown: the
                        KV cache fills up in the first tenth
    held                share of the KV cache that is held when all have ended
    small_p95           seconds of a small request alone; beside_p95, beside giant ones
    at_once, refused    requests at once, and how many of them got a 429, each with Retry-After
    drained, exit       long answers that came whole after SIGTERM, and the server's exit status
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import gevent
from gevent.pool import Pool

from benchmarks.record import RESULTS, store, text_table
from benchmarks.serving.client import Body, chat
from benchmarks.serving.faults import LONG, WRONG, connected
from benchmarks.serving.questions import questions
from benchmarks.serving.server import Server, about, quantile, serving

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SHARES = {"ordinary": 70, "giant": 2, "leaving": 14, "wrong": 14}
LAMS = (0.0, 0.25, 0.5, 0.75, 1.0)
MOST = 128  # sequences at once
DRAINED = 16  # long answers under way at SIGTERM


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=24, help="at once")
    parser.add_argument("--growth", type=float, default=0.05, help="the largest share by which memory may grow")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    with serving("--max-requests", str(MOST), "--kv-memory", "0.1", "--drain", "60") as server:
        row = about() | {"requests": options.requests, "clients": options.clients}
        row |= soak(server, options.requests, options.clients) | fairness(server) | overload(server) | drain(server)
    print(text_table([(name, value) for name, value in row.items()]))
    store([row], options.results / "serving_soak.csv")
    faults = ("lost", "other", "held", "exit")
    grown = float(str(row["growth"])) > options.growth
    return int(grown or any(row[name] for name in faults) or row["drained"] != DRAINED or not row["refused"])


def post(server: Server, path: str, body: Body) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Returns the status, headers and content of a response. Raises OSError or HTTPException if it does not come."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=300)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def giant(server: Server, chance: random.Random) -> Body:
    """Returns a prompt as long as the server takes, in token ids, which begins as no other."""
    most = server.get("/v1/models")["data"][0]["max_model_len"]
    return {"prompt": [chance.randrange(100, 700) for _ in range(most - 2)], "max_tokens": 2, "intensity": 0.5}


def soak(server: Server, requests: int, clients: int) -> dict[str, object]:
    """Sends all kinds of requests in random order."""
    chance, asked, counts = random.Random(0), questions(100), Counter[str]()
    memory: list[int] = []
    long_prompts = [giant(server, chance) for _ in range(8)]

    def one(kind: str, number: int) -> None:
        if kind == "leaving":
            with connected(server.url, LONG, reset=number % 3 > 0):
                gevent.sleep(number % 50 / 100)
            return
        path, body = CHAT, ordinary(number)
        if kind == "giant":
            path, body = COMPLETIONS, long_prompts[number % len(long_prompts)]
        if kind == "wrong":
            with connected(server.url, WRONG[number % len(WRONG)]) as connection:
                status = int(connection.makefile("rb").readline().split()[1])
            counts["wrong" if 400 <= status < 500 else "other"] += 1
            return
        try:
            status, _, content = post(server, path, body)
            whole = content.endswith(b"data: [DONE]\n\n") if body.get("stream") else bool(json.loads(content))
        except (OSError, http.client.HTTPException, ValueError):
            status, whole = 0, False
        counts["answered" if status == 200 and whole else "lost"] += 1

    def ordinary(number: int) -> Body:
        read = {"prompt_intensity": 0.0} if number % 2 else {}
        question, lam = asked[number % len(asked)].text, LAMS[number % len(LAMS)]
        return chat(question, intensity=lam, max_tokens=24, stream=number % 3 == 0, **read)

    pool, start = Pool(clients), time.perf_counter()
    for number, kind in enumerate(chance.choices([*SHARES], [*SHARES.values()], k=requests)):
        if number == requests // 10:
            memory.append(server.memory())
        pool.spawn(one, kind, number)
    pool.join(raise_error=True)
    server.wait_until_idle()
    memory.append(server.memory())
    return {
        "seconds": f"{time.perf_counter() - start:.0f}",
        **{name: counts[name] for name in ("answered", "lost", "wrong", "other")},
        "memory_mb": f"{memory[0] / 1e6:.0f} to {memory[1] / 1e6:.0f}",
        "growth": f"{memory[1] / memory[0] - 1:.3f}",
        "held": server.metrics()["dami_kv_cache_usage_ratio"],
    }


def fairness(server: Server) -> dict[str, object]:
    """Measures small requests alone, and beside giant ones."""
    chance = random.Random(1)

    def small() -> float:
        seconds = []
        for number in range(30):
            start = time.perf_counter()
            post(server, CHAT, chat(f"{number} + 5 =", intensity=0.5, max_tokens=8, ignore_eos=True))
            seconds.append(time.perf_counter() - start)
        return quantile(seconds, 0.95)

    def giants() -> None:
        while True:
            post(server, COMPLETIONS, giant(server, chance))

    alone = small()
    beside = [gevent.spawn(giants) for _ in range(4)]
    among = small()
    gevent.killall(beside)
    server.wait_until_idle()
    return {"small_p95": f"{alone:.2f}", "beside_p95": f"{among:.2f}"}


def overload(server: Server) -> dict[str, object]:
    """Sends more requests at once than the server takes. Raises RuntimeError for an answer that should not come."""
    body = chat("gcd(84, 36)", intensity=1.0, ignore_eos=True, max_tokens=48)
    sent = [gevent.spawn(post, server, CHAT, body) for _ in range(2 * MOST)]
    answers = [job.value for job in gevent.joinall(sent, raise_error=True)]
    for status, headers, content in answers:
        if status not in (200, 429) or (status == 429 and not headers["Retry-After"]):
            raise RuntimeError(f"status {status} under overload: {content[:200]!r}")
    server.wait_until_idle()
    return {"at_once": len(answers), "refused": sum(status == 429 for status, *_ in answers)}


def drain(server: Server) -> dict[str, object]:
    """Sends SIGTERM during long answers, which must come whole; new connections must be refused."""
    body = chat("gcd(84, 36)", intensity=1.0, ignore_eos=True, max_tokens=200, stream=True)
    sent = [gevent.spawn(post, server, CHAT, body) for _ in range(DRAINED)]
    while server.metrics()["dami_requests_running"] < DRAINED:
        gevent.sleep(0.05)
    os.killpg(server.process.pid, signal.SIGTERM)
    whole = sum(job.value[2].endswith(b"data: [DONE]\n\n") for job in gevent.joinall(sent, raise_error=True))
    return {"drained": whole, "exit": server.process.wait(60)}


if __name__ == "__main__":
    raise SystemExit(main())
