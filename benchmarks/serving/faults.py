"""What clients can do to a server, and whether those beside them notice.

    storm     clients ask for long answers and leave within a second, some before the first text
    silent    clients ask for long answers and never read
    refused   requests that are wrong in many ways

While each goes on, a few well-behaved clients ask greedily, one question after the other, and their answers are
compared with those before.

    faulty      clients that misbehaved
    beside      answers to the well-behaved, all of which must be
    lost, other answers of theirs that did not come, or are not those that came before
    freed       seconds after the last fault until nothing was under way and no block of the KV cache was held
    server_errors  responses of 500 and above, by the server's own count
    slowest     seconds of the slowest answer to the well-behaved; alone_slowest, without faults
"""

from __future__ import annotations

import argparse
import json
import random
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import gevent

from benchmarks.record import RESULTS, store, text_table
from benchmarks.serving.client import Body, ask, chat
from benchmarks.serving.questions import questions
from benchmarks.serving.server import Server, about, serving
from benchmarks.serving.streams import compare

LONG = chat("gcd(84, 36)", intensity=1.0, stream=True, ignore_eos=True, max_tokens=400)
WRONG: list[bytes | Body] = [
    b"{",
    b"[]",
    b"\xff\xfe",
    b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    {},
    {"messages": []},
    {"messages": "hello"},
    chat("2 + 2 =", model="another"),
    chat("2 + 2 =", intensity=1e300),
    chat("2 + 2 =", intensity=True),
    chat("2 + 2 =", intensity="absurd"),
    chat("2 + 2 =", intensity=float("nan")),
    chat("2 + 2 =", intensity=0.5, max_intensity=0.7),
    chat("2 + 2 =", temperature=-1),
    chat("2 + 2 =", max_tokens=0),
    chat("2 + 2 =", max_tokens=10**12),
    chat("2 + 2 =", n=10**6),
    chat("7 + 8 = " * 50_000),
    chat("x" * (2 << 20)),
]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--clients", type=int, default=300, help="that misbehave")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    bodies = [
        chat(question.text, intensity=lam, temperature=0, max_tokens=256)
        for question in questions(10)
        for lam in (0.0, 0.5, 1.0)
    ]
    with serving("--invariant") as server:
        rows = [measure(server, fault, options.clients, bodies) for fault in options.faults]
    columns = ("fault", "faulty", "beside", "lost", "other", "freed", "server_errors", "slowest", "alone_slowest")
    print(text_table([columns, *([row[column] for column in columns] for row in rows)]))
    store(rows, options.results / "serving_faults.csv")
    return int(any(row["lost"] or row["other"] or row["server_errors"] for row in rows))


def measure(server: Server, fault: str, clients: int, bodies: Sequence[Body]) -> dict[str, object]:
    alone, _ = ask(server.url, bodies, users=4)
    before = server_errors(server)
    misbehaving = gevent.spawn(FAULTS[fault], server.url, clients)
    said, _ = ask(server.url, bodies, users=4)
    misbehaving.get(timeout=120)
    freed = server.wait_until_idle()
    lost, crossed, other = compare(said, alone, alone)
    return {
        **about(),
        "fault": fault,
        "faulty": clients,
        "beside": len(said),
        "lost": lost,
        "other": crossed + other,
        "freed": f"{freed:.1f}",
        "server_errors": server_errors(server) - before,
        "slowest": f"{max(answer.seconds for answer in said):.2f}",
        "alone_slowest": f"{max(answer.seconds for answer in alone):.2f}",
    }


def server_errors(server: Server) -> int:
    """Returns the number of responses with status 500 or above so far."""
    return int(sum(value for name, value in server.metrics().items() if 'status="5' in name and "_created" not in name))


def storm(url: str, clients: int) -> None:
    """Runs clients that leave within a second, most with a reset, some with a proper close."""
    chance = random.Random(0)

    def leave(seconds: float, reset: bool) -> None:
        # A limit for everything. The socket's own timeout would restart with each piece received.
        with connected(url, LONG, reset) as connection, gevent.Timeout(seconds, False), suppress(ConnectionError):
            while connection.recv(1 << 16):
                pass

    gevent.joinall(
        [gevent.spawn(leave, chance.random(), chance.random() < 0.7) for _ in range(clients)], raise_error=True
    )


def silent(url: str, clients: int) -> None:
    """Runs clients that ask, read nothing for five seconds, and leave."""

    def idle() -> None:
        with connected(url, LONG):
            gevent.sleep(5)

    gevent.joinall([gevent.spawn(idle) for _ in range(clients)], raise_error=True)


def refused(url: str, clients: int) -> None:
    """Sends invalid requests, each of which must be answered with a status of 400 to 499."""

    def send(body: bytes | Body) -> None:
        with connected(url, body) as connection:
            status = int(connection.makefile("rb").readline().split()[1])
        if not 400 <= status < 500:
            raise RuntimeError(f"status {status} for {str(body)[:80]}")

    gevent.joinall([gevent.spawn(send, WRONG[i % len(WRONG)]) for i in range(clients)], raise_error=True)


@contextmanager
def connected(url: str, body: bytes | Body, reset: bool = False) -> Iterator[socket.socket]:
    """Opens a connection with a tiny receive buffer and sends a request over it.

    Args:
        url: of the server.
        body: of the request: JSON as bytes, or an object to encode.
        reset: whether it closes with a reset.
    """
    where = urlsplit(url)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connection.connect((where.hostname, where.port))
        with suppress(ConnectionError):  # a server may refuse before it has read everything
            connection.sendall(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        yield connection
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


FAULTS: dict[str, Callable[[str, int], None]] = {"storm": storm, "silent": silent, "refused": refused}

if __name__ == "__main__":
    raise SystemExit(main())
