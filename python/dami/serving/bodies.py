"""Parses request bodies without blocking the event loop.

The C JSON parser and Pydantic hold the GIL until they finish, whatever thread they run in: on a hostile megabyte, for
tenths of a second. So JSON is parsed in Python, which lets other threads run, and Pydantic stops at the first wrong
item of a list and never gets an object with many keys.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dami.serving.protocol import BadRequest

R = TypeVar("R", bound=BaseModel)
KEYS = 256  # maximum keys of an object; no object of the API has nearly as many


def read(content: bytes, kind: type[R]) -> R:
    """Parses and validates a request's body.

    Args:
        content: JSON.
        kind: class of the request.

    Raises:
        BadRequest: if the content is not JSON, or not a request of this kind.
    """
    try:
        body = DECODER.decode(content.decode())
    except RecursionError as problem:
        raise BadRequest("the body must be JSON: it is nested too deeply") from problem
    except ValueError as problem:
        raise BadRequest(f"the body must be JSON: {problem}") from problem
    if not isinstance(body, dict):
        raise BadRequest(f"the body must be a JSON object, got {json.dumps(body)[:64]}")
    try:
        return kind.model_validate(body)
    except ValidationError as problem:
        found: dict[str, list[str]] = {}
        for each in problem.errors(include_url=False, include_input=False):
            param = each.get("ctx", {}).get("param")
            texts = found.setdefault(param or _path(each["loc"], body, each["type"] == "missing"), [])
            texts.append(each["msg"].removeprefix("Value error, "))
        message = "; ".join(_message(path, " or ".join(dict.fromkeys(texts))) for path, texts in found.items())
        param = next(iter(found)).partition(".")[0].partition("[")[0]
        raise BadRequest(message, param or None) from problem


def _message(path: str, text: str) -> str:
    """Returns what is wrong with what is at a path, which the text may name itself."""
    return text if text.startswith(f"{path} ") else f"{path or 'the body'}: {text}"


def _path(place: tuple[int | str, ...], body: Any, missing: bool) -> str:
    """Returns where in a body an error is, in JavaScript's notation: Pydantic's path without the parts it adds."""
    path = ""
    for number, part in enumerate(place):
        if isinstance(body, dict) and (part in body or (missing and number == len(place) - 1)):
            path, body = f"{path}.{str(part)[:64]}", body.get(part)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            path, body = f"{path}[{part}]", body[part]
    return path.removeprefix(".")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > KEYS:
        raise BadRequest(f"an object of the body may have {KEYS} keys at most, got {len(pairs)}")
    return dict(pairs)


DECODER = json.JSONDecoder(object_pairs_hook=_object)
DECODER.scan_once = json.scanner.py_make_scanner(DECODER)  # type: ignore[attr-defined]  # not C's
