"""What clients can do to a running server: come by the dozen, leave, not read. Nobody else notices."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import Event, Thread
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from benchmarks.serving.server import Server
from tests.dami.serving.conftest import KEY

HEADERS = {"Authorization": f"Bearer {KEY}"}
SECONDS = 90  # that anything may take
QUESTIONS = ("gcd(84, 36)", "47 + 38 - 12 =", "gcd(77, 53)", "8 + 3 + 1 - 4 - 9 =", "53 + 33 + 64 =")
LAMS = (0.0, 0.5, 1.0)


def chat(question: str, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], **options}


ASKED = [chat(question, intensity=lam, temperature=0) for question in QUESTIONS for lam in LAMS]
LONG = chat("gcd(84, 36)", intensity=1.0, ignore_eos=True, max_tokens=500, stream=True)


async def streamed(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[float, str, str]:
    """λ, thought and text of an answer, which must come whole."""
    thought, text = "", ""
    async with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        lines = [line async for line in response.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    for chunk in chunks:
        [choice] = chunk["choices"]
        thought += choice["delta"].get("reasoning_content", "")
        text += choice["delta"].get("content", "")
    assert choice["finish_reason"] in ("stop", "length")
    assert len({(chunk["id"], chunk["intensity"]) for chunk in chunks}) == 1
    return chunks[0]["intensity"], thought, text


def answers(server: Server, bodies: Sequence[dict[str, Any]], together: bool = True) -> list[tuple[float, str, str]]:
    async def ask() -> list[tuple[float, str, str]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, headers=HEADERS, timeout=SECONDS, limits=limits) as client:
            if together:
                return await asyncio.gather(*(streamed(client, body) for body in bodies))
            return [await streamed(client, body) for body in bodies]

    return asyncio.run(ask())


@pytest.fixture(scope="module")
def alone(server: Server) -> list[tuple[float, str, str]]:
    """The answers to ASKED, one after the other."""
    return answers(server, ASKED, together=False)


@contextmanager
def connected(server: Server, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A connection over which a request has been sent, with next to no room for what is not read."""
    where, content = urlsplit(server.url), json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {where.netloc}\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connection.settimeout(SECONDS)
        connection.connect((where.hostname, where.port))
        connection.sendall(head.encode() + content)
        yield connection


def server_errors(server: Server) -> float:
    counts = (value for name, value in server.metrics().items() if 'status="5' in name and "_total" in name)
    return sum(counts)


@contextmanager
def one_goes_on(server: Server) -> Iterator[None]:
    """Asks LONG before what happens inside, and checks that nothing of that is under way when its answer ends.

    Its tokens come in step with all others', so requests like it that came later and were not cancelled would go on.
    """
    begun, busy, alone_at_last = Event(), Event(), Event()

    def read() -> None:
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json=LONG, headers=HEADERS, timeout=SECONDS
        ) as response:
            for line in response.iter_lines():
                begun.set()
                if line == "data: [DONE]":
                    busy.set()

    reading = Thread(target=read)
    reading.start()
    try:
        assert begun.wait(SECONDS)
        yield
        while not busy.is_set() and not alone_at_last.is_set():
            found = server.metrics()
            if found["dami_requests_running"] <= 1 and not found["dami_requests_waiting"]:
                alone_at_last.set()
    finally:
        reading.join()
    assert busy.is_set(), "its own answer did not come whole"
    assert alone_at_last.is_set(), "what was given up went on"
    server.wait_until_idle(SECONDS)


def test_many_streams_at_once_are_those_asked_alone(server: Server, alone: list[tuple[float, str, str]]) -> None:
    assert len(set(alone)) > len(QUESTIONS)
    assert [lam for lam, _, _ in alone] == [*LAMS] * len(QUESTIONS)
    assert answers(server, ASKED * 4) == alone * 4


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave_free_their_blocks(server: Server, stream: bool) -> None:
    with one_goes_on(server), ExitStack() as clients:
        for place in range(20):
            connection = clients.enter_context(connected(server, LONG | {"stream": stream}))
            if place % 2:  # without a farewell
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if stream and place % 3:  # the others leave before an answer has begun
                connection.recv(1000)
        clients.close()


def test_clients_that_do_not_read_hold_up_nobody(server: Server, alone: list[tuple[float, str, str]]) -> None:
    with ExitStack() as clients:
        for _ in range(8):
            clients.enter_context(connected(server, LONG | {"max_tokens": 200, "n": 4}))
        assert answers(server, ASKED) == alone
    server.wait_until_idle(SECONDS)


def test_one_who_reads_slowly_loses_nothing(server: Server) -> None:
    quick = answers(server, [ASKED[2]])[0]
    with connected(server, ASKED[2] | {"stream": True}) as connection:
        received = b""
        while not received.rstrip().endswith((b"[DONE]", b"0")):
            received += connection.recv(64)
    thought = "".join(
        json.loads(line[6:])["choices"][0]["delta"].get("reasoning_content", "")
        for line in received.decode().splitlines()
        if line.startswith("data: {")
    )
    assert thought == quick[1]


def test_a_storm_of_requests_that_are_given_up_stalls_nothing(
    server: Server, alone: list[tuple[float, str, str]]
) -> None:
    async def storm() -> list[tuple[float, str, str]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, headers=HEADERS, timeout=SECONDS, limits=limits) as client:
            given_up = [asyncio.create_task(streamed(client, LONG)) for _ in range(60)]
            kept = [asyncio.create_task(streamed(client, body)) for body in ASKED]
            for place, task in enumerate(given_up):
                await asyncio.sleep(0.01 * (place % 3))
                task.cancel()
            await asyncio.gather(*given_up, return_exceptions=True)
            return await asyncio.gather(*kept)

    with one_goes_on(server):
        assert asyncio.run(storm()) == alone


def test_after_all_that_the_server_has_no_error_of_its_own(server: Server, alone: list[tuple[float, str, str]]) -> None:
    assert server_errors(server) == 0
    assert server.get("/health") == {"status": "ok", "waiting": 0, "running": 0, "kv_cache_usage": 0.0}
    assert answers(server, ASKED[:2]) == alone[:2]
