"""Listens for HTTP, whatever clients do: stop in the middle of a request, come by the thousand, never leave."""

from __future__ import annotations

import asyncio
import signal
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

OWN_DESCRIPTORS = 64  # that the process needs beside its connections: files, pipes, sockets that listen
FEWEST_CONNECTIONS = 16
BACKLOG = 2048  # connections that the system lets wait to be accepted
READ = 1 << 13  # bytes read at once, which take milliseconds to parse: a body may come in chunks of one byte


class Connection(H11Protocol):
    """uvicorn's connection, with an end to waiting for the headers of a request and to the number of connections.

    It is for asyncio's own event loop, which reads no more than `READ` bytes before others have their turn.

    Args:
        read_timeout: seconds that a client has for the headers of a request.
        most: connections at once; those beyond are closed.
        arguments: uvicorn's.
    """

    def __init__(self, read_timeout: float, most: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.read_timeout, self.most = read_timeout, most
        self.reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        transport.max_size = READ
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def _watch(self) -> None:
        """Starts the clock unless it runs or there is a request, in which case it stops."""
        if not self._waiting():
            self._unwatch()
        elif self.reading is None:
            self.reading = self.loop.call_later(self.read_timeout, self._too_slow)

    def _unwatch(self) -> None:
        if self.reading is not None:
            self.reading.cancel()
            self.reading = None

    def _waiting(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _too_slow(self) -> None:
        self.reading = None
        if self._waiting():
            self.transport.close()


def run(app: FastAPI, host: str, port: int, drain: int = 25) -> int:
    """Serves until SIGINT or SIGTERM, then takes nothing more and lets what is under way end.

    Args:
        app: of `create_app`.
        host, port: where it listens.
        drain: seconds that what is under way has to end.

    Returns:
        The exit status: 0, or 1 if the engine died, the server could not start, or answers were cut off.

    Raises:
        OSError: the process may open too few files.
    """
    most, backlog = connection_limits(_raise_descriptor_limit())
    connection = partial(Connection, app.state.service.settings.read_timeout, most)
    config = uvicorn.Config(
        app,
        host,
        port,
        http=connection,  # type: ignore[arg-type]  # uvicorn calls it and asks no more of it
        loop="asyncio",
        ws="none",
        backlog=backlog,
        timeout_graceful_shutdown=drain,
        log_level="info",
        access_log=False,
    )
    server = uvicorn.Server(config)
    app.state.on_death = lambda: setattr(server, "should_exit", True)
    # uvicorn raises the signal again once it has shut down, which would then end the process with the signal's status
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return int(app.state.engine.death is not None or not server.started or app.state.cut_off > 0)


def connection_limits(descriptors: int) -> tuple[int, int]:
    """Connections at once, and those that may wait to be accepted.

    Both together leave the process the descriptors that it needs: without any left asyncio accepts in vain, as often as
    it can, and writes each time to the log.

    Args:
        descriptors: that the process may have open.

    Raises:
        OSError: they are too few.
    """
    room = descriptors - OWN_DESCRIPTORS
    if room < FEWEST_CONNECTIONS:
        wanted = OWN_DESCRIPTORS + FEWEST_CONNECTIONS
        raise OSError(f"a server needs {wanted} file descriptors or more, got a limit of {descriptors}: see ulimit -n")
    backlog = min(BACKLOG, room // 4)
    return room - backlog, backlog


def _raise_descriptor_limit() -> int:
    """Takes as many file descriptors as the system grants without asking; their number."""
    most = 1 << 16
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return most
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(soft, wanted)
