"""What the server answers."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse


def error(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: Any = None
) -> JSONResponse:
    """An error in OpenAI's shape."""
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("invalid_request_error" if status < 500 else "server_error")
    message = message.encode("utf-8", "replace").decode()  # it may quote halves of surrogate pairs
    content = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(content, status, headers)
