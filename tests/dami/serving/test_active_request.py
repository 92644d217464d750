"""Requests that are being answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from dami.serving.active_request import ActiveRequest


class Choice:
    """A choice that has ended before anybody has taken its first text."""

    reason: str | None = None

    async def news(self) -> AsyncIterator[tuple[str, list[int]]]:
        yield "text", [1]
        self.reason = "length"
        yield "more", [2]


async def told(choices: list[Any]) -> list[tuple[Any, ...]]:
    found = []
    async for news in ActiveRequest(None, "", 0, choices).news():  # type: ignore[arg-type]
        found.append(news)
        for _ in range(5):  # others go on meanwhile
            await asyncio.sleep(0)
    return found


def test_only_the_last_news_of_a_choice_say_that_it_has_ended() -> None:
    for count in (1, 2, 5):
        choices = [Choice() for _ in range(count)]
        found = asyncio.run(told(choices))
        for choice in choices:
            assert [news[1:] for news in found if news[0] is choice] == [("text", [1], None), ("more", [2], "length")]
