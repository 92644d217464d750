"""Nothing that a client sends holds the event loop, or the interpreter, for more than 50 ms.

Measured is processor time, which a busy machine does not change: of each callback in the loop's thread, and of what
keeps the interpreter to itself in another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import threading
import time
from collections.abc import Iterator
from types import FunctionType, SimpleNamespace
from typing import Any

import httpx
import pytest
from dami.generation.courses import Course
from dami.serving.active import ActiveChoice
from dami.serving.bodies import DECODER, read
from dami.serving.deltas import Deltas
from dami.serving.detokenizing import Offsets
from dami.serving.engine import Limits, Row
from dami.serving.lanes import SHORT, Lanes
from dami.serving.protocol import BadRequest, ChatRequest, CompletionRequest
from dami.serving.settings import ServiceSettings

from tests.dami.serving.test_server import CHAT, COMPLETIONS, Running, asked, shipped, until

MOST = 0.05  # seconds
BODY = (1 << 20) - 1024


class Callbacks:
    """CPU seconds of the longest callback of a thread's event loop since the last look."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.thread: threading.Thread | None = None
        self.longest, self.what = 0.0, ""
        run = asyncio.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            if threading.current_thread() is not self.thread:
                return run(handle)
            start = time.thread_time()
            run(handle)
            seconds = time.thread_time() - start
            if seconds > self.longest:
                self.longest, self.what = seconds, repr(handle)

        patch.setattr(asyncio.Handle, "_run", timed)

    def reset(self) -> None:
        self.longest, self.what = 0.0, ""


@pytest.fixture(scope="module")
def watched() -> Iterator[tuple[Running, Callbacks]]:
    with pytest.MonkeyPatch.context() as patch:
        callbacks = Callbacks(patch)
        with Running(*shipped(), Limits(kv_memory=0.3), ServiceSettings(name="pair")) as server:
            callbacks.thread = server.thread
            yield server, callbacks


def listed(item: str, bytes_: int = BODY) -> str:
    return f"[{','.join([item] * (bytes_ // (len(item) + 1)))}]"


def message(content: str) -> str:
    return f'{{"role":"user","content":{content}}}'


HOSTILE: dict[str, tuple[str, str]] = {
    "a long stop string": (CHAT, json.dumps(asked(stop="a" * 500_000))),
    "malformed messages": (CHAT, f'{{"messages":{listed("1")}}}'),
    "empty messages": (CHAT, f'{{"messages":{listed("{}")}}}'),
    "many messages": (CHAT, f'{{"messages":{listed(message(chr(34) * 2))}}}'),
    "many parts": (CHAT, f'{{"messages":[{message(listed("{}"))}]}}'),
    "many keys": (CHAT, "{" + ",".join(f'"{n:x}":0' for n in range(100_000)) + "}"),
    "lists": (COMPLETIONS, f'{{"prompt":{listed("[]")}}}'),
    "token ids": (COMPLETIONS, f'{{"prompt":{listed("7")}}}'),
    "token ids of many prompts": (COMPLETIONS, f'{{"prompt":{listed("[7]")}}}'),
    "a wrong id at the end": (COMPLETIONS, f'{{"prompt":{listed("7", BODY // 2)[:-1]},-1]}}'),
    "depth": (CHAT, '{"messages":' + "[" * BODY),
    "a number": (CHAT, '{"seed":' + "9" * BODY + "}"),
    "a long prompt": (CHAT, f'{{"messages":[{message(json.dumps("a" * BODY))}]}}'),
    "a long name of the model": (CHAT, json.dumps(asked(model="a" * BODY))),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_hold_nobody(watched: tuple[Running, Callbacks], name: str) -> None:
    (server, callbacks), (path, body) = watched, HOSTILE[name]
    callbacks.reset()
    response = httpx.post(server.url + path, content=body, headers={"content-type": "application/json"}, timeout=60)
    assert response.status_code in (400, 404)
    assert len(response.content) < 1000
    assert 0 < callbacks.longest < MOST, callbacks.what


@pytest.mark.parametrize("name", ["malformed messages", "many messages", "token ids", "a wrong id at the end"])
def test_bodies_are_checked_before_other_threads_miss_anything(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser is in Python, and lets them in; Pydantic does not."""
    assert isinstance(DECODER.scan_once, FunctionType)
    (path, body), seconds = HOSTILE[name], [0.0]
    kind: Any = ChatRequest if path == CHAT else CompletionRequest
    validate = kind.model_validate

    def timed(value: Any) -> Any:
        start = time.thread_time()
        try:
            return validate(value)
        finally:
            seconds.append(time.thread_time() - start)

    monkeypatch.setattr(kind, "model_validate", timed)
    with contextlib.suppress(BadRequest):
        read(body.encode(), kind)
    assert max(seconds) < MOST


def test_what_is_allowed_holds_nobody(watched: tuple[Running, Callbacks]) -> None:
    """As many sequences, stop strings and log-probabilities as a request may have, whole and streamed."""
    server, callbacks = watched
    callbacks.reset()
    many = {"stop": ["a" * 1023 + chr(98 + n) for n in range(16)], "ignore_eos": True, "max_tokens": 24}
    prompts: Any = {"prompt": ["a"] * 1024, "max_tokens": 1}
    logprobs = asked(logprobs=True, top_logprobs=20, n=64)
    assert len(server.post(CHAT, logprobs | many).json()["choices"]) == 64
    assert server.post(CHAT, logprobs | many | {"stream": True, "stream_options": {"include_usage": True}}).is_success
    assert len(server.post(COMPLETIONS, prompts).json()["choices"]) == 1024
    assert 0 < callbacks.longest < MOST, callbacks.what


def test_a_body_in_chunks_of_one_byte_holds_nobody(watched: tuple[Running, Callbacks]) -> None:
    server, callbacks = watched
    body = json.dumps(asked("a" * 50_000)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    callbacks.reset()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(head.encode() + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
    assert 0 < callbacks.longest < MOST, callbacks.what


def test_a_backlog_of_tokens_is_taken_in_turns() -> None:
    """A client that has not read for long: its tokens do not all become text in one go."""
    _, tokenizer = shipped()
    deltas, turns = Deltas(tokenizer, None), [0]

    async def read_all() -> int:
        row = Row(SimpleNamespace(waiting={}), [5], 0.0, Course(1), "", 1000, frozenset(), 0.0)  # type: ignore[arg-type]
        tokens = [SimpleNamespace(id=5 + n % 300, intensity=0.0) for n in range(1000)]
        for token in tokens:
            row.news.put_nowait([token])  # type: ignore[list-item]
        row.news.put_nowait(None)
        row.reason = "length"

        async def count() -> None:
            while True:
                turns[0] += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        await asyncio.sleep(0)
        choice = ActiveChoice(0, row, row.course, deltas, Offsets(tokenizer))  # type: ignore[arg-type]
        async for _ in choice.news():
            pass
        counting.cancel()
        return len(choice.tokens)

    assert asyncio.run(read_all()) == 1000
    assert turns[0] > 20


def test_garbage_is_not_looked_for_in_what_torch_has_loaded(watched: tuple[Running, Callbacks]) -> None:
    """Going through it would stop all threads, for as long as no request may."""
    assert gc.get_freeze_count() > 100_000


def test_short_work_does_not_wait_for_long_work() -> None:
    async def both() -> list[str]:
        lanes, gate, ended = Lanes(), threading.Event(), list[str]()
        long = [asyncio.create_task(lanes.run(SHORT + 1, gate.wait, 30)) for _ in range(3)]
        ended.append(await lanes.run(SHORT, lambda: "short"))
        long[2].cancel()
        gate.set()
        ended += [str(await each) for each in long[:2]]
        lanes.close()
        return ended

    assert asyncio.run(both()) == ["short", "True", "True"]


def test_clients_that_leave_while_their_body_is_read_are_forgotten(watched: tuple[Running, Callbacks]) -> None:
    server, _ = watched
    lanes, gate = server.app.state.service.lanes, threading.Event()
    holding = lanes.long.submit(gate.wait, 30)
    before = server.metric("dami_http_requests_total")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + COMPLETIONS, json={"prompt": "a" * (SHORT + 1)}, timeout=0.5)
    try:
        until(lambda: server.metric('dami_http_requests_total{path="/v1/completions",status="499"}') == 1)
        assert server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1}).is_success
        assert server.metric("dami_http_requests_total") > before
    finally:
        gate.set()
        holding.result()
