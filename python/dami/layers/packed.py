"""Packs both ends of a parameter, and puts them into a module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dami.dial.state import ModuleState, StoredEnds
from dami.layers.base import LerpModule, placeholder
from dami.layers.classes import patched_class, reclass
from dami_kernels import LerpWeight, formats


@dataclass(frozen=True)
class LowRank:
    """The λ=1 end of a weight as base + up · down: down [R, K], up [N, R] for an operand of shape [N, K]."""

    down: Tensor
    up: Tensor

    def minus(self, other: LowRank) -> LowRank:
        """Returns the difference of two, whose rank is the sum of theirs."""
        return LowRank(torch.cat((self.down, other.down.to(self.down))), torch.cat((self.up, -other.up.to(self.up)), 1))


def adapted(base: Tensor, difference: LowRank, format: str) -> LerpWeight:
    """Packs base and base + up · down: as factors in the format `lowrank`, as two full ends in any other."""
    down, up = (factor.to(base.device) for factor in (difference.down, difference.up))
    if format == "lowrank":
        factors = (factor.to(base.dtype).contiguous() for factor in (down, up))
        return LerpWeight((base, *factors), format, base.shape, base.dtype)
    return LerpWeight.pack(base, torch.addmm(base.float(), up.float(), down.float()).to(base.dtype), format)


@dataclass(frozen=True)
class Packed:
    """Both ends of a parameter, packed, in the orientation of its module.

    Attributes:
        weight: the operand.
        base: the tensor to put in the parameter's place: the base, or a placeholder if the format does not keep it.
        beside: the parameters to register beside it, by suffix; tied parameters share them.
    """

    weight: LerpWeight
    base: Tensor
    beside: dict[str, nn.Parameter]

    @classmethod
    def of(cls, weight: LerpWeight, kind: type[LerpModule]) -> Packed:
        tensors = dict(zip(formats.get(weight.format).TENSORS, map(kind.as_operand, weight.tensors), strict=True))
        base = tensors.pop("", None)
        if base is None:
            shape = kind.as_operand(torch.empty(weight.shape, device="meta")).shape
            base = placeholder(torch.empty(0, dtype=weight.dtype, device=weight.device), shape)
        beside = {suffix: nn.Parameter(tensor, requires_grad=False) for suffix, tensor in tensors.items()}
        return cls(weight, base, beside)


def patch_module(
    original: nn.Module, kind: type[LerpModule], state: ModuleState, differing: Mapping[str, Packed]
) -> None:
    """Changes a module's class, and registers what the format stores beside each tensor that differs."""
    module = reclass(original, patched_class(kind, type(original)))  # type: ignore[arg-type]
    module.lerp = state
    for name, packed in differing.items():
        base = module.tensor(name)
        base.data = packed.base
        for suffix, parameter in packed.beside.items():
            if isinstance(base, nn.Parameter):
                module.register_parameter(name + suffix, parameter)
            else:
                module.register_buffer(name + suffix, parameter.data)
        format = packed.weight.format
        state.stored[name] = StoredEnds(format, tuple(name + suffix for suffix in formats.get(format).TENSORS))
