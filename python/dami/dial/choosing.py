"""Replaces "auto" with the λ that an estimator chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dami.callers import Caller
from dami.dial.patch import patch_of
from dami.dial.values import Intensity, as_lam
from dami.sources import check_estimator


def chosen(model: nn.Module, value: Any, caller: Caller, batch: Mapping[str, Any], prompts: int) -> Intensity:
    """Parses an intensity with `Intensity.parse`, and replaces each "auto" with the estimator's number.

    Args:
        model: a patched model.
        value, caller: as in `Intensity.parse`.
        batch: the arguments of `generate` by name; the estimator gets those that are tensors.
        prompts: number of prompts.

    Raises:
        TypeError, ValueError: as in `Intensity.parse`; or there is no estimator, or it returns an invalid λ.
    """
    return _without_auto(model, Intensity.parse(value, caller, patch_of(model).presets, prompts), batch, prompts)


def _without_auto(model: nn.Module, intensity: Intensity, batch: Mapping[str, Any], prompts: int) -> Intensity:
    if intensity.parts:
        parts = [(names, layers, _without_auto(model, each, batch, prompts)) for names, layers, each in intensity.parts]
        return replace(intensity, parts=parts)
    if not intensity.auto:
        return intensity
    numbers = intensity.numbers.clone()
    numbers[list(intensity.auto)] = estimates(model, batch, prompts, intensity.auto).to(numbers.dtype)
    return replace(intensity, numbers=numbers, auto=())


def asked(intensity: Intensity) -> set[int]:
    """Returns the indices of the prompts for which an estimator chooses λ, of the whole model or of a part."""
    return {*intensity.auto}.union(*(asked(part) for _, _, part in intensity.parts))


def estimates(model: nn.Module, batch: Mapping[str, Any], prompts: int, places: Sequence[int] | None = None) -> Tensor:
    """Returns the λ that a patched model's estimator chooses for P prompts: float32 [P] on the CPU.

    Args:
        model: a patched model.
        batch: the arguments of `generate` by name; the estimator gets those that are tensors, for the P prompts only.
        prompts: number of prompts in the batch.
        places: indices of the P prompts in the batch; all of them if None.

    Raises:
        TypeError, ValueError: there is no estimator, or it returns an invalid λ.
    """
    patch = patch_of(model)
    check_estimator(patch.estimator)
    places = list(range(prompts) if places is None else places)
    inputs = {
        "input_ids" if name == "inputs" else name: tensor[places] if tensor.shape[:1] == (prompts,) else tensor
        for name, tensor in batch.items()
        if isinstance(tensor, Tensor)
    }
    groups = [inputs]
    if patch.running.invariant:  # λ must not depend on the other prompts either
        groups = [_alone(inputs, row, len(places)) for row in range(len(places))]
    return torch.cat([estimated(model, group, len(places) // len(groups)) for group in groups])


def estimated(model: nn.Module, batch: Mapping[str, Any], prompts: int) -> Tensor:
    """Returns the λ that a patched model's estimator chooses for a batch of its arguments: float32 [prompts].

    Raises:
        TypeError, ValueError: there is no estimator, or it returns an invalid λ.
    """
    estimator = check_estimator(patch_of(model).estimator)
    return as_lam(estimator.estimate(model, batch), torch.device("cpu"), prompts).expand(prompts)


def _alone(batch: Mapping[str, Tensor], row: int, prompts: int) -> dict[str, Tensor]:
    """Returns the batch that holds one prompt alone, without its padding."""
    alone = {
        name: tensor[row : row + 1] if tensor.shape[:1] == (prompts,) else tensor for name, tensor in batch.items()
    }
    mask = alone.get("attention_mask")
    if mask is None:
        return alone
    seen = mask[0].bool()
    return {name: x[:, seen] if x.shape[:2] == mask.shape else x for name, x in alone.items()}
