"""What the server's clients may send: OpenAI's requests, with an `intensity`. Pydantic checks it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[StrictInt, Field(ge=1, le=1 << 30)]
Preset = Annotated[StrictStr, Field(max_length=64)]  # or "auto"
Intensity = Number | Preset
TokenId = Annotated[StrictInt, Field(ge=0, lt=1 << 31)]


def _neutral(*values: Any) -> BeforeValidator:
    """Accepts what a field means when it is not used, and nothing else."""

    def check(value: Any) -> Any:
        if value is not None and value not in values:
            raise ValueError("is not supported by this server: leave it out")
        return None

    return BeforeValidator(check)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: StrictBool = False


class TextPart(BaseModel):
    type: Literal["text"]
    text: StrictStr


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | list[TextPart] | None = None
    reasoning_content: StrictStr | None = None
    name: StrictStr | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("content must be given")
        return self

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        given = {"role": self.role, "content": text, "reasoning_content": self.reasoning_content, "name": self.name}
        return {key: value for key, value in given.items() if value is not None}


class VllmArguments(BaseModel):
    """Where vLLM's requests hold λ."""

    model_config = ConfigDict(extra="ignore")
    intensity: Intensity | None = None
    max_intensity: Number | None = None


class Request(BaseModel):
    """What both kinds of request have."""

    model_config = ConfigDict(extra="forbid")
    model: StrictStr | None = Field(None, description="The served model; it may be left out.")
    intensity: Intensity | None = Field(
        None, description="λ: a number, 0 the instruct end and 1 the thinking end; a preset of the pair; or auto."
    )
    max_intensity: Number | None = Field(None, description="λ at most; under load the server may choose a lower one.")
    vllm_xargs: VllmArguments | None = Field(None, description="The same two, where vLLM wants them.")
    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = 1
    max_tokens: Count | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, le=1 << 30)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: StrictBool | None = False
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    user: StrictStr | None = None
    frequency_penalty: Annotated[float | None, _neutral(0)] = None
    presence_penalty: Annotated[float | None, _neutral(0)] = None
    repetition_penalty: Annotated[float | None, _neutral(1)] = None
    min_p: Annotated[float | None, _neutral(0)] = None
    logit_bias: Annotated[dict[str, float] | None, _neutral({})] = None

    @model_validator(mode="after")
    def _agree(self) -> Request:
        if self.vllm_xargs is not None:
            for name in ("intensity", "max_intensity"):
                inner, outer = getattr(self.vllm_xargs, name), getattr(self, name)
                if inner is not None and outer is not None and inner != outer:
                    raise ValueError(f"{name} is {outer} and in vllm_xargs {inner}")
                setattr(self, name, outer if inner is None else inner)
        if isinstance(self.intensity, float) and self.max_intensity is not None:
            raise ValueError("intensity and max_intensity exclude each other, unless intensity is a preset or auto")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream")
        if "" in self.stops:
            raise ValueError("stop must not be empty")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    reasoning_effort: Literal["low", "medium", "high"] | None = Field(None, description="Another name of the presets.")
    store: StrictBool | None = None
    metadata: dict[str, str] | None = None
    service_tier: StrictStr | None = None
    tools: Annotated[list[Any] | None, _neutral([])] = None
    tool_choice: Annotated[str | None, _neutral("none", "auto")] = None
    parallel_tool_calls: StrictBool | None = None
    response_format: Annotated[dict[str, Any] | None, _neutral({"type": "text"})] = None

    @model_validator(mode="after")
    def _chat_agrees(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens is the old name of max_completion_tokens: give one of them")
        if self.reasoning_effort is not None and self.intensity is None:
            self.intensity = self.reasoning_effort
        return self

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt: (
        StrictStr
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[StrictStr], Field(min_length=1, max_length=1024)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=1024)]
    )
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    echo: Annotated[bool | None, _neutral(False)] = None
    suffix: Annotated[str | None, _neutral("")] = None
    best_of: Annotated[int | None, _neutral(1)] = None

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def wanted_tokens(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several, each a text or ids."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return list(self.prompt) if several else [self.prompt]  # type: ignore[arg-type,list-item]
