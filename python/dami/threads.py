"""Thread ownership of a patched model: it has one dial and runs one pass, so one thread may use it at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

GRACE = 0.1  # seconds to wait for another thread: one that has streamed its last token is about to release the model


class Hold:
    """A thread's hold on a model: a reentrant context manager.

    A thread enters it for a forward pass, for `generate` and for a `with dami.intensity(…)` block. Continuous batching
    holds the model with a thread of its own, from start to end. The thread that starts it may be inside a block, and
    then keeps its hold.

    Raises:
        RuntimeError: on entering, if another thread holds the model.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._depth = 0
        self._batching: int | None = None  # the thread of continuous batching, 0 until it runs
        self._pauses = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Hold, ()  # a copy is not held by any thread

    def __enter__(self) -> None:
        self._enter(threading.get_ident())

    def __exit__(self, *_: object) -> None:
        self._exit(threading.get_ident())

    @contextmanager
    def of(self, thread: int) -> Iterator[None]:
        """Holds the model on behalf of another thread, as if that thread had entered."""
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
        """Calls `start` to start the thread of continuous batching, which runs its loop inside `batching`."""
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
        """Holds the model for this thread, which runs the loop of continuous batching inside."""
        self._batching = threading.get_ident()
        try:
            yield
        finally:
            self._batching = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Lets other threads hold the model while continuous batching is paused."""
        with self._lock:
            self._pauses += 1
        try:
            yield
        finally:
            with self._lock:
                self._pauses -= 1

    def _lock_when_free(self, thread: int) -> None:
        """Takes the lock once the model is free for this thread. Raises RuntimeError if it is not within GRACE."""
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
