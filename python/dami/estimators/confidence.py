"""Estimates λ without training, from the instruct end's confidence in a short trial answer and the ends' agreement.

The confidence is the geometric mean of the answer's token probabilities, as in DEER (arXiv 2504.15895). The formula for
λ is ours. The two ends run as two rows of one batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dami.estimators.registry import register_estimator
from dami.generation.pieces import end_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Signals:
    """How the two ends rate a greedy trial answer by the instruct end: means over its tokens, float32 [B] each.

    Attributes:
        confidence: geometric mean of the tokens' probabilities at the instruct end, in (0, 1].
        thinking_confidence: geometric mean of the same tokens' probabilities at the thinking end.
        entropy: entropy of the instruct end's next-token distribution, in nats.
        divergence: Jensen–Shannon divergence of the ends' next-token distributions, in nats, at most ln 2.
    """

    confidence: Tensor
    thinking_confidence: Tensor
    entropy: Tensor
    divergence: Tensor

    @property
    def gap(self) -> Tensor:
        """How much likelier the instruct end finds the tokens than the thinking end does, in nats per token."""
        return self.confidence.log() - self.thinking_confidence.log()


@torch.no_grad()
def signals(model: PreTrainedModel, batch: Mapping[str, Tensor], tokens: int) -> Signals:
    """Generates a trial answer at λ=0 for every prompt, then scores it at both ends in one forward pass.

    Args:
        model: a patched model.
        batch: `input_ids` [B, T], padded on the left, and `attention_mask` [B, T] if there is padding.
        tokens: maximum length of the trial answer, at least 1.

    Raises:
        ValueError: the batch has no `input_ids`.
    """
    trial, seen, said = _trial(model, batch, tokens)[:3]
    prompts, answer = trial[:, : -said.shape[1]], trial[:, -said.shape[1] :]
    lam = torch.tensor([0.0, 1.0], dtype=torch.float32, device=prompts.device).repeat_interleave(len(prompts))
    logits = model(
        input_ids=trial.repeat(2, 1), attention_mask=torch.cat([seen, said.to(seen.dtype)], 1).repeat(2, 1),
        intensity=lam, logits_to_keep=answer.shape[1] + 1,
    ).logits.unflatten(0, (2, -1))  # fmt: skip
    sums = torch.zeros(4, len(prompts), dtype=torch.float32, device=prompts.device)
    for step in range(answer.shape[1]):  # one position at a time, because float32 logits of all would need much memory
        logs = logits[:, :, step].float().log_softmax(-1)
        of_token = logs.gather(2, answer[None, :, step, None].expand(2, -1, 1)).squeeze(2)
        middle = torch.logaddexp(logs[0], logs[1]) - math.log(2)
        divergence = 0.5 * (logs.exp() * (logs - middle)).sum((0, 2))
        entropy = -(logs[0].exp() * logs[0]).sum(-1)
        sums += torch.stack([*of_token, entropy, divergence]) * said[:, step]
    means = sums / said.sum(1)
    return Signals(means[0].exp(), means[1].exp(), means[2], means[3])


@torch.no_grad()
def confidence(model: PreTrainedModel, batch: Mapping[str, Tensor], tokens: int) -> Tensor:
    """Returns `Signals.confidence` only, float32 [B], from the logits of generation, without another forward pass.

    Args:
        model, batch, tokens: as for `signals`.

    Raises:
        ValueError: the batch has no `input_ids`.
    """
    return confidence_and_entropies(model, batch, tokens)[0]


@torch.no_grad()
def confidence_and_entropies(
    model: PreTrainedModel, batch: Mapping[str, Tensor], tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the confidence in a greedy trial answer by the instruct end, and the entropy before each of its tokens.

    Args:
        model, batch, tokens: as for `signals`.

    Returns:
        float32 [B], the geometric mean of the tokens' probabilities; float32 [B, tokens], entropies in nats; and bool
        [B, tokens], which tokens belong to the answer.

    Raises:
        ValueError: the batch has no `input_ids`.
    """
    trial, _, said, logits = _trial(model, batch, tokens)
    chosen = trial[:, -said.shape[1] :, None]
    logs, entropies = [], []
    for i, step in enumerate(logits):
        distribution = step.float().log_softmax(1)
        logs.append(distribution.gather(1, chosen[:, i])[:, 0])
        entropies.append(torch.special.entr(distribution.exp()).sum(1))
    mean = (torch.stack(logs, 1) * said).sum(1) / said.sum(1)
    return mean.exp(), torch.stack(entropies, 1), said


def _trial(model: Any, batch: Mapping[str, Tensor], tokens: int) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Generates greedy trial answers.

    Returns the prompts with their answers [B, T + tokens], the prompts' mask [B, T], the answers' mask up to and
    including the first end token [B, tokens], and the logits of each answer token, [B, vocabulary] each.
    """
    if "input_ids" not in batch:
        raise ValueError(f"batch must have input_ids for a trial answer, got {sorted(batch)}")
    prompts = batch["input_ids"]
    seen = batch.get("attention_mask", torch.ones_like(prompts))
    trial = model.generate(
        input_ids=prompts, attention_mask=seen, intensity=0.0, do_sample=False, max_new_tokens=tokens, num_beams=1,
        num_return_sequences=1, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    ended = torch.isin(trial.sequences[:, prompts.shape[1] :], end_tokens(model).to(prompts.device)).int()
    return trial.sequences, seen, ended.cumsum(1) - ended == 0, trial.logits


@register_estimator("confidence")
@dataclass(frozen=True)
class ConfidenceEstimator:
    """Chooses λ = (1 − cᵏ) (apart + (alike − apart) a), without training or labels.

    c is the instruct end's confidence in a trial answer. Suppose k tokens are sampled, each as certain as the trial's
    tokens are on average. Then 1 − cᵏ is the probability that at least one of them differs. So if the instruct end is
    sure, it answers alone.
    a = min(1, e^−gap) measures how likely the thinking end is to begin in the same way. If it is likely, thinking is
    short and more of it costs little; if not, thinking is long.

    Attributes:
        tokens: maximum length of the trial answer. An estimate costs these tokens and one pass over them at both ends.
        doubt: k. A larger k means more thinking for all but the surest prompts.
        apart, alike: λ of an unsure prompt if a is 0, and if a is 1.

    The formula and the defaults were chosen on answers of the shipped pair; docs/intensity.md explains how.
    """

    tokens: int = 20
    doubt: float = 8.0
    apart: float = 0.5
    alike: float = 0.8

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)
        if not self.doubt > 0:
            raise ValueError(f"doubt must be positive, got {self.doubt!r}")

    def estimate(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns λ for each prompt, float32 [B], as `Estimator` says."""
        return self.choose(signals(model, batch, self.tokens))

    def choose(self, found: Signals) -> Tensor:
        """Returns λ for the signals of a trial answer, float32 [B]."""
        agreement = found.gap.neg().exp().clamp(max=1)
        return (1 - found.confidence**self.doubt) * (self.apart + (self.alike - self.apart) * agreement)


@register_estimator("confidence router")
@dataclass(frozen=True)
class ConfidenceRouter:
    """Chooses λ = 0 if the instruct end is sure of a trial answer and λ = 1 otherwise, without training or labels.

    Use it for pairs that perform worse between their ends than at them, which `ConfidenceEstimator` cannot detect.
    `dami evaluate` shows this even without labels: some thoughts do not end.

    Attributes:
        tokens: maximum length of the trial answer.
        sure: minimum confidence for the trial answer to be trusted, in (0, 1).
    """

    tokens: int = 3
    sure: float = 0.5

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)
        if not 0 < self.sure < 1:
            raise ValueError(f"sure must be between 0 and 1, got {self.sure!r}")

    def estimate(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns λ for each prompt, float32 [B], as `Estimator` says."""
        return self.choose(confidence(model, batch, self.tokens))

    def choose(self, found: Tensor) -> Tensor:
        """Returns λ for a confidence, float32 [B]."""
        return (found < self.sure).float()


def _check_tokens(tokens: Any) -> None:
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tokens must be a positive integer, got {tokens!r}")
