"""The playground: a page that answers one prompt at several λ side by side and draws the pair's frontier."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse, JSONResponse

from dami.serving.schema import NO_FRONTIER, Frontier

FILES = Path(__file__).parent
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def routes(frontier: dict[str, Any]) -> APIRouter:
    """Returns the routes of the page's files and of the frontier it draws.

    Args:
        frontier: as `read_frontier` returns it; {} if none is known.
    """
    router = APIRouter()

    def page(path: str, name: str) -> None:
        @router.get(path, include_in_schema=False)
        async def file() -> FileResponse:
            return FileResponse(FILES / name, headers=HEADERS)

    for path, name in (("/", "index.html"), ("/playground.js", "playground.js"), ("/playground.css", "playground.css")):
        page(path, name)

    @router.get("/v1/frontier", response_model=Frontier, responses=NO_FRONTIER)
    async def get_frontier() -> JSONResponse:
        """Returns the pair's accuracy and tokens by λ, as measured by `dami evaluate`."""
        if not frontier:
            raise HTTPException(404, "no frontier of this pair is known: see dami evaluate and --frontier")
        return JSONResponse(frontier)

    return router


def read_frontier(path: Path) -> dict[str, Any]:
    """Reads a frontier.json of `dami evaluate`.

    Raises:
        ValueError: if the file is something else.
    """
    wanted = f"{path} must be a frontier.json of dami evaluate"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        points = found["points"]
        for point in points:
            numbers = [point["intensity"], *point["accuracy"], *point["tokens"]]
            if len(numbers) != 7 or not all(isinstance(number, (int, float)) for number in numbers):
                raise ValueError(f"{wanted}, got the point {point}")
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{wanted}: {type(error).__name__}: {error}") from error
    if not points:
        raise ValueError(f"{wanted}, got one without points")
    return found
