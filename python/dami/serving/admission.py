"""Admission: checks who may send requests, how large they are, and how long sending them takes."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from urllib.parse import urlsplit

from fastapi import HTTPException
from fastapi.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dami.serving.replies import error

LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Admission:
    """Admits requests that name a known host, are small enough, arrive in time, and bring an API key if one is needed.

    Args:
        app: the ASGI application behind it.
        api_keys: a request to /v1 must bring one of these keys. If empty, no key is needed.
        allowed_hosts: the names allowed in a request's `Host`. If empty, any name is. Without an API key, this check
            protects against DNS rebinding: a web page whose name has been pointed at this machine.
        max_body: maximum bytes of a request.
        read_timeout: seconds that a request's body may take.
        count: called with the path and the status of each response.
        cut_off: called for each request that is cancelled because the server shuts down.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: tuple[str, ...],
        allowed_hosts: tuple[str, ...],
        max_body: int,
        read_timeout: float,
        count: Callable[[str, int], None],
        cut_off: Callable[[], None],
    ) -> None:
        self.app, self.count, self.cut_off = app, count, cut_off
        self.keys = [key.encode() for key in api_keys]
        self.hosts = {host.lower() for host in allowed_hosts}
        self.max_body, self.read_timeout = max_body, read_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.count(getattr(scope.get("route"), "path", "other"), message["status"])
            await send(message)

        refusal = self._refuse(scope["path"], headers)
        if refusal is not None:
            await refusal(scope, receive, counted)
            return
        received, whole = 0, False
        end = asyncio.get_running_loop().time() + self.read_timeout

        async def limited() -> Message:
            nonlocal received, whole
            if whole:
                return await receive()  # a disconnect
            try:
                message = await asyncio.wait_for(receive(), end - asyncio.get_running_loop().time())
            except asyncio.TimeoutError:
                raise HTTPException(408, f"the body must come within {self.read_timeout:g} seconds") from None
            received += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if received > self.max_body:
                raise HTTPException(413, self._too_large())
            return message

        try:
            await self.app(scope, limited, counted)
        except asyncio.CancelledError:  # a shutdown: a client that disconnects sends a message instead
            self.cut_off()
            raise

    def _too_large(self) -> str:
        return f"the body must be at most {self.max_body} bytes"

    def _refuse(self, path: str, headers: dict[bytes, bytes]) -> Response | None:
        host = headers.get(b"host", b"").decode("latin-1")
        if self.hosts and host and _hostname(host) not in self.hosts:
            known = ", ".join(sorted(self.hosts))
            message = f"the host must be one of {known}, got {host!r}: see dami serve --allowed-host"
            return error(403, message, code="host_not_allowed")
        if self.keys and path.startswith("/v1/"):
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            known_keys = [hmac.compare_digest(key.strip(), each) for each in self.keys]
            if scheme.lower() != b"bearer" or not any(known_keys):
                return error(401, "a valid API key is needed, as Authorization: Bearer KEY", code="invalid_api_key")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > self.max_body:
            return error(413, self._too_large())
        return None


def check_key(key: str, name: str) -> None:
    """Raises ValueError for a key that no request could bring; the message names where the key came from."""
    if not key or key != key.strip() or not key.isascii() or not key.isprintable():
        problem = "an empty one" if not key else f"one of {len(key)} characters that is not"
        raise ValueError(f"{name} must hold printable ASCII that neither begins nor ends with a space, got {problem}")


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:  # for example, an unclosed bracket
        return None
