"""Connections that read no more at once than can be parsed in milliseconds."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

READ = 1 << 13  # bytes: a body may come in chunks of one byte, each of which takes ten microseconds


class Connection(H11Protocol):
    """uvicorn's, of asyncio's own event loop."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.max_size = READ  # type: ignore[attr-defined]
        super().connection_made(transport)
