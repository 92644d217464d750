"""The OpenAI-compatible server of `dami serve`: HTTP in and out, around an `Engine`."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException as StarletteHTTPException

from dami.callers import CALLERS
from dami.dial.values import Intensity
from dami.serving import playground
from dami.serving.active_request import ActiveRequest
from dami.serving.admission import Admission
from dami.serving.bodies import read
from dami.serving.disconnects import Disconnected, unless_disconnected
from dami.serving.engine import Engine, EngineDead, Overloaded
from dami.serving.formatting import Format
from dami.serving.protocol import BadRequest, ChatRequest, CompletionRequest, DialRequest
from dami.serving.replies import EventStream, error, json_in_pieces
from dami.serving.responses_formatting import ResponsesFormat
from dami.serving.responses_protocol import ResponsesRequest, as_asked
from dami.serving.responses_schema import ResponseEvent, ResponseObject
from dami.serving.schema import (
    DEAD,
    DIALLED,
    NO_MODEL,
    App,
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    Dial,
    Health,
    Model,
    ModelList,
    answered_by,
)
from dami.serving.service import Service
from dami.serving.settings import ServiceSettings
from dami.sources import check_estimator
from dami.version import __version__

logger = logging.getLogger(__name__)
JSON = re.compile(r"application/(json|[\w.-]+\+json)\s*(;.*)?", re.IGNORECASE)


class BodyRoute(APIRoute):
    """A route whose endpoint takes a request and its body. The body is parsed outside the event loop."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        if self.body_field is None:
            return super().get_route_handler()
        kind = self.body_field.field_info.annotation

        async def handle(request: Request) -> Response:
            if not JSON.fullmatch(sent := request.headers.get("content-type", "")):
                raise BadRequest(f"the header Content-Type must be application/json, got {sent!r}")
            if (sent := request.headers.get("content-encoding", "identity")) != "identity":
                raise BadRequest(f"the header Content-Encoding must be left out, got {sent!r}: send the body as it is")
            content = await request.body()
            body = await unless_disconnected(
                request, request.app.state.service.pools.run(len(content), read, content, kind)
            )
            return await self.endpoint(request, body, **request.path_params)

        return handle


def create_app(engine: Engine, tokenizer: Any, settings: ServiceSettings | None = None) -> FastAPI:
    """Returns the server as an ASGI application that starts and stops the engine.

    Args:
        engine: the engine that generates. Each application needs its own.
        tokenizer: the pair's tokenizer.
        settings: the server's settings.

    Raises:
        ValueError: if the pair does not support the default intensity.
    """
    settings = settings or ServiceSettings()
    default = settings.default_intensity
    caller = replace(CALLERS["dami serve"], argument="default_intensity")
    if Intensity.parse(default, caller, engine.presets, 1).auto:
        check_estimator(engine.twin)
    service = Service(engine, tokenizer, settings)
    app = App(
        (ChatCompletionChunk, CompletionChunk, ResponseEvent),
        title="dami serve",
        version=__version__,
        lifespan=_lifespan,
        docs_url=None,  # FastAPI's documentation pages load scripts from other sites
        redoc_url=None,
        exception_handlers=ERRORS,
    )
    app.state.engine, app.state.service, app.state.cut_off = engine, service, 0

    def cut_off() -> None:
        app.state.cut_off += 1

    app.add_middleware(
        Admission,
        api_keys=settings.api_keys,
        allowed_hosts=settings.allowed_hosts,
        max_body=settings.max_body,
        read_timeout=settings.read_timeout,
        count=lambda path, status: service.metrics.requests.labels(path, status).inc(),
        cut_off=cut_off,
    )
    app.include_router(answers(service))
    app.include_router(playground.routes(settings.frontier))
    app.include_router(information(service))
    return app


def answers(service: Service) -> APIRouter:
    """Returns the routes that generate."""
    router = APIRouter(route_class=BodyRoute)

    async def answer(request: Request, beginning: Coroutine[Any, Any, ActiveRequest], form: Format) -> Response:
        active = await unless_disconnected(request, beginning)
        active.owner = owner_of(request)
        if active.body.stream:
            return EventStream(form.events(active), partial(service.end, active))
        try:
            content = await unless_disconnected(request, service.collected(active, form))
        finally:
            service.end(active)
        length = {"Content-Length": str(len(content))}
        return StreamingResponse(json_in_pieces(content), media_type="application/json", headers=length)

    @router.post("/v1/chat/completions", responses=answered_by(ChatCompletion, ChatCompletionChunk))
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answers a conversation."""
        return await answer(request, service.chat(body), service.chat_format)

    @router.post("/v1/completions", responses=answered_by(Completion, CompletionChunk))
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continues a text."""
        return await answer(request, service.complete(body), service.completion_format)

    @router.post("/v1/responses", responses=answered_by(ResponseObject, ResponseEvent, "response.completed"))
    async def responses(request: Request, body: ResponsesRequest) -> Response:
        """Answers a conversation, as OpenAI's Responses API does."""
        form = ResponsesFormat(service.settings.name, body)
        return await answer(request, as_asked(service.chat(body.chat(), "resp_")), form)

    @router.post("/v1/requests/{name}/dial", responses=DIALLED)
    async def dial(request: Request, body: DialRequest, name: str) -> Dial:
        """Changes λ of a running request from its next token on, or lets it wrap up its thought.

        The name is the `id` of its response. A request with another API key is none to this one.
        """
        return JSONResponse(service.turn(name, owner_of(request), body))  # type: ignore[return-value]

    return router


def owner_of(request: Request) -> str:
    """Returns what tells the clients of a server apart: the API key, in its header."""
    return request.headers.get("authorization", "")


def information(service: Service) -> APIRouter:
    """Returns the routes that describe the model, the engine and the requests."""
    router, engine = APIRouter(), service.engine

    @router.get("/v1/models")
    async def models() -> ModelList:
        """Lists the served model, under its own name and under names that carry λ."""
        return {"object": "list", "data": service.models.all()}

    @router.get("/v1/models/{model:path}", responses=NO_MODEL)
    async def model(model: str) -> Model:
        """Describes the model of this name."""
        return service.models.named(model)

    @router.get("/health", response_model=Health, responses=DEAD)
    async def health() -> JSONResponse:
        """Reports whether the engine is running, and its load."""
        load = engine.load
        status = "ok" if engine.death is None else f"the engine has died: {engine.death}"
        health: Health = {
            "status": status,
            "waiting": load.waiting,
            "running": load.running,
            "kv_cache_usage": load.kv,
        }
        return JSONResponse(health, 200 if engine.death is None else 503)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Returns the metrics in Prometheus's format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


async def _bad_request(_: Request, problem: BadRequest) -> Response:
    return error(problem.status, str(problem), problem.param, problem.code)


async def _disconnected(*_: object) -> Response:
    return Response(status_code=499)


async def _http_error(request: Request, problem: StarletteHTTPException) -> Response:
    message, path = str(problem.detail), request.url.path
    if problem.status_code in (404, 405):
        allowed = (problem.headers or {}).get("Allow")
        hint = f", but {allowed}" if allowed else "" if path.startswith("/v1/") else ": the API's paths begin with /v1"
        message = f"there is no {request.method} {path} on this server{hint}"
    return error(problem.status_code, message, headers=problem.headers)


async def _overloaded(_: Request, problem: Overloaded) -> Response:
    return error(429, str(problem), code="overloaded", headers={"Retry-After": "1"})


async def _dead(_: Request, problem: EngineDead) -> Response:
    return error(503, f"the engine has died: {problem}", code="engine_dead")


ERRORS: dict[int | type[Exception], Callable[..., Any]] = {
    BadRequest: _bad_request,
    Disconnected: _disconnected,
    StarletteHTTPException: _http_error,
    Overloaded: _overloaded,
    EngineDead: _dead,
}


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    engine: Engine = app.state.engine
    async with engine:
        dying = asyncio.create_task(_tell_death(app, engine))
        gc.collect()
        gc.freeze()  # collecting all objects that torch has loaded would pause the server for half a second
        yield
        dying.cancel()
        app.state.service.pools.close()
    gc.unfreeze()  # not before the engine has ended, which collects


async def _tell_death(app: FastAPI, engine: Engine) -> None:
    await engine.dead.wait()
    logger.error("the engine has died: %s", engine.death)
    on_death: Callable[[], None] | None = getattr(app.state, "on_death", None)
    if on_death is not None:
        on_death()
