"""The types of the objects of OpenAI's Responses API, with λ; plain dicts like those of `dami.serving.schema`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from typing_extensions import NotRequired, TypedDict

from dami.serving.schema import GrantedIntensity

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]


class ReasoningText(TypedDict):
    type: Literal["reasoning_text"]
    text: str


class OutputMessage(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


class OutputReasoning(TypedDict):
    id: str
    type: Literal["reasoning"]
    summary: list[Any]
    status: ItemStatus
    content: Annotated[list[ReasoningText], Field(description="The thought.")]


class OutputCall(TypedDict):
    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: Annotated[str, Field(description="The JSON of an object.")]


OutputItem = OutputMessage | OutputReasoning | OutputCall


class InputTokensDetails(TypedDict):
    cached_tokens: Annotated[int, Field(description="Tokens that were not read, because the KV cache had them.")]
    cache_write_tokens: int


class OutputTokensDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


class ResponseFailure(TypedDict):
    code: Literal["server_error"]
    message: str


class ResponseObject(TypedDict):
    id: str
    object: Literal["response"]
    created_at: Annotated[int, Field(description="Seconds since 1970.")]
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    model: str
    intensity: GrantedIntensity
    output: list[OutputItem]
    usage: ResponseUsage | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, Any]
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: Any
    tools: list[Any]
    top_p: float | None
    truncation: Literal["disabled"]


class ResponseEvent(TypedDict):
    """An event of a stream: the fields of its type are those of OpenAI's API."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    type: str
    sequence_number: int
    response: NotRequired[ResponseObject]
    item: NotRequired[OutputItem]
    delta: NotRequired[str]
    intensity: NotRequired[Annotated[float, Field(description="λ of the last token of a delta.")]]
