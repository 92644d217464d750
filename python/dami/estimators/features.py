"""Computes features of a prompt before it is answered: the instruct end's states, and signals of a trial answer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dami.estimators.confidence import Signals, signals
from dami.generation.pieces import CACHE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def middle_and_last(model: PreTrainedModel) -> tuple[int, int]:
    """Returns the layer two thirds of the way up, where a model knows most about a prompt, and the last."""
    depth = model.config.get_text_config().num_hidden_layers
    return round(depth * 2 / 3), depth


@torch.no_grad()
def prompt_states(model: PreTrainedModel, batch: Mapping[str, Any], layers: Sequence[int]) -> Tensor:
    """Returns the instruct end's hidden states at each prompt's last token, of several layers, in one forward pass.

    Args:
        model: a patched model.
        batch: `input_ids` [B, T] or `inputs_embeds` [B, T, D], and `attention_mask` [B, T] if there is padding; a cache
            of the prompts' first tokens at λ=0, if they have been read: then only the others are.
        layers: indices into transformers' `hidden_states`: 0 is the embedding, -1 the input of the head.

    Returns:
        float32 [B, D · layers] on the CPU.

    Raises:
        ValueError: the model has no such layer.
    """
    inputs: dict[str, Any] = {
        name: batch[name] for name in ("input_ids", "inputs_embeds", "attention_mask") if name in batch
    }
    seen = inputs.get("attention_mask")
    if seen is not None and "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (seen.cumsum(1) - 1).clamp(min=0)
    if CACHE in batch:
        past = batch[CACHE].get_seq_length()
        inputs = {name: x if name == "attention_mask" else x[:, past:] for name, x in inputs.items()}
        inputs |= {CACHE: batch[CACHE], "use_cache": True}
    states = model(
        **{"use_cache": False, **inputs}, intensity=0.0, output_hidden_states=True, logits_to_keep=1
    ).hidden_states
    wrong = [layer for layer in layers if not -len(states) <= layer < len(states)]
    if wrong:
        raise ValueError(f"layers must be from {-len(states)} to {len(states) - 1} for this model, got {wrong}")
    length = states[0].shape[1]
    last = torch.full((len(states[0]),), length - 1) if seen is None else length - 1 - seen.flip(1).argmax(1)
    rows = torch.arange(len(last), device=states[0].device)
    return torch.cat([states[layer][rows, last.to(rows.device)].float().cpu() for layer in layers], 1)


def trial_signals(model: PreTrainedModel, batch: Mapping[str, Tensor], tokens: int) -> Tensor:
    """Returns `confidence.signals` as float32 [B, 4] on the CPU, with probabilities as logarithms."""
    found: Signals = signals(model, batch, tokens)
    columns = {field.name: getattr(found, field.name) for field in fields(found)}
    return torch.stack([c.log() if "confidence" in name else c for name, c in columns.items()], 1).float().cpu()
