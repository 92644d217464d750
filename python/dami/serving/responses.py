"""What the server answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import JSONResponse, StreamingResponse


def error(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: Any = None
) -> JSONResponse:
    """An error in OpenAI's shape."""
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("invalid_request_error" if status < 500 else "server_error")
    message = message.encode("utf-8", "replace").decode()  # it may quote halves of surrogate pairs
    content = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(content, status, headers)


PIECE = 1 << 16  # bytes of a body that are written in one go


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


def finite_logprob(logprob: float) -> float:
    """As JSON can hold it: NaN is no greater either."""
    return logprob if logprob > -9999.0 else -9999.0


def as_json(content: dict[str, Any]) -> bytes:
    """As `json.dumps`, but without keeping out other threads until all is done: `iterencode` is Python."""
    return "".join(json.JSONEncoder(ensure_ascii=False).iterencode(content)).encode()


def as_event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def chunk_of(index: int, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


async def json_in_pieces(content: bytes) -> AsyncIterator[bytes]:
    """A long body in pieces, between which the event loop sees to others."""
    for begin in range(0, len(content), PIECE):
        yield content[begin : begin + PIECE]
        await asyncio.sleep(0)


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
    403: {"description": "The request's Host is none of the server's.", "content": ERROR},
    **NOT_FOUND,
    408: {"description": "The body did not come in time.", "content": ERROR},
    413: {"description": "The body is too large.", "content": ERROR},
    422: {"description": "Not used: see 400.", "content": ERROR},
    429: {"description": "There are too many requests.", "content": ERROR},
    503: {"description": "The engine has died.", "content": ERROR},
}
