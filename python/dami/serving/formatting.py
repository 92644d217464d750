"""Formats answers as OpenAI's API does: whole or in chunks, as messages or as text."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence

from dami.serving.active_request import ActiveChoice, ActiveRequest, Said
from dami.serving.calls import Call
from dami.serving.engine import EngineDead, Token
from dami.serving.replies import as_event, error
from dami.serving.schema import (
    AssistantMessage,
    CallOfTool,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionChunkChoice,
    CompletionLogprobs,
    FinishReason,
    MessageDelta,
    Response,
    TokenLogprob,
)
from dami.serving.token_bytes import TokenBytes


class Format(ABC):
    """The response format of one route."""

    @abstractmethod
    def whole(self, request: ActiveRequest) -> Mapping[str, object]:
        """Returns the whole response to a request that has ended."""

    @abstractmethod
    def events(self, request: ActiveRequest) -> AsyncIterator[str]:
        """Yields all server-sent events of an answer."""


class ChunkedFormat(Format):
    """A format whose events are chunks of the response.

    Args:
        name: the served model's name.
        token_bytes: the bytes of its tokenizer's tokens.
    """

    chunk_object: str

    def __init__(self, name: str, token_bytes: TokenBytes) -> None:
        self.name, self.token_bytes = name, token_bytes

    @abstractmethod
    def chunks(self, request: ActiveRequest) -> AsyncIterator[ChatCompletionChunk | CompletionChunk]:
        """Yields a request's response in chunks, each of one choice."""

    async def events(self, request: ActiveRequest) -> AsyncIterator[str]:
        options = request.body.stream_options
        try:
            async for chunk in self.chunks(request):
                yield as_event(chunk)
            if options is not None and options.include_usage:
                common = self.common(request, self.chunk_object, request.intensity)
                yield as_event({**common, "choices": [], "usage": await asyncio.to_thread(request.usage)})
            yield "data: [DONE]\n\n"
        except EngineDead as dead:
            yield f"data: {bytes(error(500, f'the engine has died: {dead}').body).decode()}\n\n"

    def common(self, request: ActiveRequest, kind: str, intensity: float | None) -> Response:
        """Returns the fields common to a response and its chunks."""
        return {
            "id": request.id,
            "object": kind,
            "created": request.created,
            "model": request.body.model or self.name,
            "intensity": intensity,
        }


class ChatFormat(ChunkedFormat):
    """Messages, with thoughts in a field of their own."""

    chunk_object = "chat.completion.chunk"

    def whole(self, request: ActiveRequest) -> ChatCompletion:
        choices: list[ChatChoice] = []
        for choice in request.choices:
            logprobs = None if request.body.wanted_logprobs is None else self.logprobs(choice.tokens)
            said = choice.said()
            choices.append(
                {
                    "index": choice.index,
                    "message": _message(said),
                    "logprobs": logprobs,
                    "finish_reason": _reason(choice.reason, bool(said.calls)),
                }
            )
        common = self.common(request, "chat.completion", request.intensity)
        return {**common, "choices": choices, "usage": request.usage()}

    async def chunks(self, request: ActiveRequest) -> AsyncIterator[ChatCompletionChunk]:
        for choice in request.choices:
            yield self._chunk(request, choice, {"role": "assistant", "content": ""}, None, None)
            await asyncio.sleep(0)  # there may be many: let the event loop run
        called = dict.fromkeys(request.choices, 0)
        async for choice, said, tokens, reason in request.news():
            logprobs = None if request.body.wanted_logprobs is None else self.logprobs(tokens)
            delta = _message_delta(said, called[choice])
            called[choice] += len(said.calls)
            yield self._chunk(request, choice, delta, logprobs, _reason(reason, called[choice] > 0))

    def _chunk(
        self,
        request: ActiveRequest,
        choice: ActiveChoice,
        delta: MessageDelta,
        logprobs: ChatLogprobs | None,
        reason: FinishReason | None,
    ) -> ChatCompletionChunk:
        chunk: ChatChunkChoice = {
            "index": choice.index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": reason,
        }
        return {**self.common(request, self.chunk_object, choice.intensity), "choices": [chunk]}

    def logprobs(self, tokens: Sequence[Token]) -> ChatLogprobs:
        def entry(token: int, logprob: float) -> TokenLogprob:
            text, spelled = self.token_bytes.text(token), list(self.token_bytes(token))
            return {"token": text, "logprob": finite_logprob(logprob), "bytes": spelled}

        return {
            "content": [
                {
                    **entry(token.id, token.logprobs.chosen),
                    "top_logprobs": [entry(*each) for each in token.logprobs.top],
                }
                for token in tokens
                if token.logprobs is not None
            ]
        }


class CompletionFormat(ChunkedFormat):
    """Plain text, unchanged."""

    chunk_object = "text_completion"

    def whole(self, request: ActiveRequest) -> Completion:
        choices: list[CompletionChoice] = []
        for choice in request.choices:
            logprobs = None if request.body.wanted_logprobs is None else self.logprobs(choice, choice.tokens)
            choices.append(
                {
                    "index": choice.index,
                    "text": choice.deltas.answer.text,
                    "intensity": choice.row.intensity,
                    "logprobs": logprobs,
                    "finish_reason": choice.reason,
                }
            )
        return {
            **self.common(request, "text_completion", request.intensity),
            "choices": choices,
            "usage": request.usage(),
        }

    async def chunks(self, request: ActiveRequest) -> AsyncIterator[CompletionChunk]:
        async for choice, said, tokens, reason in request.news():
            chunk: CompletionChunkChoice = {
                "index": choice.index,
                "text": said.answer,
                "logprobs": None if request.body.wanted_logprobs is None else self.logprobs(choice, tokens),
                "finish_reason": reason,
            }
            yield {**self.common(request, self.chunk_object, choice.intensity), "choices": [chunk]}

    def logprobs(self, choice: ActiveChoice, tokens: Sequence[Token]) -> CompletionLogprobs:
        """Returns the log-probabilities of a choice's next tokens."""
        found: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            if token.logprobs is None:
                continue
            top: dict[str, float] = {}
            for each, logprob in ({token.id: token.logprobs.chosen} | dict(token.logprobs.top)).items():
                text = self.token_bytes.text(each)
                top[f"token_id:{each}" if text in top else text] = finite_logprob(logprob)
            found["tokens"].append(self.token_bytes.text(token.id))
            found["token_logprobs"].append(finite_logprob(token.logprobs.chosen))
            found["top_logprobs"].append(top)
            found["text_offset"].append(choice.offsets.push(token.id))
        return found


def finite_logprob(logprob: float) -> float:
    """Returns the log-probability as JSON can hold it: at least −9999, which also replaces NaN."""
    return logprob if logprob > -9999.0 else -9999.0


def _reason(reason: FinishReason | None, called: bool) -> FinishReason | None:
    return "tool_calls" if called and reason == "stop" else reason


def _message(said: Said) -> AssistantMessage:
    message: AssistantMessage = {"role": "assistant", "content": said.answer}
    if said.thought:
        message["reasoning_content"] = said.thought
    if said.calls:
        message["content"] = said.answer or None
        message["tool_calls"] = [_call(call) for call in said.calls]
    return message


def _message_delta(said: Said, called: int) -> MessageDelta:
    """Returns new text and calls, after so many calls."""
    delta: MessageDelta = {}
    if said.thought:
        delta["reasoning_content"] = said.thought
    if said.answer:
        delta["content"] = said.answer
    if said.calls:
        delta["tool_calls"] = [{"index": place, **_call(call)} for place, call in enumerate(said.calls, called)]
    return delta


def _call(call: Call) -> CallOfTool:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
