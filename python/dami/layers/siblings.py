"""Computes linear layers that read one input in one call: queries, keys and values, or gate and up.

Which layers these are is found while the model runs: two layers that get the very same tensor, one right after the
other. From then on the first computes the results of all, and the others take theirs, as long as each gets that tensor
unchanged, at the same λ, and has the weights that it had when it last ran alone. A change that torch does not count,
such as one through `x.data` or NumPy, is not noticed.
"""

from __future__ import annotations

from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from dami.layers.base import LerpModule
from dami.upstream import changes_of, has_pre_hooks, hook_of, parameters_of
from dami_kernels import lerp_linears

ATTEMPTS = 3  # passes in a row in which a layer does not take its result, before the layers part


def pays(x: Tensor) -> bool:
    """Whether one call for several layers saves time: on a GPU it saves launches, on a CPU less than the notes cost."""
    return not x.is_cpu


class Siblings:
    """Layers that read one input, in the order in which they are called. The first computes for all.

    It refers to them weakly, so that a model is freed with its last reference.
    """

    def __init__(self, first: LerpModule) -> None:
        self._layers: list[ReferenceType[LerpModule]] = [ref(first)]
        self._untaken = self._in_vain = 0

    def append(self, layer: LerpModule) -> None:
        self._layers.append(ref(layer))

    def is_first(self, layer: LerpModule) -> bool:
        return self._layers[0]() is layer

    def compute(self, first: LerpModule, x: Tensor, rows: dict[str, Any]) -> Tensor | None:
        """Returns the first layer's result and keeps the others', or None if all must compute alone this time."""
        layers = [layer for each in self._layers if (layer := each()) is not None]
        self._in_vain = self._in_vain + 1 if self._untaken else 0
        self._untaken = 0
        if self._in_vain == ATTEMPTS or len(layers) < len(self._layers):
            for layer in layers:
                layer.lerp.siblings, layer.lerp.alone = None, True
            return None
        part, others = first.lerp.part, layers[1:]
        if not _can_wait(first) or not all(
            layer.lerp.part is part and _can_wait(layer) and layer.lerp.seen == _memory(layer) for layer in others
        ):
            return None
        biases = None if parameters_of(first)["bias"] is None else [layer.ends("bias") for layer in layers]
        weights = [layer.ends("weight") for layer in layers]
        y, *ys = lerp_linears(x, weights, biases=biases, **first.lerp.settings, **rows)
        source = _source(first, x)
        first.lerp.running.results.update({layer: (source, y) for layer, y in zip(others, ys, strict=True)})
        self._untaken = len(others)
        return y

    def take(self, layer: LerpModule, x: Tensor) -> Tensor | None:
        """Returns the result that was kept for a layer, if it is the result of this input."""
        source, y = layer.lerp.running.results.pop(layer, (None, None))
        if source is None or not _is_same(source, _source(layer, x)):
            return None
        self._untaken -= 1
        return y


def together(layer: LerpModule, x: Tensor, rows: dict[str, Any]) -> Tensor | None:
    """Returns a layer's result if it is computed with those of others; otherwise None, and notes whom it could join.

    Args:
        layer: a linear layer that is called inside a pass, with no gradient wanted.
        x: its input. It must not be a tensor of inference mode, whose changes in place nobody counts.
        rows: the operator's arguments that give each row its λ.
    """
    lerp = layer.lerp
    if lerp.alone:
        return None
    siblings = lerp.siblings
    if siblings is not None:
        y = siblings.compute(layer, x, rows) if siblings.is_first(layer) else siblings.take(layer, x)
        if y is not None:
            return y
    if siblings is not None:
        lerp.seen = _memory(layer)
    before, lerp.running.last = lerp.running.last, (layer, x, changes_of(x))
    if siblings is None and before is not None and before[1] is x and before[2] == changes_of(x):
        other = before[0]
        if _is_alike(other, layer):
            siblings = other.lerp.siblings or Siblings(other)
            siblings.append(layer)
            other.lerp.siblings = lerp.siblings = siblings
            lerp.seen = _memory(layer)
    return None


def _is_alike(a: LerpModule, b: LerpModule) -> bool:
    """Whether two layers can be computed in one call."""
    if a is b or a.lerp.alone or not _can_wait(a) or not _can_wait(b) or type(a).forward is not type(b).forward:
        return False
    first, second = a.ends("weight"), b.ends("weight")
    return (
        (first.format, first.dtype, first.device) == (second.format, second.dtype, second.device)
        and (parameters_of(a)["bias"] is None) == (parameters_of(b)["bias"] is None)
        and a.lerp.settings == b.lerp.settings
        and (a.lerp.group == "head") == (b.lerp.group == "head")
        and _memory(a) is not None
    )


def _can_wait(layer: LerpModule) -> bool:
    """Whether nothing runs before the layer computes that could bring its weights or change its input."""
    return not has_pre_hooks(layer) and hook_of(layer) is None and "forward" not in vars(layer)


def _memory(layer: LerpModule) -> tuple[tuple[int, int], ...] | None:
    """Where a layer's tensors are and how often each was changed in place; None if nobody counts that."""
    tensors = [*layer.ends("weight").tensors]
    if parameters_of(layer)["bias"] is not None:
        tensors += layer.ends("bias").tensors
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return tuple([(tensor.data_ptr(), changes_of(tensor)) for tensor in tensors])


def _source(layer: LerpModule, x: Tensor) -> tuple[Any, ...]:
    """What a result depends on besides the weights: x and λ, by identity, and modes."""
    lerp = layer.lerp
    modes = changes_of(x), torch.is_autocast_enabled(x.device.type), torch.is_inference_mode_enabled()
    return x, lerp.part, lerp.dial.lam, lerp.running.packed, modes


def _is_same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return all(x is y for x, y in zip(a[:-1], b[:-1], strict=True)) and a[-1] == b[-1]
