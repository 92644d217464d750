"""Nothing that a client sends holds the event loop, or the interpreter, for long.

Counted are calls of functions, not seconds, which depend on the machine: those of each turn of the loop, between two
looks at its sockets, and those of what keeps the interpreter to itself in another thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from types import FrameType, FunctionType, SimpleNamespace
from typing import Any

import httpx
import pytest
from dami.generation.courses import Course
from dami.serving.active_request import ActiveChoice
from dami.serving.bodies import DECODER, KEYS, read
from dami.serving.deltas import Deltas
from dami.serving.detokenizing import Offsets
from dami.serving.engine import CHUNK, Limits, Row
from dami.serving.formatting import ChatFormat, CompletionFormat
from dami.serving.prompts import Prompts
from dami.serving.protocol import PROMPTS, ChatRequest, CompletionRequest
from dami.serving.replies import as_json
from dami.serving.settings import ServiceSettings
from dami.serving.thread_pools import SHORT, ThreadPools
from dami.thoughts import Reader
from pydantic import ValidationError

from tests.dami.serving.test_server import CHAT, COMPLETIONS, Running, asked, shipped, until

MOST = 50_000  # calls in a turn: ten milliseconds or so
BODY = (1 << 20) - 1024
LONG = (read, Prompts.of_chat, Prompts.of_text, Reader.read, ChatFormat.whole, CompletionFormat.whole, as_json)
ELSEWHERE = {id(function.__code__): function.__qualname__ for function in LONG}  # for other threads


class Calls(Counter[str]):
    """Counts the calls of functions of all kinds while it is entered, by name."""

    def __enter__(self) -> Calls:
        sys.setprofile(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _count(self, frame: FrameType, event: str, function: Any) -> None:
        if event == "call":
            self[ELSEWHERE.get(id(frame.f_code), frame.f_code.co_name)] += 1
        elif event == "c_call":
            self[function.__name__] += 1


class Turns:
    """The turns of a thread's event loop: that with most calls since the last look, and the names of all."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.thread: threading.Thread | None = None
        self.longest, self.names = Calls(), set[str]()
        turn = asyncio.BaseEventLoop._run_once  # type: ignore[attr-defined]

        def counted(loop: asyncio.BaseEventLoop) -> None:
            if threading.current_thread() is not self.thread:
                return turn(loop)
            with Calls() as calls:
                turn(loop)
            self.names.update(calls)
            self.longest = max(self.longest, calls, key=Calls.total)

        patch.setattr(asyncio.BaseEventLoop, "_run_once", counted)

    @contextlib.contextmanager
    def checked(self) -> Iterator[None]:
        """Checks that no turn inside makes too many calls, or one that other threads should."""
        self.longest, self.names = Calls(), set()
        yield
        assert 0 < self.longest.total() < MOST, self.longest.most_common(20)
        assert not self.names & {*ELSEWHERE.values()}


@pytest.fixture(scope="module")
def watched() -> Iterator[tuple[Running, Turns]]:
    with pytest.MonkeyPatch.context() as patch:
        turns = Turns(patch)
        with Running(*shipped(), Limits(kv_memory=0.3), ServiceSettings(name="pair")) as server:
            assert server.post(CHAT, asked(max_tokens=1)).is_success  # FastAPI makes its routes at the first request
            turns.thread = server.thread
            yield server, turns


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
def test_hostile_bodies_hold_nobody(watched: tuple[Running, Turns], name: str) -> None:
    (server, turns), (path, body) = watched, HOSTILE[name]
    with turns.checked():
        response = httpx.post(server.url + path, content=body, headers={"content-type": "application/json"}, timeout=60)
    assert response.status_code in (400, 404)
    assert len(response.content) < 1000


@pytest.mark.parametrize("name", ["malformed messages", "many messages", "many parts", "a wrong id at the end"])
def test_pydantic_stops_at_the_first_wrong_item(name: str) -> None:
    """It keeps the interpreter to itself until it has done, but the parser, which is in Python, lets others in."""
    assert isinstance(DECODER.scan_once, FunctionType)
    (path, body), kind = HOSTILE[name], {CHAT: ChatRequest, COMPLETIONS: CompletionRequest}
    content = json.loads(body)
    with Calls() as calls, pytest.raises(ValidationError) as caught:
        kind[path].model_validate(content)
    assert calls.total() < MOST
    assert caught.value.error_count() <= 4  # for a prompt may be of four kinds


def test_what_is_allowed_holds_nobody(watched: tuple[Running, Turns]) -> None:
    """As many sequences, biases, stop strings and log-probabilities as a request may have, whole and streamed."""
    server, turns = watched
    many = {"stop": ["a" * 1023 + chr(98 + n) for n in range(16)], "ignore_eos": True, "max_tokens": 8}
    logprobs = asked(logprobs=True, top_logprobs=20, n=64)
    biases = {str(token): 0.5 for token in range(KEYS)}
    prompts: Any = {"prompt": ["a"] * PROMPTS, "max_tokens": 1, "logit_bias": biases}
    with turns.checked():
        assert len(server.post(CHAT, logprobs | many).json()["choices"]) == 64
        assert server.post(CHAT, logprobs | many | {"stream": True}).is_success
        assert len(server.post(COMPLETIONS, prompts).json()["choices"]) == PROMPTS


def test_tokens_without_text_do_not_pile_up(watched: tuple[Running, Turns]) -> None:
    """Their log-probabilities are sent before there is any text to send with them."""
    server, turns = watched
    [letter] = server.app.state.service.tokenizer.encode("a", add_special_tokens=False)
    held = {"stop": ["a" * 1000 + "b"], "logit_bias": {str(letter): 100}, "logprobs": 20, "max_tokens": 100}
    with turns.checked():
        response = server.post(COMPLETIONS, {"prompt": "a", "temperature": 0, "stream": True} | held)
    *chunks, done = response.text.split("\n\n")[:-1]
    assert done == "data: [DONE]"
    choices = [json.loads(chunk.removeprefix("data: "))["choices"][0] for chunk in chunks]
    assert [choice["text"] for choice in choices if choice["text"]] == ["a" * 100]
    assert sum(len(choice["logprobs"]["tokens"]) for choice in choices) == 100
    assert max(len(choice["logprobs"]["tokens"]) for choice in choices) <= 2 * CHUNK


def test_a_body_in_chunks_of_one_byte_holds_nobody(watched: tuple[Running, Turns]) -> None:
    server, turns = watched
    body = json.dumps(asked("a" * 50_000)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with turns.checked(), socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(head.encode() + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400 ")


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


def test_garbage_is_not_looked_for_in_what_torch_has_loaded(watched: tuple[Running, Turns]) -> None:
    """Going through it would stop all threads, for as long as no request may."""
    assert gc.get_freeze_count() > 100_000


def test_short_work_does_not_wait_for_long_work() -> None:
    async def both() -> list[str]:
        pools, gate, ended = ThreadPools(), threading.Event(), list[str]()
        long = [asyncio.create_task(pools.run(SHORT + 1, gate.wait, 30)) for _ in range(3)]
        ended.append(await pools.run(SHORT, lambda: "short"))
        long[2].cancel()
        gate.set()
        ended += [str(await each) for each in long[:2]]
        pools.close()
        return ended

    assert asyncio.run(both()) == ["short", "True", "True"]


def test_clients_that_leave_while_their_body_is_read_are_forgotten(
    watched: tuple[Running, Turns], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, begun, gate = watched[0], threading.Event(), threading.Event()

    def reading(*arguments: Any) -> Any:
        begun.set()
        assert gate.wait(30)
        return read(*arguments)

    monkeypatch.setattr("dami.serving.app.read", reading)
    with server.leaving(COMPLETIONS, {"prompt": "a" * (SHORT + 1)}):
        assert begun.wait(30)
    until(lambda: server.given_up(COMPLETIONS) == 1)
    assert not server.engine.rows
    gate.set()
    assert server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1}).is_success
