"""The client, a process of its own that imports nothing big: asks servers all at once, and waits for every answer.

Reads [[url, body], …] from standard input, in JSON, and prints the seconds from the first request to the last answer,
and for each its text and number of tokens.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen


def ask(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=300) as response:
            answer = json.load(response)
    except HTTPError as error:
        raise SystemExit(f"{url} answers {error.code}: {error.read()[:500].decode(errors='replace')}") from None
    return {"text": answer["choices"][0]["text"], "tokens": answer["usage"]["completion_tokens"]}


if __name__ == "__main__":
    requests = json.load(sys.stdin)
    with ThreadPoolExecutor(len(requests)) as pool:
        start = time.perf_counter()
        answers = list(pool.map(lambda request: ask(*request), requests))
        seconds = time.perf_counter() - start
    json.dump({"seconds": seconds, "answers": answers}, sys.stdout)
