"""Linear layers that read one input, such as queries, keys and values, or gate and up: computed in one call.

Which layers these are is seen while the model runs: two that get the very same tensor, one right after the other. From
then on the first computes the results of all, and the others take theirs, as long as each gets that tensor unchanged.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dami.dial.state import Dial
from dami.layers.base import LerpModule
from dami.upstream import changes_of, has_pre_hooks, hook_of, parameters_of
from dami_kernels import lerp_linears


class Siblings:
    """Layers that read one input, in the order in which they are called; the first computes for all."""

    def __init__(self, first: LerpModule) -> None:
        self.layers = [first]
        self._waiting: dict[LerpModule, Tensor] = {}
        self._source: tuple[Any, ...] = ()

    def compute(self, x: Tensor, rows: dict[str, Any]) -> Tensor | None:
        """The first layer's result, while those of the others wait; None if some must compute alone this time."""
        first = self.layers[0]
        if self._waiting:
            self.part()  # for one was not called
            return None
        if not all(layer.lerp.part is first.lerp.part and _can_wait(layer) for layer in self.layers):
            return None
        weights = [layer.ends("weight") for layer in self.layers]
        biases = None if parameters_of(first)["bias"] is None else [layer.ends("bias") for layer in self.layers]
        y, *others = lerp_linears(x, weights, biases=biases, **first.lerp.settings, **rows)
        self._waiting = dict(zip(self.layers[1:], others, strict=True))
        self._source = _source(first, x)
        return y

    def take(self, layer: LerpModule, x: Tensor) -> Tensor | None:
        """What waits for a layer, if it is the result of this input."""
        y = self._waiting.pop(layer, None)
        if y is not None and not _same(self._source, _source(layer, x)):
            self.part()
            return None
        if not self._waiting:
            self._source = ()
        return y

    def part(self) -> None:
        """From now on every layer computes alone."""
        for layer in self.layers:
            layer.lerp.siblings, layer.lerp.alone = None, True
        self._waiting, self._source = {}, ()


def together(layer: LerpModule, x: Tensor, rows: dict[str, Any]) -> Tensor | None:
    """A layer's result where it is computed with that of others; else None, and whom it could join is remembered.

    Args:
        layer: which is called, and no gradient is wanted.
        x: its input, no tensor of inference mode: whether these were changed in place, nobody can tell.
        rows: the operator's arguments that give each row its λ.
    """
    siblings = layer.lerp.siblings
    if siblings is not None:
        return siblings.compute(x, rows) if siblings.layers[0] is layer else siblings.take(layer, x)
    if not layer.lerp.alone:
        running = layer.lerp.running
        before, running.last = running.last, (layer, x, changes_of(x))
        if before is not None and before[1] is x and before[2] == changes_of(x) and _alike(before[0], layer):
            siblings = before[0].lerp.siblings or Siblings(before[0])
            siblings.layers.append(layer)
            before[0].lerp.siblings = layer.lerp.siblings = siblings
    return None


def _alike(a: LerpModule, b: LerpModule) -> bool:
    """Whether two layers can be computed in one call."""
    if a is b or not _can_wait(a) or not _can_wait(b) or type(a).forward is not type(b).forward:
        return False
    first, second = a.ends("weight"), b.ends("weight")
    return (
        (first.format, first.dtype, first.device) == (second.format, second.dtype, second.device)
        and (parameters_of(a)["bias"] is None) == (parameters_of(b)["bias"] is None)
        and a.lerp.settings == b.lerp.settings
    )


def _can_wait(layer: LerpModule) -> bool:
    """Whether nothing is to run before the layer computes, which could bring its weights or change its input."""
    return not has_pre_hooks(layer) and hook_of(layer) is None and "forward" not in vars(layer)


def _source(layer: LerpModule, x: Tensor) -> tuple[int, Tensor, Dial | None, Tensor, Tensor | None]:
    """What a result depends on beside the weights: how often x was changed in place, and objects."""
    lerp = layer.lerp
    return changes_of(x), x, lerp.part, lerp.dial.lam, lerp.running.packed


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return a[0] == b[0] and a[1] is b[1] and a[2] is b[2] and a[3] is b[3] and a[4] is b[4]
