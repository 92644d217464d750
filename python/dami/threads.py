"""Whose a patched model is: it has one dial and runs one pass, so it is in the hands of one thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

GRACE = 0.1  # seconds that a thread is waited for: one that has streamed its last token is about to let go


class Hold:
    """A thread's hold on a model: a context manager, which it enters for a forward pass, for `generate` and for a
    `with dami.intensity(…)` block, one inside the other too.

    Continuous batching holds the model by a thread of its own, from its start to its end. The thread that starts it may
    be inside a block, which goes on holding then.

    Raises:
        RuntimeError: on entering, if another thread holds the model.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._thread: int | None = None
        self._depth = 0
        self._batching: int | None = None  # the thread of continuous batching, 0 until it has begun
        self._pauses = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Hold, ()  # nobody holds a copy

    def __enter__(self) -> None:
        if torch.compiler.is_compiling() or self._batching == threading.get_ident():
            return
        with self._changed:
            self._wait()
            self._thread, self._depth = threading.get_ident(), self._depth + 1

    def __exit__(self, *_: object) -> None:
        if torch.compiler.is_compiling() or self._batching == threading.get_ident():
            return
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._thread = None
                self._changed.notify_all()

    def start_batching(self, start: Callable[[], None]) -> None:
        """Starts the thread of continuous batching, which runs its loop inside `batching`."""
        with self._changed:
            self._wait()
            self._batching = 0
        try:
            start()
        except BaseException:
            self._batching = None
            raise

    @contextmanager
    def batching(self) -> Iterator[None]:
        """The whole of the loop of continuous batching."""
        self._batching = threading.get_ident()
        try:
            yield
        finally:
            with self._changed:
                self._batching = None
                self._changed.notify_all()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While continuous batching is paused: other threads may hold the model."""
        with self._changed:
            self._pauses += 1
        try:
            yield
        finally:
            with self._changed:
                self._pauses -= 1

    def _wait(self) -> None:
        """Returns when the model is this thread's, or nobody's."""
        me = threading.get_ident()
        if not self._changed.wait_for(lambda: self._thread in (None, me), GRACE):
            raise RuntimeError(
                "the model is in use by another thread, which runs it or is inside a `with dami.intensity(model, …)` "
                "block: it has one λ for all threads, so give each a model of its own, dami.twin(model)"
            )
        if not self._changed.wait_for(lambda: self._batching is None or self._pauses, GRACE):
            raise RuntimeError(
                "the model is in use by continuous batching, until its manager is stopped: add requests to that, "
                "add_request(…, intensity=…), or run a model of its own weights, dami.twin(model)"
            )
