"""The parameters of OpenAI's API as its clients use them: the official one, and LiteLLM where it is installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from dami.serving.settings import ServiceSettings
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from tests.dami.serving.test_server import CHAT, COMPLETIONS, LIMITS, QUESTIONS, Running, asked, running, shipped, sse


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(LIMITS, ServiceSettings(name="pair")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return server.client()


class Sum(BaseModel):
    """The answer to a sum."""

    model_config = ConfigDict(extra="forbid")
    total: int
    even: bool


def test_structured_outputs(client: openai.OpenAI) -> None:
    """Thoughts go on as they will; the answer obeys the schema, and has an end."""
    pytest.importorskip("llguidance")
    for lam in (0.0, 0.5, 1.0):
        completion = client.chat.completions.parse(
            model="pair",
            messages=[{"role": "user", "content": QUESTIONS[0]}],
            response_format=Sum,
            max_completion_tokens=200,
            seed=1,
            extra_body={"intensity": lam, "thinking_token_budget": 60},
        )
        [choice] = completion.choices
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Sum)
        assert ("reasoning_content" in choice.message.model_dump()) or lam < 1
        assert "{" not in choice.message.model_dump().get("reasoning_content", "")


def test_json_objects_and_plain_text(server: Running, client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    body = asked(response_format={"type": "json_object"}, max_tokens=300, intensity=0.0, temperature=1, seed=5)
    chunks = sse(server.post(CHAT, body | {"stream": True}))
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    if chunks[-1]["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(text), dict)
    assert text.lstrip().startswith("{")
    plain, none = (server.post(CHAT, asked(response_format=form)).json() for form in ({"type": "text"}, None))
    assert plain["choices"] == none["choices"]


def test_a_schema_that_is_not_supported(server: Running) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "json_schema", "json_schema": {"name": "wings", "schema": {"type": "wings"}}}
    response = server.post(CHAT, asked(response_format=schema))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")
    assert "response_format: the JSON schema is not supported" in response.text


def test_biases(server: Running) -> None:
    """A token that is ruled out does not come, and one with a high bias always does."""

    def tokens(**options: Any) -> list[str]:
        found = server.post(CHAT, asked(logprobs=True, **options)).json()["choices"][0]["logprobs"]["content"]
        return [each["token"] for each in found]

    tokenizer = server.app.state.service.tokenizer
    first = tokens()[0]
    [ident] = tokenizer.encode(first, add_special_tokens=False)
    assert first not in tokens(logit_bias={str(ident): -100})
    assert tokens(logit_bias={"9": 100}, max_tokens=5) == [tokenizer.decode([9])] * 5
    assert tokens(logit_bias={"9": 0}) == tokens(logit_bias={}) == tokens()
    text = server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 3, "temperature": 0, "logit_bias": {"9": 100}}).json()
    assert text["choices"][0]["text"] == tokenizer.decode([9] * 3)


class Penalties(LogitsProcessor):
    """OpenAI's formula: μ[j] − c[j] · frequency − (c[j] > 0) · presence, c counting what has been generated."""

    def __init__(self, prompt: int, frequency: float, presence: float) -> None:
        self.prompt, self.frequency, self.presence = prompt, frequency, presence

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        count = torch.stack([row.bincount(minlength=scores.shape[1]) for row in input_ids[:, self.prompt :]])
        return scores - count * self.frequency - (count > 0) * self.presence


@pytest.mark.parametrize(("frequency", "presence"), [(0.7, 0.0), (0.0, 1.5), (-0.3, 0.4)])
def test_penalties(server: Running, frequency: float, presence: float) -> None:
    model, tokenizer = shipped()
    text = f"<|user|>{QUESTIONS[0]}<|assistant|>"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    processors = LogitsProcessorList([Penalties(ids.shape[1], frequency, presence)])
    new = model.generate(
        ids, intensity=1.0, do_sample=False, max_new_tokens=40, eos_token_id=None, logits_processor=processors
    )
    body = {"prompt": text, "max_tokens": 40, "temperature": 0, "ignore_eos": True, "intensity": 1.0, "logprobs": 0}
    response = server.post(COMPLETIONS, body | {"frequency_penalty": frequency, "presence_penalty": presence}).json()
    assert response["choices"][0]["logprobs"]["tokens"] == [tokenizer.decode([t]) for t in new[0, ids.shape[1] :]]


def test_an_answer_may_go_on_with_the_assistant_s_message(server: Running) -> None:
    """As a completion of the same text does, whether the message ends in an answer or in the middle of a thought."""
    for begun, lam in (("The answer is", 0.0), ("<think>42 + 69 = 111", 1.0)):
        messages = [*asked()["messages"], {"role": "assistant", "content": begun}]
        goes_on = {"continue_final_message": True, "add_generation_prompt": False, "logprobs": True, "intensity": lam}
        [choice] = server.post(CHAT, asked() | goes_on | {"messages": messages}).json()["choices"]
        plain = {"prompt": f"<|user|>{QUESTIONS[0]}<|assistant|>{begun}", "temperature": 0, "max_tokens": 60}
        text = server.post(COMPLETIONS, plain | {"intensity": lam, "logprobs": 0}).json()["choices"][0]
        assert [each["token"] for each in choice["logprobs"]["content"]] == text["logprobs"]["tokens"]
        if begun.startswith("<think>"):
            assert choice["message"]["reasoning_content"] == text["text"].partition("</think>")[0].strip()


def test_variables_for_the_chat_template(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = server.app.state.service.tokenizer
    thinks = "{% if not enable_thinking | default(true) %}{{ '<think></think>' }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + thinks)

    def prompt_tokens(**options: Any) -> int:
        return server.post(CHAT, asked(max_tokens=1, **options)).json()["usage"]["prompt_tokens"]

    assert prompt_tokens(chat_template_kwargs={"enable_thinking": False}) == prompt_tokens() + 2
    assert prompt_tokens(chat_template_kwargs={"enable_thinking": True}) == prompt_tokens(chat_template_kwargs={})


def test_what_clients_send_though_it_changes_nothing(server: Running) -> None:
    idle = {
        "user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "metadata": {"a": "b"}, "store": False,
        "service_tier": "auto", "tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "functions": [],
        "function_call": "none", "modalities": ["text"], "verbosity": "medium", "logit_bias": {}, "n": 1,
        "frequency_penalty": 0, "presence_penalty": 0, "response_format": {"type": "text"}, "stream": False,
        "repetition_penalty": 1, "min_p": 0, "audio": None, "prediction": None, "web_search_options": None,
    }  # fmt: skip
    wanted, found = (server.post(CHAT, asked(**options)).json() for options in ({}, idle))
    assert found["choices"] == wanted["choices"]


def test_the_official_client(client: openai.OpenAI) -> None:
    parts: Any = [{"type": "text", "text": QUESTIONS[0][:4]}, {"type": "text", "text": QUESTIONS[0][4:]}]
    options: Any = {"model": "pair:1", "messages": [{"role": "user", "content": parts}], "temperature": 0}
    whole = client.chat.completions.create(**options, n=2, logprobs=True, top_logprobs=2, max_completion_tokens=60)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.model == "pair:1"
    with client.chat.completions.stream(**options, stream_options={"include_usage": True}) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.usage is not None
    assert final.usage.completion_tokens == whole.usage.completion_tokens / 2  # type: ignore[union-attr]
    low = client.chat.completions.create(
        **options | {"model": "pair"}, reasoning_effort="low", max_completion_tokens=60
    )
    assert low.intensity == 0.25  # type: ignore[attr-defined]
    with pytest.raises(openai.BadRequestError, match="tools: the chat template of this pair has no place for them"):
        client.chat.completions.create(**options, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.NotFoundError, match="there is no model 'pair:huge'"):
        client.chat.completions.create(**options | {"model": "pair:huge"})


def test_litellm(server: Running) -> None:
    litellm = pytest.importorskip("litellm")
    options = {"api_base": f"{server.url}/v1", "api_key": "none", "messages": asked()["messages"], "temperature": 0}
    wanted = server.post(CHAT, asked(intensity=1.0)).json()["choices"][0]["message"]
    answer = litellm.completion(model="openai/pair:1", max_tokens=60, **options)
    assert answer.choices[0].message.content == wanted["content"]
    assert answer.choices[0].message.reasoning_content == wanted["reasoning_content"]
    chunks = litellm.completion(model="openai/pair:1", max_tokens=60, stream=True, **options)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == wanted["content"]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == wanted["reasoning_content"]
