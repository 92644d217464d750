"""Finds which parameters of a loaded model differ between the ends, and has operators read them, or refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.mamba.short_conv import ShortConv

from dami.serving.vllm import mla, norms, routing, short_conv
from dami.serving.vllm.ends import Ends
from dami.serving.vllm.methods import LinearMethod, give_rows
from dami.serving.vllm.rows import StepIntensities


def convert(model: nn.Module, found: Mapping[str, Ends], rows: StepIntensities) -> None:
    """Gives every pair of ends its place: at λ if they differ, or one tensor as in an ordinary model if not.

    Args:
        model: the model, with its weights loaded.
        found: the ends of every parameter and persistent buffer, by its path.
        rows: λ of the model's steps.

    Raises:
        ValueError: if a parameter differs and its layer is of no known kind; the message names all of them.
    """
    refused = []
    routers = {
        id(getattr(layer.router, routing.BIAS)): layer
        for layer in model.modules()
        if isinstance(layer, MoERunner) and getattr(layer.router, routing.BIAS, None) is not None
    }
    routed = []
    convolutions = {layer.conv: layer for layer in model.modules() if isinstance(layer, ShortConv)}
    convolved = set()
    fitted: dict[nn.Module, dict[str, Any]] = {}
    differing = []
    for path, ends in found.items():
        ends.show(ends.tensors[0])
        if not ends.converted and (len(ends.tensors) == 1 or torch.equal(*ends.tensors)):
            continue
        differing.append(ends)
        if id(ends.tensors[0]) in routers:
            routed.append((routers[id(ends.tensors[0])], ends))
            continue
        for layer, name in ends.places:
            if ends.converted or _is_bias(layer, name):
                continue
            if layer in convolutions:
                convolved.add(convolutions[layer])
                continue
            fits = norms.fit(layer) if layer not in fitted else fitted[layer]
            if fits is None:
                refused.append(f"{path} (in a {type(layer).__name__})")
            else:
                fitted[layer] = fits
    if refused:
        head = "these parameters differ between the ends, and dami has no operator for their layers in vLLM:"
        raise ValueError("\n  ".join([head, *refused]))
    for ends in differing:
        ends.keep()
    for layer, fits in fitted.items():
        norms.convert(layer, fits)
        give_rows(layer, rows)
    for runner, bias in routed:
        runner.routed_experts.routing = routing.Routing(runner.router, bias, rows)
    for layer in convolved:
        short_conv.convert(layer, rows)
    for layer in model.modules():
        if isinstance(layer, MLAAttention) and isinstance(layer.kv_b_proj.quant_method, LinearMethod):
            mla.convert(layer)
        if getattr(layer, "fuse_qkv_rmsnorm", False):  # its kernel reads the norms' weights itself
            vars(layer)["fuse_qkv_rmsnorm"] = False


def _is_bias(layer: Any, name: str) -> bool:
    """Returns whether a parameter is a linear layer's bias that its product adds."""
    linear = isinstance(layer, LinearBase) and isinstance(layer.quant_method, LinearMethod)
    return linear and name == "bias" and not layer.skip_bias_add
