"""The types of the server's responses: OpenAI's objects, with λ.

Pydantic generates the server's schema from them, and mypy checks the code that builds them. At run time they are plain
dicts. So a chunk of a stream costs no more than its JSON, and a long answer can be written without blocking other
threads (`replies.as_json`), which Pydantic's own models would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict

FinishReason = Literal["stop", "length", "tool_calls"]

GrantedIntensity = Annotated[
    float | None, Field(description="λ granted; null if the response's prompts got different ones.")
]


class Error(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(TypedDict):
    error: Error


class TokenLogprob(TypedDict):
    token: Annotated[str, Field(description=r"Its text, or `bytes:\xf0\x9f` where it is a part of a character.")]
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChosenLogprob]


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionTokensDetails(TypedDict):
    reasoning_tokens: int


class PromptTokensDetails(TypedDict):
    cached_tokens: Annotated[int, Field(description="Tokens that were not read, because the KV cache had them.")]


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class CalledFunction(TypedDict):
    name: str
    arguments: Annotated[str, Field(description="The JSON of an object.")]


class CallOfTool(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class CallDelta(CallOfTool):
    index: Annotated[int, Field(description="Place among the calls of the answer. A call comes whole.")]


class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: Annotated[str | None, Field(description="null if the answer is nothing but calls.")]
    reasoning_content: NotRequired[Annotated[str, Field(description="The thought, if there is one.")]]
    tool_calls: NotRequired[list[CallOfTool]]


class ChatChoice(TypedDict):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class MessageDelta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    reasoning_content: NotRequired[str]
    content: NotRequired[str]
    tool_calls: NotRequired[list[CallDelta]]


class ChatChunkChoice(TypedDict):
    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class CompletionChunkChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionChoice(CompletionChunkChoice):
    intensity: Annotated[float, Field(description="λ granted to its prompt.")]


class Response(TypedDict):
    """The fields common to all responses and chunks."""

    id: str
    object: str
    created: Annotated[int, Field(description="Seconds since 1970.")]
    model: str
    intensity: GrantedIntensity


class ChatCompletion(Response):
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(Response):
    choices: Annotated[list[ChatChunkChoice], Field(description="One; none in the chunk that holds the usage.")]
    usage: NotRequired[Usage]


class Completion(Response):
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Response):
    choices: Annotated[list[CompletionChunkChoice], Field(description="One; none in the chunk that holds the usage.")]
    usage: NotRequired[Usage]


class IntensityInfo(TypedDict):
    """The intensities that a model can be asked for."""

    default: Annotated[float | str, Field(description="Of requests that name no λ.")]
    prompt: Annotated[float | str, Field(description="λ at which prompts are read by default, or same.")]
    tail: Annotated[int | str, Field(description="The default of prompt_tail.")]
    least_tail: Annotated[
        int | None, Field(description="The least prompt_tail that costs the pair nothing at prompt_intensity 0.")
    ]
    range: Annotated[list[float], Field(min_length=2, max_length=2, description="The lowest and the highest λ.")]
    presets: dict[str, float]
    auto: Annotated[bool, Field(description="Whether the pair has an estimator.")]
    frontier: Annotated[bool, Field(description="Whether /v1/frontier has one.")]


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    intensity: IntensityInfo


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


class Dial(TypedDict):
    """What a running request has been told."""

    id: str
    object: Literal["request.dial"]
    choices: Annotated[list[int], Field(description="Indices of the choices that go on accordingly.")]
    intensity: Annotated[float | None, Field(description="λ from the next token on; null if it was not changed.")]
    wrap_up: Annotated[int | None, Field(description="The most tokens that the thought may still have.")]


class Health(TypedDict):
    status: Annotated[str, Field(description="ok, or why the engine has died.")]
    waiting: int
    running: int
    kv_cache_usage: float


Estimate = Annotated[list[float], Field(min_length=3, max_length=3, description="Value, lowest and highest of 95 %.")]


class FrontierPoint(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    intensity: float
    accuracy: Estimate
    tokens: Estimate


class Frontier(TypedDict):
    """A frontier.json of `dami evaluate`. It has more fields than these."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    points: list[FrontierPoint]


SCHEMAS = "#/components/schemas/{model}"
Described = dict[int | str, dict[str, Any]]  # responses by status, in FastAPI's format


def errors(descriptions: dict[int, str]) -> Described:
    """Describes errors by status."""
    return {status: {"model": ErrorResponse, "description": text} for status, text in descriptions.items()}


NO_MODEL = errors({404: "There is no such model."})
NOT_RUNNING = {404: "There is no such request, or it has ended."}
NO_FRONTIER = errors({404: "None is known."})
DEAD: Described = {503: {"model": Health, "description": "The engine has died."}}
REFUSED = errors(
    {
        400: "The request is not valid.",
        401: "An API key is needed.",
        403: "The request's Host is none of the server's.",
        404: "There is no such model.",
        408: "The body did not come in time.",
        413: "The body is too large.",
        422: "Not used: see 400.",
        429: "There are too many requests.",
        503: "The engine has died.",
    }
)


DIALLED: Described = {**REFUSED, **errors(NOT_RUNNING)}


def answered_by(whole: type, chunk: type, last: str = "[DONE]") -> Described:
    """Describes the responses of a route that generates: a `whole` object, or with `stream` events, each a `chunk`."""
    content = {"$ref": SCHEMAS.format(model=chunk.__name__)}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
    event = {"type": "object", "required": ["data"], "properties": {"data": data}}
    described = {
        "model": whole,
        "description": f"The answer, or with `stream` its pieces, of which the last is {last}.",
        "content": {"text/event-stream": {"itemSchema": event}},
    }
    return {200: described, **REFUSED}


class App(FastAPI):
    """An application whose schema includes the pieces of streams; FastAPI itself adds only the types of JSON bodies.

    Args:
        streamed: the types of the pieces.
        options: those of FastAPI.
    """

    def __init__(self, streamed: Sequence[type], **options: Any) -> None:
        super().__init__(**options)
        self.streamed = streamed

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            components = super().openapi()["components"]["schemas"]
            for kind in self.streamed:
                schema = TypeAdapter(kind).json_schema(ref_template=SCHEMAS)
                components |= schema.pop("$defs") | {kind.__name__: schema}
        return super().openapi()
