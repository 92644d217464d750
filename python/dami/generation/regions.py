"""Runs the layers of a model by compiled graphs, where layers that are alike share one.

So the time that compiling takes does not grow with the number of layers. A graph must not know which layer it is for.
transformers' layers tell the cache so by their index; while they are compiled, their index is `OWN`, and the cache that
they get has one layer. A layer that uses its index for anything else cannot be traced then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import StaticCache
from transformers.modeling_layers import GradientCheckpointingLayer

from dami.generation.repeated_calls import FirstCall, OwnTensors, Recorder
from dami.upstream import HOOKS, LAYER_INDEX, captures_outputs, has_hooks, unsupported


class Own:
    """The index of any layer: it can be handed on, but not compared, computed with or used as a key."""

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError("a layer that is compiled for all that are alike asks for its index")

    __eq__ = __ne__ = __bool__ = __hash__ = __index__ = __str__ = _refuse


OWN = Own()


class OneLayer:
    """A cache as one layer sees it. A layer that asks anything else of its cache cannot be traced."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def update(self, key: Tensor, value: Tensor, index: object, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if index is not OWN:
            raise TypeError("a layer reads what another has cached")
        return self.layer.update(key, value, *args, **options)

    def get_seq_length(self, index: object) -> Any:
        if index is not OWN:
            raise TypeError("a layer reads how much another has cached")
        return self.layer.get_seq_length()


class Region:
    """A layer of a model, and what its modules have to have during a step in place of what they have.

    Hooks by which transformers records outputs are left out: they are there for good once any have been asked for.

    Attributes:
        layer: the layer.
        index: its index in the cache.
        own: its own tensors.
        hooked: whether hooks run inside it. They may change what no guard is about, such as a list, so it has no graph.
    """

    def __init__(self, layer: nn.Module, index: int) -> None:
        self.layer, self.index, self.own, self.hooked = layer, index, OwnTensors(layer), hooks_inside(layer)
        self._arguments: tuple[object, object, list[Any] | None] = None, None, None
        self._changes: list[tuple[dict[str, Any], str, Any, Any]] = []  # attributes, a name, its value, that of a step
        for module in layer.modules():
            attributes = vars(module)
            if LAYER_INDEX in attributes:
                self._changes.append((attributes, LAYER_INDEX, attributes[LAYER_INDEX], OWN))
            hooks = attributes[HOOKS]
            if module is not layer and any(map(captures_outputs, hooks.values())):
                kept = type(hooks)((key, hook) for key, hook in hooks.items() if not captures_outputs(hook))
                self._changes.append((attributes, HOOKS, hooks, kept))

    def arguments(self, first: FirstCall, cache: object) -> list[Any] | None:
        """Returns the layer's `FirstCall.own_arguments`, which stay the same for the same code and cache."""
        code, of, found = self._arguments
        if code is not first.code or of is not cache:
            found = first.own_arguments(self.own, cache)
            self._arguments = first.code, cache, found
        return found

    def enter(self) -> None:
        for attributes, name, _, value in self._changes:
            attributes[name] = value

    def leave(self) -> None:
        for attributes, name, value, _ in self._changes:
            attributes[name] = value


def regions_of(model: nn.Module) -> list[Region]:
    """Returns the layers of a model that have an index in the cache; none if one has several, or a replaced forward."""
    found: dict[nn.Module, set[Any]] = {}
    inside: set[nn.Module] = set()
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer not in inside:
            inside.update(layer.modules())
            indices = {vars(each)[LAYER_INDEX] for each in layer.modules() if LAYER_INDEX in vars(each)}
            if indices:
                found[layer] = indices
    if any(len(indices) > 1 or None in indices or "forward" in vars(layer) for layer, indices in found.items()):
        return []  # such as in an encoder, or where accelerate has replaced the forward
    return [Region(layer, *indices) for layer, indices in found.items()]


def hooks_inside(layer: nn.Module) -> bool:
    """Whether hooks run inside a layer."""
    return any(has_hooks(module) for module in layer.modules() if module is not layer)


@contextmanager
def entered(regions: Sequence[Region]) -> Iterator[None]:
    """Makes layers that are alike equal for the duration of a `with` block."""
    try:
        for region in regions:
            region.enter()
        yield
    finally:
        for region in regions:
            region.leave()


class Graph:
    """A compiled function of a module and its inputs.

    Args:
        run: the function. The first call compiles it.
        recorder: the backend that compiles it, if calls may be repeated.

    Attributes:
        failed: whether torch could not make one graph of it.
    """

    def __init__(self, run: Callable[..., Any], recorder: Recorder | None = None) -> None:
        self.run, self.failed = run, False
        self._recorder = recorder
        self._pure: object = None  # code of which it is known that it changes nothing but tensors
        self._first: FirstCall | None = None

    def begin_step(self) -> None:
        """Lets torch make the next call, which others may then repeat."""
        self._first = None

    def call(
        self, region: Region, cache: object, inputs: Sequence[Any], named: Mapping[str, Any], whole: object
    ) -> Any:
        """Returns a layer's result.

        Args:
            region: the layer.
            cache: what it has cached.
            inputs, named: its inputs.
            whole: the model's cache, in place of which the layer gets its own.
        """
        if self._first is not None and self._first.is_like(inputs, named):
            own = region.arguments(self._first, cache)
            if own is not None:
                return self._first.repeat(inputs[0], own)
        one = OneLayer(cache)
        given = [one if each is whole else each for each in inputs]
        given_by_name = {name: one if each is whole else each for name, each in named.items()}
        if self._recorder is None:
            return self.run(region.layer, *given, **given_by_name)
        before = _attributes(region, cache) if self._pure is None else None
        result = self.run(region.layer, *given, **given_by_name)
        call, self._recorder.last = self._recorder.last, None
        if call is None or (before is not None and not _are_same(before, _attributes(region, cache))):
            self._recorder = None
        elif before is None and call.code is not self._pure:
            self._pure = None  # its next call shows
        else:
            self._pure = call.code
            with suppress(LookupError):
                self._first = FirstCall(call, region.own, inputs, named, cache, result)
        return result


def _attributes(region: Region, cache: object) -> list[dict[str, Any]]:
    """Returns what a layer's modules and its cache have."""
    return [{**vars(each)} for each in (cache, *region.layer.modules())]


def _are_same(some: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    return all(
        one.keys() == other.keys() and all(value is other[name] for name, value in one.items())
        for one, other in zip(some, others, strict=True)
    )


@contextmanager
def by_graphs(graphs: Mapping[Region, Graph], cache: StaticCache) -> Iterator[None]:
    """Runs layers by their graphs for the duration of a `with` block; a layer whose graph fails runs as it is."""
    with entered([*graphs]):
        try:
            for region, graph in graphs.items():
                graph.begin_step()
                vars(region.layer)["forward"] = _by_graph(region, graph, cache)
            yield
        finally:
            for region, graph in graphs.items():
                graph.begin_step()
                vars(region.layer).pop("forward", None)


def _by_graph(region: Region, graph: Graph, cache: StaticCache) -> Callable[..., Any]:
    """Returns what to call instead of a layer's forward."""
    layer = region.layer

    def forward(*inputs: Any, **named: Any) -> Any:
        if region.index >= len(cache.layers):  # it has no cache of its own
            graph.failed = True
        if not graph.failed and not region.hooked:
            try:
                return graph.call(region, cache.layers[region.index], inputs, named, cache)
            except unsupported():
                graph.failed = True
        region.leave()
        return type(layer).forward(layer, *inputs, **named)

    return forward
