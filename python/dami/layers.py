"""The modules of a patched model.

A patched module is the original object with its class changed to a subclass of its class. Its parameters stay where
they were, under their own names, as the base end; the target end is registered beside them (`weight_target`). So
isinstance checks, hooks, tied references, `module.weight.dtype`, `.to()` and `state_dict` go on working, and taking the
patch off gives back the very same modules.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dami.dial import Dial
from dami_kernels import LerpWeight, lerp_embedding, lerp_layer_norm, lerp_linear, lerp_rms_norm

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Stored:
    """In which format a patched module keeps both ends of a parameter, and the names of its tensors."""

    format: str
    names: tuple[str, ...]


@dataclass(eq=False)
class Lerp:
    """What a patched module knows beyond the original.

    Attributes:
        dial: where it reads λ.
        original: its class before.
        settings: keyword arguments of its operator, such as a norm's eps, or a linear layer's `invariant`.
        layer: index of its layer, None outside the layers.
        group: one of `dial.GROUPS`.
        stored: where the ends of every parameter that is interpolated are, by its name.
    """

    dial: Dial
    original: type[nn.Module]
    settings: dict[str, Any]
    layer: int | None
    group: str
    stored: dict[str, Stored] = field(default_factory=dict)


def placeholder(like: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of a shape, and of the dtype and device of `like`, that takes the memory of one number: NaN.

    It stands where a format does not keep the base as it was, for all who ask a parameter what it is.
    """
    return like.new_full((), float("nan")).expand(shape)


class LerpModule(nn.Module):
    """What all patched modules share. A subclass is a kind: which modules it patches, and their forward."""

    kind: ClassVar[str]
    original: ClassVar[type[nn.Module] | None] = None
    lerp: Lerp

    @classmethod
    def fit(cls, module: nn.Module) -> dict[str, Any] | None:
        """Settings of the operator that computes what `module` does, or None if this kind does not fit."""
        return {} if cls.original is not None and isinstance(module, cls.original) else None

    @staticmethod
    def as_operand(tensor: Tensor) -> Tensor:
        """A parameter, or a stored tensor, between the module's shape and the operator's: its own inverse."""
        return tensor

    def ends(self, name: str) -> LerpWeight:
        """Both ends of a parameter as the operators take them; one tensor stands for both where they are identical."""
        stored = self.lerp.stored.get(name, Stored("pair", (name, name)))
        parameter = self.as_operand(getattr(self, name))
        tensors = tuple(self.as_operand(getattr(self, tensor)) for tensor in stored.names)
        return LerpWeight(tensors, stored.format, parameter.shape, parameter.dtype)

    def bias_ends(self) -> LerpWeight | None:
        return None if self.bias is None else self.ends("bias")

    def rows(self, x: Tensor, features: int = 1) -> tuple[Tensor, dict[str, Any]]:
        """`x` with its rows in the order of the sequences, and the operator's arguments that give each row its λ.

        Args:
            x: its first dimension is the batch, B sequences or any multiple (beams of one sequence are neighbours), or
                1 for what all sequences share, such as the positions [1, T]: it is then expanded to B.
            features: how many trailing dimensions are not rows.
        """
        lam = self.lerp.dial.lam.to(x.device)
        if lam.dim() == 0:
            return x, {"lam": lam}
        if x.dim() == features:
            x = x.unsqueeze(0)
        if x.shape[0] == 1:
            x = x.expand(lam.shape[0], *x.shape[1:])
        if x.shape[0] % lam.shape[0] != 0:
            raise ValueError(
                f"intensity must hold one number per sequence, got {lam.shape[0]} for an input of shape {list(x.shape)}"
            )
        return x, {"lam": lam, "rows_per_lam": x.shape[: x.dim() - features].numel() // lam.shape[0]}

    def placeholders(self) -> list[str]:
        """Names of the parameters that are placeholders."""
        return [name for name, stored in self.lerp.stored.items() if name not in stored.names]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As any module's, for `.to()` and its like; but scales keep their dtype, and placeholders take no memory."""
        scales = {id(parameter) for name, parameter in self._parameters.items() if name.endswith("_scale")}
        placeholders = {id(getattr(self, name)) for name in self.placeholders()}

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) in placeholders:
                return placeholder(fn(tensor.new_empty(())), tensor.shape)
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in scales else moved

        return super()._apply(move, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As any module's; but placeholders are not part of a state."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.placeholders():
            destination.pop(prefix + name, None)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *lists: Any) -> None:
        missing: list[str] = lists[0]
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        missing[:] = [name for name in missing if name.removeprefix(prefix) not in self.placeholders()]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (_kind_of(type(self)), self.lerp.original), self.__dict__


class LerpLinear(LerpModule, nn.Linear):
    """`nn.Linear` at λ."""

    kind = "linear"
    original = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        x, rows = self.rows(input)
        return lerp_linear(x, self.ends("weight"), bias=self.bias_ends(), **self.lerp.settings, **rows)


class LerpConv1D(LerpModule, Conv1D):
    """transformers' `Conv1D` at λ: a linear layer whose weight is [K, N].

    While patched, what is stored keeps that orientation and lies transposed in memory, as the operator reads it.
    """

    kind = "conv1d"
    original = Conv1D

    @staticmethod
    def as_operand(tensor: Tensor) -> Tensor:
        return tensor.t() if tensor.dim() == 2 else tensor

    def forward(self, x: Tensor) -> Tensor:
        x, rows = self.rows(x)
        return lerp_linear(x, self.ends("weight"), bias=self.bias_ends(), **self.lerp.settings, **rows)


class LerpEmbedding(LerpModule, nn.Embedding):
    """`nn.Embedding` at λ. A subclass that scales the result, as Gemma's does, goes on doing so."""

    kind = "embedding"
    original = nn.Embedding

    @classmethod
    def fit(cls, module: nn.Module) -> dict[str, Any] | None:
        return {} if isinstance(module, nn.Embedding) and module.max_norm is None else None

    def forward(self, input: Tensor) -> Tensor:
        ids, rows = self.rows(input, features=0)
        return lerp_embedding(ids, self.ends("weight"), **rows)


class LerpLayerNorm(LerpModule, nn.LayerNorm):
    """`nn.LayerNorm` over the last dimension at λ, with or without a bias."""

    kind = "layer_norm"
    original = nn.LayerNorm

    @classmethod
    def fit(cls, module: nn.Module) -> dict[str, Any] | None:
        fits = isinstance(module, nn.LayerNorm) and module.weight is not None and module.weight.dim() == 1
        return {"eps": module.eps} if fits else None

    def forward(self, input: Tensor) -> Tensor:
        x, rows = self.rows(input)
        return lerp_layer_norm(x, self.ends("weight"), bias=self.bias_ends(), **self.lerp.settings, **rows)


class LerpRMSNorm(LerpModule):
    """An RMS norm of any spelling at λ: any module of one vector `weight` that computes x/rms(x)·(offset + weight)."""

    kind = "rms_norm"

    @classmethod
    def fit(cls, module: nn.Module) -> dict[str, Any] | None:
        """Finds eps and offset by running the module on random input: many classes, one formula."""
        parameters = dict(module.named_parameters())
        weight = parameters.get("weight")
        if len(parameters) != 1 or weight is None or weight.dim() != 1:
            return None
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(weight.shape, generator=generator).to(weight.device)
        epsilons = [value for value in vars(module).values() if isinstance(value, float) and 0 < value < 1]
        for eps in (*epsilons, torch.finfo(torch.float32).eps):  # the last is torch's own where it is given none
            # as large as eps makes it: the mean square and eps weigh the same
            x = torch.randn(3, *weight.shape, generator=generator).to(weight.device) * eps**0.5
            try:
                y = type(module).forward(with_parameters(module, {"weight": w}), x)
            except Exception:  # another module altogether, with another signature
                return None
            normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            for offset in (0.0, 1.0):
                if isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, normed * (offset + w), rtol=1e-4):
                    return {"eps": eps, "offset": offset}
        return None

    def forward(self, x: Tensor) -> Tensor:
        x, rows = self.rows(x)
        return lerp_rms_norm(x, self.ends("weight"), **self.lerp.settings, **rows)


KINDS: tuple[type[LerpModule], ...] = (LerpLinear, LerpConv1D, LerpEmbedding, LerpLayerNorm, LerpRMSNorm)
PARAMETERS = ("weight", "bias")


def with_parameters(module: nn.Module, parameters: Mapping[str, Any]) -> nn.Module:
    """A shallow copy of a module that holds other parameters; the module itself is left alone."""
    probe = nn.Module.__new__(type(module))
    probe.__dict__ = copy.copy(module.__dict__)
    probe._parameters = dict(parameters)
    return probe


def kind_of(module: nn.Module) -> tuple[type[LerpModule], dict[str, Any]] | None:
    """The kind that computes what `module` does, with the operator's settings; None if there is none."""
    if "forward" in vars(module) and "_old_forward" not in vars(module):  # it no longer asks its class
        return None
    for kind in KINDS:
        settings = kind.fit(module)
        if settings is not None and (kind.original in (None, type(module)) or _reaches(kind, module)):
            return kind, settings
    return None


def _reaches(kind: type[LerpModule], module: nn.Module) -> bool:
    """Whether the forward of a subclass goes through its parent's, which is the one that a patch replaces."""

    class Reached(Exception):
        pass

    def forward(*_: Any) -> Tensor:
        raise Reached

    cls = type(module)
    probe = with_parameters(module, module._parameters)
    probe.__class__ = type(cls.__name__, (cls, type("Probe", (kind,), {"forward": forward})), {})
    try:
        type(probe).forward(probe, torch.zeros(1, 1, dtype=torch.long))
    except Reached:
        return True
    except Exception:
        return False
    return False


@cache
def patched_class(kind: type[LerpModule], original: type[nn.Module]) -> type[LerpModule]:
    """The class of a patched module: a subclass of the original's whose innermost forward is the kind's."""
    if original is kind.original:
        return kind
    # a subclass keeps its own forward, which calls its parent's; a norm's forward is replaced as a whole
    bases = (kind, original) if kind.original is None else (original, kind)
    return type(f"Lerp{original.__name__}", bases, {"__module__": original.__module__})


def _kind_of(cls: type[LerpModule]) -> type[LerpModule]:
    return next(kind for kind in KINDS if issubclass(cls, kind))


def _rebuild(kind: type[LerpModule], original: type[nn.Module]) -> LerpModule:
    cls = patched_class(kind, original)  # type: ignore[arg-type]  # mypy takes a class for its instance
    return cls.__new__(cls)


def reclass(module: nn.Module, cls: type[M]) -> M:
    """Changes a module's class in place, and what accelerate's hooks have kept of the old one."""
    module.__class__ = cls
    if "_old_forward" in module.__dict__:
        module._old_forward = cls.forward.__get__(module)
    return cast(M, module)
