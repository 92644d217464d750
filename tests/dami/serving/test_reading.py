"""Prompts that a server reads at a λ of their own, and λ that it chooses while it reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dami
import httpx
import pytest
import torch
from dami.chat import last_turn, render
from dami.estimators.preference import PreferenceEstimator
from dami.generation.batching import StepLoad
from dami.serving import service
from dami.serving.controller import IntensityController
from dami.serving.engine import Limits
from dami.serving.protocol import BadRequest, ChatRequest, CompletionRequest
from dami.serving.reading import PromptReading, default_reading, proposal, reading_of
from dami.serving.sampling import sampling_of
from dami.serving.settings import ServiceSettings
from transformers import ContinuousBatchingConfig, GenerationConfig

from tests.dami.serving.test_server import CHAT, COMPLETIONS, QUESTIONS, Running, asked, sse, until

LIMITS = Limits(kv_memory=0.05, max_batch_tokens=48)
MOST = 12  # tokens of an answer
TALK = [
    {"role": "user", "content": QUESTIONS[0]},
    {"role": "assistant", "content": "93"},
    {"role": "user", "content": "12 + 3 ="},
]


class Preferring(PreferenceEstimator):
    """The shipped pair's estimator, which fails on request."""

    broken = False

    def choose(self, features: torch.Tensor) -> torch.Tensor:
        if type(self).broken:
            raise RuntimeError("no idea")
        return super().choose(features)


def loaded() -> tuple[Any, Any]:
    model, tokenizer = dami.load_pair(*dami.example_pair(), dtype=torch.float32)
    settings, weights = model.dami.estimator.state()
    return dami.attach(model, Preferring.from_state(settings, weights), {"low": 0.25}), tokenizer


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Any]:
    return loaded()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    model, tokenizer = loaded()
    settings = ServiceSettings(name="pair", prompt_intensity=0.0)
    with Running(model, tokenizer, LIMITS, settings) as running:
        running.steps = []  # type: ignore[attr-defined]
        hand_over = running.engine.manager.on_step
        running.engine.manager.on_step = lambda step: running.steps.append(step) or hand_over(step)  # type: ignore
        yield running


def alone(plain: tuple[Any, Any], prompt: list[int], lam: float, read: float, tail: int) -> str:
    """What `generate_batch` answers, which is compared with merged models elsewhere."""
    model, tokenizer = plain
    config = GenerationConfig(do_sample=False, max_new_tokens=MOST, eos_token_id=model.generation_config.eos_token_id)
    batching = ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=64)
    lams = {"intensity": lam, "prompt_intensity": read, "prompt_tail": tail}
    [output] = model.generate_batch([prompt], config, batching, **lams).values()
    return str(tokenizer.decode(output.generated_tokens, skip_special_tokens=True))


def text_of(answer: dict[str, Any]) -> str:
    message = answer["choices"][0]["message"]
    thought = message.get("reasoning_content", "")
    return f"{thought}{message['content']}"


def bare(text: str) -> str:
    """A text without the tags around thoughts."""
    return text.replace("<think>", "").replace("</think>", "").replace("\n", "").strip()


def tokens_of(server: Running) -> int:
    """Tokens read since the last call, once the server is idle."""
    steps: list[StepLoad] = server.steps  # type: ignore[attr-defined]
    until(lambda: not server.engine.rows and bool(steps) and not steps[-1].rows)
    count = sum(step.tokens for step in steps)
    steps.clear()
    return count


@pytest.mark.parametrize(
    ("fields", "read", "tail"),
    [
        ({}, 0.0, 1),
        ({"prompt_tail": 0}, 0.0, 0),
        ({"prompt_intensity": 1, "prompt_tail": 5}, 1.0, 5),
        ({"prompt_intensity": "low"}, 0.25, 1),
        ({"prompt_intensity": "same"}, 0.8, 1),
        ({"prompt_tail": "turn"}, 0.0, None),
        ({"vllm_xargs": {"prompt_intensity": 0.5, "prompt_tail": 2}}, 0.5, 2),
    ],
    ids=str,
)
def test_a_prompt_is_read_as_the_request_says(
    server: Running, plain: tuple[Any, Any], fields: dict[str, Any], read: float, tail: int | None
) -> None:
    body = {"messages": TALK, "temperature": 0, "max_tokens": MOST, "intensity": 0.8, **fields}
    answer = server.post(CHAT, body).json()
    tokenizer = plain[1]
    [text, other] = render(tokenizer, [TALK, [*TALK[:-1], {"role": "user", "content": "0"}]], "default", None)
    ids, otherwise = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in (text, other))
    if tail is None:
        tail = last_turn(ids, otherwise)
        assert tokenizer.decode(ids[-tail:]).startswith("12 + 3")
    assert answer["intensity"] == 0.8
    assert bare(text_of(answer)) == bare(alone(plain, ids, 0.8, read, tail))


def test_texts_are_read_so_too(server: Running, plain: tuple[Any, Any]) -> None:
    prompt = f"<|user|>{QUESTIONS[1]}<|assistant|>"
    body = {"prompt": [prompt] * 2, "temperature": 0, "max_tokens": MOST, "intensity": 1.0, "prompt_tail": 3}
    wanted = alone(plain, plain[1](prompt)["input_ids"], 1.0, 0.0, 3)
    assert [choice["text"] for choice in server.post(COMPLETIONS, body).json()["choices"]] == [wanted] * 2


def test_what_was_not_read_is_counted(server: Running) -> None:
    """For each prompt once, and in the metrics when the request has ended.

    transformers keeps no prompt whose answer is one token.
    """
    body = {"prompt": [[7] * 40, [8] * 40], "max_tokens": 3, "n": 2}
    first, again = (server.post(COMPLETIONS, body | {"intensity": lam}).json()["usage"] for lam in (0.3, 0.9))
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in (first, again)]
    assert cached == [0, 2 * 32]
    before = server.metric("dami_cached_prompt_tokens_total")
    server.post(COMPLETIONS, body | {"intensity": 0.5})
    until(lambda: server.metric("dami_cached_prompt_tokens_total") == before + 2 * 32)


def test_the_estimator_looks_at_the_prompt_in_passing(server: Running, plain: tuple[Any, Any]) -> None:
    """It costs one token: the last of the prompt is read again, at the λ chosen."""
    model, tokenizer = plain
    prompt = [*tokenizer(f"<|user|>{QUESTIONS[0]}<|assistant|>")["input_ids"]]
    wanted = model.dami.estimator.estimate(dami.twin(model), {"input_ids": torch.tensor([prompt])}).item()
    body = {"prompt": prompt, "temperature": 0, "max_tokens": MOST, "intensity": "auto", "ignore_eos": True}
    tokens_of(server)
    answer = server.post(COMPLETIONS, body).json()
    assert answer["intensity"] == answer["choices"][0]["intensity"] == pytest.approx(wanted)
    assert not server.engine._to_estimate
    assert server.engine._estimating is None  # nobody else was asked
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    shared = (len(prompt) - 1) // 16 * 16
    assert tokens_of(server) == len(prompt) + 1 + MOST - 1
    chunks = sse(server.post(COMPLETIONS, body | {"stream": True}))
    assert {chunk["intensity"] for chunk in chunks} == {answer["intensity"]}
    assert tokens_of(server) == len(prompt) - shared + 1 + MOST - 1
    assert answer["choices"][0]["text"] == "".join(chunk["choices"][0]["text"] for chunk in chunks)
    capped = server.post(COMPLETIONS, body | {"max_intensity": 0.05}).json()
    assert capped["intensity"] == min(0.05, answer["intensity"])
    several = server.post(COMPLETIONS, body | {"n": 2}).json()
    assert several["intensity"] == pytest.approx(wanted)


def test_sampling_follows_what_is_chosen(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its defaults may depend on λ, which is known only when the prompt has been read."""
    asked_for: list[float] = []

    def seen(body: Any, ends: Any, seed: int, intensity: float) -> Any:
        asked_for.append(intensity)
        return sampling_of(body, ends, seed, intensity)

    monkeypatch.setattr(service, "sampling_of", seen)
    answer = server.post(CHAT, asked(max_tokens=2, intensity="auto")).json()
    assert asked_for == [answer["intensity"]]


def test_an_estimator_that_fails_in_passing_fails_its_request_only(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Preferring, "broken", True)
    response = server.post(CHAT, asked(intensity="auto"))
    assert (response.status_code, response.json()["error"]["message"]) == (500, "the estimator failed: no idea")
    assert response.json()["error"]["code"] == "estimator_failed"
    monkeypatch.undo()
    assert server.post(CHAT, asked(max_tokens=1, intensity="auto")).status_code == 200
    until(lambda: not server.engine.load.running)
    assert server.engine.load.kv == 0


def test_a_load_lowers_what_is_chosen_in_passing() -> None:
    model, tokenizer = loaded()
    controller = IntensityController(1e-9, 4, clock=lambda: 0.0)  # always overloaded
    settings = ServiceSettings(name="pair", prompt_intensity=0.0)
    with Running(model, tokenizer, LIMITS, settings, controller) as running:
        controller._cap = 0.1
        answer = running.post(CHAT, asked(QUESTIONS[0], intensity="auto", max_tokens=2)).json()
        assert answer["intensity"] <= 0.1
        assert running.metric("dami_requests_lowered_total") == 1
        until(lambda: not controller._in_flight.total())


def test_the_model_says_how_prompts_are_read(server: Running) -> None:
    model, *_ = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert {name: model["intensity"][name] for name in ("prompt", "tail", "least_tail")} == {
        "prompt": 0.0,
        "tail": 1,
        "least_tail": 8,
    }


@pytest.mark.parametrize(
    ("path", "fields", "param", "message"),
    [
        (CHAT, {"prompt_intensity": "auto"}, "prompt_intensity", "takes a number or a preset as prompt_intensity"),
        (CHAT, {"prompt_intensity": "high"}, "prompt_intensity", "got 'high' ('same' means that of the answer)"),
        (CHAT, {"prompt_intensity": 3}, "prompt_intensity", "must be in -1 to 2 on this server, got 3"),
        (CHAT, {"prompt_intensity": True}, "prompt_intensity", "prompt_intensity: "),
        (CHAT, {"prompt_tail": -1}, "prompt_tail", "greater than or equal to 0"),
        (CHAT, {"prompt_tail": 1.5}, "prompt_tail", "prompt_tail: "),
        (CHAT, {"prompt_tail": "all"}, "prompt_tail", "'turn'"),
        (CHAT, {"prompt_intensity": "same", "prompt_tail": 1}, "prompt_tail", "give prompt_intensity, or leave out"),
        (CHAT, {"prompt_tail": 1, "vllm_xargs": {"prompt_tail": 2}}, "prompt_tail", "is 1 and in vllm_xargs 2"),
        (COMPLETIONS, {"prompt_tail": "turn"}, "prompt_tail", "must be a number for a text, which has no turns"),
    ],
    ids=str,
)
def test_bad_readings_are_refused(server: Running, path: str, fields: dict[str, Any], param: str, message: str) -> None:
    body = asked() if path == CHAT else {"prompt": "a"}
    response = server.post(path, body | fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize("tail", [-1, True, "all", 1.5])
def test_a_bad_default_is_refused(tail: Any) -> None:
    with pytest.raises(ValueError, match="prompt_tail must be an integer of at least 0, or 'turn', got"):
        default_reading(0.0, tail, {})
    with pytest.raises(ValueError, match="prompt_intensity must be a number or a preset, of which the model has none"):
        default_reading("low", 1, {})
    with pytest.raises(TypeError, match="takes a number or a preset as prompt_intensity, got 'auto'"):
        default_reading("auto", 1, {})


def test_what_a_request_leaves_out_is_the_servers() -> None:
    chat = ChatRequest.model_validate({"messages": [{"role": "user", "content": "a"}]})
    text = CompletionRequest.model_validate({"prompt": "a"})
    default = default_reading("low", "turn", {"low": 0.25})
    assert reading_of(chat, default, {}, (0.0, 1.0)) == default == PromptReading(0.25, "turn")
    assert reading_of(text, default, {}, (0.0, 1.0)) == PromptReading(0.25, 1)
    chat.prompt_intensity = 1.5
    with pytest.raises(BadRequest, match=r"prompt_intensity must be in 0 to 1 on this server, got 1.5"):
        reading_of(chat, default, {}, (0.0, 1.0))


def test_a_turn_begins_where_another_message_would() -> None:
    assert last_turn([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert last_turn([1, 2], [1, 2]) == 2  # without a user message


def test_a_measured_tail_is_proposed() -> None:
    same, read = PromptReading(None, 1), PromptReading(0.0, 1)
    assert proposal(None, same) is None
    for tail, last in ((1, "token"), (3, "3 tokens")):
        assert f"for their last {last}: --prompt-intensity 0 --prompt-tail {tail} reads" in str(proposal(tail, same))
    assert proposal(3, read) == "this pair answers worse with --prompt-tail 1: 3 is the least that costs nothing"
    assert proposal(1, read) is proposal(3, PromptReading(0.0, "turn")) is None
