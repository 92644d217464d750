"""λ that changes while a request runs: by a schedule, by a budget for thoughts, and by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from threading import Event, Semaphore
from typing import Any

import httpx
import pytest
import torch
from dami.generation.budget import ThoughtLimit
from dami.schedules import bend, linear, switch_after
from dami.serving.engine import Limits
from dami.serving.guiding import Guide
from dami.serving.settings import ServiceSettings
from transformers import LogitsProcessorList

from tests.dami.serving.test_server import CHAT, COMPLETIONS, LIMITS, QUESTIONS, Running, asked, running, shipped, until

HARD = "State the final answer to the following arithmetic problem: 47 + 38 - 12 + 95 - 23 + 61 ="
FRONTIER = {"points": [{"intensity": 1.0, "accuracy": [0.9, 0.8, 1.0], "tokens": [12.0, 11.0, 13.0]}]}
LONG = {"temperature": 0, "ignore_eos": True, "intensity": 1.0}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(LIMITS, ServiceSettings(name="pair", intensity_range=(-1.0, 1.5), frontier=FRONTIER)) as server:
        yield server


@pytest.fixture(scope="module")
def generate() -> Callable[..., list[int]]:
    """What the pair generates greedily for a question, by `generate`: the ids, without what follows the end."""
    model, tokenizer = shipped()

    def run(question: str, intensity: Any, most: int, budget: int | None = None, ends: bool = True) -> list[int]:
        ids = tokenizer(f"<|user|>{question}<|assistant|>", return_tensors="pt")["input_ids"]
        [start], [end] = (tokenizer.encode(tag, add_special_tokens=False) for tag in ("<think>", "</think>"))
        limits = [] if budget is None else [ThoughtLimit(ids.shape[1], budget, start, end)]
        options = {} if ends else {"eos_token_id": None, "min_new_tokens": most}
        new = model.generate(
            ids, intensity=intensity, do_sample=False, max_new_tokens=most,
            logits_processor=LogitsProcessorList(limits), **options,
        )  # fmt: skip
        return new[0, ids.shape[1] :].tolist()

    run.tokenizer = tokenizer  # type: ignore[attr-defined]
    return run


def tokens_of(server: Running, question: str, **options: Any) -> list[str]:
    """The tokens of an answer, thought and all, as the API gives them."""
    body = asked(question, logprobs=True, **options)
    return [each["token"] for each in server.post(CHAT, body).json()["choices"][0]["logprobs"]["content"]]


def as_text(ids: list[int], generate: Any) -> list[str]:
    return [generate.tokenizer.decode([token]) for token in ids]


@pytest.mark.parametrize("budget", [0, 5, 12, 30])
def test_a_budget_is_the_schedule_and_the_limit_of_generate(server: Running, generate: Any, budget: int) -> None:
    [start], [end] = (generate.tokenizer.encode(tag, add_special_tokens=False) for tag in ("<think>", "</think>"))
    schedule = bend(1.0, budget, start, end, span=12) if budget else 1.0
    wanted = generate(HARD, schedule, 60, budget)
    assert tokens_of(server, HARD, intensity=1.0, thinking_token_budget=budget) == as_text(wanted, generate)
    said = server.post(CHAT, asked(HARD, intensity=1.0, thinking_token_budget=budget)).json()
    assert said["usage"]["completion_tokens_details"]["reasoning_tokens"] <= budget
    assert said["choices"][0]["message"]["content"]


def test_a_thought_of_a_pair_without_a_frontier_is_cut_off(generate: Any) -> None:
    wanted = generate(HARD, 1.0, 60, 12)
    with running() as server:
        assert tokens_of(server, HARD, intensity=1.0, thinking_token_budget=12) == as_text(wanted, generate)


def test_what_the_tokens_of_an_answer_leave_to_its_thought(server: Running) -> None:
    def thought(**options: Any) -> int:
        body = {"messages": asked(HARD)["messages"], "temperature": 0} | options
        response = server.post(CHAT, body)
        assert response.status_code == 200, response.text
        return response.json()["usage"]["completion_tokens_details"]["reasoning_tokens"]

    free = thought(reasoning_effort="xhigh")
    assert free > 38
    assert 0 < thought(reasoning_effort="xhigh", max_completion_tokens=40) <= 38
    assert 0 < thought(reasoning_effort="high", max_completion_tokens=40) <= 32
    assert thought(reasoning_effort="low", max_completion_tokens=40) <= 8
    assert thought(reasoning_effort="none") == 0
    lower = thought(reasoning_effort="xhigh", max_completion_tokens=40, thinking_token_budget=10)
    assert 0 < lower <= 10
    with running(settings=ServiceSettings(name="pair", answer_reserve=12)) as reserving:
        for room, left in ((40, 28), (12, 0), (5, 0)):
            body = asked(HARD, intensity=1.0, max_tokens=room)
            assert reserving.post(CHAT, body).json()["usage"]["completion_tokens_details"]["reasoning_tokens"] <= left


def test_efforts_stand_for_lam(server: Running) -> None:
    for effort, lam in (("none", 0), ("minimal", 0), ("low", 0.25), ("medium", 0.5), ("high", 0.75), ("xhigh", 1)):
        assert server.post(CHAT, asked(max_tokens=1, reasoning_effort=effort)).json()["intensity"] == lam


def test_a_schedule_in_the_body_is_one_of_generate(server: Running, generate: Any) -> None:
    falling = tokens_of(server, HARD, intensity=1.0, intensity_schedule=[[16, 0.2]])
    assert falling == as_text(generate(HARD, linear(1.0, 0.2, 16), 60), generate)
    end = generate.tokenizer.encode("</think>", add_special_tokens=False)
    switched = tokens_of(server, HARD, intensity=0.9, answer_intensity=-0.5)
    assert switched == as_text(generate(HARD, switch_after(end, 0.9, -0.5), 60), generate)
    text = f"<|user|>{HARD}<|assistant|>"
    plain = {"prompt": text, "temperature": 0, "max_tokens": 30, "intensity": 1.0, "intensity_schedule": [[16, 0.2]]}
    said = server.post(COMPLETIONS, plain | {"logprobs": 0}).json()["choices"][0]["logprobs"]["tokens"]
    assert said == falling[:30]


def dial(server: Running, name: str, **change: Any) -> httpx.Response:
    return server.post(f"/v1/requests/{name}/dial", change)


def stream(
    server: Running, change: Callable[[str, int], Any], headers: dict[str, str] | None = None, **options: Any
) -> list[tuple[str, float]]:
    """The tokens of a streamed answer, each with its λ. `change` is called with its id and how many have come.

    The server takes at most eight steps more than have been read, so that what is changed still runs.
    """
    tokens: list[str] = []
    told: list[tuple[int, float]] = []
    guides: list[Guide] = []
    body = asked(HARD, stream=True, logprobs=True, **LONG | options)
    head, steps = server.engine.model.lm_head, Semaphore(8)
    forward = head.forward

    def awaited(*arguments: Any, **named: Any) -> Any:
        assert steps.acquire(timeout=60)
        return forward(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch, ExitStack() as after:
        patch.setattr(head, "forward", awaited)
        after.callback(steps.release, 10_000)
        response = after.enter_context(httpx.stream("POST", server.url + CHAT, json=body, headers=headers, timeout=60))
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                active = server.app.state.service.active.get(chunk["id"])
                guides += [choice.guide for choice in active.choices] if active is not None else []
                new = [each["token"] for each in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
                tokens += new
                told.append((len(tokens), chunk["intensity"]))
                change(chunk["id"], len(tokens))
                if new:
                    steps.release(len(new))
    lams = guides[0].lams
    for count, lam in told:
        assert lam == pytest.approx(lams[max(count - 1, 0)], abs=1e-7)  # chunks tell the λ of their last token
    return list(zip(tokens, lams[: len(tokens)], strict=True))


def test_chunks_tell_the_lam_of_their_tokens(server: Running) -> None:
    """Which `stream` compares."""
    found = stream(server, lambda *_: None, intensity_schedule=[[10, 0.5]], max_tokens=30)
    lams = [lam for _, lam in found]
    assert lams[0] == 1.0
    assert lams[-1] == 0.5
    assert lams == sorted(lams, reverse=True)
    assert len(set(lams)) > 3


def test_lam_of_a_running_request_can_be_turned(server: Running, generate: Any) -> None:
    """What comes is what `generate` says with λ turned at the same tokens."""
    turned: list[int] = []

    def change(name: str, count: int) -> None:
        if count >= 5 and not turned:
            turned.append(count)
            response = dial(server, name, intensity=0.25)
            assert response.json() == {
                "id": name, "object": "request.dial", "choices": [0], "intensity": 0.25, "wrap_up": None,
            }  # fmt: skip

    found = stream(server, change, max_tokens=80)
    lams = [lam for _, lam in found]
    at = lams.index(0.25)
    assert turned[0] <= at < 80
    assert lams == [1.0] * at + [0.25] * (80 - at)
    wanted = generate(HARD, lambda step, tokens: 1.0 if step < at else 0.25, 80, ends=False)
    assert [token for token, _ in found] == as_text(wanted, generate)


def test_a_thought_can_be_wrapped_up_while_it_streams(server: Running) -> None:
    asked_for: list[int] = []

    def change(name: str, count: int) -> None:
        if count >= 5 and not asked_for:
            asked_for.append(count)
            assert dial(server, name, wrap_up=8, choice=0).status_code == 200

    # never ends by itself: the end tag is ruled out, except where it is forced
    [end] = server.app.state.service.thoughts.end
    found = stream(server, change, max_tokens=80, logit_bias={str(end): -100})
    tokens, lams = zip(*found, strict=True)
    at = tokens.index("</think>")
    assert "</think>" not in tokens[at + 1 :]
    falling = [lam for lam in lams[: at + 1] if lam < 1]
    assert falling == pytest.approx([7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])
    assert set(lams[at + 1 :]) == {1.0}


def test_only_what_runs_can_be_dialled(server: Running) -> None:
    refused: list[httpx.Response] = []

    def change(name: str, count: int) -> None:
        if not refused:
            refused.extend([
                dial(server, name, choice=1, intensity=0.5),
                dial(server, name),
                dial(server, name, intensity=7),
                dial(server, name, intensity="auto"),
                dial(server, name, intensity="low"),
                dial(server, name, wrap_up=-1),
                dial(server, name, intensity=0.5, wings=1),
            ])  # fmt: skip
        known.append(name)

    known: list[str] = []
    stream(server, change, max_tokens=40)
    errors = [(each.status_code, each.json()["error"]) for each in refused]
    assert [status for status, _ in errors] == [404, *[400] * 6]
    messages = [error["message"] for _, error in errors]
    for message, wanted in zip(messages, (
        f"there is no running request {known[0]}, choice 1",
        "intensity or wrap_up must be given",
        "intensity must be in -1 to 1.5 on this server, got 7",
        "intensity must be a number or a preset, got 'auto'",
        "intensity must be a number, a preset, of which the model has none",
        "wrap_up: Input should be greater than or equal to 0",
        "wings: Extra inputs are not permitted",
    ), strict=True):  # fmt: skip
        assert wanted in message
    for name in (known[0], "chatcmpl-unknown"):  # it has ended; it never was
        response = dial(server, name, intensity=0.5)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "request_not_found")
        assert f"there is no running request {name}" in response.text
    assert not server.app.state.service.active


def test_a_plain_text_has_no_thought_to_wrap_up(server: Running) -> None:
    body = {"prompt": "a", "max_tokens": 60, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", server.url + COMPLETIONS, json=body, timeout=60) as response:
        first = next(line for line in response.iter_lines() if line)
        name = json.loads(first.removeprefix("data: "))["id"]
        refusal = dial(server, name, wrap_up=5)
    assert refusal.status_code in (400, 404)  # 404 if it has ended meanwhile
    if refusal.status_code == 400:
        assert "wrap_up is for chat completions: a plain text has no thoughts" in refusal.text


def test_only_the_same_key_may_dial() -> None:
    settings = ServiceSettings(name="pair", api_keys=("one", "two"))
    with running(Limits(kv_memory=0.05), settings) as server:
        keys = [{"Authorization": f"Bearer {key}"} for key in ("one", "two", "three")]
        found: list[httpx.Response] = []

        def change(name: str, count: int) -> None:
            if not found:
                path = f"/v1/requests/{name}/dial"
                found.extend(server.post(path, {"intensity": 0.1}, headers=keys[which]) for which in (1, 2, 0))

        stream(server, change, keys[0], max_tokens=20)
        assert [each.status_code for each in found] == [404, 401, 200]


def test_no_other_request_changes_by_a_bit() -> None:
    """With an invariant model: log-probabilities of one at rest, alone and beside one that is turned all the time."""
    model, _ = shipped(invariant=True)
    still = asked(HARD, logprobs=True, top_logprobs=3, **LONG | {"intensity": 0.6, "max_tokens": 60})
    with running(LIMITS, ServiceSettings(name="pair"), model=model) as server, ThreadPoolExecutor() as clients:
        alone = server.post(CHAT, still).json()["choices"]
        beside: list[Any] = []

        def change(name: str, count: int) -> None:
            if count >= 3 and not beside:
                beside.append(clients.submit(server.post, CHAT, still))
            if beside and not beside[0].done():
                dial(server, name, intensity=(count % 7) / 7)

        lams = {lam for _, lam in stream(server, change, max_tokens=150)}
        assert len(lams) > 2
        assert beside[0].result(60).json()["choices"] == alone


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"thinking_token_budget": -1}, "thinking_token_budget", "greater than or equal to 0"),
        ({"intensity_schedule": []}, "intensity_schedule", "at least 1 item"),
        ({"intensity_schedule": [[5]]}, "intensity_schedule", "intensity_schedule[0]"),
        ({"intensity_schedule": [[0, 0.5]]}, "intensity_schedule", "greater than or equal to 1"),
        ({"intensity_schedule": [[5, 0.5], [5, 0.7]]}, "intensity_schedule", "must ascend, got points at [5, 5]"),
        ({"intensity_schedule": [[5, 9.5]]}, "intensity_schedule", "intensity_schedule must be in -1 to 1.5"),
        ({"answer_intensity": "auto"}, "answer_intensity", "answer_intensity must be a number or a preset, got 'auto'"),
        ({"answer_intensity": 3}, "answer_intensity", "answer_intensity must be in -1 to 1.5"),
    ],
)
def test_bad_courses(server: Running, options: dict[str, Any], param: str, message: str) -> None:
    response = server.post(CHAT, asked(QUESTIONS[0], **options))
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert message in response.json()["error"]["message"]


def test_evicted_requests_come_back_as_they_were(
    generate: Any, evicted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cache too small for all, those evicted are read again at the λ of each of their tokens."""
    tight = Limits(kv_memory=0.0018, max_batch_tokens=48, max_model_len=128, share_prefixes=False)
    points = [(0, 1.0), (10, 0.2), (30, 1.0), (60, 0.4)]

    def lam(step: int, tokens: torch.Tensor) -> float:
        for (left, low), (right, high) in pairwise(points):
            if step <= right:
                return low + (high - low) * (step - left) / (right - left)
        return points[-1][1]

    wanted = as_text(generate(HARD, lam, 70, ends=False), generate)
    with running(tight) as server, ThreadPoolExecutor(6) as clients:
        body = asked(HARD, intensity_schedule=points[1:], logprobs=True, **LONG | {"max_tokens": 70})
        head, come = server.engine.model.lm_head, Event()
        forward = head.forward
        monkeypatch.setattr(head, "forward", lambda *x, **y: (come.wait(60), forward(*x, **y))[1])
        asking = [clients.submit(server.post, CHAT, body) for _ in range(6)]
        until(lambda: len(server.engine.rows) == 6)
        come.set()
        for response in asking:
            found = response.result(60).json()["choices"][0]["logprobs"]["content"]
            assert [token["token"] for token in found] == wanted
    assert evicted
