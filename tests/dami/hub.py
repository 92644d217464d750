"""A hub of models on this machine, and commands that use it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar


class Hub(BaseHTTPRequestHandler):
    """The parts of a hub's API that a client uses to read a repository.

    Attributes:
        directories: of the repositories, by name.
        served: how many bytes of weights have been handed out.
        cuts: of how many more ranges of weights the connection breaks half-way.
        stop: how many bytes of weights are handed out before every request is refused; None for all.
    """

    directories: ClassVar[dict[str, Path]] = {}
    served = 0
    cuts = 0
    stop: int | None = None

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        info = re.fullmatch(r"/api/models/(\w+/\w+)(?:/revision/\w+)?", path)
        tree = re.fullmatch(r"/api/models/(\w+/\w+)/tree/\w+", path)
        file = re.fullmatch(r"/(\w+/\w+)/resolve/\w+/(.+)", path)
        if info:
            names = [{"rfilename": name} for name in self._files(info[1])]
            self._send(json.dumps({"id": info[1], "sha": "0" * 40, "siblings": names}).encode())
        elif tree:
            files = [
                {"type": "file", "path": name, "size": (self.directories[tree[1]] / name).stat().st_size, "oid": "0123"}
                for name in self._files(tree[1])
            ]
            self._send(json.dumps(files).encode())
        elif file and (self.directories[file[1]] / file[2]).exists():
            content = (self.directories[file[1]] / file[2]).read_bytes()
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            part = content[int(span[1]) : int(span[2]) + 1] if span else content
            if file[2].endswith(".safetensors") and self.command == "GET":
                assert span, "the whole file of weights was asked for"
                if Hub.stop is not None and Hub.served + len(part) > Hub.stop:
                    return self._send(b"", 403)
                if Hub.cuts and len(part) > 500:
                    Hub.cuts -= 1
                    return self._send(part[: len(part) // 2], 206, len(part))
                Hub.served += len(part)
            self._send(part, 206 if span else 200)
        else:
            self._send(b"", 404)

    def _files(self, repository: str) -> list[str]:
        where = self.directories[repository]
        return [each.relative_to(where).as_posix() for each in where.rglob("*") if each.is_file()]

    def _send(self, content: bytes, status: int = 200, promised: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if promised is None else promised))
        self.send_header("ETag", f'"{hashlib.sha1(content + self.path.encode()).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(directories: Mapping[str, Path]) -> Iterator[str]:
    """The address of a hub that has these repositories, for the duration of a `with` block."""
    Hub.directories, Hub.served, Hub.cuts, Hub.stop = dict(directories), 0, 0, None
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run_on(hub: str, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `dami` in a process of its own, since the client of the hub reads its address when it is imported."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_ENDPOINT": hub,
        "HF_HOME": str(cache / "cache"),
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-m", "dami", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
