"""OpenAI's Responses API as its official client uses it, against chat completions of the same conversation."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from dami.serving.service import ServiceSettings
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.dami.serving.test_calls import TEMPLATE, TOOLS
from tests.dami.serving.test_clients import Sum
from tests.dami.serving.test_server import (
    CHAT,
    LIMITS,
    QUESTIONS,
    Running,
    asked,
    burning,  # noqa: F401  # a fixture
    running,
)

RESPONSES = "/v1/responses"
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(LIMITS, ServiceSettings(name="pair")) as server:
        server.app.state.service.tokenizer.chat_template = TEMPLATE
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return server.client()


def wanted(**options: Any) -> dict[str, Any]:
    return {"model": "pair", "input": QUESTIONS[0], "temperature": 0, "max_output_tokens": 60} | options


def said(response: Response) -> dict[str, Any]:
    """What a response says, as the message of a chat completion."""
    message: dict[str, Any] = {"role": "assistant", "content": response.output_text}
    for item in response.output:
        if item.type == "reasoning":
            message["reasoning_content"] = "".join(part.text for part in item.content or ())
    return message


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_a_response_says_what_a_chat_completion_says(server: Running, client: openai.OpenAI, lam: float) -> None:
    chat = server.post(CHAT, asked(intensity=lam)).json()
    whole = client.responses.create(**wanted(extra_body={"intensity": lam}))
    Response.model_validate(whole.to_dict())
    assert said(whole) == chat["choices"][0]["message"]
    assert [item.type for item in whole.output] == (["reasoning", "message"] if lam else ["message"])
    assert (whole.status, whole.intensity, whole.error) == ("completed", lam, None)  # type: ignore[attr-defined]
    assert whole.usage is not None
    usage = chat["usage"]
    assert whole.usage.output_tokens == usage["completion_tokens"]
    assert whole.usage.output_tokens_details.to_dict() == usage["completion_tokens_details"]
    assert (whole.usage.input_tokens, whole.usage.total_tokens) == (usage["prompt_tokens"], usage["total_tokens"])

    events = list(client.responses.create(**wanted(extra_body={"intensity": lam}), stream=True))
    for event in events:
        EVENT.validate_python(event.to_dict())
    assert [event.sequence_number for event in events] == list(range(len(events)))
    parts = ["response.reasoning_text", "response.output_text"][0 if lam else 1 :]
    kinds = list(dict.fromkeys(f"{event.type} {getattr(event, 'output_index', '')}".strip() for event in events))
    assert kinds == [
        "response.created",
        "response.in_progress",
        *(
            f"{kind} {place}"
            for place, part in enumerate(parts)
            for kind in (
                "response.output_item.added", "response.content_part.added", f"{part}.delta", f"{part}.done",
                "response.content_part.done", "response.output_item.done",
            )
        ),
        "response.completed",
    ]  # fmt: skip
    last = events[-1].response
    assert said(last) == said(whole)
    assert last.usage.output_tokens == whole.usage.output_tokens
    assert {event.intensity for event in events if event.type.endswith(".delta")} == {lam}


def test_the_client_s_stream_and_structured_output(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    options: Any = wanted(max_output_tokens=200, extra_body={"intensity": 1.0, "seed": 1, "thinking_token_budget": 60})
    parsed = client.responses.parse(**options, text_format=Sum)
    assert isinstance(parsed.output_parsed, Sum)
    assert parsed.text is not None
    assert parsed.text.format is not None
    assert parsed.text.format.type == "json_schema"
    with client.responses.stream(**options, text_format=Sum) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.output_parsed == parsed.output_parsed


def test_an_answer_that_is_cut_off_is_incomplete(client: openai.OpenAI) -> None:
    options: Any = wanted(max_output_tokens=8, extra_body={"intensity": 1.0})
    *_, last = client.responses.create(**options, stream=True)
    for response in (client.responses.create(**options), last.response):
        assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert response.output[-1].status == "incomplete"
    assert last.type == "response.incomplete"


def test_effort_instructions_and_names_of_models(server: Running, client: openai.OpenAI) -> None:
    low = client.responses.create(**wanted(reasoning={"effort": "low"}))
    assert low.intensity == 0.25  # type: ignore[attr-defined]
    assert low.reasoning is not None
    assert low.reasoning.effort == "low"
    named = client.responses.create(**wanted(model="pair:0.8"))
    assert (named.model, named.intensity) == ("pair:0.8", 0.8)  # type: ignore[attr-defined]
    told = client.responses.create(**wanted(instructions="Be right.", metadata={"a": "b"}))
    messages = [{"role": "system", "content": "Be right."}, *asked()["messages"]]
    assert said(told) == server.post(CHAT, asked(messages=messages)).json()["choices"][0]["message"]
    assert (told.instructions, told.metadata) == ("Be right.", {"a": "b"})


def test_earlier_items_come_back_as_they_went(server: Running, client: openai.OpenAI) -> None:
    question = {"role": "user", "content": [{"type": "input_text", "text": QUESTIONS[0]}]}
    first = client.responses.create(**wanted(input=[question], extra_body={"intensity": 1.0}))
    items: Any = [question, *(item.to_dict() for item in first.output), {"role": "user", "content": QUESTIONS[1]}]
    second = client.responses.create(**wanted(input=items))
    messages = [*asked()["messages"], said(first), *asked(QUESTIONS[1])["messages"]]
    chat = server.post(CHAT, asked(messages=messages)).json()
    assert said(second) == chat["choices"][0]["message"]
    assert second.usage is not None
    assert second.usage.input_tokens == chat["usage"]["prompt_tokens"]


def test_calls(server: Running, client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    tools: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
    options: Any = wanted(
        tools=tools, tool_choice={"type": "function", "name": "add"}, parallel_tool_calls=False, max_output_tokens=200,
        extra_body={"intensity": 1.0, "thinking_token_budget": 20},
    )  # fmt: skip
    whole = client.responses.create(**options)
    Response.model_validate(whole.to_dict())
    thought, call = whole.output
    assert (thought.type, call.type, call.name) == ("reasoning", "function_call", "add")
    assert json.loads(call.arguments).keys() == {"a", "b"}
    with client.responses.stream(**options) as stream:
        events = [event for event in stream if "function_call" in event.type]
        final = stream.get_final_response()
    assert [event.type.rpartition(".")[2] for event in events] == ["delta", "done"]
    assert final.output[-1].arguments == call.arguments
    items = [
        {"role": "user", "content": QUESTIONS[0]},
        thought.to_dict(),
        call.to_dict(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "6"},
    ]
    answered = client.responses.create(**options | {"input": items, "tool_choice": "none"})
    function = {"name": "add", "arguments": call.arguments}
    messages = [
        *asked()["messages"],
        {"role": "assistant", "tool_calls": [{"id": call.call_id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": call.call_id, "content": "6"},
    ]
    chat = server.post(CHAT, asked(messages=messages, max_tokens=1)).json()
    assert answered.usage is not None
    assert answered.usage.input_tokens == chat["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "is not supported by this server: leave it out"),
        ({"store": True}, "store", "is not supported by this server: leave it out"),
        ({"background": True}, "background", "is not supported"),
        ({"include": ["reasoning.encrypted_content"]}, "include", "is not supported"),
        ({"truncation": "auto"}, "truncation", "is not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools", "tools[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "input[0]"),
        ({"reasoning": {"effort": "low"}, "intensity": 1.0}, "reasoning", "reasoning is low and intensity 1.0"),
        ({"max_output_tokens": 1 << 20}, "max_output_tokens", "this server takes"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice is 'required', and tools has the functions []"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text", "schema"),
        ({"max_tokens": 5}, "max_tokens", "Extra inputs are not permitted"),
    ],
)
def test_what_is_refused_is_named(server: Running, options: dict[str, Any], param: str, message: str) -> None:
    response = server.post(RESPONSES, wanted(**options))
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert message in response.json()["error"]["message"]


def test_what_clients_send_though_it_changes_nothing(server: Running) -> None:
    idle = {
        "store": False, "include": [], "service_tier": "auto", "truncation": "disabled", "user": "u", "tools": [],
        "tool_choice": "auto", "text": {"format": {"type": "text"}, "verbosity": "medium"}, "prompt_cache_key": "k",
        "reasoning": {"summary": "auto"}, "previous_response_id": None, "background": False, "stream": False,
    }  # fmt: skip
    plain, same = (server.post(RESPONSES, wanted(**options)).json() for options in ({}, idle))
    assert [item["content"] for item in same["output"]] == [item["content"] for item in plain["output"]]


def test_an_engine_that_dies_fails_the_response(
    burning: tuple[Running, threading.Event],  # noqa: F811
) -> None:
    server, lit = burning
    stream = server.client().responses.create(**wanted(stream=True, extra_body={"intensity": 1.0}))
    lit.set()
    events = list(stream)
    assert events[-1].type == "response.failed"
    assert events[-1].response.status == "failed"
    assert "the memory is on fire" in events[-1].response.error.message
    EVENT.validate_python(events[-1].to_dict())
