"""Names become numbers: presets, and what an estimator chooses for "auto"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dami.dial.patch import patch_of
from dami.dial.values import as_lam
from dami.sources import check_estimator, check_preset


def named(model: nn.Module, intensity: Any) -> Any:
    """An intensity with the model's presets, such as "low", in place of their names; "auto" and all else are left.

    Raises:
        TypeError: the model is not patched.
        ValueError: it has no preset of that name.
    """
    if isinstance(intensity, (list, tuple)):
        return [named(model, each) if isinstance(each, str) else each for each in intensity]
    if not isinstance(intensity, str) or intensity == "auto":
        return intensity
    presets = patch_of(model).presets
    check_preset(intensity, presets)
    return presets[intensity]


def resolved(model: nn.Module, intensity: Any, batch: Mapping[str, Any], prompts: int) -> Any:
    """An intensity with numbers for presets' names, and what the estimator chooses wherever it says "auto".

    Args:
        model: a patched model.
        intensity: anything that `generate` takes.
        batch: arguments of `generate` by name; the estimator is given the tensors, for the prompts that want it only.
        prompts: how many there are.

    Raises:
        ValueError: there is no estimator, or no such preset.
    """
    value = named(model, intensity)
    values = [value] * prompts if isinstance(value, str) else value
    places = [i for i, each in enumerate(values) if isinstance(each, str)] if isinstance(values, list) else []
    if not places:
        return value
    if len(values) != prompts:
        raise ValueError(f"intensity must be a real number, or one per sequence, got {len(values)} for {prompts}")
    patch = patch_of(model)
    estimator = check_estimator(patch.estimator)
    inputs = {
        "input_ids" if name == "inputs" else name: tensor[places] if tensor.shape[:1] == (prompts,) else tensor
        for name, tensor in batch.items()
        if isinstance(tensor, Tensor)
    }
    groups = [inputs]
    if patch.running.invariant:  # λ must not depend on the other prompts either
        groups = [_alone(inputs, row, len(places)) for row in range(len(places))]
    several = len(places) // len(groups)
    chosen = [
        as_lam(estimator.estimate(model, group), torch.device("cpu"), several).expand(several) for group in groups
    ]
    for place, lam in zip(places, torch.cat(chosen).tolist(), strict=True):
        values[place] = lam
    return values


def _alone(batch: Mapping[str, Tensor], row: int, prompts: int) -> dict[str, Tensor]:
    """A prompt of a batch by itself, without padding."""
    alone = {
        name: tensor[row : row + 1] if tensor.shape[:1] == (prompts,) else tensor for name, tensor in batch.items()
    }
    mask = alone.get("attention_mask")
    if mask is None:
        return alone
    seen = mask[0].bool()
    return {name: x[:, seen] if x.shape[:2] == mask.shape else x for name, x in alone.items()}
