"""Signals of a prompt that estimators can read before it is answered, by name, so that they can be compared.

All are read at the instruct end. "states" is one pass over the prompt; the others need a short trial answer, and
"divergence" also a pass at the thinking end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dami.estimators.confidence import confidence_and_entropies, signals
from dami.estimators.features import middle_and_last, prompt_states
from dami.generation.pieces import end_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Read = Callable[["PreTrainedModel", Mapping[str, Tensor], int], Tensor]


def states(model: PreTrainedModel, batch: Mapping[str, Tensor], tokens: int) -> Tensor:
    """Returns the states at the prompt's last token, float32 [B, 2 D], of a middle layer and the last."""
    return prompt_states(model, batch, middle_and_last(model))


def doubt(model: PreTrainedModel, batch: Mapping[str, Tensor], tokens: int) -> Tensor:
    """Returns the log of the confidence in a greedy trial answer, and its mean entropy, float32 [B, 2]."""
    confidence, entropies, said = confidence_and_entropies(model, batch, tokens)
    return torch.stack([confidence.log(), (entropies * said).sum(1) / said.sum(1)], 1).cpu()


def entropy_shape(model: PreTrainedModel, batch: Mapping[str, Tensor], tokens: int) -> Tensor:
    """Returns mean, slope and roughness of the entropy over a greedy trial answer, float32 [B, 3].

    The slope is that of the least-squares line, in nats per token; the roughness is the mean absolute change from
    token to token. Both are 0 for an answer of one token. After EDRM (arXiv 2605.22873), whose exact forms we do not
    know.
    """
    _, entropies, said = confidence_and_entropies(model, batch, tokens)
    count = said.sum(1)
    mean = (entropies * said).sum(1) / count
    place = torch.arange(entropies.shape[1], device=said.device) - ((count - 1) / 2)[:, None]
    spread = (place**2 * said).sum(1)
    slope = (place * (entropies - mean[:, None]) * said).sum(1) / spread.clamp(min=1e-9)
    changes = (entropies.diff(dim=1).abs() * said[:, 1:]).sum(1) / (count - 1).clamp(min=1)
    return torch.stack([mean, slope, changes], 1).cpu()


@torch.no_grad()
def agreement(model: PreTrainedModel, batch: Mapping[str, Tensor], tokens: int) -> Tensor:
    """Returns how far two sampled trial answers agree, float32 [B, 1]: their common beginning over the longer one."""
    length = batch["input_ids"].shape[1]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    generate: Any = model.generate
    said = generate(
        **inputs, intensity=0.0, do_sample=True, max_new_tokens=tokens, num_beams=1, num_return_sequences=2
    )[:, length:]
    ended = torch.isin(said, end_tokens(model).to(said.device)).int()
    counts = (ended.cumsum(1) - ended == 0).sum(1).unflatten(0, (-1, 2)).amax(1)
    first, second = said.unflatten(0, (-1, 2)).unbind(1)
    common = (first == second).int().cumprod(1).sum(1).minimum(counts)
    return (common / counts)[:, None].float().cpu()


def divergence(model: PreTrainedModel, batch: Mapping[str, Tensor], tokens: int) -> Tensor:
    """Returns how much the ends differ over a greedy trial answer, float32 [B, 2]: the gap and the divergence."""
    found = signals(model, batch, tokens)
    return torch.stack([found.gap, found.divergence], 1).float().cpu()


SIGNALS: Mapping[str, Read] = {
    "states": states,
    "doubt": doubt,
    "entropy shape": entropy_shape,
    "agreement": agreement,
    "divergence": divergence,
}


def read(model: PreTrainedModel, batch: Mapping[str, Tensor], names: Sequence[str], tokens: int) -> list[Tensor]:
    """Returns each signal by name, float32 [B, its width] on the CPU."""
    return [SIGNALS[name](model, batch, tokens) for name in names]
