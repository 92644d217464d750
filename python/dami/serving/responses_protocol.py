"""Requests of OpenAI's Responses API, as the chat completions that answer them."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, StrictBool, StrictInt, StrictStr, ValidationError, model_validator

from dami.serving.fields import Count, Number, Preset, Strict, neutral
from dami.serving.protocol import MESSAGES, BadRequest, ChatRequest, Dialled, Effort
from dami.serving.tools import TOOLS, Function, FunctionCall, FunctionName, Mode

T = TypeVar("T")

Status = Literal["in_progress", "completed", "incomplete"]


class Item(Strict):
    """An item of an input. Clients send items of earlier responses as they came."""

    id: StrictStr | None = None
    status: Status | None = None


class ContentPart(Strict):
    type: Literal["input_text", "output_text", "text"]
    text: StrictStr
    annotations: Annotated[list[Any] | None, neutral([])] = None
    logprobs: Annotated[list[Any] | None, neutral([])] = None


class ReasoningPart(Strict):
    type: Literal["reasoning_text"]
    text: StrictStr


Parts = Annotated[list[ContentPart], Field(max_length=MESSAGES, fail_fast=True)]


class MessageItem(Item):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | Parts
    phase: StrictStr | None = None


class ReasoningItem(Item):
    type: Literal["reasoning"]
    summary: Annotated[list[Any] | None, neutral([])] = None
    content: Annotated[list[ReasoningPart], Field(max_length=MESSAGES, fail_fast=True)] | None = None
    encrypted_content: Annotated[str | None, neutral()] = None


class CallItem(Item, FunctionCall):
    type: Literal["function_call"]
    call_id: StrictStr


class CallOutputItem(Item):
    type: Literal["function_call_output"]
    call_id: StrictStr
    output: StrictStr | Parts


AnyItem = MessageItem | ReasoningItem | CallItem | CallOutputItem


class FunctionTool(Function):
    type: Literal["function"]


class NamedFunction(FunctionName):
    type: Literal["function"]


class TextFormat(Strict):
    """What the answer, and not the thought, must be."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[StrictStr, Field(max_length=64)] | None = None
    description: StrictStr | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: StrictBool | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("schema must be given with the type json_schema, and with no other")
        return self

    def plain(self) -> dict[str, Any]:
        """Returns the `response_format` of a chat completion."""
        given = self.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
        return {"type": self.type, **({"json_schema": given} if given else {})}


class Text(Strict):
    format: TextFormat | None = None
    verbosity: Annotated[str | None, neutral("medium")] = None


class Reasoning(Strict):
    effort: Effort | None = None
    summary: Annotated[str | None, neutral("auto")] = None
    generate_summary: Annotated[str | None, neutral("auto")] = None


class ResponseStreamOptions(Strict):
    include_obfuscation: Annotated[bool | None, neutral(False)] = None


class ResponsesRequest(Dialled):
    """POST /v1/responses."""

    input: StrictStr | Annotated[list[AnyItem], Field(min_length=1, max_length=MESSAGES, fail_fast=True)]
    instructions: StrictStr | None = None
    max_output_tokens: Count | None = None
    reasoning: Reasoning | None = None
    text: Text | None = None
    answer_intensity: Number | Preset | None = Field(
        None, description="λ of the answer after its thought: a number or a preset; by default, that of the thought."
    )
    thinking_token_budget: Annotated[StrictInt, Field(ge=0, le=1 << 30)] | None = Field(
        None, description="The most tokens of a thought. λ falls as the thought nears it, so that it ends by itself."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables for the chat template.")
    tools: Annotated[list[FunctionTool], Field(max_length=TOOLS, fail_fast=True)] | None = None
    tool_choice: Mode | NamedFunction | None = Field(None, description="auto by default.")
    parallel_tool_calls: StrictBool | None = Field(True, description="Whether an answer may have several calls.")
    metadata: dict[str, str] | None = None
    safety_identifier: StrictStr | None = None
    prompt_cache_key: StrictStr | None = None
    stream_options: ResponseStreamOptions | None = None
    store: Annotated[bool | None, neutral(False)] = Field(None, description="This server keeps no response.")
    previous_response_id: Annotated[str | None, neutral()] = Field(None, description="As store.")
    conversation: Annotated[Any, neutral()] = None
    background: Annotated[bool | None, neutral(False)] = None
    include: Annotated[list[Any] | None, neutral([])] = None
    max_tool_calls: Annotated[int | None, neutral()] = None
    prompt: Annotated[Any, neutral()] = None
    service_tier: Annotated[str | None, neutral("auto", "default")] = None
    top_logprobs: Annotated[int | None, neutral(0)] = None
    truncation: Annotated[str | None, neutral("disabled")] = None

    same: ClassVar = (
        *Dialled.model_fields, "answer_intensity", "thinking_token_budget", "chat_template_kwargs",
        "parallel_tool_calls",
    )  # fmt: skip

    def chat(self) -> ChatRequest:
        """Returns the chat completion that answers this request.

        Raises:
            BadRequest: fields contradict each other.
        """
        fields: dict[str, Any] = {name: getattr(self, name) for name in self.same}
        fields |= {"messages": self._messages(), "max_completion_tokens": self.max_output_tokens}
        if self.reasoning is not None:
            fields["reasoning_effort"] = self.reasoning.effort
        if self.text is not None and self.text.format is not None:
            fields["response_format"] = self.text.format.plain()
        fields["tools"] = [
            {"type": "function", "function": each.model_dump(exclude={"type"})} for each in self.tools or ()
        ]
        choice = self.tool_choice
        if isinstance(choice, NamedFunction):
            fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        else:
            fields["tool_choice"] = choice
        try:
            return ChatRequest.model_validate(fields)
        except ValidationError as problem:
            [first, *_] = problem.errors(include_url=False, include_input=False)
            param = first.get("ctx", {}).get("param") or str(first["loc"][0])
            raise renamed(BadRequest(first["msg"].removeprefix("Value error, "), param)) from None

    def _messages(self) -> list[dict[str, Any]]:
        """Returns the input as messages: an assistant's thought, text and calls are one."""
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for item in self.input:
            if isinstance(item, CallOutputItem):
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
            elif isinstance(item, MessageItem) and item.role != "assistant":
                messages.append({"role": item.role, "content": _text(item.content)})
            else:
                if not messages or messages[-1]["role"] != "assistant" or isinstance(item, ReasoningItem):
                    messages.append({"role": "assistant"})
                _add(messages[-1], item)
        return messages


NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning",
    "response_format": "text",
}


def renamed(problem: BadRequest) -> BadRequest:
    """Returns a problem of a chat completion as one of the request whose field it was."""
    param = NAMES.get(problem.param or "", problem.param)
    message = str(problem)
    if param != problem.param:
        message = message.replace(str(problem.param), str(param))
    return BadRequest(message, param, problem.code, problem.status)


async def as_asked(work: Awaitable[T]) -> T:
    """Awaits work on a chat completion, and names its problems as `renamed` does."""
    try:
        return await work
    except BadRequest as problem:
        raise renamed(problem) from problem


def _add(message: dict[str, Any], item: MessageItem | ReasoningItem | CallItem) -> None:
    """Adds an item to a message of the assistant."""
    if isinstance(item, MessageItem):
        message["content"] = message.get("content", "") + _text(item.content)
    elif isinstance(item, ReasoningItem):
        if item.content:
            message["reasoning_content"] = "".join(part.text for part in item.content)
    else:
        function = {"name": item.name, "arguments": item.arguments}
        message.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})


def _text(content: str | list[ContentPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
