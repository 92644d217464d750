"""Launches of Triton kernels that cost microseconds on the host, not Triton's tens of them.

Triton binds, specialises and looks up every launch in Python. Here its first launch of a kind is remembered: the
compiled kernel and every argument but the operands' addresses. A launch is of the same kind if all that Triton, the
operators' checks and the launch parameters look at is the same: of each operand its type, dtype, shape, strides, device
and the remainder of its address by 16; all other arguments; and Triton's driver and settings. The addresses, the
device guard, the stream and the scratch belong to each launch.

Where somebody listens to launches, or something is missing that this relies on, Triton launches.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dami_kernels import native, upstream
from dami_kernels.counters import counters

LOG = logging.getLogger("dami_kernels")
DEVICE_TYPE = 2  # DLPack's number of CUDA
LIMIT = 1 << 12  # kinds that are remembered

Operand = Tensor | tuple[Any, ...] | None  # a tuple has the tensors of a weight, or such tuples, or integers
_C: Any = getattr(native, "_C", None)
_steps: dict[Any, _Step] = {}  # by what `launch` is given
_calls: dict[Any, _Call] = {}  # by what a public operator is given


class _Watch(threading.local):
    steps: list[tuple[_Step | None, Any]] | None = None


_watch = _Watch()


class Launch(NamedTuple):
    """One launch. The kernel first takes what `Job` says; `named` are its other parameters, and options."""

    kernel: Any
    grid: tuple[int, ...]
    named: dict[str, Any]

    def by_triton(self, *operands: Any) -> Any:
        return self.kernel[self.grid](*operands, **self.named)


@dataclass(frozen=True)
class Job:
    """The launches that compute one result, one after the other.

    Attributes:
        operands: that the kernels take first; then the result, the parts and the counters, if there are any.
        shape, dtype: of the result.
        launches: of which each takes the same.
        parts: how many float32 numbers of scratch.
        counters: how many int32 zeros, see `counters`.
    """

    operands: tuple[Operand, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    launches: tuple[Launch, ...]
    parts: int = 0
    counters: int = 0


def launch(plan: Callable[..., Job | Tensor], operands: tuple[Operand, ...], *others: Any) -> Tensor:
    """Runs the job `plan(*operands, *others)`, and plans it only if there was none of its kind.

    Args:
        plan: a function of what the operands are, not of what they hold. It may replace some by copies, or return a
            result that was computed otherwise; such jobs are planned at every call.
        operands: the first is a tensor.
        others: further arguments of the plan, which can be hashed and are the same wherever they are equal.
    """
    seen, state = _facts(False, operands)
    key = None if seen is None else (plan, seen[0], others, state)
    step = _steps.get(key)
    y = None if seen is None or step is None else step.run(seen[1], step.y)
    if y is None:
        y, step = _first_launch(plan(*operands, *others), seen, state)
        if step is not None:
            _remember(_steps, key, step)
    if _watch.steps is not None:
        _watch.steps.append((step, seen and seen[1]))
    return y


def call(
    graph: bool, operands: tuple[Operand, ...], rows_per_lam: int | None, *others: Any
) -> tuple[Tensor, ...] | FirstCall | None:
    """Runs a public operator as it ran when it was last given the like.

    Args:
        graph: whether gradients are recorded, for operands that require them.
        operands, rows_per_lam, others: what the public operator was given. `others` are as in `launch`.

    Returns:
        Its results, a `FirstCall` if it was not given the like before, or None if it has to go through the dispatcher.
    """
    seen, state = _facts(graph, operands)
    if seen is None or (rows_per_lam is not None and type(rows_per_lam) is not int):  # True is equal to 1, too
        return None
    key = seen[0], rows_per_lam, others, state
    known = _calls.get(key)
    if known is None:
        return FirstCall(key, seen[1])
    y = known.step.run(seen[1], known.y)
    if y is None or known.parts is None:
        return None if y is None else (y,)
    return tuple([y.as_strided(*part) for part in known.parts])


class FirstCall:
    """A public operator's call that goes through its checks and the dispatcher, to be remembered if it only launches.

    It is remembered if it made one launch, with the very addresses that it was given: nothing was copied or added.
    """

    def __init__(self, key: Any, addresses: Any) -> None:
        self.key, self.addresses = key, addresses

    def run(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        outer, _watch.steps = _watch.steps, []
        try:
            result = function(*args, **options)
            steps = _watch.steps
        finally:
            _watch.steps = outer
        if len(steps) == 1 and steps[0][0] is not None and steps[0][1] == self.addresses:
            step = steps[0][0]
            if isinstance(result, Tensor):
                _remember(_calls, self.key, _Call(step, _shape_of(result), None))
            else:
                parts = [(each.shape, each.stride(), each.storage_offset()) for each in result]
                _remember(_calls, self.key, _Call(step, step.y, parts))
        return result


def forget() -> None:
    """Forgets all launches, for those who change how they are planned."""
    upstream.look_at_triton_again()
    _steps.clear()
    _calls.clear()


class _Ready:
    """A compiled kernel, with all of its arguments but the first ones."""

    def __init__(self, launch: Launch, compiled: Any, given: int) -> None:
        self.hooks = launch.kernel.pre_run_hooks
        self.grid = (*launch.grid, 1, 1)[:3]
        self.launch, self.kernel = upstream.launcher_of(compiled)
        self.others = tuple([launch.named[name] for name in launch.kernel.arg_names[given:]])


class _Step:
    """A job as it was launched once, on the current device. `y` and `parts` have the shapes of what it writes."""

    def __init__(
        self, driver: Any, y: Tensor, parts: Tensor | None, counters: int, launches: tuple[_Ready, ...]
    ) -> None:
        self.driver, self.device = driver, driver.get_current_device()
        self.y, self.parts, self.counters = y, parts, counters
        self.launches = launches

    def run(self, addresses: tuple[Any, ...], like: Tensor) -> Tensor | None:
        """Returns the result, which is like a given tensor, or None if Triton has to launch."""
        if self.driver.get_current_device() == self.device:
            return self._run(addresses, like)
        with torch.cuda.device(self.device):
            return self._run(addresses, like)

    def _run(self, addresses: tuple[Any, ...], like: Tensor) -> Tensor | None:
        for ready in self.launches:
            if ready.hooks:
                return None
        y = torch.empty_like(like)
        to = y.data_ptr()
        if to % 16:
            return None
        if self.parts is None:
            addresses = *addresses, to
        else:
            parts, arrived = torch.empty_like(self.parts), counters(y.device, self.counters)
            addresses = *addresses, to, parts.data_ptr(), arrived.data_ptr()
            if (addresses[-2] | addresses[-1]) % 16:
                return None
        stream = self.driver.get_current_stream(self.device)
        for ready in self.launches:
            ready.launch(*ready.grid, stream, *ready.kernel, *addresses, *ready.others)
        return y


class _Call(NamedTuple):
    """How a public operator ran: `y` has its output's shape, `parts` several results' sizes, strides and offsets."""

    step: _Step
    y: Tensor
    parts: list[tuple[torch.Size, tuple[int, ...], int]] | None


def _first_launch(job: Job | Tensor, seen: Any, state: Any) -> tuple[Tensor, _Step | None]:
    """Returns the result, which Triton launched, and the step to repeat it by if that can be done."""
    if isinstance(job, Tensor):
        return job, None
    if why := native.WHY_NOT if _C is None else upstream.why_triton_launches():
        _say_why_slow(why)
    x = job.operands[0]
    assert isinstance(x, Tensor)
    with torch.cuda.device_of(x):
        y, parts = x.new_empty(job.shape, dtype=job.dtype), None
        to = [y]
        if job.parts:
            parts = x.new_empty(job.parts, dtype=torch.float32)
            to += [parts, counters(x.device, job.counters)]
        compiled = [launch.by_triton(*job.operands, *to) for launch in job.launches]
        used, _ = _facts(False, job.operands)
        if state is None or used is None or used[1] != seen[1] or not all(map(upstream.is_compiled, compiled)):
            return y, None
        if any(tensor.data_ptr() % 16 for tensor in to):
            return y, None
        given = len(job.operands) + len(to)
        ready = [_Ready(launch, kernel, given) for launch, kernel in zip(job.launches, compiled, strict=True)]
        shape_of_parts = None if parts is None else _shape_of(parts)
        return y, _Step(state[0], _shape_of(y), shape_of_parts, job.counters, tuple(ready))


def _shape_of(tensor: Tensor) -> Tensor:
    """Returns a tensor of that shape in the memory of one number: `empty_like` of it costs less than `new_empty`."""
    return _number(tensor.dtype, tensor.device).expand(tensor.shape)


@cache
def _number(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty((), dtype=dtype, device=device)


def _facts(graph: bool, operands: tuple[Operand, ...]) -> tuple[tuple[bytes, tuple[Any, ...]] | None, Any]:
    """Returns what operands are, with their addresses, and Triton's state; or None if nothing may be remembered."""
    if _C is None or (seen := _C.facts(DEVICE_TYPE, graph, operands)) is None:
        return None, None
    state = upstream.triton_state()
    return (None, None) if state is None else (seen, state)


def _remember(known: dict[Any, Any], key: Any, value: Any) -> None:
    if len(known) >= LIMIT:
        known.clear()
    known[key] = value


@cache
def _say_why_slow(why: str) -> None:
    LOG.warning("Triton's own launches, which take tens of microseconds each: %s", why)
