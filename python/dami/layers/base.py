"""`LerpModule`: what all patched modules share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from dami.dial.state import PatchedModule, StoredEnds
from dami.layers.row_parameter import RowParameter, blend
from dami.upstream import HOOKED, asked_by_hook, buffers_of, hook_of, in_backward, offloading, parameters_of
from dami_kernels import LerpWeight
from dami_kernels.weight import FLOAT_DTYPES

M = TypeVar("M", bound=nn.Module)


def placeholder(like: Tensor, shape: torch.Size) -> Tensor:
    """Returns a NaN tensor of a shape, with the dtype and device of `like`, that takes the memory of one number.

    It takes a parameter's place when the format does not keep the base, so that code can still ask for the parameter's
    shape, dtype and device.
    """
    return like.new_full((), float("nan")).expand(shape)


def supply_placeholders(module: LerpModule) -> None:
    """Gives a module's placeholders to accelerate's offloading hooks, as no state dict or file holds them.

    Each placeholder is made on the device where the module computes: if it were elsewhere, a hook would copy it there
    at the size of the whole parameter.
    """
    for held, prefix, device in offloading(module):
        for name in module.placeholders():
            tensor = module.tensor(name)
            if tensor is not None:  # None until the quantizer registers it, after all else is loaded
                held[prefix + name] = placeholder(torch.empty(0, dtype=tensor.dtype, device=device), tensor.shape)


def check_dtypes(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Raises TypeError if `fn`, from `.to()` and the like, would give weights a dtype that no operator takes."""
    kinds = {(parameter.dtype, parameter.device) for parameter in module.parameters() if parameter.is_floating_point()}
    for dtype, device in kinds:
        wanted = fn(torch.empty(0, dtype=dtype, device=device)).dtype
        if wanted not in FLOAT_DTYPES:
            raise TypeError(
                f"a patched model computes in float32, bfloat16 or float16, got {wanted}: for a model in {wanted} make "
                "a merged copy, dami.materialize(model, intensity), and convert that"
            )


def runs_again() -> bool:
    """Whether this thread is in a backward pass, where a forward is a recomputation."""
    return not torch.compiler.is_compiling() and in_backward()


@dataclass(frozen=True)
class Recipe:
    """How to recreate a class that was made at run time, in a process that unpickles its objects.

    Attributes:
        factory: the function that makes the class.
        arguments: the function's arguments; a class among them that was itself made at run time is given as its recipe.
    """

    factory: Callable[..., type[nn.Module]]
    arguments: tuple[Any, ...]


def recipe_of(cls: type[nn.Module]) -> type[nn.Module] | Recipe:
    """Returns the recipe of a class, or the class itself if it has none and can be found by name."""
    return vars(cls).get("recipe", cls)


def rebuild(recipe: type[nn.Module] | Recipe) -> nn.Module:
    """Returns an empty module of a class, for pickle to fill."""
    cls = _class_of(recipe)
    return cls.__new__(cls)


def _class_of(recipe: Any) -> Any:
    if isinstance(recipe, Recipe):
        return recipe.factory(*map(_class_of, recipe.arguments))
    return recipe


class LerpModule(PatchedModule):
    """The base class of all patched modules. A subclass is a kind: it says which modules it patches, and their forward.

    A kind's forward passes both ends of `operands` to an operator. Any other parameter that the module reads, or that
    another module reads from it, is at λ: `module.name` is the blended tensor, or a `RowParameter` if each sequence has
    its own λ.
    """

    kind: ClassVar[str]
    replaces: ClassVar[type[nn.Module] | None] = None
    operands: ClassVar[tuple[str, ...]] = ("weight", "bias")

    @classmethod
    def fit(cls, module: nn.Module) -> dict[str, Any] | None:
        """Returns the settings with which the operator computes what `module` does; None if this kind does not fit."""
        return {} if cls.replaces is not None and isinstance(module, cls.replaces) else None

    @staticmethod
    def as_operand(tensor: Tensor) -> Tensor:
        """Converts a parameter or stored tensor from the module's shape to the operator's, or back: its own inverse."""
        return tensor

    def ends(self, name: str) -> LerpWeight:
        """Returns both ends of a parameter as the operators take them; one tensor serves as both if they are identical.

        The result is cached as long as the module's parameters are the same objects with the same shapes and dtypes.
        Operators look up the tensors' memory at every call.
        """
        parameters = parameters_of(self)
        known = None if torch.compiler.is_compiling() else self.lerp.ends.get(name)
        if known is not None:
            parameter, names, weight = known
            same = parameters.get(name) is parameter
            if same and parameter.dtype is weight.dtype and parameter.shape == weight.shape:
                for stored_name, tensor in zip(names, weight.tensors, strict=True):
                    if parameters.get(stored_name) is not tensor:
                        break
                else:
                    return weight
        stored = self.lerp.stored.get(name, StoredEnds("pair", (name, name)))
        parameter = self.as_operand(self.tensor(name))
        tensors = tuple(self.as_operand(self.tensor(tensor)) for tensor in stored.names)
        weight = LerpWeight(tensors, stored.format, parameter.shape, parameter.dtype)
        # Views are not cached, as they would keep a parameter's old memory; nor is memory that hooks free.
        if parameter is parameters.get(name) and hook_of(self) is None and not torch.compiler.is_compiling():
            self.lerp.ends[name] = parameter, stored.names, weight
        return weight

    def beside(self, name: str) -> tuple[str, ...]:
        """Returns the names of the tensors stored beside a parameter or buffer; none if both ends are identical."""
        stored = self.lerp.stored.get(name)
        return () if stored is None else tuple(tensor for tensor in stored.names if tensor != name)

    def tensor(self, name: str) -> Tensor:
        """Returns a parameter or buffer as it is stored."""
        return self._parameters[name] if name in self._parameters else self._buffers[name]  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        lerp = self.__dict__.get("lerp")
        if lerp is None or name not in lerp.stored:
            return super().__getattr__(name)
        if asked_by_hook(self):
            return super().__getattr__(name)  # hooks move the stored tensors in and out
        lam, outside = lerp.lam, lerp.running.sequences is None
        if outside and (name in self.operands or (lam.dim() == 0 and lam.item() == 0)):
            return super().__getattr__(name)  # code that inspects a model outside a pass sees the base, λ = 0
        ends = self.ends(name)
        if name in self.operands or lam.dim():
            value: Tensor = RowParameter(f"{lerp.name}.{name}", lam.to(ends.device), lerp.running, ends)
        else:
            value = blend(ends, lam.to(ends.device))
        return self.as_operand(value)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if "lerp" in self.__dict__:
            self.lerp.ends.clear()
        if name == HOOKED:
            supply_placeholders(self)

    def bias_ends(self) -> LerpWeight | None:
        return None if self._parameters.get("bias") is None else self.ends("bias")

    def rows(self, x: Tensor, features: int = 1) -> tuple[Tensor, dict[str, Any]]:
        """Returns `x` with its rows in the order of the sequences, and the operator arguments that give each row its λ.

        Args:
            x: its first dimension is the batch: B sequences or a multiple (beams of one sequence are adjacent); or 1
                for a tensor that all sequences share, such as the positions [1, T], which is expanded to B.
            features: number of trailing dimensions that are not rows.
        """
        lerp, running = self.lerp, self.lerp.running
        lam = lerp.lam
        if running.sequences and running.packed is None and type(x) is Tensor and lam.device == x.device:
            if lam.dim() == 0:
                return x, {"lam": lam}
            if x.dim() > features + 1 and x.shape[0] == lam.shape[0] == running.sequences and running.ordered:
                return x, {"lam": lam, "rows_per_lam": x.shape[1 : x.dim() - features].numel()}  # the common case
        lam = lam.to(x.device)
        if running.sequences is None and runs_again():
            raise RuntimeError(
                f"{self.lerp.name} runs again in the backward pass, where it does not know the λ it ran at: checkpoint "
                "layers by model.gradient_checkpointing_enable(), or the whole model, model(…, intensity=…)"
            )
        if lam.dim() and running.packed is not None:
            return x, self._packed_rows(x, lam, features)
        if isinstance(x, RowParameter):
            x = x.of_batch()
        if lam.dim() == 0:
            return x, {"lam": lam}
        flat = x.dim() <= features + 1
        if x.shape[0] == 1 and not flat:
            x = x.expand(lam.shape[0], *x.shape[1:])
        count = x.shape[0] if x.dim() > features else 1
        gathered = flat and x.dim() > features and running.are_gathered(x)
        if count % lam.shape[0] != 0 or gathered or not running.counts(count):
            raise ValueError(
                f"intensity must hold one number per sequence, got {lam.shape[0]} for an input of shape "
                f"{list(x.shape)} of {self.lerp.name}"
            )
        return x, {"lam": lam, "rows_per_lam": x.shape[: x.dim() - features].numel() // lam.shape[0]}

    def _packed_rows(self, x: Tensor, lam: Tensor, features: int) -> dict[str, Any]:
        """Returns the operator arguments for an `x` of a packed row, where a dimension before the features is tokens.

        The first packed row, that of `dami.generation.batching.check_packed`, shows which dimension this is: no other
        dimension has the size of its number of tokens.
        """
        if self.lerp.group == "head" and self.lerp.running.kept is not None:
            lam = self.lerp.running.kept
        lead, tokens = x.shape[: x.dim() - features], len(lam)
        if self.lerp.tokens_at is None and lead.count(tokens) == 1:
            self.lerp.tokens_at = lead.index(tokens)
        at = self.lerp.tokens_at
        if at is None or at >= len(lead) or lead[at] != tokens:
            raise ValueError(
                f"{self.lerp.name} cannot tell the {tokens} tokens of a packed row, each at its own intensity, in an "
                f"input of shape {list(x.shape)}"
            )
        outer, inner = lead[:at].numel(), lead[at + 1 :].numel()
        if outer == 1:
            return {"lam": lam, "rows_per_lam": inner}
        rows = torch.arange(tokens, dtype=torch.int32, device=x.device)
        return {"lam": lam, "row_to_lam": rows.repeat_interleave(inner).repeat(outer)}

    def placeholders(self) -> list[str]:
        """Returns the names of the parameters that are placeholders."""
        return [name for name, stored in self.lerp.stored.items() if name not in stored.names]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As in `nn.Module`, for `.to()` and the like; but scales keep their dtype, and placeholders take no memory."""
        check_dtypes(self, fn)
        self.lerp.ends.clear()
        scales = {id(parameter) for name, parameter in self._parameters.items() if name.endswith("_scale")}
        placeholders = {id(self.tensor(name)) for name in self.placeholders()}

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) in placeholders:
                return placeholder(fn(tensor.new_empty(())), tensor.shape)
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in scales else moved

        return super()._apply(move, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As in `nn.Module`, but leaves out placeholders."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.placeholders():
            destination.pop(prefix + name, None)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *lists: Any) -> None:
        missing: list[str] = lists[0]
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        missing[:] = [name for name in missing if name.removeprefix(prefix) not in self.placeholders()]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return rebuild, (recipe_of(type(self)),), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As in `nn.Module`, but makes placeholders small again: a deep copy gives them memory for their full shape."""
        super().__setstate__(state)
        for name in self.placeholders():
            tensor = self.tensor(name)
            if any(tensor.stride()):
                tensor.data = placeholder(tensor, tensor.shape)


def own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Returns the parameters and buffers of a module, without those of its children."""
    return [(name, t) for name, t in (*parameters_of(module).items(), *buffers_of(module).items()) if t is not None]
