"""The requests that clients may send: OpenAI's, with an `intensity`. Pydantic validates them."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr, model_validator

from dami.serving.fields import (
    Count,
    Intensity,
    Number,
    Penalty,
    Point,
    Preset,
    StopString,
    Strict,
    Tail,
    TokenId,
    disagreement,
    neutral,
)
from dami.serving.tools import TOOLS, Function, Mode, NamedTool, Tool, ToolCall

MESSAGES = 2048  # maximum messages of a conversation, as in OpenAI's API, and maximum parts of a message
PROMPTS = 1024  # maximum prompts of a request
SAME = "same"  # a prompt_intensity: that of the answer
EFFORTS = {"none": 0.0, "minimal": 0.0, "xhigh": 1.0, "max": 1.0}  # λ of OpenAI's values that are not presets
MIDDLE = {"low": 0.25, "medium": 0.5, "high": 0.75}  # λ of the others, if the pair has no such preset
SHARES = {"none": 0.0, "minimal": 0.1, "low": 0.2, "medium": 0.5, "high": 0.8, "xhigh": 0.95}  # of the tokens, to think
POINTS = 64  # maximum points of a schedule

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class BadRequest(Exception):
    """A client's request is invalid or cannot be met."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class JsonSchema(Strict):
    """A JSON schema that the answer must obey."""

    name: Annotated[StrictStr, Field(max_length=64)] = "answer"
    description: StrictStr | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(Strict):
    """What the answer, and not the thought, must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be given with the type json_schema, and with no other")
        return self

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema of the answer; None if any text will do."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class StreamOptions(Strict):
    include_usage: StrictBool = False
    include_obfuscation: Annotated[bool | None, neutral(False)] = None


class TextPart(Strict):
    type: Literal["text"]
    text: StrictStr


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | Annotated[list[TextPart], Field(max_length=MESSAGES, fail_fast=True)] | None = None
    reasoning_content: StrictStr | None = None
    name: StrictStr | None = None
    tool_call_id: StrictStr | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=TOOLS, fail_fast=True)] | None = None
    function_call: Annotated[Any, neutral()] = None
    refusal: Annotated[str | None, neutral("")] = None
    audio: Annotated[Any, neutral()] = None
    annotations: Annotated[list[Any] | None, neutral([])] = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("content must be given")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls are the assistant's, got some of the role {self.role}")
        return self

    def plain(self) -> dict[str, Any]:
        """Returns the message as chat templates take it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        plain: dict[str, Any] = {"role": self.role, "content": text}
        for name in ("reasoning_content", "name", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                plain[name] = value
        if self.tool_calls:
            plain["tool_calls"] = [call.plain() for call in self.tool_calls]
        return plain


class DialRequest(Strict):
    """POST /v1/requests/{id}/dial."""

    intensity: Number | Preset | None = Field(
        None, description="λ from the next token on: a number or a preset of the pair."
    )
    wrap_up: Annotated[StrictInt, Field(ge=0, le=1 << 30)] | None = Field(
        None, description="The most tokens that the thought may still have. λ falls, so that it ends by itself."
    )
    choice: Annotated[StrictInt, Field(ge=0)] | None = Field(None, description="Index of the choice; all by default.")

    @model_validator(mode="after")
    def _changes_something(self) -> DialRequest:
        if self.intensity is None and self.wrap_up is None:
            raise ValueError("intensity or wrap_up must be given")
        return self


class VllmArguments(Strict):
    """vLLM's place for λ in a request."""

    intensity: Intensity | None = None
    max_intensity: Number | None = None
    prompt_intensity: Intensity | None = None
    prompt_tail: Tail | None = None


class Dialled(Strict):
    """The fields of all requests that say at which λ they are answered."""

    model: Annotated[StrictStr, Field(max_length=256)] | None = Field(
        None, description="The served model; it may be left out."
    )
    intensity: Intensity | None = Field(
        None, description="λ: a number, 0 the instruct end and 1 the thinking end; a preset of the pair; or auto."
    )
    intensity_schedule: Annotated[list[Point], Field(min_length=1, max_length=POINTS, fail_fast=True)] | None = Field(
        None,
        description="[tokens, λ] in ascending order: straight lines from the granted λ at 0 tokens through them.",
    )
    max_intensity: Number | None = Field(None, description="λ at most; under load the server may choose a lower one.")
    prompt_intensity: Intensity | None = Field(
        None,
        description="λ at which the prompt is read, except for its tail: a number, a preset, or same for that of the "
        "answer. Requests at any λ share the reading of equal beginnings.",
    )
    prompt_tail: Tail | None = Field(
        None,
        description="How many tokens at the end of the prompt are read at the λ of the answer; or turn, for all from "
        "the last user message on.",
    )
    vllm_xargs: VllmArguments | None = Field(None, description="These four, where vLLM wants them.")
    seed: Annotated[StrictInt, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, le=1 << 30)] | None = None
    stream: StrictBool | None = False
    user: StrictStr | None = None

    @model_validator(mode="after")
    def _dial_agrees(self) -> Dialled:
        if self.vllm_xargs is not None:
            for name in VllmArguments.model_fields:
                inner, outer = getattr(self.vllm_xargs, name), getattr(self, name)
                if inner is not None and outer is not None and inner != outer:
                    raise disagreement(name, f"{name} is {outer} and in vllm_xargs {inner}: give one of them")
                setattr(self, name, outer if inner is None else inner)
        if isinstance(self.intensity, float) and self.max_intensity is not None:
            raise disagreement(
                "max_intensity", "intensity and max_intensity exclude each other, unless intensity is a preset or auto"
            )
        places = [tokens for tokens, _ in self.intensity_schedule or ()]
        if any(after <= before for before, after in pairwise(places)):
            raise disagreement("intensity_schedule", f"intensity_schedule must ascend, got points at {places}")
        return self


class Request(Dialled):
    """The fields common to requests for chat completions and completions."""

    prompt_field: ClassVar[str]
    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = 1
    max_tokens: Count | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True)] | None = None
    ignore_eos: StrictBool | None = False
    stream_options: StreamOptions | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    repetition_penalty: Annotated[float | None, neutral(1)] = None
    min_p: Annotated[float | None, neutral(0)] = None

    @model_validator(mode="after")
    def _agree(self) -> Request:
        if self.stream_options is not None and not self.stream:
            raise disagreement("stream_options", "stream_options needs stream")
        return self

    @property
    def biases(self) -> dict[int, float]:
        """The bias of each token in `logit_bias`. Raises BadRequest for a key that is not a token's id."""
        biases = self.logit_bias or {}
        for key in biases:
            if not (key.isascii() and key.isdecimal() and len(key) < 10):
                raise BadRequest(f"logit_bias must have ids of tokens as keys, got {key[:64]!r}", "logit_bias")
        return {int(key): bias for key, bias in biases.items()}

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    prompt_field: ClassVar = "messages"
    messages: Annotated[list[Message], Field(min_length=1, max_length=MESSAGES, fail_fast=True)]
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    reasoning_effort: Effort | None = Field(
        None,
        description="low, medium and high are the pair's presets, or else λ=0.25, 0.5 and 0.75; none and minimal are "
        "λ=0, xhigh and max λ=1. Of max_completion_tokens, the thought may then have 0.2, 0.5 and 0.8; none or 0.1; "
        "0.95 or all.",
    )
    answer_intensity: Number | Preset | None = Field(
        None, description="λ of the answer after its thought: a number or a preset; by default, that of the thought."
    )
    thinking_token_budget: Annotated[StrictInt, Field(ge=0, le=1 << 30)] | None = Field(
        None, description="The most tokens of a thought. λ falls as the thought nears it, so that it ends by itself."
    )
    response_format: ResponseFormat | None = None
    continue_final_message: StrictBool | None = Field(
        False, description="Whether the answer goes on with the last message, which is the assistant's."
    )
    add_generation_prompt: StrictBool | None = Field(
        None, description="The opposite of continue_final_message; it may be left out."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables for the chat template.")
    store: Annotated[bool | None, neutral(False)] = None
    metadata: dict[str, str] | None = None
    safety_identifier: StrictStr | None = None
    prompt_cache_key: StrictStr | None = None
    verbosity: Annotated[str | None, neutral("medium")] = None
    modalities: Annotated[list[Any] | None, neutral(["text"])] = None
    prediction: Annotated[Any, neutral()] = None
    audio: Annotated[Any, neutral()] = None
    web_search_options: Annotated[Any, neutral()] = None
    functions: Annotated[list[Any] | None, neutral([])] = None
    function_call: Annotated[Any, neutral("none", "auto")] = None
    service_tier: Annotated[str | None, neutral("auto", "default")] = None
    tools: Annotated[list[Tool], Field(max_length=TOOLS, fail_fast=True)] | None = None
    tool_choice: Mode | NamedTool | None = Field(None, description="auto by default.")
    parallel_tool_calls: StrictBool | None = Field(True, description="Whether an answer may have several calls.")

    @model_validator(mode="after")
    def _chat_agrees(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise disagreement("top_logprobs", "top_logprobs needs logprobs")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise disagreement("max_tokens", "max_tokens is the old name of max_completion_tokens: give one of them")
        if self.reasoning_effort is not None:
            meant = EFFORTS.get(self.reasoning_effort, self.reasoning_effort)
            if self.intensity not in (None, meant):
                raise disagreement(
                    "reasoning_effort",
                    f"reasoning_effort is {self.reasoning_effort} and intensity {self.intensity}: give one of them",
                )
            self.intensity = meant
        if self.add_generation_prompt is not None and self.add_generation_prompt == bool(self.continue_final_message):
            raise disagreement(
                "add_generation_prompt",
                f"add_generation_prompt and continue_final_message are both {self.add_generation_prompt}: give one",
            )
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise disagreement(
                "continue_final_message",
                f"continue_final_message needs a last message of the assistant, got one of {self.messages[-1].role}",
            )
        names = [tool.function.name for tool in self.tools or ()]
        if len({*names}) < len(names):
            raise disagreement("tools", f"the functions of tools must have different names, got {names}")
        if self.forced and not self.callable:
            wanted = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else self.tool_choice
            raise disagreement("tool_choice", f"tool_choice is {wanted!r}, and tools has the functions {names}")
        formed = self.response_format is not None and self.response_format.type != "text"
        for name in ("ignore_eos", "continue_final_message"):
            for field, given in (("response_format", formed), ("tools", bool(self.callable))):
                if given and getattr(self, name):
                    raise disagreement(field, f"{field} excludes {name}")
        return self

    @property
    def forced(self) -> bool:
        """Whether the answer must be a call."""
        return self.tool_choice not in (None, "none", "auto")

    @property
    def callable(self) -> list[Function]:
        """The functions that the answer may call."""
        functions = [] if self.tool_choice == "none" else [tool.function for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool):
            return [each for each in functions if each.name == self.tool_choice.function.name]
        return functions

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt_field: ClassVar = "prompt"
    prompt: (
        StrictStr
        | Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
        | Annotated[list[StrictStr], Field(min_length=1, max_length=PROMPTS, fail_fast=True)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]],
            Field(min_length=1, max_length=PROMPTS, fail_fast=True),
        ]
    )
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    echo: Annotated[bool | None, neutral(False)] = None
    suffix: Annotated[str | None, neutral("")] = None
    best_of: Annotated[int | None, neutral(1)] = None

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def wanted_tokens(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several, each a text or a list of ids."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return list(self.prompt) if several else [self.prompt]  # type: ignore[arg-type,list-item]
