"""Calls what torch has compiled for one layer for the layers that are alike, past all that torch does before it.

In every step, torch calls the code of a kind of layers for the first of them: it evaluates guards on the inputs, takes
tensors from the module, and sees to what the code changes. `Recorder` notes which tensors the code gets and returns.
For each layer after it, the code is called with the same tensors, but for the layer's own, those of its cache and its
hidden states, which take the places of the first layer's. Where it is not known what is in a place, or where a call
changes more than tensors, torch calls all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dami.dial.state import ModuleState
from dami.upstream import tree_flatten


class Call(NamedTuple):
    """A call of compiled code: its arguments and its results."""

    code: Callable[[list[Any]], Sequence[Any]]
    arguments: Sequence[Any]
    results: Sequence[Any]


class Recorder:
    """A backend of `torch.compile` that keeps the last call of compiled code.

    Args:
        compiler: compiles a graph, see `upstream.compiler`.

    Attributes:
        last: the call; None if there has been none since this was set to None, or if torch adds to what the code does.
    """

    def __init__(self, compiler: Callable[..., Callable[..., Any]]) -> None:
        self._compiler = compiler
        self.last: Call | None = None

    def __call__(self, graph: Any, inputs: Any, **_: Any) -> Callable[..., Any]:
        whole = self._compiler(graph, inputs, self._recorded)

        def run(*arguments: Any) -> Any:
            self.last = None
            results = whole(*arguments)
            if self.last is not None and [*map(id, self.last.results)] != [*map(id, results)]:
                self.last = None  # torch uses results, to change an argument for instance
            return results

        return run

    def _recorded(self, code: Callable[[list[Any]], Sequence[Any]]) -> Callable[[list[Any]], Sequence[Any]]:
        def run(arguments: list[Any]) -> Sequence[Any]:
            given = [*arguments]
            results = code(arguments)
            self.last = Call(code, given, results)
            return results

        return run


class OwnTensors:
    """The parameters and buffers of a layer.

    Attributes:
        tensors: these tensors, in an order that layers of one structure share.
        comparable: whether none of them is there twice, and all modules read the λ of one dial.
    """

    def __init__(self, layer: nn.Module) -> None:
        named = chain(layer.named_parameters(remove_duplicate=False), layer.named_buffers(remove_duplicate=False))
        self.tensors = [tensor for _, tensor in named]
        states = [each for module in layer.modules() for each in vars(module).values() if isinstance(each, ModuleState)]
        self._dial = states[0].dial if states else None
        one_lam = all(state.part is None and state.dial is self._dial for state in states)
        self.comparable = one_lam and len({*map(id, self.tensors)}) == len(self.tensors)

    @property
    def lam(self) -> Tensor | None:
        """The λ that the modules read; None if there is none."""
        return None if self._dial is None else self._dial.lam


class FirstCall:
    """The call of a kind's first layer in a step, which can be repeated for others.

    Args:
        call: what `Recorder` kept of it.
        own: the layer's own tensors.
        inputs, named: the layer's inputs; the first are its hidden states.
        cache: the layer's cache.
        result: what the layer returned, one of the call's results.

    Raises:
        LookupError: the layers are not comparable, or it is not known where the result is or what an argument would be
            for another layer, such as one that is both its hidden states and another input, or autocast is on, which
            torch turns off around the code.
    """

    def __init__(
        self,
        call: Call,
        own: OwnTensors,
        inputs: Sequence[Any],
        named: Mapping[str, Any],
        cache: object,
        result: object,
    ) -> None:
        if not own.comparable:
            raise LookupError("the layer's tensors cannot be told apart")
        if torch.is_autocast_enabled(inputs[0].device.type):
            raise LookupError("autocast is on")
        self._call, self._others, self._named = call, inputs[1:], named
        self._form, self._state = _form(inputs[0]), _state(cache)
        self._result = _places(call.results)[id(result)]
        owns = _places(own.tensors)
        cached = {id(value): name for name, value in vars(cache).items()}
        self._ids = shared = {*map(id, tree_flatten((inputs[1:], {**named}))[0]), id(own.lam)}
        if id(inputs[0]) in shared:
            raise LookupError("the hidden states are another input as well")
        self._own: list[tuple[int, int]] = []  # places among the arguments and among a layer's own tensors
        self._cached: list[tuple[int, str]] = []
        self._shared: list[tuple[int, Any]] = []
        self._hidden: list[int] = []
        for at, key in enumerate(map(id, call.arguments)):
            if key == id(inputs[0]):
                self._hidden.append(at)
            elif key in owns:
                self._own.append((at, owns[key]))
            elif key in cached:
                self._cached.append((at, cached[key]))
            elif key in shared:
                self._shared.append((at, call.arguments[at]))
            else:
                raise LookupError(f"argument {at} is of none")

    @property
    def code(self) -> Callable[..., Any]:
        return self._call.code

    def is_like(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> bool:
        """Whether a layer gets the same inputs, but for the numbers in its hidden states."""
        return (
            len(inputs) == len(self._others) + 1
            and named.keys() == self._named.keys()
            and all(map(is_, inputs[1:], self._others))
            and all(map(is_, named.values(), self._named.values()))
            and id(inputs[0]) not in self._ids
            and _form(inputs[0]) == self._form
        )

    def own_arguments(self, own: OwnTensors, cache: object) -> list[Any] | None:
        """Returns the arguments that are another layer's, each in its place; None if its call must not be repeated."""
        if not own.comparable or _state(cache) != self._state:
            return None
        found: list[Any] = [None] * len(self._call.arguments)
        for at, index in self._own:
            found[at] = own.tensors[index]
        for at, name in self._cached:
            found[at] = getattr(cache, name)
        return found

    def repeat(self, hidden: Tensor, own: list[Any]) -> Any:
        """Returns the result of another layer, of its hidden states and its `own_arguments`."""
        arguments = [*own]
        for at, value in self._shared:
            arguments[at] = value
        for at in self._hidden:
            arguments[at] = hidden
        return self._call.code(arguments)[self._result]


def _places(values: Sequence[Any]) -> dict[int, int]:
    return {id(value): at for at, value in enumerate(values)}


def _form(value: Any) -> Any:
    """Returns what code that was compiled with a value depends on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device, value.is_inference()
    return [*map(_form, value)] if isinstance(value, (list, tuple)) else value


def _state(cache: object) -> dict[str, Any]:
    return {name: _form(value) for name, value in vars(cache).items()}
