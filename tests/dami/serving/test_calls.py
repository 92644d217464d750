"""Calls of functions: read from answers as they come, forced by a grammar, and over HTTP by OpenAI's client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from dami.loading.load import example_pair
from dami.serving.calls import CallReader, calls_in, grammar_of, writes_calls
from dami.serving.service import ServiceSettings
from dami.serving.structured import Grammars
from dami.serving.tools import Function
from pydantic import BaseModel, ConfigDict
from transformers import AutoTokenizer

from tests.dami.serving.test_server import CHAT, LIMITS, QUESTIONS, Running, asked, running, sse

TEMPLATE = """
{%- if tools %}<|user|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}
{%- for message in messages %}
{{- '<|assistant|>' if message.role == 'assistant' else '<|user|>' }}
{{- '<tool_response>' if message.role == 'tool' }}{{ message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ call.function.arguments | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor %}
{%- if message.role == 'assistant' %}<|end|>{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
ADD = Function(
    name="add",
    parameters={
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": [1, 2]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
)
NOW = Function(name="now")
TOOLS = [{"type": "function", "function": each.model_dump(exclude_none=True)} for each in (ADD, NOW)]
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 4, "b": 2}}\n</tool_call>'


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """A server whose chat template takes tools."""
    with running(LIMITS, ServiceSettings(name="pair")) as server:
        server.app.state.service.tokenizer.chat_template = TEMPLATE
        yield server


@pytest.mark.parametrize(
    ("answer", "text", "calls"),
    [
        ("2 + 2 = 4", "2 + 2 = 4", []),
        (CALLED, "", [("add", {"a": 4, "b": 2})]),
        (f"So:\n\n{CALLED}\n{CALLED}\nDone.", "So:\nDone.", [("add", {"a": 4, "b": 2})] * 2),
        ('a <tool_call>{"name": "é\\n", "arguments": {}}</tool_call>', "a", [("é\n", {})]),
        (CALLED.removesuffix("\n</tool_call>"), "", [("add", {"a": 4, "b": 2})]),  # the model forgot the end tag
        ("<tool_call>add</tool_call> or so", "<tool_call>add</tool_call> or so", []),
        (f"<tool_call>[]</tool_call>{CALLED}", "<tool_call>[]</tool_call>", [("add", {"a": 4, "b": 2})]),
        ('<tool_call>{"name": "add", "argum', '<tool_call>{"name": "add", "argum', []),  # cut off
        ('<tool_call>{"name": "add"}</tool_call>', '<tool_call>{"name": "add"}</tool_call>', []),
        ("a <tool_cat> and <tool_", "a <tool_cat> and <tool_", []),
    ],
)
def test_calls_are_read_however_they_come(answer: str, text: str, calls: list[Any]) -> None:
    for size in (1, 2, 7, len(answer)):
        reader, said, found = CallReader(), "", []
        pieces = [answer[at : at + size] for at in range(0, len(answer), size)]
        for given, more in (*map(reader.push, pieces), reader.finish()):
            said, found = said + given, found + more
        assert said == text
        assert [(call.name, json.loads(call.arguments)) for call in found] == calls
        assert len({call.id for call in found}) == len(calls)
    assert calls_in(answer)[0] == text


def test_text_comes_as_soon_as_it_can_be_no_call() -> None:
    reader = CallReader()
    assert [reader.push(piece)[0] for piece in ("a", " ", "<tool", "s", " <tool_call", "> b")] == [
        "a", "", "", " <tools", "", "",
    ]  # fmt: skip


def test_who_writes_calls_so() -> None:
    assert writes_calls("… <tool_call>\n{{ call }}\n</tool_call>")
    assert not writes_calls("<tool_call>\n<function={{ name }}>")
    assert not writes_calls("[TOOL_CALLS]")


STRICT = ADD.model_copy(update={"strict": True})
SCHEMA = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}


@pytest.mark.parametrize(
    ("options", "right", "wrong"),
    [
        (
            {"forced": True, "several": True},
            [CALLED, f"{CALLED}\n{CALLED}", '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'],
            [
                "no",
                CALLED.replace("2", "3"),
                CALLED.replace("add", "now"),
                CALLED.replace("add", "sub"),
                f"{CALLED} no",
            ],
        ),
        ({"forced": True, "several": False}, [CALLED], [f"{CALLED}\n{CALLED}"]),
        ({"forced": False, "several": True, "schema": SCHEMA}, [CALLED, '{"sum": 6}'], ["6", '{"sum": 6}' + CALLED]),
        ({"forced": False, "several": True}, ["", "6", f"So: {CALLED} {CALLED}."], [CALLED.replace("2", "3")]),
        ({"forced": False, "several": False}, ["", "6", f"So: {CALLED}"], [f"{CALLED}{CALLED}", f"{CALLED}."]),
    ],
)
def test_grammars_of_calls(options: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    llguidance = pytest.importorskip("llguidance")
    tokenizer = AutoTokenizer.from_pretrained(example_pair()[0])
    rules = grammar_of([STRICT, NOW], **options)
    assert rules is not None
    grammar = Grammars(tokenizer, 768).of(rules)

    def fits(text: str) -> bool:
        matcher = llguidance.LLMatcher(grammar.tokens, grammar.text)
        ids = tokenizer.encode(text, add_special_tokens=False)
        return bool(matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting())

    assert [*map(fits, right)] == [True] * len(right)
    assert [*map(fits, wrong)] == [False] * len(wrong)
    assert grammar_of([ADD, NOW], forced=False, several=True) is None


def tokens_of(server: Running, **options: Any) -> int:
    return int(server.post(CHAT, asked(max_tokens=1, **options)).json()["usage"]["prompt_tokens"])


def test_tools_stand_in_the_prompt_unless_they_are_not_to_be_called(server: Running) -> None:
    assert tokens_of(server, tools=TOOLS) > tokens_of(server, tools=TOOLS[:1]) > tokens_of(server)
    assert tokens_of(server, tools=TOOLS, tool_choice="none") == tokens_of(server, tools=[]) == tokens_of(server)


def test_calls_and_their_results_stand_in_the_prompt(server: Running) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 4, "b": 2}'}}
    messages = [
        {"role": "user", "content": "4 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "6"},
    ]
    text = f"<|user|>4 + 2?<|assistant|>{CALLED}<|end|><|user|><tool_response>6<|assistant|>"
    wanted = len(server.app.state.service.tokenizer.encode(text, add_special_tokens=False))
    assert tokens_of(server, messages=messages) == wanted


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_a_forced_call_comes_after_the_thought(server: Running, lam: float) -> None:
    pytest.importorskip("llguidance")
    body = asked(tools=TOOLS, tool_choice="required", parallel_tool_calls=False, intensity=lam)
    body |= {"max_tokens": 200, "thinking_token_budget": 30}
    [choice] = server.post(CHAT, body).json()["choices"]
    [call] = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    arguments = json.loads(call["function"]["arguments"])
    assert arguments == {} or (0 <= arguments["a"] <= 99 and arguments["b"] in (1, 2))
    assert lam < 1 or "reasoning_content" in choice["message"]

    chunks = [chunk["choices"][0] for chunk in sse(server.post(CHAT, body | {"stream": True}))]
    said = [delta for chunk in chunks for delta in chunk["delta"].get("tool_calls", [])]
    assert [(each["index"], each["function"]) for each in said] == [(0, call["function"])]
    assert chunks[-1]["finish_reason"] == "tool_calls"
    thought = "".join(chunk["delta"].get("reasoning_content", "") for chunk in chunks)
    assert thought == choice["message"].get("reasoning_content", "")
    assert not "".join(chunk["delta"].get("content", "") for chunk in chunks)


def test_an_answer_may_do_without_a_call(server: Running) -> None:
    [free], [none] = (server.post(CHAT, asked(tools=tools)).json()["choices"] for tools in (TOOLS, []))
    assert free["message"].keys() == none["message"].keys()
    assert free["finish_reason"] in ("stop", "length")
    strict = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]]
    pytest.importorskip("llguidance")
    assert server.post(CHAT, asked(tools=strict)).json()["choices"][0]["message"] == free["message"]


class Add(BaseModel):
    """Adds two numbers."""

    model_config = ConfigDict(extra="forbid")
    a: Literal[1, 2, 3]
    b: bool


def test_the_official_client(server: Running) -> None:
    pytest.importorskip("llguidance")
    options: Any = {
        "model": "pair:0.8", "messages": [{"role": "user", "content": QUESTIONS[0]}], "temperature": 0,
        "tools": [openai.pydantic_function_tool(Add)],
        "tool_choice": {"type": "function", "function": {"name": "Add"}},
        "max_completion_tokens": 200, "extra_body": {"thinking_token_budget": 20},
    }  # fmt: skip
    parsed = server.client().chat.completions.parse(**options, parallel_tool_calls=False)
    [call] = parsed.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Add)
    with server.client().chat.completions.stream(**options, parallel_tool_calls=False) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.done" in kinds
    assert message.tool_calls is not None
    assert [each.function.arguments for each in message.tool_calls] == [call.function.arguments]
    first = server.client().chat.completions.create(**options).choices[0].message
    assert first.tool_calls is not None
    again = [
        *options["messages"],
        first,  # as the documentation of the API does it
        *({"role": "tool", "tool_call_id": each.id, "content": "3"} for each in first.tool_calls),
    ]
    said = server.client().chat.completions.create(**options | {"messages": again, "tool_choice": "none"})
    assert said.choices[0].message.tool_calls is None


FUNCTION = TOOLS[0]["function"]


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice", "tool_choice is 'required', and tools has the functions []"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "sub"}}},
            "tool_choice",
            "tool_choice is 'sub', and tools has the functions ['add', 'now']",
        ),
        ({"tools": [TOOLS[0]] * 2}, "tools", "the functions of tools must have different names, got ['add', 'add']"),
        ({"tools": TOOLS, "ignore_eos": True}, "tools", "tools excludes ignore_eos"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools", "tools[0].type"),
        ({"tools": [{"type": "function", "function": FUNCTION | {"name": "a b"}}]}, "tools", "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": FUNCTION | {"parameters": {"type": "x"}, "strict": True}}]},
            "tools",
            "tools: the JSON schema is not supported",
        ),
    ],
)
def test_wrong_tools(server: Running, options: dict[str, Any], param: str, message: str) -> None:
    pytest.importorskip("llguidance")
    response = server.post(CHAT, asked(**options))
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("role", "arguments", "message"),
    [
        ("assistant", "{", "messages[0].tool_calls[0].function.arguments: must be the JSON of an object"),
        ("assistant", "[1]", "must be the JSON of an object, got '[1]'"),
        ("user", "{}", "tool_calls are the assistant's, got some of the role user"),
    ],
)
def test_wrong_calls_in_messages(server: Running, role: str, arguments: str, message: str) -> None:
    call = {"id": "c1", "function": {"name": "add", "arguments": arguments}}
    response = server.post(CHAT, {"messages": [{"role": role, "content": "a", "tool_calls": [call]}]})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "has no place for them"),
        (TEMPLATE.replace("tool_call>", "call>"), "this server reads calls as <tool_call>, and this pair writes them"),
        (TEMPLATE.replace("tool | tojson", "tool.type"), "the chat template leaves out 'add'"),
    ],
)
def test_templates_without_tools(server: Running, monkeypatch: pytest.MonkeyPatch, template: str, message: str) -> None:
    monkeypatch.setattr(server.app.state.service.tokenizer, "chat_template", template)
    response = server.post(CHAT, asked(tools=TOOLS))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
    assert message in response.json()["error"]["message"]


def test_a_template_that_leaves_out_calls(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    template = TEMPLATE.replace("message.tool_calls or []", "[]")
    monkeypatch.setattr(server.app.state.service.tokenizer, "chat_template", template)
    call = {"id": "c1", "function": {"name": "add", "arguments": "{}"}}
    messages = [*asked()["messages"], {"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "a"}]
    response = server.post(CHAT, asked(messages=messages))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
    assert "messages[1]: the chat template leaves out its calls" in response.json()["error"]["message"]
