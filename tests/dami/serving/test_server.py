"""The server over HTTP, on the shipped pair: answers against single runs of `generate`, and all that may go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import dami
import httpx
import openai
import pytest
import torch
import uvicorn
from dami.chat import ask
from dami.serving.app import create_app
from dami.serving.engine import Engine, Limits
from dami.serving.listening import Connection
from dami.serving.settings import ServiceSettings

QUESTIONS = [f"What is {n} + 69 - 18?" for n in (42, 88)]
LAM = [0.0, 0.3, 0.5, 0.8, 1.0, 1.2]
LIMITS = Limits(kv_memory=0.05, max_batch_tokens=48)
MOST = 60  # tokens of an answer
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def asked(question: str = QUESTIONS[0], **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": MOST} | options


class Running:
    """A server in a thread."""

    def __init__(
        self, model: Any, tokenizer: Any, limits: Limits, settings: ServiceSettings, controller: Any = None
    ) -> None:
        self.engine = Engine(model, limits, controller)
        self.app = create_app(self.engine, tokenizer, settings)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.server = uvicorn.Server(
            uvicorn.Config(
                self.app,
                port=self.port,
                loop="asyncio",
                http=partial(Connection, settings.read_timeout, 10_000),  # type: ignore[arg-type]
                log_level="warning",
            )
        )
        self.thread = threading.Thread(target=self.server.run)
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Running:
        self.thread.start()
        until(lambda: self.server.started or not self.thread.is_alive())
        assert self.server.started
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    @contextlib.contextmanager
    def leaving(self, path: str, body: Any) -> Iterator[None]:
        """A client that has sent a request, and is gone at the end."""
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(content)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(head.encode() + content)
            yield

    def given_up(self, path: str) -> float:
        """How many requests were, before anything was answered."""
        return self.metric(f'dami_http_requests_total{{path="{path}",status="499"}}')

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


def until(true: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def shipped(**options: Any) -> tuple[Any, Any]:
    model, tokenizer = dami.load_pair(*dami.example_pair(), dtype=torch.float32, **options)
    dami.attach(model, None, {}).dami_patch.frontier = {}  # without the estimator that comes with it
    return model, tokenizer


@contextlib.contextmanager
def running(
    limits: Limits = LIMITS, settings: ServiceSettings | None = None, controller: Any = None, model: Any = None
) -> Iterator[Running]:
    loaded, tokenizer = shipped()
    with Running(model or loaded, tokenizer, limits, settings or ServiceSettings(name="pair"), controller) as server:
        yield server


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def alone() -> Callable[..., Any]:
    """What the pair answers to one question at one λ, greedily, by `generate`."""
    model, tokenizer = shipped()
    known: dict[tuple[str, float], Any] = {}

    def answer(question: str, intensity: float) -> Any:
        key = question, intensity
        if key not in known:
            [known[key]] = ask(model, tokenizer, [question], [intensity], do_sample=False, max_new_tokens=MOST)
        return known[key]

    return answer


def test_answers_of_a_mixed_batch_are_those_of_single_runs(server: Running, alone: Callable[..., Any]) -> None:
    rows = [(QUESTIONS[i % 2], lam) for i, lam in enumerate(LAM)]

    async def all_at_once() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            create = client.chat.completions.create
            return await asyncio.gather(
                *(create(model="pair", **asked(question), extra_body={"intensity": lam}) for question, lam in rows)
            )

    for (question, lam), response in zip(rows, asyncio.run(all_at_once()), strict=True):
        wanted, [choice] = alone(question, lam), response.choices
        assert choice.message.content == wanted.text
        assert getattr(choice.message, "reasoning_content", "") == wanted.thought
        assert choice.finish_reason == ("stop" if wanted.finished else "length")
        assert response.usage.completion_tokens == wanted.tokens
        assert response.intensity == lam
    until(lambda: server.engine.load.kv == 0)
    assert not server.engine.rows


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_a_stream_holds_the_same_answer(server: Running, alone: Callable[..., Any], lam: float) -> None:
    stream = server.client().chat.completions.create(
        model="pair",
        **asked(),
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"intensity": lam},
    )
    chunks, wanted = list(stream), alone(QUESTIONS[0], lam)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == wanted.text
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == wanted.thought
    assert len(deltas) > 2
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert ends[-1] == ("stop" if wanted.finished else "length")
    assert chunks[-1].usage.completion_tokens == wanted.tokens
    assert (chunks[-1].usage.completion_tokens_details.reasoning_tokens > 0) == bool(wanted.thought)
    assert {chunk.intensity for chunk in chunks} == {lam}
    assert len({chunk.id for chunk in chunks}) == 1


def test_where_lam_may_stand(server: Running) -> None:
    def lam(**options: Any) -> Any:
        response = server.post(CHAT, asked(max_tokens=1, **options))
        assert response.status_code == 200, response.text
        return response.json()["intensity"]

    assert lam() == 0.0
    assert lam(intensity=1) == 1
    assert lam(intensity=-0.5) == -0.5
    assert lam(vllm_xargs={"intensity": 0.25}) == 0.25
    assert lam(vllm_xargs={"intensity": 0.25}, intensity=0.25) == 0.25
    assert lam(max_intensity=0.75) == 0.75
    assert [lam(reasoning_effort=word) for word in ("none", "minimal", "xhigh", "max")] == [0, 0, 1, 1]
    assert lam(reasoning_effort="xhigh", max_intensity=0.75) == 0.75
    assert lam(reasoning_effort="none", intensity=0) == 0


def test_the_name_of_the_model_may_carry_lam(server: Running, alone: Callable[..., Any]) -> None:
    def answer(model: str, **options: Any) -> Any:
        return server.post(CHAT, asked(model=model, **options)).json()

    names = [model.id for model in server.client().models.list()]
    assert names == ["pair", "pair:0", "pair:0.3", "pair:0.5", "pair:0.7", "pair:1"]
    response = answer("pair:0.3")
    assert (response["intensity"], response["model"]) == (0.3, "pair:0.3")
    assert response["choices"][0]["message"]["content"] == alone(QUESTIONS[0], 0.3).text
    assert server.client().models.retrieve("pair:0.25").intensity["default"] == 0.25
    assert answer("pair:-0.5", max_tokens=1)["intensity"] == -0.5
    assert answer("pair:0.3", intensity=0.3, max_tokens=1)["intensity"] == 0.3
    assert answer("pair:1", reasoning_effort="xhigh", max_tokens=1)["intensity"] == 1
    completion = server.post(COMPLETIONS, {"model": "pair:0.7", "prompt": "a", "max_tokens": 1}).json()
    assert (completion["intensity"], completion["model"]) == (0.7, "pair:0.7")
    stream = sse(server.post(CHAT, asked(model="pair:0.7", max_tokens=1, stream=True)))
    assert {(chunk["model"], chunk["intensity"]) for chunk in stream} == {("pair:0.7", 0.7)}


def test_completions(server: Running) -> None:
    tokenizer = server.app.state.service.tokenizer
    text = f"<|user|>{QUESTIONS[0]}<|assistant|>"
    ids = tokenizer(text)["input_ids"]
    options = {"temperature": 0, "max_tokens": 40, "intensity": 0.0}
    by_text, by_ids, several, both = (
        server.post(COMPLETIONS, {"prompt": prompt, **options}).json()
        for prompt in (text, ids, [text, text], [ids, ids])
    )
    assert by_text["choices"] == by_ids["choices"]
    assert [choice["text"] for choice in several["choices"]] == [by_text["choices"][0]["text"]] * 2
    assert [choice["index"] for choice in both["choices"]] == [0, 1]
    assert both["usage"]["prompt_tokens"] == 2 * len(ids)
    assert by_text["object"] == "text_completion"
    model, _ = shipped()
    new = model.generate(torch.tensor([ids]), intensity=0.0, do_sample=False, max_new_tokens=40)[0, len(ids) :]
    assert by_text["choices"][0]["text"] == tokenizer.decode(new, skip_special_tokens=True)
    stream = server.client().completions.create(model="pair", prompt=[text, text], stream=True, extra_body=options)  # type: ignore[call-overload]
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [by_text["choices"][0]["text"]] * 2


def test_choices_are_drawn_by_seed(server: Running) -> None:
    def texts(**options: Any) -> list[str]:
        body = asked(**{"temperature": 1.5, "n": 4, "max_tokens": 12, "intensity": 0.4, "ignore_eos": True, **options})
        return [
            choice["message"].get("reasoning_content", "") + choice["message"]["content"]
            for choice in server.post(CHAT, body).json()["choices"]
        ]

    first = texts(seed=7)
    assert len(set(first)) > 1
    assert texts(seed=7) == first
    assert texts(seed=8)[:3] == first[1:]  # one seed for each choice
    assert texts(seed=7, top_k=1) == texts(temperature=0)
    assert texts() != texts()


def test_logprobs_are_those_of_the_model(server: Running) -> None:
    model, tokenizer = shipped()
    response = server.post(CHAT, asked(max_tokens=6, intensity=0.4, logprobs=True, top_logprobs=3)).json()
    entries = response["choices"][0]["logprobs"]["content"]
    prompt = tokenizer(f"<|user|>{QUESTIONS[0]}<|assistant|>", return_tensors="pt")["input_ids"]
    new = model.generate(prompt, intensity=0.4, do_sample=False, max_new_tokens=6)[0, prompt.shape[1] :]
    with torch.no_grad():
        full = torch.cat([prompt[0], new])[None]
        logprobs = model(full, intensity=0.4).logits[0, prompt.shape[1] - 1 : -1].log_softmax(1)
    assert len(entries) == len(new)
    for entry, row, token in zip(entries, logprobs, new, strict=True):
        assert entry["token"] == tokenizer.decode([int(token)])
        assert [top["token"] for top in entry["top_logprobs"]] == [
            tokenizer.decode([id_]) for id_ in row.topk(3).indices
        ]
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert entry["logprob"] == pytest.approx(float(row[token]), abs=1e-3)
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
    chunks = sse(server.post(CHAT, asked(max_tokens=6, intensity=0.4, logprobs=True, top_logprobs=3, stream=True)))
    streamed = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in entries]


def sse(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def test_completion_logprobs(server: Running) -> None:
    text = f"<|user|>{QUESTIONS[0]}<|assistant|>"
    body = {"prompt": text, "temperature": 0, "max_tokens": 5, "logprobs": 2, "intensity": 1.0}
    [choice] = server.post(COMPLETIONS, body).json()["choices"]
    found = choice["logprobs"]
    assert [len(found[key]) for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [5] * 4
    assert all(len(top) == 2 for top in found["top_logprobs"])
    assert [found["text_offset"][0], found["text_offset"][-1]] == [0, sum(map(len, found["tokens"][:-1]))]
    assert [top[token] for top, token in zip(found["top_logprobs"], found["tokens"], strict=True)] == found[
        "token_logprobs"
    ]
    streamed = [chunk["choices"][0]["logprobs"] for chunk in sse(server.post(COMPLETIONS, body | {"stream": True}))]
    assert [offset for each in streamed for offset in each["text_offset"]] == found["text_offset"]


def test_log_probabilities_of_parts_of_characters(server: Running) -> None:
    """Drawn almost evenly from a vocabulary of which a quarter are bytes that are no characters."""
    wild = {"temperature": 100, "seed": 3, "max_tokens": 40, "ignore_eos": True}
    response = server.post(CHAT, asked(logprobs=True, top_logprobs=1, **wild)).json()
    entries = response["choices"][0]["logprobs"]["content"]
    parts = [entry for entry in entries if entry["token"].startswith("bytes:")]
    assert parts
    for entry in parts:
        assert entry["token"] == "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry["bytes"])
        with pytest.raises(UnicodeDecodeError):
            bytes(entry["bytes"]).decode()
    found = server.post(COMPLETIONS, {"prompt": "a", "logprobs": 20, **wild}).json()["choices"][0]["logprobs"]
    assert {len(top) for top in found["top_logprobs"]} <= {20, 21}


def test_stops(server: Running, alone: Callable[..., Any]) -> None:
    wanted = alone(QUESTIONS[0], 1.0).thought

    def choice(**options: Any) -> Any:
        return server.post(CHAT, asked(intensity=1.0, **options)).json()["choices"][0]

    cut = choice(stop=[wanted[5:8], "never"])
    assert cut["message"] == {"role": "assistant", "content": "", "reasoning_content": wanted[:5].rstrip()}
    assert cut["finish_reason"] == "stop"
    streamed = sse(server.post(CHAT, asked(intensity=1.0, stop=wanted[5:8], stream=True)))
    pieces = [chunk["choices"][0]["delta"].get("reasoning_content", "") for chunk in streamed]
    assert "".join(pieces) == wanted[:5].rstrip()
    assert streamed[-1]["choices"][0]["finish_reason"] == "stop"
    tokenizer = server.app.state.service.tokenizer
    by_id = choice(stop_token_ids=tokenizer(wanted[8:], add_special_tokens=False)["input_ids"])
    assert by_id["finish_reason"] == "stop"
    assert wanted.startswith(by_id["message"].get("reasoning_content", ""))
    assert by_id["message"]["content"] == ""
    on = server.post(CHAT, asked(intensity=0.0, ignore_eos=True, max_tokens=30)).json()
    assert (on["choices"][0]["finish_reason"], on["usage"]["completion_tokens"]) == ("length", 30)


def test_models_health_and_metrics(server: Running) -> None:
    listed = server.client().models.list().data[0]
    assert listed.id == server.client().models.retrieve("pair").id == "pair"
    reading = {"prompt": "same", "tail": 1, "least_tail": 8}
    lams = {"default": 0.0, "range": [-1.0, 2.0], "presets": {}, "auto": False, "frontier": False}
    assert listed.intensity == lams | reading
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
    before = server.metric("dami_generated_tokens_total")
    server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 3, "ignore_eos": True})
    assert server.metric("dami_generated_tokens_total") == before + 3
    assert server.metric('dami_http_requests_total{path="/v1/completions",status="200"}') >= 1
    assert server.metric("dami_engine_alive") == 1


def said(**options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a"} | options]}


BAD: list[tuple[str, Any, int, str | None, str]] = [
    (CHAT, {}, 400, "messages", "messages: Field required"),
    (CHAT, [], 400, None, "the body must be a JSON object, got []"),
    (CHAT, "a", 400, None, 'the body must be a JSON object, got "a"'),
    (CHAT, asked() | {"messages": []}, 400, "messages", "at least 1 item"),
    (
        CHAT,
        asked() | {"messages": [{"role": "king", "content": "a"}]},
        400,
        "messages",
        "messages[0].role: Input should be 'system', 'developer'",
    ),
    (CHAT, asked() | {"messages": [{"role": "user"}]}, 400, "messages", "messages[0]: content must be given"),
    (CHAT, asked() | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "'text'"),
    (
        CHAT,
        asked() | {"messages": [{"role": "system", "content": "a"}]},
        400,
        "messages",
        "the chat template does not take these messages",
    ),
    (CHAT, asked(model="other"), 404, "model", "model must be 'pair', got 'other'"),
    (CHAT, asked(model="pairs:0.5"), 404, "model", "model must be 'pair', got 'pairs:0.5'"),
    (CHAT, asked(model="pair:"), 404, "model", "with a colon and a number, a preset or auto, got 'pair:'"),
    (CHAT, asked(model="pair:0.5:1"), 404, "model", "a number, a preset or auto, got 'pair:0.5:1'"),
    (CHAT, asked(model="pair:nan"), 404, "model", "a number, a preset or auto, got 'pair:nan'"),
    (CHAT, asked(model="pair:3"), 404, "model", "there is no model 'pair:3': intensity must be in -1 to 2"),
    (CHAT, asked(model="pair:low"), 404, "model", "there is no model 'pair:low': intensity must be a number, a preset"),
    (CHAT, asked(model="pair:auto"), 404, "model", "there is no model 'pair:auto': intensity 'auto' needs"),
    (CHAT, asked(model="pair:0.5", intensity=0.4), 400, "intensity", "model is 'pair:0.5' and intensity 0.4"),
    (
        CHAT,
        asked(model="pair:0.5", intensity="low"),
        400,
        "intensity",
        "intensity must be a number, a preset, of which",
    ),
    (
        CHAT,
        asked(model="pair:0.5", reasoning_effort="max"),
        400,
        "reasoning_effort",
        "model is 'pair:0.5' and reasoning_effort max",
    ),
    (CHAT, asked(model="pair:0.5", max_intensity=1), 400, "max_intensity", "'pair:0.5', which excludes max_intensity"),
    (COMPLETIONS, {"prompt": "a", "model": "pair:2.5"}, 404, "model", "there is no model 'pair:2.5'"),
    (CHAT, asked(intensity="high"), 400, "intensity", "a preset, of which the model has none, or 'auto', got 'high'"),
    (CHAT, asked(intensity="auto"), 400, "intensity", "needs an estimator, and this pair has none"),
    (CHAT, asked(intensity="0.5"), 400, "intensity", "a preset, of which the model has none, or 'auto', got '0.5'"),
    (CHAT, asked(intensity=2.5), 400, "intensity", "intensity must be in -1 to 2 on this server, got 2.5"),
    (CHAT, asked(intensity=True), 400, "intensity", "valid number"),
    (CHAT, asked(intensity=[0.1]), 400, "intensity", "valid number"),
    (CHAT, asked(max_intensity=-3), 400, "max_intensity", "max_intensity must be in -1 to 2"),
    (CHAT, asked(intensity=0.1, max_intensity=0.2), 400, "max_intensity", "exclude each other"),
    (CHAT, asked(intensity=0.1, vllm_xargs={"intensity": 0.2}), 400, "intensity", "is 0.1 and in vllm_xargs 0.2"),
    (CHAT, asked(intensity=0.1, reasoning_effort="low"), 400, "reasoning_effort", "is low and intensity 0.1"),
    (CHAT, asked(reasoning_effort="huge"), 400, "reasoning_effort", "'none', 'minimal', 'low'"),
    (CHAT, asked(vllm_xargs={"intensty": 1}), 400, "vllm_xargs", "vllm_xargs.intensty: Extra inputs are not"),
    (CHAT, asked(temperature=-1), 400, "temperature", "greater than or equal to 0"),
    (CHAT, asked(top_p=0), 400, "top_p", "greater than 0"),
    (CHAT, asked(top_k=1.5), 400, "top_k", "valid integer"),
    (CHAT, asked(n=0), 400, "n", "greater than or equal to 1"),
    (CHAT, asked(seed="x"), 400, "seed", "valid integer"),
    (CHAT, asked(stop=""), 400, "stop", "at least 1 character"),
    (CHAT, asked(stop=["a", ""]), 400, "stop", "stop[1]: String should have at least 1 character"),
    (CHAT, asked(stop="a" * 1025), 400, "stop", "at most 1024 characters"),
    (CHAT, asked(max_tokens=0), 400, "max_tokens", "greater than or equal to 1"),
    (CHAT, asked(max_completion_tokens=6), 400, "max_tokens", "give one of them"),
    (CHAT, asked(max_tokens=None, max_completion_tokens=600), 400, "max_completion_tokens", "takes 512 together"),
    (CHAT, asked(max_tokens=600), 400, "max_tokens", "takes 512 together"),
    (CHAT, asked("word " * 600, max_tokens=None), 400, "messages", "takes 512 together"),
    (CHAT, asked("word " * 2000), 400, "messages", "the prompt has 10020 characters, and this server takes 9728"),
    (CHAT, asked() | {"messages": asked()["messages"] * 2049}, 400, "messages", "at most 2048 items"),
    (CHAT, asked(top_logprobs=2), 400, "top_logprobs", "top_logprobs needs logprobs"),
    (CHAT, asked(stream_options={}), 400, "stream_options", "stream_options needs stream"),
    (
        CHAT,
        asked(stream=True, stream_options={"include_usag": True}),
        400,
        "stream_options",
        "stream_options.include_us",
    ),
    (CHAT, asked(store=True), 400, "store", "not supported by this server"),
    (CHAT, asked(service_tier="flex"), 400, "service_tier", "not supported by this server"),
    (CHAT, asked(**{f"key{n}": 0 for n in range(300)}), 400, None, "may have 256 keys at most, got 303"),
    *(
        (CHAT, said(**{name: value}), 400, "messages", f"messages[0].{name}: is not supported by this server")
        for name, value in {
            "function_call": {},
            "refusal": "no",
            "audio": {"id": "1"},
            "annotations": [1],
        }.items()
    ),
    (CHAT, said(prefix=True), 400, "messages", "messages[0].prefix: Extra inputs are not permitted"),
    (CHAT, said(images=["a"]), 400, "messages", "messages[0].images: Extra inputs are not permitted"),
    (
        CHAT,
        said(content=[{"type": "text", "text": "a", "txt": 1}]),
        400,
        "messages",
        "messages[0].content[0].txt: Extra",
    ),
    (CHAT, said(role="developer"), 400, "messages", "knows the roles user and assistant, not developer"),
    (CHAT, asked(tools=[{}]), 400, "tools", "tools[0].type: Field required"),
    (CHAT, asked(logit_bias={"five": 1}), 400, "logit_bias", "must have ids of tokens as keys, got 'five'"),
    (CHAT, asked(logit_bias={"768": 1}), 400, "logit_bias", "logit_bias has the id 768, and the vocabulary 768 ids"),
    (
        CHAT,
        asked(stop_token_ids=[5, 768]),
        400,
        "stop_token_ids",
        "stop_token_ids has the id 768, and the vocabulary 768",
    ),
    (CHAT, asked(logit_bias={"5": 101}), 400, "logit_bias", "less than or equal to 100"),
    (CHAT, asked(response_format={"type": "json_schema"}), 400, "response_format", "json_schema must be given with"),
    (
        CHAT,
        asked(response_format={"type": "text", "json_schema": {"schema": {}}}),
        400,
        "response_format",
        "with the type json_schema, and with no other",
    ),
    (CHAT, asked(response_format={"type": "xml"}), 400, "response_format", "'text', 'json_object' or 'json_schema'"),
    (
        CHAT,
        asked(response_format={"type": "json_object"}, ignore_eos=True),
        400,
        "response_format",
        "response_format excludes ignore_eos",
    ),
    (CHAT, asked(presence_penalty=2.5), 400, "presence_penalty", "less than or equal to 2"),
    (CHAT, asked(frequency_penalty=-2.5), 400, "frequency_penalty", "greater than or equal to -2"),
    (CHAT, asked(repetition_penalty=1.1), 400, "repetition_penalty", "not supported by this server"),
    (CHAT, asked(min_p=0.1), 400, "min_p", "not supported by this server"),
    (CHAT, asked(continue_final_message=True), 400, "continue_final_message", "of the assistant, got one of user"),
    (CHAT, asked(add_generation_prompt=False), 400, "add_generation_prompt", "are both False: give one"),
    (CHAT, asked(chat_template_kwargs={"wings": 1}), 400, "chat_template_kwargs", "of the chat template, got 'wings'"),
    (CHAT, asked(chat_template_kwargs={"messages": 1}), 400, "chat_template_kwargs", "template, got 'messages'"),
    (CHAT, asked(chat_template_kwargs={"tokenize": 1}), 400, "chat_template_kwargs", "template, got 'tokenize'"),
    *(
        (CHAT, asked(**{name: value}), 400, name, f"{name}: is not supported by this server")
        for name, value in {
            "modalities": ["audio"],
            "prediction": {"type": "content"},
            "audio": {"voice": "alloy"},
            "web_search_options": {},
            "functions": [{"name": "f"}],
            "function_call": {"name": "f"},
            "verbosity": "low",
        }.items()
    ),
    (CHAT, asked(wings=2), 400, "wings", "Extra inputs are not permitted"),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt", "at least one token"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt", "at least 1 item"),
    (COMPLETIONS, {"prompt": [5, 10**6]}, 400, "prompt", "prompt has the id 1000000, the vocabulary has 768"),
    (COMPLETIONS, {"prompt": [[5], []]}, 400, "prompt", "at least 1 item"),
    (COMPLETIONS, {"prompt": [5] * 512}, 400, "prompt", "the prompt has 512 tokens"),
    (COMPLETIONS, {"prompt": "a" * 9729}, 400, "prompt", "has 9729 characters, and this server takes 9728"),
    (COMPLETIONS, {"prompt": [5], "max_tokens": 512}, 400, "max_tokens", "takes 512 together"),
    (COMPLETIONS, {"prompt": ["a"] * 1025}, 400, "prompt", "at most 1024 items"),
    (COMPLETIONS, {"prompt": ["a"] * 1024, "n": 2}, 400, "n", "may have 1024 sequences at most on this server"),
    (COMPLETIONS, {"prompt": "a", "echo": True}, 400, "echo", "not supported by this server"),
    (COMPLETIONS, {"prompt": "a", "logprobs": 50}, 400, "logprobs", "less than or equal to 20"),
    ("/chat/completions", {}, 404, None, "on this server: the API's paths begin with /v1"),
    ("/health", {}, 405, None, "there is no POST /health on this server, but GET"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "message"), BAD)
def test_bad_requests(server: Running, path: str, body: Any, status: int, param: str | None, message: str) -> None:
    response = server.post(path, body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert message in error["message"]
    assert error["type"] in ("invalid_request_error", "not_found_error")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "the body must be JSON: Expecting property name"),
        (b"", "the body must be JSON: Expecting value"),
        (b"\xff", "the body must be JSON: 'utf-8' codec"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "the prompt is not text"),
        (b'{"messages": [{"role": "\\ud800", "content": "a"}]}', "role|Input"),
        (b'{"prompt": "a", "messages": [{"role": "user", "content": "a"}], "intensity": NaN}', "finite number"),
        (b'{"messages": [{"role": "user", "content": "a"}], "intensity": 1e999}', "finite number"),
        (b'{"messages": ' + b"[" * 100_000, "the body must be JSON: it is nested too deeply"),
        (b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 5000 + b"}", "body must be JSON"),
    ],
)
def test_bad_bodies(server: Running, content: bytes, message: str) -> None:
    response = httpx.post(server.url + CHAT, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert re.search(message, response.json()["error"]["message"])
    assert response.json()["error"]["param"] in (None, "messages", "prompt", "intensity")


def test_a_body_that_is_not_called_json(server: Running) -> None:
    for headers in ({"content-type": "text/plain"}, {}):
        response = httpx.post(server.url + CHAT, content=json.dumps(asked()), headers=headers)
        assert response.status_code == 400
        assert "the header Content-Type must be application/json, got" in response.json()["error"]["message"]
    response = httpx.post(
        server.url + CHAT,
        content=json.dumps(asked(max_tokens=1)),
        headers={"content-type": "Application/JSON; charset=utf-8"},
    )
    assert response.status_code == 200


def test_a_compressed_body_is_refused_by_name(server: Running) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    response = httpx.post(server.url + CHAT, content=gzip.compress(json.dumps(asked()).encode()), headers=headers)
    assert response.status_code == 400
    assert "Content-Encoding must be left out, got 'gzip'" in response.json()["error"]["message"]


def test_what_an_answer_holds_may_be_sent_back(server: Running) -> None:
    said = server.client().chat.completions.create(model="pair", **asked(max_tokens=4)).choices[0].message
    empty = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    messages = [*asked()["messages"], said.model_dump() | empty, *asked("And 5 + 6?")["messages"]]
    assert server.post(CHAT, asked(max_tokens=1) | {"messages": messages}).status_code == 200


TURNS = "{% for m in messages if m.role in ROLES %}<|user|>{{ m.role }} {{ m.content | trim }}{% endfor %}<|assistant|>"


def test_developers_are_heard(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """As such, or as the system by templates that leave the role out or refuse it."""
    tokenizer = server.app.state.service.tokenizer

    def answer(template: str, *roles: str) -> Any:
        monkeypatch.setattr(tokenizer, "chat_template", template)
        messages = [{"role": role, "content": f" {role[0]} 42 + 69"} for role in roles]
        return server.post(CHAT, asked(max_tokens=8) | {"messages": messages}).json()

    plain, known = TURNS.replace("ROLES", "('system', 'user')"), TURNS.replace("ROLES", "('developer', 'user')")
    refusing = "{% if 'developer' in messages | map(attribute='role') %}{{ raise_exception('no') }}{% endif %}" + plain
    both = answer(plain, "developer", "user")
    assert both["usage"]["prompt_tokens"] > answer(plain, "user")["usage"]["prompt_tokens"]
    assert both["usage"]["prompt_tokens"] == answer(refusing, "developer", "user")["usage"]["prompt_tokens"]
    as_such = tokenizer("<|user|>developer d 42 + 69<|user|>user u 42 + 69<|assistant|>")["input_ids"]
    assert answer(known, "developer", "user")["usage"]["prompt_tokens"] == len(as_such)
    for template, roles in ((known, ("user", "system")), (plain, ("user", "tool"))):
        error = answer(template, *roles)["error"]
        assert error["message"] == f"messages[1]: the chat template leaves out the role {roles[1]!r}"
        assert error["param"] == "messages"


def test_clients_that_leave_free_their_blocks(server: Running) -> None:
    """In the middle of a stream, before its first piece, and while they wait for a whole answer."""
    endless = asked(ignore_eos=True, intensity=1.0, max_tokens=480)
    before = server.metric('dami_sequences_total{reason="cancelled"}')
    for pieces in (3, 0):
        with httpx.stream("POST", server.url + CHAT, json=endless | {"stream": True}) as response:
            lines = response.iter_lines()  # kept: httpx closes the connection when it is dropped
            for _ in range(pieces):
                next(lines)
            until(lambda: len(server.engine.rows) > 0)
    until(lambda: not server.engine.rows)
    with server.leaving(CHAT, endless | {"n": 3}):
        until(lambda: len(server.app.state.service.active) == 1)
    until(lambda: not server.engine.rows and server.engine.load.kv == 0)
    assert server.metric('dami_sequences_total{reason="cancelled"}') == before + 5
    assert server.post(CHAT, asked(max_tokens=1)).status_code == 200


def test_a_slow_reader_does_not_hold_up_others(server: Running) -> None:
    with httpx.stream("POST", server.url + CHAT, json=asked(stream=True, ignore_eos=True, max_tokens=200)) as response:
        lines = response.iter_lines()
        next(lines)
        assert server.post(CHAT, asked(max_tokens=4)).status_code == 200
        until(lambda: not server.engine.rows)  # it is generated, whether or not it is read
        assert list(lines)[-2] == "data: [DONE]"


def test_keys_sizes_and_numbers_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ServiceSettings(name="pair", api_keys=("one", "two"), max_body=2000, intensity_range=(0.0, 1.0))
    with running(Limits(kv_memory=0.05, max_requests=8, max_model_len=100), settings) as server:
        assert server.post(CHAT, asked()).status_code == 401
        assert server.post(CHAT, asked(), headers={"Authorization": "Bearer three"}).json()["error"]["code"] == (
            "invalid_api_key"
        )
        assert httpx.get(f"{server.url}/health").status_code == 200
        key = {"Authorization": "Bearer two"}
        assert server.post(CHAT, asked(max_tokens=2), headers=key).status_code == 200
        assert server.post(CHAT, asked("x" * 3000), headers=key).status_code == 413
        pieces = iter([b'{"messages": [{"role": "user", "content": "'] + [b"x" * 1000] * 5 + [b'"}]}'])
        headers = key | {"content-type": "application/json"}
        response = httpx.post(server.url + CHAT, content=pieces, headers=headers)
        assert (response.status_code, response.json()["error"]["message"]) == (
            413,
            "the body must be at most 2000 bytes",
        )
        assert "in 0 to 1" in server.post(CHAT, asked(intensity=1.1), headers=key).json()["error"]["message"]
        assert "takes 100 together" in server.post(CHAT, asked(max_tokens=99), headers=key).text
        response = server.post(CHAT, asked(n=3), headers=key)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "n")
        assert "may have 2 sequences at most on this server, n for each prompt, got 3" in response.text
        assert not server.engine.rows
        endless = asked(n=2, stream=True, ignore_eos=True, max_tokens=80)
        go, forward = threading.Event(), server.engine.model.lm_head.forward
        monkeypatch.setattr(server.engine.model.lm_head, "forward", lambda *x, **y: (go.wait(30), forward(*x, **y))[1])
        with contextlib.ExitStack() as streams:
            streams.callback(go.set)
            for _ in range(4):
                url = server.url + CHAT
                streams.enter_context(httpx.stream("POST", url, json=endless, headers=key, timeout=60))
            response = server.post(CHAT, asked(), headers=key)
            assert (response.status_code, response.headers["retry-after"]) == (429, "1")
            assert "8 sequences are under way, and 8 is the most" in response.text


def test_presets_and_a_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    class Halves:
        def __init__(self) -> None:
            self.calls: list[Any] = []

        def grant(self, intensity: float, adjustable: bool) -> float:
            return intensity / 2 if adjustable else intensity

        def start(self, intensity: float) -> None:
            self.calls.append(("start", intensity))

        def finish(self, intensity: float, tokens: int | None) -> None:
            self.calls.append(("finish", intensity, tokens))

        def observe(self, running: int, seconds_per_token: float, waited: float) -> None:
            if running:
                self.calls.append(("observe", running, seconds_per_token > 0, waited >= 0))

    controller = Halves()
    with running(controller=controller) as server:
        server.engine.presets.update(low=0.1, high=0.9)
        for options, granted in (
            ({"intensity": "high"}, 0.9),
            ({"reasoning_effort": "low"}, 0.1),
            ({"intensity": "high", "max_intensity": 0.5}, 0.25),
            ({"max_intensity": 0.5}, 0.25),
            ({"intensity": 0.5}, 0.5),
        ):
            response = server.post(CHAT, asked(max_tokens=2, ignore_eos=True, **options)).json()
            assert response["intensity"] == granted
        assert "one of ['high', 'low'] or 'auto', got 'medium'" in server.post(CHAT, asked(intensity="medium")).text
        names = [model["id"] for model in httpx.get(f"{server.url}/v1/models").json()["data"]]
        assert names[:4] == ["pair", "pair:low", "pair:high", "pair:0"]
        named = server.post(CHAT, asked(model="pair:high", max_intensity=0.5, max_tokens=2, ignore_eos=True)).json()
        assert named["intensity"] == 0.25
        until(lambda: ("finish", 0.5, 2) in controller.calls)
    started = [call[1] for call in controller.calls if call[0] == "start"]
    assert started == [0.0, 1.0, 0.9, 0.1, 0.25, 0.25, 0.5, 0.25]  # the first two by the engine, before any request
    tried_out = [call for call in controller.calls if call[0] == "finish"][:2]
    assert sorted(tried_out) == [("finish", 0.0, None), ("finish", 1.0, None)]
    assert ("observe", 1, True, True) in controller.calls


class ByLength:
    """λ rises with the prompt's length: it runs the model, as an estimator may."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def estimate(self, model: Any, batch: Any) -> list[float]:
        self.batches.append(len(batch["input_ids"]))
        model(**batch, intensity=0.5)
        return [length / 100 for length in batch["attention_mask"].sum(1).tolist()]


def test_auto(alone: Callable[..., Any]) -> None:
    model, tokenizer = shipped()
    estimator = ByLength()
    dami.attach(model, estimator)
    questions = ["What is 4 + 5?", "What is 42 + 69 - 18 + 12 - 7?"]
    with running(settings=ServiceSettings(name="pair", default_intensity="auto"), model=model) as server:

        async def both() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                return await asyncio.gather(*(client.post(CHAT, json=asked(q)) for q in questions))

        answers = [response.json() for response in asyncio.run(both())]
        capped = server.post(CHAT, asked(intensity="auto", max_intensity=0.05, max_tokens=1)).json()
        prompts = [f"<|user|>{question}<|assistant|>" for question in questions]
        several = {"prompt": prompts, "n": 2, "max_tokens": 1, "model": "pair:auto"}
        whole = server.post(COMPLETIONS, several).json()
        chunks = sse(server.post(COMPLETIONS, several | {"stream": True}))
        alike = server.post(COMPLETIONS, several | {"prompt": prompts[:1] * 2}).json()
    for question, answer in zip(questions, answers, strict=True):
        length = len(tokenizer(f"<|user|>{question}<|assistant|>")["input_ids"])
        assert answer["intensity"] == pytest.approx(length / 100)
        assert answer["choices"][0]["message"]["content"] == alone(question, answer["intensity"]).text
    assert answers[0]["intensity"] < answers[1]["intensity"]
    assert capped["intensity"] == 0.05
    wanted = [answers[0]["intensity"]] * 2 + [answers[1]["intensity"]] * 2
    assert [choice["intensity"] for choice in whole["choices"]] == wanted
    assert whole["intensity"] is None
    assert {chunk["choices"][0]["index"]: chunk["intensity"] for chunk in chunks} == dict(enumerate(wanted))
    assert alike["intensity"] == wanted[0]


def test_a_client_that_leaves_takes_no_other_s_estimate_with_it() -> None:
    model, _ = shipped()
    begun, gate = threading.Semaphore(0), threading.Semaphore(0)

    class Waits:
        def estimate(self, model: Any, batch: Any) -> list[float]:
            begun.release()
            assert gate.acquire(timeout=30)
            return [0.25] * len(batch["input_ids"])

    dami.attach(model, Waits())
    with running(model=model) as server, ThreadPoolExecutor() as clients:
        auto = asked(intensity="auto", max_tokens=1)
        with contextlib.ExitStack() as others:
            with server.leaving(CHAT, auto):
                assert begun.acquire(timeout=30)
                others.enter_context(server.leaving(CHAT, auto))
                until(lambda: len(server.engine._to_estimate) == 1)
                staying = clients.submit(server.post, CHAT, auto)
                until(lambda: len(server.engine._to_estimate) == 2)
            until(lambda: server.given_up(CHAT) == 1)  # in the middle of its estimate
            gate.release()
            assert begun.acquire(timeout=30)
        until(lambda: server.given_up(CHAT) == 2)  # while the batch that it began is estimated
        gate.release()
        gate.release()
        assert staying.result(30).json()["intensity"] == 0.25
        assert not server.engine._to_estimate


def test_a_failing_estimator_is_an_error_of_its_request_only() -> None:
    model, _ = shipped()

    class Fails:
        def estimate(self, model: Any, batch: Any) -> Any:
            raise RuntimeError("no idea")

    dami.attach(model, Fails())
    with running(model=model) as server:
        response = server.post(CHAT, asked(intensity="auto"))
        assert (response.status_code, response.json()["error"]["message"]) == (500, "the estimator failed: no idea")
        assert server.post(CHAT, asked(max_tokens=1)).status_code == 200


@pytest.fixture
def burning(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Running, threading.Event]]:
    """A server whose engine takes five steps, then none until the event is set, and dies of the next."""
    with running() as server:
        lit, steps, forward = threading.Event(), itertools.count(), server.engine.model.lm_head.forward

        def burn(*arguments: Any, **options: Any) -> Any:
            if next(steps) < 5:
                return forward(*arguments, **options)
            lit.wait(30)
            raise RuntimeError("the memory is on fire")

        monkeypatch.setattr(server.engine.model.lm_head, "forward", burn)
        yield server, lit


def test_a_dead_engine_is_told_to_everybody(burning: tuple[Running, threading.Event]) -> None:
    server, lit = burning
    told = []
    server.app.state.on_death = lambda: told.append(1)
    endless = asked(ignore_eos=True, max_tokens=400)
    with ThreadPoolExecutor() as clients:
        streamed = clients.submit(server.post, CHAT, endless | {"stream": True})
        until(lambda: len(server.engine.rows) == 1)
        whole = clients.submit(server.post, CHAT, endless)
        until(lambda: len(server.engine.rows) == 2)
        lit.set()
        response = whole.result(30)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead")
        assert "the memory is on fire" in response.text
        response = streamed.result(30)
        assert response.status_code == 200
        assert "the memory is on fire" in response.text.split("data: ")[-1]
    until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
    assert server.post(CHAT, asked()).status_code == 503
    assert server.metric("dami_engine_alive") == 0
    until(lambda: told == [1])


def test_who_comes_before_the_engine_s_death_is_noticed_is_told_its_cause(
    burning: tuple[Running, threading.Event],
) -> None:
    server, lit = burning
    server.engine._loop.call_soon_threadsafe(server.engine._watch.cancel)
    lit.set()
    server.post(CHAT, asked(ignore_eos=True))
    until(lambda: not server.engine.manager.is_running())
    response = server.post(CHAT, asked())
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead")
    assert "the memory is on fire" in response.text
    assert not server.engine.rows


def test_what_is_under_way_ends_before_the_server_does() -> None:
    with running(Limits(kv_memory=0.05, max_requests=1)) as server:
        with httpx.stream(
            "POST", server.url + CHAT, json=asked(stream=True, ignore_eos=True, max_tokens=60)
        ) as response:
            lines = response.iter_lines()
            next(lines)
            server.server.should_exit = True
            rest = list(lines)
        assert rest[-2] == "data: [DONE]"
        server.thread.join(30)
        assert not server.thread.is_alive()


def test_a_conversation_may_be_put_through_the_template_that_its_lam_asks_for() -> None:
    model, tokenizer = shipped()
    plain = tokenizer.chat_template
    tokenizer.chat_template = {"default": plain, "instruct": plain, "thinking": plain + "{{ '<think>' }}"}
    settings = ServiceSettings(name="pair", chat_template=0.5)
    with Running(model, tokenizer, LIMITS, settings) as server:
        below, above = (server.post(CHAT, asked(intensity=lam)).json() for lam in (0.4, 0.6))
    assert above["usage"]["prompt_tokens"] == below["usage"]["prompt_tokens"] + 1


def test_models_that_cannot_be_batched_do_not_start() -> None:
    from transformers import GPTNeoXConfig

    from tests.dami import architectures

    _, tokenizer = shipped()
    model = dami.patch_model(*architectures.pair(GPTNeoXConfig))
    app = create_app(Engine(model, LIMITS), tokenizer, ServiceSettings())

    async def start() -> None:
        async with app.router.lifespan_context(app):
            pass

    with pytest.raises(ValueError, match="GPTNeoXForCausalLM cannot be batched continuously"):
        asyncio.run(start())


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            Limits(kv_memory=0.05, max_model_len=1000),
            "max_model_len must be at most 512, got 1000: the model takes 512",
        ),
        (Limits(kv_memory=0.0005, max_model_len=500), "max_model_len must be at most .* and the cache holds"),
    ],
)
def test_limits_that_do_not_fit(limits: Limits, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(shipped()[0], limits)


def test_a_default_that_the_pair_does_not_have_is_refused() -> None:
    model, tokenizer = shipped()
    engine = Engine(model, LIMITS)
    with pytest.raises(ValueError, match=r"default_intensity must be a number, a preset, of which the model has none"):
        create_app(engine, tokenizer, ServiceSettings(default_intensity="high"))


@pytest.mark.slow
def test_the_command_serves_and_sigterm_drains_it() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", "from dami.cli import app; app()", "serve", "--port", str(port)]
    with subprocess.Popen(command, cwd=root, env={"PYTHONPATH": f"{root}:{root / 'python'}", "PATH": ""}) as process:
        url = f"http://127.0.0.1:{port}"

        def up() -> bool:
            with contextlib.suppress(httpx.ConnectError):
                return httpx.get(f"{url}/health").status_code == 200
            return False

        until(up, 120)
        with httpx.stream("POST", url + CHAT, json=asked(stream=True, ignore_eos=True, max_tokens=200)) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert list(lines)[-2] == "data: [DONE]"
        assert process.wait(60) == 0
