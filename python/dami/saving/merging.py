"""A merged copy at one λ, in memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dami.callers import CALLERS
from dami.dial.patch import patch_of
from dami.dial.values import Intensity
from dami.layers.base import LerpModule
from dami.layers.peft import refuse_adapters
from dami.saving.model_card import write_merged_card
from dami.sources import METHOD


def write_merged(model: PreTrainedModel, directory: str | Path, tokenizer: Any, intensity: float | str) -> float:
    """Writes an ordinary checkpoint of a patched model at one λ into a directory, with a model card, and returns λ.

    Raises:
        TypeError, ValueError: as `materialize`.
    """
    patch = patch_of(model)
    lam = Intensity.parse(intensity, CALLERS["dami.materialize"], patch.presets).numbers.item()
    materialize(model, lam).save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    write_merged_card(directory, patch.origin.parents, lam)
    return lam


@torch.no_grad()
def materialize(model: PreTrainedModel, intensity: float | str) -> PreTrainedModel:
    """A merged copy: a plain model of a patched model's weights at one λ, which stays as it is.

    Where one λ is enough, the copy is the faster choice: it reads the bytes of one model instead of a pair. Each weight
    is blended in float32 and rounded once, as in mergekit's linear merge. `save_pretrained` writes an ordinary
    checkpoint.

    Raises:
        TypeError, ValueError: the model is not patched or is offloaded, or `intensity` is neither one finite number nor
            a preset.
    """
    patch = patch_of(model)
    refuse_adapters(model, "materialize", "take it off, unload(), and put it on the copy, as it is the same at every λ")
    lam = Intensity.parse(intensity, CALLERS["dami.materialize"], patch.presets).one
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ValueError("model must be on devices to make a merged copy, not offloaded")
    config = copy.deepcopy(model.config)
    if getattr(model, "quantization_method", None) == METHOD:
        del config.quantization_config
    merged: dict[int, Tensor] = {}
    state = {}
    for prefix, module in model.named_modules():
        lerp = module.lerp if isinstance(module, LerpModule) else None
        beside = (
            {name for own, stored in lerp.stored.items() for name in stored.names if name != own} if lerp else set()
        )
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is None or name in beside:
                continue
            if id(tensor) not in merged:
                merged[id(tensor)] = (
                    module.as_operand(module.ends(name).materialize(lam))
                    if isinstance(module, LerpModule) and name in module.lerp.stored
                    else tensor.detach().clone()
                )
            state[f"{prefix}.{name}" if prefix else name] = merged[id(tensor)].contiguous()
    with torch.device("meta"):
        plain: Any = patch.original(config)
    for name, tensor in state.items():
        holder, _, local = name.rpartition(".")
        module = plain.get_submodule(holder)
        if local in module._parameters:
            setattr(module, local, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
        else:
            setattr(module, local, tensor)
    plain.tie_weights()
    plain.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    return plain.eval()
