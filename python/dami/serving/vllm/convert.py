"""Finds which parameters of a loaded model differ between the ends, and has operators read them, or refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention
from vllm.model_executor.layers.mamba.short_conv import ShortConv

from dami.serving.vllm import delta_net, mla, norms, routing, short_conv, sinks
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
    takers = {id(tensor): take for layer in model.modules() for tensor, take in _taken_by(layer)}
    taken = []
    readers = {part: layer for layer in model.modules() for part in _read_by(layer)}
    reading: dict[nn.Module, None] = {}
    fitted: dict[nn.Module, dict[str, Any]] = {}
    differing = []
    for path, ends in found.items():
        ends.show(ends.tensors[0])
        if not ends.converted and (len(ends.tensors) == 1 or torch.equal(*ends.tensors)):
            continue
        differing.append(ends)
        if id(ends.tensors[0]) in takers:
            taken.append((takers[id(ends.tensors[0])], ends))
            continue
        for layer, name in ends.places:
            if ends.converted or _is_bias(layer, name):
                continue
            if layer in readers:
                reading[readers[layer]] = None
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
    for take, ends in taken:
        take(ends, rows)
    for layer in reading:
        (short_conv if isinstance(layer, ShortConv) else delta_net).convert(layer, rows)
    for layer in model.modules():
        if isinstance(layer, MLAAttention) and isinstance(layer.kv_b_proj.quant_method, LinearMethod):
            mla.convert(layer)
        if getattr(layer, "fuse_qkv_rmsnorm", False):  # its kernel reads the norms' weights itself
            vars(layer)["fuse_qkv_rmsnorm"] = False


def _taken_by(layer: Any) -> Iterator[tuple[Any, Callable[[Ends, StepIntensities], None]]]:
    """Yields the parameters that a part of this layer which is no module holds, each with what converts that part."""
    if isinstance(layer, MoERunner):
        yield getattr(layer.router, routing.BIAS, None), partial(routing.convert, layer)
    if isinstance(layer, Attention):
        yield getattr(layer.impl, "sinks", None), partial(sinks.convert, layer)


def _read_by(layer: Any) -> list[nn.Module]:
    """Returns the modules whose parameters this one reads itself, in ways that its kind knows."""
    if isinstance(layer, ShortConv):
        return [layer.conv]
    return [layer, layer.conv1d] if type(layer) is QwenGatedDeltaNetAttention else []


def _is_bias(layer: Any, name: str) -> bool:
    """Returns whether a parameter is a linear layer's bias that its product adds."""
    linear = isinstance(layer, LinearBase) and isinstance(layer.quant_method, LinearMethod)
    return linear and name == "bias" and not layer.skip_bias_add
