"""The OpenAI-compatible server of `dami serve`: HTTP in and out, around an `Engine`."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from dami import __version__
from dami.chat import ChatTemplate, render
from dami.serving import playground
from dami.serving.deltas import Delta, Deltas, Stop
from dami.serving.engine import Engine, EngineDead, Overloaded, Row, Token
from dami.serving.metrics import Metrics
from dami.serving.protocol import ChatRequest, CompletionRequest
from dami.serving.sampling import Sampling
from dami.thoughts import Reader

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a server is told beside its engine.

    Attributes:
        name: of the served model.
        default_intensity: of requests that name none: λ, a preset or "auto".
        intensity_range: the lowest and the highest λ that requests may ask for.
        chat_template: which template conversations go through, as in `dami.chat.render`.
        api_keys: a request must bring one of them; none if there are none.
        max_body: bytes of a request at most.
        frontier: of the pair, as `playground.read_frontier` gives it; {} if none is known.
    """

    name: str = "dami"
    default_intensity: float | str = 0.5
    intensity_range: tuple[float, float] = (-1.0, 2.0)
    chat_template: ChatTemplate = "default"
    api_keys: tuple[str, ...] = ()
    max_body: int = 1 << 20
    frontier: dict[str, Any] = field(default_factory=dict)


class BadRequest(Exception):
    """What a client asked for cannot be done."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


def error(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: Any = None
) -> JSONResponse:
    """An error in OpenAI's shape."""
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("invalid_request_error" if status < 500 else "server_error")
    message = message.encode("utf-8", "replace").decode()  # it may quote halves of surrogate pairs
    content = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(content, status, headers)


@dataclass(eq=False)
class Choice:
    """One of a response's choices while it comes.

    Attributes:
        index: its place.
        row: where its tokens come from.
        deltas: turns them into text.
        tokens: all that have come.
        reason: why it ended.
    """

    index: int
    row: Row
    deltas: Deltas
    tokens: list[Token] = field(default_factory=list)
    reason: str | None = None

    async def news(self) -> AsyncIterator[tuple[Delta, list[Token]]]:
        """What comes, with the tokens of which it is the text; the last when `reason` is known."""
        fresh: list[Token] = []
        async for tokens in self.row:
            given = Delta()
            for token in tokens:
                self.tokens.append(token)
                fresh.append(token)
                if token.id not in self.row.ends:
                    more = self.deltas.push(token.id)
                    given = Delta(given.thought + more.thought, given.answer + more.answer)
                if self.deltas.stopped:
                    self.row.cancel(complete=True)
                    self.reason = "stop"
                    yield given, fresh
                    return
            if given.thought or given.answer:
                yield given, fresh
                fresh = []
        self.reason = self.row.reason
        yield self.deltas.finish(finished=self.reason == "stop"), fresh

    def reasoning_tokens(self) -> int:
        reader = self.deltas.reader
        if reader is None:
            return 0
        ids = [token.id for token in self.tokens]
        said = reader.read(ids, inside=self.deltas.given_inside, finished=self.reason == "stop")
        return sum(len(segment.ids) for segment in said.segments if segment.kind == "thought")


@dataclass(eq=False)
class Answering:
    """A request that has been taken in.

    Attributes:
        body: what was asked.
        id: of the response.
        intensity: λ granted.
        prompt_tokens: of all prompts.
        choices: of the response.
        created: seconds since 1970.
    """

    body: ChatRequest | CompletionRequest
    id: str
    intensity: float
    prompt_tokens: int
    choices: list[Choice]
    created: int = field(default_factory=lambda: int(time.time()))

    def cancel(self) -> None:
        for choice in self.choices:
            choice.row.cancel()

    def usage(self) -> dict[str, Any]:
        tokens = sum(len(choice.tokens) for choice in self.choices)
        usage = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
        }
        reasoning = sum(choice.reasoning_tokens() for choice in self.choices)
        return usage | {"completion_tokens_details": {"reasoning_tokens": reasoning}}

    async def collect(self) -> None:
        """Lets all choices come to their ends."""

        async def drain(choice: Choice) -> None:
            async for _ in choice.news():
                pass

        await asyncio.gather(*map(drain, self.choices))

    async def news(self) -> AsyncIterator[tuple[Choice, Delta, list[Token]]]:
        """What comes to any choice; no faster than it is taken."""
        queue: asyncio.Queue[Any] = asyncio.Queue(1)

        async def pump(choice: Choice) -> None:
            try:
                async for delta, tokens in choice.news():
                    await queue.put((choice, delta, tokens))
            except Exception as failure:
                await queue.put(failure)

        pumps = [asyncio.create_task(pump(choice)) for choice in self.choices]
        try:
            running = len(pumps)
            while running:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                running -= item[0].reason is not None
                yield item
        finally:
            for task in pumps:
                task.cancel()


class EventStream(StreamingResponse):
    """Server-sent events of an answer, and what is to be done when they end in whatever way."""

    def __init__(self, events: AsyncIterator[str], ended: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.ended = ended

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ended()


class Service:
    """Answers requests.

    Args:
        engine: what generates.
        tokenizer: the pair's.
        settings: of the server.
    """

    def __init__(self, engine: Engine, tokenizer: Any, settings: Settings) -> None:
        self.engine, self.tokenizer, self.settings = engine, tokenizer, settings
        self.metrics = Metrics(lambda: engine.load, lambda: engine.death is None, engine.controller)
        self.reader = Reader.of(tokenizer)
        self.vocabulary = engine.model.get_input_embeddings().num_embeddings
        self.tokenizing = ThreadPoolExecutor(1, "tokenizer")  # one: tokenizers mind being used by two at once
        self.defaults = _sampling_defaults(engine.model)
        self.created = int(time.time())

    async def chat(self, body: ChatRequest) -> Answering:
        self._check(body)
        messages = [message.plain() for message in body.messages]
        by_intensity = not isinstance(self.settings.chat_template, str)
        first = "default" if by_intensity else self.settings.chat_template
        text, ids = await self._in_thread(self._encode_chat, messages, first, None)
        intensity = await self._choose(body, ids)
        if by_intensity:
            text, ids = await self._in_thread(self._encode_chat, messages, self.settings.chat_template, intensity)
        return self._begin(body, "chatcmpl", [ids], intensity, self.reader, self.reader.opens(text))

    async def complete(self, body: CompletionRequest) -> Answering:
        self._check(body)
        prompts = [await self._in_thread(self._encode, prompt) for prompt in body.prompts]
        return self._begin(body, "cmpl", prompts, await self._choose(body, prompts[0]), None, False)

    def _check(self, body: ChatRequest | CompletionRequest) -> None:
        if body.model not in (None, self.settings.name):
            raise BadRequest(
                f"model must be {self.settings.name!r}, got {body.model!r}", "model", "model_not_found", 404
            )
        presets = self.engine.presets
        if isinstance(body.intensity, str) and body.intensity != "auto" and body.intensity not in presets:
            known = f"it has {', '.join(sorted(presets))}" if presets else "it has none"
            raise BadRequest(f"intensity {body.intensity!r} is not a preset of this pair: {known}", "intensity")
        if body.intensity == "auto" and self.engine.twin is None:
            raise BadRequest("intensity 'auto' needs an estimator, and this pair has none", "intensity")
        low, high = self.settings.intensity_range
        for name in ("intensity", "max_intensity"):
            value = getattr(body, name)
            if isinstance(value, float) and not low <= value <= high:
                raise BadRequest(f"{name} must be in {low:g} to {high:g} on this server, got {value:g}", name)

    async def _choose(self, body: ChatRequest | CompletionRequest, prompt: list[int]) -> float:
        """The λ that a request gets."""
        asked: float | str = self.settings.default_intensity
        if body.intensity is not None:
            asked = body.intensity
        elif body.max_intensity is not None and asked != "auto":
            asked = body.max_intensity
        value = self.engine.presets.get(asked, asked) if isinstance(asked, str) else asked
        if value == "auto":
            self._check_length(prompt, 1)
            low, high = self.settings.intensity_range
            try:
                value = min(max(await self.engine.estimate(prompt), low), high)
            except Exception as problem:
                logger.exception("the estimator failed")
                raise BadRequest(f"the estimator failed: {problem}", code="estimator_failed", status=500) from problem
        value = float(value) if body.max_intensity is None else min(float(value), body.max_intensity)
        granted = self.engine.grant(value, adjustable=asked == "auto" or body.max_intensity is not None)
        self.metrics.lowered.inc(granted < value)
        return granted

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.tokenizing, function, *arguments)

    def _encode_chat(
        self, messages: list[dict[str, str]], template: ChatTemplate, intensity: float | None
    ) -> tuple[str, list[int]]:
        try:
            [text] = render(self.tokenizer, [messages], template, None if intensity is None else [intensity])
        except Exception as problem:  # templates raise what they like
            raise BadRequest(f"messages do not fit the chat template: {problem}", "messages") from problem
        return text, self._encode(text, add_special_tokens=False)

    def _encode(self, prompt: str | list[int], add_special_tokens: bool = True) -> list[int]:
        if not isinstance(prompt, str):
            if max(prompt) >= self.vocabulary:
                raise BadRequest(f"prompt has the id {max(prompt)}, the vocabulary has {self.vocabulary}", "prompt")
            return prompt
        try:
            prompt.encode()
        except UnicodeEncodeError as problem:
            raise BadRequest(f"the prompt is not text: {problem}", "prompt") from problem
        return self.tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"]

    def _check_length(self, prompt: list[int], tokens: int) -> None:
        if not prompt:
            raise BadRequest("the prompt must hold at least one token", "prompt")
        if len(prompt) + tokens > self.engine.max_model_len:
            raise BadRequest(
                f"the prompt has {len(prompt)} tokens, {tokens} more are wanted, and this server takes "
                f"{self.engine.max_model_len} together",
                "messages" if tokens == 1 else "max_tokens",
                "context_length_exceeded",
            )

    def _begin(
        self,
        body: ChatRequest | CompletionRequest,
        prefix: str,
        prompts: Sequence[list[int]],
        intensity: float,
        reader: Reader | None,
        inside: bool,
    ) -> Answering:
        """Submits all rows of a request, or none."""
        n, wanted = body.n or 1, body.wanted_tokens
        rooms = []
        for prompt in prompts:
            self._check_length(prompt, wanted or 1)
            rooms.append(
                wanted or min(self.engine.max_model_len - len(prompt), self.defaults["max_tokens"] or math.inf)
            )
        self.engine.check_room(n * len(prompts))
        ends = frozenset(() if body.ignore_eos else self.engine.ends) | frozenset(body.stop_token_ids or ())
        seed = secrets.randbits(62) if body.seed is None else body.seed
        sampling = {name: self._setting(body, name) for name in ("temperature", "top_p", "top_k")}
        stops = [*map(Stop, body.stops)]
        answering = Answering(body, f"{prefix}-{secrets.token_hex(12)}", intensity, sum(map(len, prompts)), [])
        try:
            for prompt, room in zip(prompts, rooms, strict=True):
                for each in range(n):
                    row = self.engine.submit(
                        prompt,
                        intensity,
                        Sampling(**sampling, seed=seed + each, logprobs=body.wanted_logprobs),
                        int(room),
                        ends,
                    )
                    deltas = Deltas(self.tokenizer, reader, inside, stops)
                    answering.choices.append(Choice(len(answering.choices), row, deltas))
        except BaseException:
            answering.cancel()
            raise
        self.metrics.intensity.observe(intensity)
        self.metrics.prompt_tokens.inc(answering.prompt_tokens)
        return answering

    def _setting(self, body: ChatRequest | CompletionRequest, name: str) -> Any:
        value = getattr(body, name)
        value = self.defaults[name] if value is None else value
        return max(value, 0)  # a top_k of −1 is vLLM's word for none

    def end(self, answering: Answering) -> None:
        """Counts an answer that has come to its end, or cuts it off."""
        answering.cancel()
        now = time.monotonic()
        for choice in answering.choices:
            row, tokens = choice.row, len(choice.tokens)
            self.metrics.finished.labels(choice.reason or "cancelled").inc()
            self.metrics.generated_tokens.inc(tokens)
            if row.first_token is not None:
                self.metrics.first_token.observe(row.first_token - row.arrival)
                if tokens > 1:
                    self.metrics.per_token.observe((now - row.first_token) / (tokens - 1))
            self.metrics.whole.observe(now - row.arrival)

    def common(self, answering: Answering, kind: str) -> dict[str, Any]:
        """What a response and each of its chunks have."""
        return {
            "id": answering.id,
            "object": kind,
            "created": answering.created,
            "model": self.settings.name,
            "intensity": answering.intensity,
        }

    async def chat_events(self, answering: Answering) -> AsyncIterator[str]:
        common = self.common(answering, "chat.completion.chunk")
        for choice in answering.choices:
            yield _event(common | {"choices": [_chunk(choice.index, {"role": "assistant", "content": ""})]})
        async for choice, delta, tokens in answering.news():
            content = {"reasoning_content": delta.thought, "content": delta.answer}
            chunk = _chunk(choice.index, {key: text for key, text in content.items() if text}, choice.reason)
            if answering.body.wanted_logprobs is not None:
                chunk["logprobs"] = self.chat_logprobs(tokens)
            yield _event(common | {"choices": [chunk]})

    async def completion_events(self, answering: Answering) -> AsyncIterator[str]:
        common = self.common(answering, "text_completion")
        async for choice, delta, tokens in answering.news():
            chunk = {"index": choice.index, "text": delta.answer, "logprobs": None, "finish_reason": choice.reason}
            if answering.body.wanted_logprobs is not None:
                before = choice.deltas.answer.text[: -len(delta.answer) or None]
                chunk["logprobs"] = self.completion_logprobs(tokens, len(before))
            yield _event(common | {"choices": [chunk]})

    async def events(self, answering: Answering) -> AsyncIterator[str]:
        """All server-sent events of an answer."""
        chat = isinstance(answering.body, ChatRequest)
        options = answering.body.stream_options
        try:
            async for event in self.chat_events(answering) if chat else self.completion_events(answering):
                yield event
            if options is not None and options.include_usage:
                common = self.common(answering, "chat.completion.chunk" if chat else "text_completion")
                yield _event(common | {"choices": [], "usage": answering.usage()})
            yield "data: [DONE]\n\n"
        except EngineDead as dead:
            yield f"data: {bytes(error(500, f'the engine has died: {dead}').body).decode()}\n\n"

    def chat_response(self, answering: Answering) -> dict[str, Any]:
        choices = []
        for choice in answering.choices:
            said = choice.deltas.said  # None where a stop string ended it
            thought = choice.deltas.thought.text if said is None else said.thought
            message = {"role": "assistant", "content": choice.deltas.answer.text if said is None else said.answer}
            if thought:
                message["reasoning_content"] = thought
            logprobs = None if answering.body.wanted_logprobs is None else self.chat_logprobs(choice.tokens)
            choices.append(
                {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": choice.reason}
            )
        return self.common(answering, "chat.completion") | {"choices": choices, "usage": answering.usage()}

    def completion_response(self, answering: Answering) -> dict[str, Any]:
        choices = []
        for choice in answering.choices:
            logprobs = None if answering.body.wanted_logprobs is None else self.completion_logprobs(choice.tokens, 0)
            text = choice.deltas.answer.text
            choices.append({"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.reason})
        return self.common(answering, "text_completion") | {"choices": choices, "usage": answering.usage()}

    def chat_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.reader.text(token)
            return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}

        return {
            "content": [
                entry(token.id, token.logprobs.chosen) | {"top_logprobs": [entry(*each) for each in token.logprobs.top]}
                for token in tokens
                if token.logprobs is not None
            ]
        }

    def completion_logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            if token.logprobs is None:
                continue
            text = self.reader.text(token.id)
            top = {self.reader.text(each): _finite(logprob) for each, logprob in token.logprobs.top}
            found["tokens"].append(text)
            found["token_logprobs"].append(_finite(token.logprobs.chosen))
            found["top_logprobs"].append(top | {text: _finite(token.logprobs.chosen)})
            found["text_offset"].append(offset)
            offset += len(text)
        return found


def _finite(logprob: float) -> float:
    """As JSON can hold it."""
    return max(logprob, -9999.0)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _chunk(index: int, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _sampling_defaults(model: Any) -> dict[str, Any]:
    """How tokens are drawn where a request does not say: as the model's generation config has it."""
    config = model.generation_config
    sampled = config.do_sample is not False

    def of(name: str, otherwise: float) -> Any:
        value = getattr(config, name, None)
        return value if sampled and value is not None else otherwise

    return {
        "temperature": of("temperature", 1.0),
        "top_p": of("top_p", 1.0),
        "top_k": of("top_k", 0),
        "max_tokens": config.max_new_tokens,
    }


async def unless_gone(request: Request, work: Coroutine[Any, Any, None]) -> bool:
    """Does the work, or gives it up when the client has gone; whether it is done."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
        return tasks[0].done()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Gate:
    """Lets in requests that are small enough and bring an API key where one is wanted."""

    def __init__(self, app: Any, settings: Settings, count: Callable[[str, int], None]) -> None:
        self.app, self.settings, self.count = app, settings, count
        self.keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.count(getattr(scope.get("route"), "path", "other"), message["status"])
            await send(message)

        refusal = self._refuse(scope["path"], headers)
        if refusal is not None:
            await refusal(scope, receive, counted)
            return
        received = 0

        async def limited() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.settings.max_body:
                raise HTTPException(413, self._too_large())
            return message

        await self.app(scope, limited, counted)

    def _too_large(self) -> str:
        return f"the body must be at most {self.settings.max_body} bytes"

    def _refuse(self, path: str, headers: dict[bytes, bytes]) -> Response | None:
        if self.keys and path.startswith("/v1/"):
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            known = [hmac.compare_digest(key.strip(), each) for each in self.keys]
            if scheme.lower() != b"bearer" or not any(known):
                return error(401, "a valid API key is needed, as Authorization: Bearer KEY", code="invalid_api_key")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > self.settings.max_body:
            return error(413, self._too_large())
        return None


def create_app(engine: Engine, tokenizer: Any, settings: Settings | None = None) -> FastAPI:
    """The server as an ASGI application, which starts and stops the engine.

    Args:
        engine: what generates; one application for each.
        tokenizer: the pair's.
        settings: of the server.

    Raises:
        ValueError: the default intensity is none of the pair's.
    """
    settings = settings or Settings()
    default = settings.default_intensity
    if isinstance(default, str) and default not in engine.presets and (default != "auto" or engine.twin is None):
        raise ValueError(
            f"default_intensity must be a number, a preset of the pair {sorted(engine.presets)}, or 'auto' if it has "
            f"an estimator, got {default!r}"
        )
    service = Service(engine, tokenizer, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with engine:
            dying = asyncio.create_task(_tell_death(app, engine))
            yield
            dying.cancel()

    app = FastAPI(title="dami serve", version=__version__, lifespan=lifespan)
    app.state.engine, app.state.service = engine, service
    app.add_middleware(
        Gate, settings=settings, count=lambda path, status: service.metrics.requests.labels(path, status).inc()
    )

    async def answer(request: Request, answering: Answering, whole: Callable[[Answering], dict[str, Any]]) -> Response:
        if answering.body.stream:
            return EventStream(service.events(answering), partial(service.end, answering))
        try:
            if not await unless_gone(request, answering.collect()):
                return Response(status_code=499)
        finally:
            service.end(answering)
        return JSONResponse(whole(answering))

    @app.post("/v1/chat/completions", responses=RESPONSES)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answers a conversation."""
        return await answer(request, await service.chat(body), service.chat_response)

    @app.post("/v1/completions", responses=RESPONSES)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continues a text."""
        return await answer(request, await service.complete(body), service.completion_response)

    app.include_router(playground.routes(settings.frontier))

    def model_object() -> dict[str, Any]:
        return {
            "id": settings.name,
            "object": "model",
            "created": service.created,
            "owned_by": "dami",
            "max_model_len": engine.max_model_len,
            "intensity": {
                "default": settings.default_intensity,
                "range": list(settings.intensity_range),
                "presets": engine.presets,
                "auto": engine.twin is not None,
                "frontier": bool(settings.frontier),
            },
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [model_object()]}

    @app.get("/v1/models/{model:path}", responses=NOT_FOUND)
    async def model(model: str) -> dict[str, Any]:
        """The model, by name."""
        if model != settings.name:
            raise BadRequest(f"model must be {settings.name!r}, got {model!r}", "model", "model_not_found", 404)
        return model_object()

    @app.get("/health", responses=DEAD)
    async def health() -> JSONResponse:
        """Whether the engine generates, and how much it has to do."""
        load = engine.load
        state = {"status": "ok", "waiting": load.waiting, "running": load.running, "kv_cache_usage": load.kv}
        if engine.death is not None:
            return JSONResponse(state | {"status": f"the engine has died: {engine.death}"}, 503)
        return JSONResponse(state)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(BadRequest)
    async def bad_request(_: Request, problem: BadRequest) -> Response:
        return error(problem.status, str(problem), problem.param, problem.code)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, problem: RequestValidationError) -> Response:
        found: dict[str, list[str]] = {}
        for each in problem.errors():
            place = [str(part) for part in each["loc"] if part != "body"]
            found.setdefault(place[0] if place else "body", []).append(each["msg"].removeprefix("Value error, "))
        message = "; ".join(f"{name}: {' or '.join(dict.fromkeys(texts))}" for name, texts in found.items())
        return error(400, message, next(iter(found), None))

    @app.exception_handler(StarletteHTTPException)
    async def http_error(_: Request, problem: StarletteHTTPException) -> Response:
        return error(problem.status_code, str(problem.detail), headers=problem.headers)

    @app.exception_handler(Overloaded)
    async def overloaded(_: Request, problem: Overloaded) -> Response:
        return error(429, str(problem), code="overloaded", headers={"Retry-After": "1"})

    @app.exception_handler(EngineDead)
    async def dead(_: Request, problem: EngineDead) -> Response:
        return error(503, f"the engine has died: {problem}", code="engine_dead")

    return app


async def _tell_death(app: FastAPI, engine: Engine) -> None:
    await engine.dead.wait()
    logger.error("the engine has died: %s", engine.death)
    on_death: Callable[[], None] | None = getattr(app.state, "on_death", None)
    if on_death is not None:
        on_death()


ERROR = {
    "application/json": {
        "schema": {
            "type": "object",
            "required": ["error"],
            "properties": {
                "error": {
                    "type": "object",
                    "required": ["message", "type", "param", "code"],
                    "properties": {
                        "message": {"type": "string"},
                        "type": {"type": "string"},
                        "param": {"type": ["string", "null"]},
                        "code": {"type": ["string", "null"]},
                    },
                }
            },
        }
    }
}
NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"description": "There is no such model.", "content": ERROR}}
DEAD: dict[int | str, dict[str, Any]] = {
    503: {"description": "The engine has died.", "content": {"application/json": {}}}
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or with `stream` its pieces.",
        "content": {"application/json": {}, "text/event-stream": {}},
    },
    400: {"description": "The request is not valid.", "content": ERROR},
    401: {"description": "An API key is needed.", "content": ERROR},
    **NOT_FOUND,
    413: {"description": "The body is too large.", "content": ERROR},
    422: {"description": "Not used: see 400.", "content": ERROR},
    429: {"description": "There are too many requests.", "content": ERROR},
    503: {"description": "The engine has died.", "content": ERROR},
}


def run(app: FastAPI, host: str, port: int, drain: int | None = None) -> int:
    """Serves until SIGINT or SIGTERM, then takes nothing more and lets what is under way end; the exit status.

    Args:
        app: of `create_app`.
        host, port: where it listens.
        drain: seconds that what is under way has to end; None for as long as it takes.
    """
    server = uvicorn.Server(
        uvicorn.Config(app, host, port, timeout_graceful_shutdown=drain, log_level="info", access_log=False)
    )
    app.state.on_death = lambda: setattr(server, "should_exit", True)
    server.run()
    return 1 if app.state.engine.death is not None or not server.started else 0
