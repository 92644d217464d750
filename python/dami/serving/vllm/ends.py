"""Both ends of a parameter of a vLLM layer: how vLLM's own loaders fill them, and how operators read them.

A loader knows a parameter by its name. The tensors of a format are loaded one after the other: while the i-th is read,
that name is the i-th tensor here, so vLLM renames, merges and splits each as it would the weight of an ordinary model.
After loading, the tensors have names of their own, and the name that vLLM knows holds only NaN: whatever reads it past
dami's operators gives NaN instead of one of the ends, and the self-test finds it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs

from dami.upstream import buffers_of, parameters_of
from dami_kernels import LerpWeight, formats
from dami_kernels.quantize import GROUP

LARGE = (LinearBase, VocabParallelEmbedding, RoutedExperts)  # their weights are made as pairs, or not doubled


@dataclass
class Ends:
    """Both ends of one parameter, or of one persistent buffer.

    Attributes:
        format: storage format.
        shape: shape of either end in this process.
        dtype: dtype of either end.
        tensors: the tensors of the format, in its order.
        places: layers that have the parameter, and its name there; several if it is tied.
        converted: whether operators read it, because its layer is of a known kind.
        names: names of the tensors in the layer, once they are kept there.
    """

    format: str
    shape: torch.Size
    dtype: torch.dtype
    tensors: list[Tensor]
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    converted: bool = False
    names: tuple[str, ...] = ()

    def show(self, tensor: Tensor) -> None:
        """Makes a tensor what vLLM knows by the parameter's name."""
        for layer, name in self.places:
            own: Any = buffers_of(layer) if name in buffers_of(layer) else parameters_of(layer)
            own[name] = tensor

    def keep(self) -> None:
        """Gives the tensors names of their own, and leaves NaN under the name that vLLM knows."""
        nan = torch.full((1,), torch.nan, dtype=self.dtype, device=self.tensors[0].device).expand(self.shape)
        self.show(nn.Parameter(nan, requires_grad=False))
        kept: Any = [t if isinstance(t, nn.Parameter) else nn.Parameter(t, requires_grad=False) for t in self.tensors]
        self.names = tuple(f"pair_{self.places[0][1]}{suffix}" for suffix in formats.get(self.format).TENSORS)
        for layer, name in self.places:
            parameters_of(layer).update(zip(self.names, kept, strict=True))
            ends_in(layer)[name] = self

    @contextmanager
    def zeroed(self) -> Iterator[None]:
        """Leaves zeros instead of NaN under the name that vLLM knows."""
        (layer, name), *_ = self.places
        nan: Any = parameters_of(layer)[name]
        self.show(nn.Parameter(torch.zeros_like(nan), requires_grad=False))
        yield
        self.show(nan)


def ends_in(layer: Any) -> dict[str, Ends]:
    """Returns a layer's parameters that have two ends, by name: the layer's own dict."""
    if "pair_ends" not in vars(layer):
        layer.pair_ends = {}
    return layer.pair_ends


def ends_of(layer: Any, name: str) -> LerpWeight:
    """Returns both ends of a parameter as the operators take them: one tensor twice if they are equal."""
    ends: Ends | None = layer.pair_ends.get(name)
    own: Any = parameters_of(layer)
    if ends is None:
        return LerpWeight((own[name], own[name]), "pair", own[name].shape, own[name].dtype)
    return LerpWeight(tuple(own[each] for each in ends.names), ends.format, ends.shape, ends.dtype)


def optional_ends(layer: Any, name: str) -> LerpWeight | None:
    """Returns `ends_of`, or None if the layer has no such parameter."""
    return None if parameters_of(layer).get(name) is None else ends_of(layer, name)


def create(layer: nn.Module, name: str, format: str, shape: Sequence[int], dtype: torch.dtype, **attrs: Any) -> Ends:
    """Adds a parameter to a layer, with empty tensors for both of its ends.

    Args:
        layer: the layer to add it to.
        name: the parameter's name.
        format: its storage format.
        shape: shape of either end in this process: [..., N, K].
        dtype: dtype of either end.
        attrs: attributes of the tensors, which vLLM's weight loaders read.
    """
    row = torch.zeros(*([1] * (len(shape) - 1)), shape[-1], dtype=dtype, device="cpu")
    tensors: list[Tensor] = []
    for suffix, like in zip(formats.get(format).TENSORS, LerpWeight.pack(row, row, format).tensors, strict=True):
        if format == "lowrank" and suffix:
            continue  # see `add_factors`
        tensors.append(nn.Parameter(torch.empty(*shape[:-1], like.shape[-1], dtype=like.dtype), requires_grad=False))
        set_weight_attrs(tensors[-1], attrs)
    layer.register_parameter(name, tensors[0])  # type: ignore[arg-type]
    return Ends(format, torch.Size(shape), dtype, tensors, [(layer, name)], converted=True)


def twice(layer: nn.Module, name: str, tensor: Tensor) -> Ends:
    """Returns the ends of a parameter or buffer that a layer has already: itself, and a copy of it."""
    copy: Tensor = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        copy = nn.Parameter(copy, requires_grad=False)
        set_weight_attrs(copy, dict(vars(tensor)))
    return Ends("pair", tensor.shape, tensor.dtype, [tensor, copy], [(layer, name)])


def add_factors(ends: Ends, ranks: Sequence[int], columns: int, weight_loader: Any) -> None:
    """Adds the factors of a low-rank difference, with those of merged weights side by side.

    The factor up is then block-diagonal, because each part contributes to its own outputs only.

    Args:
        ends: the ends of the weight.
        ranks: rank of each part.
        columns: K of the whole weight.
        weight_loader: the layer's weight loader, which knows the rows of each part.
    """
    layer: Any = ends.places[0][0]
    shape = ends.shape
    bounds = list(itertools.accumulate(ranks, initial=0))
    down = nn.Parameter(torch.zeros(bounds[-1], shape[1], dtype=ends.dtype), requires_grad=False)
    up = nn.Parameter(torch.zeros(shape[0], bounds[-1], dtype=ends.dtype), requires_grad=False)

    def columns_of(loaded: Tensor, shard: Any) -> slice:
        shard = getattr(loaded, "shard_id", None) if shard is None else shard
        part = {"q": 0, "k": 1, "v": 2, None: 0}.get(shard, shard)
        return slice(bounds[part], bounds[part + 1])

    def load_down(parameter: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
        first = 0 if shape[1] == columns else layer.tp_rank * shape[1]
        parameter.data[columns_of(loaded, shard)] = loaded.narrow(1, first, shape[1])

    def load_up(parameter: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
        part = nn.Parameter(parameter.new_zeros(shape[0], loaded.shape[1]), requires_grad=False)
        set_weight_attrs(part, {"output_dim": 0})
        weight_loader(part, loaded, *([] if shard is None else [shard]))
        parameter.data[:, columns_of(loaded, shard)] = part.data

    set_weight_attrs(down, {"weight_loader": load_down})
    set_weight_attrs(up, {"weight_loader": load_up})
    ends.tensors += [down, up]


def check_groups(layer: Any, format: str, size: int, whole: int) -> None:
    """Raises ValueError if input features that share a scale would be split."""
    if size != whole and format not in ("pair", "lowrank") and size % GROUP:
        raise ValueError(
            f"{layer.prefix or type(layer).__name__}: {whole} input features cannot be split into parts of {size}, as "
            f"{GROUP} of them share a scale in the format {format!r}: use fewer processes, or the format 'pair'"
        )


def find(model: nn.Module) -> dict[str, Ends]:
    """Returns the ends of every parameter and persistent floating-point buffer of a model, by its path.

    A weight that vLLM keeps once, because its ends are equal, has one tensor only.
    """
    found: dict[int, Ends] = {}
    paths: dict[int, str] = {}
    for path, tensor in model.state_dict(keep_vars=True).items():
        parent, _, name = path.rpartition(".")
        layer: Any = model.get_submodule(parent)
        known = ends_in(layer).get(name)
        if not isinstance(tensor, Tensor) or not (known or tensor.is_floating_point()):
            continue
        if known is not None:
            ends = known
        elif id(tensor) in found:
            ends = found[id(tensor)]
            ends.places.append((layer, name))
        elif tensor.dim() == (3 if isinstance(layer, RoutedExperts) else 2) and isinstance(layer, LARGE):
            ends = Ends("pair", tensor.shape, tensor.dtype, [tensor], [(layer, name)])
        else:
            ends = twice(layer, name, tensor)
        found[id(tensor)] = ends
        paths.setdefault(id(ends), path)
    return {paths[id(ends)]: ends for ends in found.values()}


@contextmanager
def shown(found: dict[str, Ends], index: int) -> Iterator[None]:
    """Lets vLLM load the tensors with this index in their formats; where there is none, nothing may be loaded."""
    for path, ends in found.items():
        if index < len(ends.tensors):
            if index == 1 and ends.format == "pair":  # a part that is stored once is the same in both ends
                ends.tensors[1].data.copy_(ends.tensors[0].data)
            ends.show(ends.tensors[index])
        else:
            ends.show(guard(path))
    yield
    for ends in found.values():
        ends.show(ends.tensors[0])


def guard(path: str) -> Tensor:
    """Returns a parameter that cannot be loaded."""

    def refuse(*_: Any) -> None:
        raise ValueError(f"{path} differs between the ends, and vLLM keeps it where a pair cannot reach it")

    empty = nn.Parameter(torch.empty(0), requires_grad=False)
    set_weight_attrs(empty, {"weight_loader": refuse})
    return empty
