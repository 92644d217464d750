"""Responses as HTTP carries them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping

from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from dami.serving.schema import ErrorResponse

PIECE = 1 << 16  # bytes of a body that are written in one go


def error(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error in OpenAI's shape."""
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("invalid_request_error" if status < 500 else "server_error")
    message = message.encode("utf-8", "replace").decode()  # it may quote halves of surrogate pairs
    content: ErrorResponse = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(content, status, headers)


class EventStream(StreamingResponse):
    """Server-sent events of an answer, and what is to be done when they end in whatever way."""

    def __init__(self, events: AsyncIterator[str], ended: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ended()


def as_json(content: Mapping[str, object]) -> bytes:
    """As `json.dumps`, but without keeping out other threads until all is done: `iterencode` is Python."""
    return "".join(json.JSONEncoder(ensure_ascii=False).iterencode(content)).encode()


def as_event(content: Mapping[str, object]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def json_in_pieces(content: bytes) -> AsyncIterator[bytes]:
    """A long body in pieces, between which the event loop sees to others."""
    for begin in range(0, len(content), PIECE):
        yield content[begin : begin + PIECE]
        await asyncio.sleep(0)
