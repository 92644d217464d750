"""Locust users who ask a server for chat completions, as streams, and what it said to each."""

from __future__ import annotations

import json
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import gevent
import locust
from locust.env import Environment

Body = dict[str, Any]


def chat(question: str, **options: Any) -> Body:
    """Returns the body of a chat request."""
    return {"messages": [{"role": "user", "content": question}], **options}


@dataclass(frozen=True)
class Said:
    """The answer of a server.

    Attributes:
        question: the question asked.
        intensity: the λ that the server used.
        thought, text: of the answer.
        tokens: number of generated tokens.
        first: seconds from the request to the first text.
        seconds: from the request to the end.
        error: why the answer is incomplete; empty if it is complete.
    """

    question: str
    intensity: float
    thought: str
    text: str
    tokens: int
    first: float
    seconds: float
    error: str = ""


def ask(
    url: str, bodies: Sequence[Body], users: int | None = None, rate: float | None = None, seconds: float = 300
) -> tuple[list[Said], float]:
    """Asks a server. Returns its answers and the seconds from the first request to the last answer.

    Args:
        url: of the server.
        bodies: bodies of the requests.
        users: number of concurrent users, each of whom asks one question after another; all questions by default.
        rate: mean number of requests per second, at random times (a Poisson process with seed 0), whether or not
            earlier ones have been answered. Excludes `users`.
        seconds: time limit for everything.

    Raises:
        TimeoutError: it takes longer.
    """
    chance = random.Random(0)
    moments = list(accumulate(chance.expovariate(rate) if rate else 0.0 for _ in bodies))
    todo = deque(enumerate(bodies))
    said: dict[int, Said] = {}

    class Asker(locust.FastHttpUser):
        host = url
        network_timeout = connection_timeout = seconds
        wait_time = locust.constant(0)

        @locust.task
        def ask(self) -> None:
            if todo:
                place, body = todo.popleft()
                gevent.sleep(max(0.0, start + moments[place] - time.perf_counter()))
                said[place] = stream(self.client, body)
            if rate or not todo:
                raise locust.exception.StopUser

    environment = Environment(user_classes=[Asker])
    runner = environment.create_local_runner()
    start = time.perf_counter()
    runner.start(users or len(bodies), spawn_rate=users or len(bodies))
    try:
        with gevent.Timeout(seconds, TimeoutError(f"{len(bodies)} requests were not answered in {seconds} s")):
            while len(said) < len(bodies):
                gevent.sleep(0.02)
    finally:
        took = time.perf_counter() - start
        runner.quit()
    return [said[place] for place in range(len(bodies))], took


def stream(client: Any, body: Body) -> Said:
    """Requests one answer as a stream and reads it to the end."""
    start = time.perf_counter()
    found: dict[str, Any] = {"intensity": float("nan"), "thought": "", "text": "", "tokens": 0}
    question, first, error = body["messages"][-1]["content"], float("nan"), ""
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    with client.post("/v1/chat/completions", json=body, stream=True, catch_response=True) as response:
        try:
            if response.status_code != 200:
                raise ConnectionError(f"status {response.status_code}: {response.text}")
            for chunk in events(response):
                if "error" in chunk:
                    raise ConnectionError(chunk["error"]["message"])
                found["intensity"] = chunk["intensity"]
                if "usage" in chunk:
                    found["tokens"] = chunk["usage"]["completion_tokens"]
                for choice in chunk["choices"]:
                    for key, name in (("thought", "reasoning_content"), ("text", "content")):
                        found[key] += choice["delta"].get(name, "")
                if first != first and (found["thought"] or found["text"]):
                    first = time.perf_counter() - start
            response.success()
        except (ConnectionError, OSError) as problem:
            error = str(problem) or type(problem).__name__
            response.failure(error)
    return Said(question, **found, first=first, seconds=time.perf_counter() - start, error=error)


def events(response: Any) -> Iterator[dict[str, Any]]:
    """Yields the JSON of each server-sent event. Raises ConnectionError if the last one does not arrive."""
    while line := response.stream.readline(b"\n"):
        if line.startswith(b"data: [DONE]"):
            response.stream.read()
            return
        if line.startswith(b"data: "):
            yield json.loads(line[6:])
    raise ConnectionError("the stream broke off")
