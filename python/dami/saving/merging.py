"""Makes a merged copy of a patched model at one λ, in memory or on disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dami.callers import CALLERS
from dami.dial.patch import patch_of
from dami.dial.values import Intensity
from dami.layers.base import LerpModule, own_tensors
from dami.layers.peft import refuse_adapters
from dami.saving.model_card import write_merged_card
from dami.sources import QUANT_METHOD
from dami.upstream import parameters_of


def write_merged(
    model: PreTrainedModel,
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    intensity: float | str,
) -> float:
    """Writes a patched model at one λ as an ordinary checkpoint with a model card, and returns λ.

    Raises:
        TypeError, ValueError: as in `materialize`.
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
    """Returns a merged copy: an ordinary model with the weights at one λ. The patched model does not change.

    If you need only one λ, the copy is faster, because it reads the bytes of one model instead of a pair. Each weight
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
    if getattr(model, "quantization_method", None) == QUANT_METHOD:
        del config.quantization_config
    state = _state_at(model, lam)
    with torch.device("meta"):
        plain: Any = patch.original(config)
    for name, tensor in state.items():
        holder, _, local = name.rpartition(".")
        module = plain.get_submodule(holder)
        if local in parameters_of(module):
            setattr(module, local, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
        else:
            setattr(module, local, tensor)
    plain.tie_weights()
    plain.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    return plain.eval()


def _state_at(model: nn.Module, lam: float) -> dict[str, Tensor]:
    """Returns copies of a patched model's weights and buffers at λ, by name. Tied tensors stay tied."""
    merged: dict[int, Tensor] = {}
    state = {}
    for prefix, module in model.named_modules():
        lerp = module if isinstance(module, LerpModule) else None
        stored = {} if lerp is None else lerp.lerp.stored
        beside = set() if lerp is None else {name for own in stored for name in lerp.beside(own)}
        for name, tensor in own_tensors(module):
            if name in beside:
                continue
            if id(tensor) not in merged:
                if lerp is not None and name in stored:
                    value = lerp.as_operand(lerp.ends(name).materialize(lam))
                else:
                    value = tensor.detach().clone()
                merged[id(tensor)] = value.contiguous()
            state[f"{prefix}.{name}" if prefix else name] = merged[id(tensor)]
    return state
