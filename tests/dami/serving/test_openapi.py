"""The server against its own OpenAPI: what fits it or nearly does is answered as it says, by no error of ours."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from dami.serving import schema as types
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from pydantic import TypeAdapter

from benchmarks.serving.server import Server, serving

schemathesis = pytest.importorskip("schemathesis")
from schemathesis.specs.openapi import checks  # noqa: E402

CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def bounded() -> Iterator[Server]:
    """A server whose answers are short whatever is asked for."""
    with serving("--max-model-len", "24", "--max-requests", "200", threads=1) as running:
        yield running


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_every_request_is_answered_as_the_schema_says(bounded: Server, mode: Any) -> None:
    schema = schemathesis.openapi.from_url(f"{bounded.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics"} <= {each.path for each in operations}
    for operation in operations:

        @given(operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=30,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def answered(case: Any) -> None:
            case.call_and_validate(timeout=60, checks=CHECKS)

        with suppress(Unsatisfiable):  # nothing is wrong for one that takes nothing
            answered()


CHAT = {"messages": [{"role": "user", "content": "2 + 3?"}], "max_tokens": 4, "intensity": 1.0}
ANSWERS = [
    ("/v1/chat/completions", CHAT, types.ChatCompletion, types.ChatCompletionChunk),
    (
        "/v1/chat/completions",
        CHAT | {"logprobs": True, "top_logprobs": 2},
        types.ChatCompletion,
        types.ChatCompletionChunk,
    ),
    (
        "/v1/completions",
        {"prompt": ["2", "3"], "max_tokens": 2, "ignore_eos": True},
        types.Completion,
        types.CompletionChunk,
    ),
    (
        "/v1/completions",
        {"prompt": "2", "logprobs": 2, "max_tokens": 4, "ignore_eos": True},
        types.Completion,
        types.CompletionChunk,
    ),
]


def fits(kind: Any, content: str) -> Any:
    """The JSON as it is, if it is of a kind to the letter: no other type and no field more."""
    validated = TypeAdapter(kind).validate_json(content, strict=True, extra="forbid")
    assert validated == json.loads(content)
    return validated


@pytest.mark.parametrize(("path", "body", "whole", "chunk"), ANSWERS)
def test_answers_have_the_fields_of_the_schema_and_no_others(
    bounded: Server, path: str, body: Any, whole: Any, chunk: Any
) -> None:
    answer = fits(whole, httpx.post(bounded.url + path, json=body, timeout=60).text)
    assert all(choice["logprobs"] is not None for choice in answer["choices"]) == ("logprobs" in body)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    events = httpx.post(bounded.url + path, json=body | options, timeout=60).text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [fits(chunk, event.removeprefix("data: ")) for event in events[:-2]]
    assert [bool(each["choices"]) for each in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1]["usage"] == answer["usage"]


def test_what_tells_about_the_server_has_the_fields_of_the_schema(bounded: Server) -> None:
    told = {
        "/v1/models": types.ModelList,
        "/v1/models/shipped": types.Model,
        "/v1/models/other": types.ErrorResponse,
        "/v1/nothing": types.ErrorResponse,
        "/health": types.Health,
    }
    for path, kind in told.items():
        fits(kind, httpx.get(bounded.url + path).text)


def test_the_schema_has_every_object_that_it_names(bounded: Server) -> None:
    text = httpx.get(f"{bounded.url}/openapi.json").text
    known = json.loads(text)["components"]["schemas"]
    named = set(re.findall('"#/components/schemas/([^"]+)"', text))
    assert named <= set(known)
    chunk = known["ChatCompletionChunk"]["properties"]["choices"]["items"]
    assert chunk == {"$ref": "#/components/schemas/ChatChunkChoice"}
    for name in (
        "ChatCompletion",
        "ChatCompletionChunk",
        "Completion",
        "CompletionChunk",
        "ResponseObject",
        "ResponseEvent",
        "ModelList",
        "ErrorResponse",
    ):
        assert name in named
    paths = json.loads(text)["paths"]
    assert all(
        content.get("schema") not in (None, {}) or "itemSchema" in content
        for path in paths.values()
        for operation in path.values()
        for response in operation["responses"].values()
        for content in response.get("content", {}).values()
    )


def test_after_all_that_the_server_is_well(bounded: Server) -> None:
    bounded.wait_until_idle()
    assert httpx.get(f"{bounded.url}/health").json()["status"] == "ok"
    errors = [name for name, value in bounded.metrics().items() if 'status="5' in name and value]
    assert not errors
