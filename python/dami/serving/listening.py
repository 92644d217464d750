"""Serves HTTP robustly: clients may stop in the middle of a request, connect by the thousand, or never disconnect."""

from __future__ import annotations

import asyncio
import signal
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

OWN_DESCRIPTORS = 64  # what the process needs besides connections: files, pipes, listening sockets
FEWEST_CONNECTIONS = 16
BACKLOG = 2048  # connections that may wait to be accepted
READ = 1 << 12  # bytes read at once, which parse in milliseconds even if the body comes in chunks of one byte


class Connection(H11Protocol):
    """uvicorn's connection, with a timeout for a request's headers and a limit on the number of connections.

    It needs asyncio's own event loop, which then reads at most `READ` bytes before other tasks get a turn.

    Args:
        read_timeout: seconds that a client has to send a request's headers.
        most: maximum connections at once; further ones are closed.
        arguments: uvicorn's arguments.
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
        """Starts the timer while waiting for a request, unless it already runs; stops it once there is a request."""
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
    """Serves until SIGINT or SIGTERM, then accepts no more requests and lets running ones finish.

    Args:
        app: the application, from `create_app`.
        host, port: the address to listen on.
        drain: seconds that running requests have to finish.

    Returns:
        The exit status: 0, or 1 if the engine died, the server could not start, or answers were cut off.

    Raises:
        OSError: if the process may open too few files.
    """
    most, backlog = connection_limits(_raise_descriptor_limit())
    connection = partial(Connection, app.state.service.settings.read_timeout, most)
    config = uvicorn.Config(
        app,
        host,
        port,
        http=connection,  # type: ignore[arg-type]  # uvicorn only calls it
        loop="asyncio",
        ws="none",
        backlog=backlog,
        timeout_graceful_shutdown=drain,
        log_level="info",
        access_log=False,
    )
    server = uvicorn.Server(config)
    app.state.on_death = lambda: setattr(server, "should_exit", True)
    # after its shutdown uvicorn raises the signal again, which would end the process with the signal's exit status
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return int(app.state.engine.death is not None or not server.started or app.state.cut_off > 0)


def connection_limits(descriptors: int) -> tuple[int, int]:
    """Returns how many connections may be open at once, and how many may wait to be accepted.

    Together they leave the process the file descriptors that it needs. Without any left, asyncio would retry accepting
    in a busy loop and write to the log each time.

    Args:
        descriptors: how many file descriptors the process may have open.

    Raises:
        OSError: if there are too few.
    """
    room = descriptors - OWN_DESCRIPTORS
    if room < FEWEST_CONNECTIONS:
        wanted = OWN_DESCRIPTORS + FEWEST_CONNECTIONS
        raise OSError(f"a server needs {wanted} file descriptors or more, got a limit of {descriptors}: see ulimit -n")
    backlog = min(BACKLOG, room // 4)
    return room - backlog, backlog


def _raise_descriptor_limit() -> int:
    """Raises the limit of file descriptors as far as the system allows without privileges, and returns it."""
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
