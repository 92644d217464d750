"""Norms of a pair in vLLM: any module that computes an RMS norm or a layer norm, found by running it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_gather

from dami.serving.vllm.ends import ends_of, optional_ends
from dami.serving.vllm.methods import rows_of
from dami.upstream import parameters_of
from dami_kernels import lerp_layer_norm, lerp_rms_norm


def fit(module: nn.Module) -> dict[str, Any] | None:
    """Finds what a norm computes by running it on random input, as many classes implement these formulas.

    Returns:
        the attributes of a `PairNorm`, or None if the module is no norm over the last dimension.
    """
    own = {name: tensor for name, tensor in parameters_of(module).items() if tensor is not None}
    weight = own.get("weight")
    if weight is None or weight.dim() != 1 or own.keys() - {"weight", "bias"} or list(module.children()):
        return None
    numbers = [value for value in vars(module).values() if isinstance(value, float) and 0 < value < 1]
    for eps, (centred, offset) in product((*numbers, torch.finfo(torch.float32).eps), KINDS):
        generator = torch.Generator().manual_seed(0)
        x, residual, gate = (
            (torch.randn(3, *weight.shape, generator=generator) * scale).to(weight.device, weight.dtype)
            for scale in (eps**0.5, eps**0.5, 1.0)  # so that the mean square and eps are about equal
        )
        found: dict[str, Any] = {"centred": centred, "eps": eps, "offset": offset}
        y = _run(module, x)
        if y is None or not _close(y[0], normed(x, weight, own.get("bias"), **found)):
            continue
        both = _run(module, x, residual)
        if both is None or len(both) == 1:
            gated = _run(module, x, gate) or (None,)
            products = {name: (y[0].float() * GATES[name](gate.float())).to(x.dtype) for name in GATES}
            names = [name for name, product in products.items() if _close(gated[0], product)]
            return {**found, "second": names[0] if names else None, "returns": len(y)}
        for name, inner, outer in (("added", x + residual, x + residual), ("passed on", x, residual)):
            if _close(both[0], normed(inner, weight, own.get("bias"), **found)) and _close(both[1], outer):
                return {**found, "second": name, "returns": len(y)}
    return None


KINDS = ((False, 0.0), (False, 1.0), (True, 0.0))  # whether the mean is subtracted, and what is added to the weight
GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


def normed(x: Tensor, weight: Tensor, bias: Tensor | None, centred: bool, eps: float, offset: float) -> Tensor:
    """Computes a norm in float32: x / √(mean(x²) + eps) · (offset + weight) + bias, of x less its mean if centred."""
    wide = x.float()
    if centred:
        wide = wide - wide.mean(-1, keepdim=True)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (offset + weight.float())
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _run(module: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...] | None:
    """Returns the outputs of a module that may write to its inputs; None if it does not take them."""
    try:
        y = module(*(x.clone() for x in inputs))
    except Exception:
        return None
    return y if isinstance(y, tuple) else (y,)


def _close(x: Any, y: Tensor) -> bool:
    tolerance = max(4 * torch.finfo(y.dtype).eps, 1e-4)
    return isinstance(x, Tensor) and x.shape == y.shape and torch.allclose(x, y, tolerance, tolerance)


class PairNorm(nn.Module):
    """A norm at λ: a norm of vLLM or transformers with its class changed and the thinking end beside its weight.

    Attributes:
        intensity, rows_per_token: as in `methods.rows_of`.
        centred, eps, offset: as in `normed`.
        second: what is done with a second input: a residual is "added" to the first one or "passed on", and a gate is
            multiplied by after "silu" or "sigmoid"; None if there is no second input.
        returns: how many values it returns without a residual.
    """

    intensity: Tensor
    rows_per_token: int
    centred: bool
    eps: float
    offset: float
    second: str | None
    returns: int

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is not None and self.second is None:
            raise ValueError(f"a {type(self).__name__} takes one input, got two")
        gate = GATES.get(self.second or "")
        if residual is not None and gate is not None:
            return (self.normed(x).float() * gate(residual.float())).to(x.dtype)
        if residual is not None and self.second == "added":
            x = residual = x + residual
        y = self.normed(x)
        return (y, residual) if residual is not None or self.returns > 1 else y

    def normed(self, x: Tensor) -> Tensor:
        weight = ends_of(self, "weight")
        if x.shape[-1] != weight.shape[0]:  # a norm over what is split over processes, as in vLLM's TPAwareRMSNorm
            whole = self.normed(tensor_model_parallel_all_gather(x.contiguous()))
            return whole.chunk(whole.shape[-1] // x.shape[-1], -1)[get_tensor_model_parallel_rank()]
        rows = rows_of(self, x)
        if self.centred:
            return lerp_layer_norm(x, weight, bias=optional_ends(self, "bias"), eps=self.eps, **rows)
        return lerp_rms_norm(x, weight, eps=self.eps, offset=self.offset, **rows)


CLASSES: dict[type[nn.Module], type[nn.Module]] = {}  # subclasses that compute at λ, by the norm's class


def convert(module: Any, found: dict[str, Any]) -> None:
    """Turns a norm into one at λ, given what `fit` found."""
    cls = type(module)
    if cls not in CLASSES:
        CLASSES[cls] = type(f"Pair{cls.__name__}", (PairNorm, cls), {})
    module.__class__ = CLASSES[cls]
    vars(module).update(found)
