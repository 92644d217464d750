"""HTTP replies: errors, JSON and event streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping

from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from dami.serving.schema import ErrorResponse

PIECE = 1 << 16  # bytes of a body to write at once


def error(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Returns an error response in OpenAI's format."""
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("invalid_request_error" if status < 500 else "server_error")
    message = message.encode("utf-8", "replace").decode()  # it may quote lone surrogates
    content: ErrorResponse = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(content, status, headers)


class EventStream(StreamingResponse):
    """The server-sent events of an answer. Calls `ended` when they end, for whatever reason."""

    def __init__(self, events: AsyncIterator[str], ended: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ended()


def as_json(content: Mapping[str, object]) -> bytes:
    """Works like `json.dumps`, but lets other threads run in between, because `iterencode` is written in Python."""
    return "".join(json.JSONEncoder(ensure_ascii=False).iterencode(content)).encode()


def as_event(content: Mapping[str, object]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def json_in_pieces(content: bytes) -> AsyncIterator[bytes]:
    """Yields a long body in pieces, and lets the event loop run other tasks in between."""
    for begin in range(0, len(content), PIECE):
        yield content[begin : begin + PIECE]
        await asyncio.sleep(0)
