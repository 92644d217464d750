"""The class of a patched model: `forward` and `generate` of the original, with an `intensity`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dami.dial import Dial, as_lam


@dataclass(eq=False)
class Patch:
    """What `patch_model` keeps on a model.

    Attributes:
        dial: the λ of all modules, except where `dami.intensity` points a part of them elsewhere.
        original: the model's class before.
        trainable: the parameters that required a gradient before.
    """

    dial: Dial
    original: type[nn.Module]
    trainable: list[nn.Parameter]


class LerpModel(nn.Module):
    """First parent of a patched model's class."""

    dami_patch: Patch

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (self.dami_patch.original,), self.__dict__


@functools.cache
def patched_model_class(original: type[nn.Module]) -> type[LerpModel]:
    """The class of a patched model. It keeps its name, by which transformers looks up a good deal."""

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, intensity: Any = None, **kwargs: Any) -> Any:
        sequences = _sequences(args, kwargs, "input_ids", "inputs_embeds")
        dial = self.dami_patch.dial
        lam = dial.lam.to(self.device) if intensity is None else as_lam(intensity, self.device, sequences)
        if sequences is not None and lam.dim() == 1 and sequences % lam.shape[0] != 0:
            raise ValueError(
                f"intensity must hold one number per sequence, got {lam.shape[0]} for {sequences} sequences"
            )
        if lam.requires_grad and any(getattr(m, "gradient_checkpointing", False) for m in self.modules()):
            raise ValueError(
                "intensity takes no gradient under gradient checkpointing, which would rerun modules at another λ"
            )
        before, dial.lam = dial.lam, lam
        try:
            return original.forward(self, *args, **kwargs)
        finally:
            dial.lam = before

    members: dict[str, Any] = {"__module__": original.__module__, "__doc__": original.__doc__}
    members["forward"] = _with_intensity(forward, original.forward)
    if hasattr(original, "generate"):

        @functools.wraps(original.generate)
        def generate(self: Any, *args: Any, intensity: Any = None, **kwargs: Any) -> Any:
            turned = nullcontext()
            if intensity is not None:
                prompts = _sequences(args, kwargs, "inputs", "input_ids", "inputs_embeds")
                turned = self.dami_patch.dial.turned(as_lam(intensity, self.device, prompts or 1))
            with turned:
                return original.generate(self, *args, **kwargs)

        members["generate"] = _with_intensity(generate, original.generate)
    return type(original.__name__, (LerpModel, original), members)


def _sequences(args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> int | None:
    """Size of the batch: of the first positional argument, or of the first tensor of these names."""
    inputs = (*args[:1], *(kwargs.get(name) for name in names))
    return next((value.shape[0] for value in inputs if isinstance(value, Tensor)), None)


def _with_intensity(function: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """Gives `function` the original's signature and an `intensity`: transformers reads signatures."""
    signature = inspect.signature(original)
    parameters = list(signature.parameters.values())
    at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    parameters.insert(at, inspect.Parameter("intensity", inspect.Parameter.KEYWORD_ONLY, default=None))
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return function


def _rebuild(original: type[nn.Module]) -> nn.Module:
    cls = patched_model_class(original)  # type: ignore[arg-type]  # mypy takes a class for its instance
    return cls.__new__(cls)
