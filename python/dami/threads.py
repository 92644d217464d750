"""Whose a patched model is: it has one dial and runs one pass, so it is in the hands of one thread at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

GRACE = 0.1  # seconds that another thread is waited for: one that has streamed its last token is about to let go


class Hold:
    """A thread's hold on a model: a context manager, which it enters for a forward pass, for `generate` and for a
    `with dami.intensity(…)` block, one inside the other too.

    Continuous batching holds the model by a thread of its own, from its start to its end. The thread that starts it may
    be inside a block, which goes on holding then.

    Raises:
        RuntimeError: on entering, if another thread holds the model.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._depth = 0
        self._batching: int | None = None  # the thread of continuous batching, 0 until it has begun
        self._pauses = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Hold, ()  # nobody holds a copy

    def __enter__(self) -> None:
        self._enter(threading.get_ident())

    def __exit__(self, *_: object) -> None:
        self._exit(threading.get_ident())

    @contextmanager
    def of(self, thread: int) -> Iterator[None]:
        """What a thread does in the name of another, as if that had entered."""
        self._enter(thread)
        try:
            yield
        finally:
            self._exit(thread)

    def _enter(self, thread: int) -> None:
        if self._batching != thread:
            self._lock_when_free(thread)
            self._thread, self._depth = thread, self._depth + 1
            self._lock.release()

    def _exit(self, thread: int) -> None:
        if self._batching != thread:
            with self._lock:
                self._depth -= 1
                if not self._depth:
                    self._thread = None

    def start_batching(self, start: Callable[[], None]) -> None:
        """Starts the thread of continuous batching, which runs its loop inside `batching`."""
        self._lock_when_free(threading.get_ident())
        self._batching = 0
        self._lock.release()
        try:
            start()
        except BaseException:
            self._batching = None
            raise

    @contextmanager
    def batching(self) -> Iterator[None]:
        """The loop of continuous batching, from its beginning to its end."""
        self._batching = threading.get_ident()
        try:
            yield
        finally:
            self._batching = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While continuous batching is paused: other threads may hold the model."""
        with self._lock:
            self._pauses += 1
        try:
            yield
        finally:
            with self._lock:
                self._pauses -= 1

    def _lock_when_free(self, thread: int) -> None:
        """Takes the lock when the model is this thread's, or nobody's."""
        deadline = None
        self._lock.acquire()
        while reason := self._reason_to_wait(thread):
            self._lock.release()
            deadline = deadline or time.monotonic() + GRACE
            if time.monotonic() > deadline:
                raise RuntimeError(reason)
            time.sleep(0.001)
            self._lock.acquire()

    def _reason_to_wait(self, thread: int) -> str | None:
        if self._thread is not None and self._thread != thread:
            return (
                "the model is in use by another thread, which runs it or is inside a `with dami.intensity(model, …)` "
                "block: it has one λ for all threads, so give each thread a model of its own, dami.twin(model)"
            )
        if self._batching is not None and not self._pauses:
            return (
                "the model is in use by continuous batching until its manager is stopped: add requests to that, "
                "add_request(…, intensity=…), or run another model of the same weights, dami.twin(model)"
            )
        return None
