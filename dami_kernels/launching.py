"""Launches of Triton kernels that cost microseconds on the host, not Triton's tens of them.

Triton binds, specialises and looks up every launch in Python. Here its first launch of a kind is remembered: the
compiled kernel and every argument but the operands' addresses. A launch is of the same kind if all that Triton, the
operators' checks and the launch parameters look at is the same: of each operand its type, dtype, shape, strides, device
and whether its address is a multiple of 16; all other arguments; and Triton's driver and settings. The addresses, the
device guard and the stream belong to each launch.

Where somebody listens to launches, or something is missing that this relies on, Triton launches.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dami_kernels import native, upstream

LOG = logging.getLogger("dami_kernels")
DEVICE_TYPE = 2  # DLPack's number of CUDA
LIMIT = 1 << 12  # kinds that are remembered

Operand = Tensor | tuple[Any, ...] | None  # a tuple holds the tensors of a weight, or such tuples
_C: Any = getattr(native, "_C", None)
_steps: dict[Any, _Step] = {}  # by what `launch` is given
_calls: dict[Any, tuple[_Step, list[torch.Size]]] = {}  # by what a public operator is given, with its results' shapes


class _Watch(threading.local):
    steps: list[tuple[_Step | None, Any]] | None = None


_watch = _Watch()


class Launch(NamedTuple):
    """One launch. The kernel's first parameters are the operands and the output; `named` are the others, with options."""

    kernel: Any
    grid: tuple[int, ...]
    named: dict[str, Any]

    def by_triton(self, *operands: Any) -> Any:
        return self.kernel[self.grid](*operands, **self.named)


class Job(NamedTuple):
    """The launches that compute one result.

    Attributes:
        shape, dtype: of the result.
        compute: takes the operands and writes the result, or if there is `add`, [splits, *shape] in float32.
        add: takes these and writes the result.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: Launch
    splits: int = 1
    add: Launch | None = None

    def outputs(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns memory for the result and for what `compute` writes."""
        y = like.new_empty(self.shape, dtype=self.dtype)
        return y, y if self.add is None else like.new_empty((self.splits, *self.shape), dtype=torch.float32)


def launch(plan: Callable[..., Job], operands: tuple[Operand, ...], *others: Any) -> Tensor:
    """Runs the job `plan(*operands, *others)`, and plans it only if there was none of its kind.

    Args:
        plan: a function of what the operands are, not of what they hold.
        operands: the kernel's first arguments. The first is a tensor.
        others: further arguments of the plan, which can be hashed and are the same wherever they are equal.
    """
    seen, state = _facts(False, operands)
    key = None if seen is None else (plan, seen[0], others, state)
    step = _steps.get(key)
    y = None if seen is None or step is None else step.run(seen[1], operands[0])
    if y is None:
        y, step = _launch_by_triton(plan(*operands, *others), operands, state)
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
    if seen is None or (rows_per_lam is not None and type(rows_per_lam) is not int):
        return None
    key = (seen[0], rows_per_lam, others, state)
    known = _calls.get(key)
    if known is None:
        return FirstCall(key, seen[1])
    step, shapes = known
    if len(shapes) == 1:
        y = step.run(seen[1], operands[0], shapes[0])
        return None if y is None else (y,)
    y = step.run(seen[1], operands[0])
    if y is None:
        return None
    parts = y.split([shape.numel() for shape in shapes])
    return tuple([part.view(shape) for part, shape in zip(parts, shapes, strict=True)])


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
            results = result if isinstance(result, tuple) else (result,)
            _remember(_calls, self.key, (steps[0][0], [each.shape for each in results]))
        return result


def forget() -> None:
    """Forgets all launches, for those who change how they are planned."""
    _steps.clear()
    _calls.clear()


class _Ready:
    """A compiled kernel, with all of its arguments but the first ones."""

    def __init__(self, launch: Launch, compiled: Any, given: int) -> None:
        self.hooks = launch.kernel.pre_run_hooks
        self.grid = (*launch.grid, 1, 1)[:3]
        self.kernel = compiled.function, compiled.packed_metadata, None, None, None  # no hooks, nor anything for them
        self.others = tuple([launch.named[name] for name in launch.kernel.arg_names[given:]])
        self.run = compiled.run

    def launch(self, stream: int, *operands: Any) -> None:
        self.run(*self.grid, stream, *self.kernel, *operands, *self.others)


class _Step:
    """A job as it was launched once, on the device that was current then."""

    def __init__(self, driver: Any, job: Job, compute: _Ready, add: _Ready | None) -> None:
        self.job, self.compute, self.add = job, compute, add
        self.driver = driver
        self.device = driver.get_current_device()

    def run(self, addresses: tuple[Any, ...], like: Any, shape: Any = None) -> Tensor | None:
        """Returns the result, in the job's shape or another with as many elements; or None if Triton has to launch."""
        if self.compute.hooks or (self.add is not None and self.add.hooks):
            return None
        job = self.job
        shape = job.shape if shape is None else shape
        y = like.new_empty(shape) if like.dtype is job.dtype else like.new_empty(shape, dtype=job.dtype)
        out = y if self.add is None else like.new_empty((job.splits, *job.shape), dtype=torch.float32)
        to = y.data_ptr(), out.data_ptr()
        if (to[0] | to[1]) % 16:
            return None
        if self.driver.get_current_device() == self.device:
            self._launch(addresses, *to)
        else:
            with torch.cuda.device_of(like):
                self._launch(addresses, *to)
        return y

    def _launch(self, addresses: tuple[Any, ...], y: int, out: int) -> None:
        stream = self.driver.get_current_stream(self.device)
        self.compute.launch(stream, *addresses, out)
        if self.add is not None:
            self.add.launch(stream, out, y)


def _launch_by_triton(job: Job, operands: tuple[Any, ...], state: Any) -> tuple[Tensor, _Step | None]:
    """Returns the result, and the step to repeat it by if there is one."""
    if why := native.WHY_NOT if _C is None else upstream.why_triton_launches():
        _say_why_slow(why)
    y, out = job.outputs(operands[0])
    with torch.cuda.device_of(operands[0]):
        compute = job.compute.by_triton(*operands, out)
        add = None if job.add is None else job.add.by_triton(out, y)
        if state is None or (y.data_ptr() | out.data_ptr()) % 16 or not upstream.is_compiled(compute):
            return y, None
        ready = None if job.add is None else _Ready(job.add, add, 2)
        return y, _Step(state[0], job, _Ready(job.compute, compute, len(operands) + 1), ready)


def _facts(graph: bool, operands: tuple[Operand, ...]) -> tuple[tuple[bytes, tuple[Any, ...]] | None, Any]:
    """Returns what operands are, with their addresses, and Triton's state; or None if nothing may be remembered."""
    seen = None if _C is None else _C.facts(DEVICE_TYPE, graph, operands)
    state = None if seen is None else upstream.triton_state()
    return (None, None) if state is None else (seen, state)


def _remember(known: dict[Any, Any], key: Any, value: Any) -> None:
    if len(known) >= LIMIT:
        known.clear()
    known[key] = value


@cache
def _say_why_slow(why: str) -> None:
    LOG.warning("Triton's own launches, which take tens of microseconds each: %s", why)
