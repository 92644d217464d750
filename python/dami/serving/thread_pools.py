"""Threads for work that would block the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
SHORT = 1 << 14  # characters or bytes that can be parsed, rendered or tokenised within milliseconds


class ThreadPools:
    """Two threads, so that short work never waits for long work."""

    def __init__(self) -> None:
        self.short, self.long = (ThreadPoolExecutor(1, name) for name in ("short", "long"))

    async def run(self, size: int, function: Callable[..., T], *arguments: object) -> T:
        """Calls a function in a thread and returns its result.

        Args:
            size: the size of its input, in characters or bytes.
            function, arguments: the function and its arguments.
        """
        pool = self.short if size <= SHORT else self.long
        return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)

    def close(self) -> None:
        """Stops both threads and drops work that has not begun."""
        for pool in (self.short, self.long):
            pool.shutdown(wait=False, cancel_futures=True)
