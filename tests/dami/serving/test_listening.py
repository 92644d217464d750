"""Clients that stall, come in crowds or lie about the host; signals; and keys."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from dami.serving.admission import check_key
from dami.serving.listening import connection_limits
from dami.serving.settings import ServiceSettings

ROOT = Path(__file__).resolve().parents[3]
DESCRIPTORS = 128
READ_TIMEOUT = 1.0
SECONDS = 60  # that anything may take
APP = """
import asyncio, resource, sys
from types import SimpleNamespace
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from dami.serving import admission, listening

resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]),) * 2)
app = FastAPI()
app.state.engine, app.state.cut_off = SimpleNamespace(death=None), 0
app.state.service = SimpleNamespace(settings=SimpleNamespace(read_timeout=float(sys.argv[3])))

def cut_off():
    app.state.cut_off += 1

app.add_middleware(admission.Admission, api_keys=("two words",), allowed_hosts=admission.LOOPBACK, max_body=1000,
                   read_timeout=float(sys.argv[3]), count=lambda *_: None, cut_off=cut_off)

@app.get("/health")
def health():
    return "ok"

@app.post("/echo")
async def echo(request: Request):
    return (await request.body()).decode()

@app.get("/v1/secret")
def secret():
    return "secret"

@app.get("/slow")
async def slow(seconds: float):
    async def pieces():
        yield "begun "
        await asyncio.sleep(seconds)
        yield "ended"
    return StreamingResponse(pieces())

sys.exit(listening.run(app, "127.0.0.1", int(sys.argv[1]), drain=int(sys.argv[4])))
"""


class Listening:
    """The application in a process of its own, and its log."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.port, self.process, self.log = port, process, log
        self.url = f"http://127.0.0.1:{port}"

    def connect(self, sent: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), SECONDS)
        connection.sendall(sent)
        return connection


@pytest.fixture(scope="module")
def listening(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Listening]:
    with started(tmp_path_factory.mktemp("server")) as server:
        yield server


@contextmanager
def started(directory: Path, drain: int = 1) -> Iterator[Listening]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}
    arguments = [sys.executable, "-c", APP, str(port), str(DESCRIPTORS), str(READ_TIMEOUT), str(drain)]
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(arguments, env=environment, stderr=log)
        server = Listening(port, process, directory / "log")
        try:
            until_up(server)
            yield server
        finally:
            process.kill()
            process.wait()


def until_up(server: Listening) -> None:
    end = time.monotonic() + SECONDS
    while not up(server):
        assert server.process.poll() is None, server.log.read_text()
        assert time.monotonic() < end
        time.sleep(0.1)


def up(server: Listening) -> bool:
    try:
        return httpx.get(f"{server.url}/health", timeout=SECONDS).status_code == 200
    except httpx.TransportError:
        return False


def closed(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection, which fails if it does not."""
    found = b""
    while piece := connection.recv(1000):
        found += piece
    return found


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n"])
def test_headers_that_do_not_come_end_the_connection(listening: Listening, sent: bytes) -> None:
    with listening.connect(sent) as connection:
        assert closed(connection) == b""


def test_neither_do_those_of_a_second_request(listening: Listening) -> None:
    with listening.connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
        assert b"200 OK" in connection.recv(1000)
        connection.sendall(b"GET /hea")
        assert b"HTTP/1.1" not in closed(connection)


def test_headers_that_drip_end_the_connection(listening: Listening) -> None:
    with listening.connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ") as connection:
        try:
            for _ in range(10 * SECONDS):
                connection.sendall(b"x")
                time.sleep(0.1)
        except (ConnectionResetError, BrokenPipeError):
            return
    pytest.fail("it was let go on")


def test_a_body_that_does_not_come_is_refused(listening: Listening) -> None:
    head = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 5\r\n\r\n"
    with listening.connect(head + b"he") as connection:
        answer = closed(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the body must come within 1 seconds" in answer


def test_an_answer_may_take_longer_than_a_request(listening: Listening) -> None:
    assert httpx.get(f"{listening.url}/slow?seconds={READ_TIMEOUT + 0.5}", timeout=SECONDS).text == "begun ended"


def test_a_crowd_is_let_in_as_far_as_descriptors_go_and_the_log_stays_small(listening: Listening) -> None:
    with ExitStack() as crowd:
        for _ in range(DESCRIPTORS):
            crowd.enter_context(listening.connect())
        time.sleep(0.5)
    until_up(listening)
    assert listening.log.stat().st_size < 20_000


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]:8000"])
def test_hosts_that_are_allowed(listening: Listening, host: str) -> None:
    assert httpx.get(f"{listening.url}/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:80", "[::1", "127.0.0.1.nip.io"])
def test_hosts_that_are_not(listening: Listening, host: str) -> None:
    response = httpx.get(f"{listening.url}/health", headers={"Host": host})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "host_not_allowed")
    assert f"got '{host}': see dami serve --allowed-host" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("key", "status"), [("two words", 200), ("two", 401), ("words", 401), ("two  words", 401), ("x", 401)]
)
def test_a_key_is_taken_whole(listening: Listening, key: str, status: int) -> None:
    assert httpx.get(f"{listening.url}/v1/secret", headers={"Authorization": f"Bearer {key}"}).status_code == status


@pytest.mark.parametrize("key", ["", " ", " a", "a\n", "é", "a\tb"])
def test_keys_that_no_request_can_bring(key: str) -> None:
    with pytest.raises(ValueError, match="--api-key must hold printable ASCII that neither begins nor ends"):
        check_key(key, "--api-key")
    with pytest.raises(ValueError, match="api_keys must hold printable ASCII"):
        ServiceSettings(api_keys=("good", key))


def test_too_few_descriptors() -> None:
    for descriptors in (80, 128, 1024, 1 << 16):
        connections, backlog = connection_limits(descriptors)
        assert connections + backlog + 64 == descriptors
        assert 0 < backlog <= 2048
    with pytest.raises(OSError, match=re.escape("needs 80 file descriptors or more, got a limit of 79")):
        connection_limits(79)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_end_and_then_the_process_with_0(tmp_path: Path, number: signal.Signals) -> None:
    with started(tmp_path, drain=SECONDS) as server:
        with httpx.stream("GET", f"{server.url}/slow?seconds=0.5", timeout=SECONDS) as response:
            pieces = response.iter_text()
            assert next(pieces) == "begun "
            server.process.send_signal(number)
            assert next(pieces) == "ended"
        assert server.process.wait(SECONDS) == 0, server.log.read_text()


def test_one_who_stalls_does_not_keep_the_process_alive(tmp_path: Path) -> None:
    with started(tmp_path) as server, httpx.stream("GET", f"{server.url}/slow?seconds=3600", timeout=SECONDS):
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(SECONDS) == 1, "an answer was cut off, and the status does not say so"
