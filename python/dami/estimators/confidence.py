"""λ from confidence, nothing trained: how sure is the instruct end of a short answer, and does the other end agree?

The confidence in a trial answer, as the geometric mean of its tokens' probabilities, is DEER's (arXiv 2504.15895); what
λ is made of it is ours. The two ends are two rows of one batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dami.estimators.registry import register_estimator
from dami.generation.pieces import end_tokens


@dataclass(frozen=True)
class Signals:
    """What the two ends say of a greedy trial answer by the instruct end: means over its tokens, float32 [B] each.

    Attributes:
        confidence: geometric mean of the tokens' probabilities at the instruct end, in (0, 1].
        thinking_confidence: likewise at the thinking end, of the same tokens.
        entropy: of the instruct end's next-token distribution, in nats.
        divergence: Jensen–Shannon divergence of the ends' next-token distributions, in nats, at most ln 2.
    """

    confidence: Tensor
    thinking_confidence: Tensor
    entropy: Tensor
    divergence: Tensor

    @property
    def gap(self) -> Tensor:
        """How much likelier the tokens are to the instruct end than to the thinking end, in nats per token."""
        return self.confidence.log() - self.thinking_confidence.log()


@torch.no_grad()
def signals(model: Any, batch: Mapping[str, Tensor], tokens: int) -> Signals:
    """Generates a trial answer of at most so many tokens for every prompt, at λ=0, and reads it at both ends at once.

    Args:
        model: a patched model.
        batch: `input_ids` [B, T], padded on the left, and `attention_mask` [B, T] if there is padding.
        tokens: at least 1.

    Raises:
        ValueError: the batch has no `input_ids`.
    """
    trial, seen, said = _trial(model, batch, tokens)[:3]
    prompts, answer = trial[:, : -said.shape[1]], trial[:, -said.shape[1] :]
    lam = torch.tensor([0.0, 1.0], device=prompts.device).repeat_interleave(len(prompts))
    logits = model(
        input_ids=trial.repeat(2, 1), attention_mask=torch.cat([seen, said.to(seen.dtype)], 1).repeat(2, 1),
        intensity=lam, logits_to_keep=answer.shape[1] + 1,
    ).logits.unflatten(0, (2, -1))  # fmt: skip
    sums = torch.zeros(4, len(prompts), device=prompts.device)
    for step in range(answer.shape[1]):  # one position at a time: float32 logits of all would take much memory
        logs = logits[:, :, step].float().log_softmax(-1)
        of_token = logs.gather(2, answer[None, :, step, None].expand(2, -1, 1)).squeeze(2)
        middle = torch.logaddexp(logs[0], logs[1]) - torch.log(torch.tensor(2.0))
        divergence = 0.5 * (logs.exp() * (logs - middle)).sum((0, 2))
        entropy = -(logs[0].exp() * logs[0]).sum(-1)
        sums += torch.stack([*of_token, entropy, divergence]) * said[:, step]
    means = sums / said.sum(1)
    return Signals(means[0].exp(), means[1].exp(), means[2], means[3])


@torch.no_grad()
def confidence(model: Any, batch: Mapping[str, Tensor], tokens: int) -> Tensor:
    """`Signals.confidence` by itself, float32 [B]: what generating the trial answer has computed anyway.

    Args:
        model, batch, tokens: as for `signals`.

    Raises:
        ValueError: the batch has no `input_ids`.
    """
    trial, _, said, logits = _trial(model, batch, tokens)
    chosen = trial[:, -said.shape[1] :, None]
    logs = torch.cat([step.float().log_softmax(1).gather(1, chosen[:, i]) for i, step in enumerate(logits)], 1)
    return ((logs * said).sum(1) / said.sum(1)).exp()


def _trial(model: Any, batch: Mapping[str, Tensor], tokens: int) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Prompts with greedy trial answers [B, T + tokens], the prompts' mask [B, T], the answers' up to their first end
    token and with it [B, tokens], and the logits of each of their tokens, [B, vocabulary]."""
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
    """λ = (1 − cᵏ) (apart + (alike − apart) a): no training, no labels.

    c is the instruct end's confidence in a trial answer. 1 − cᵏ is the chance that of k tokens, each as sure as the
    trial's are on average, at least one would be another if they were drawn: a sure instruct end answers itself.
    a = min(1, e^−gap) says how far the thinking end would have begun likewise: where it would, thinking is short, and
    more of it costs little; where it would set out on a way of its own, it is long.

    Attributes:
        tokens: of the trial answer, at most: what an estimate costs, beside one pass over it at both ends.
        doubt: k. Larger means more thinking for all but the surest.
        apart, alike: λ of an unsure prompt, where a is 0 and where it is 1.

    The form and the defaults were chosen on answers of the pair that ships with dami: docs/intensity.md says how.
    """

    tokens: int = 20
    doubt: float = 8.0
    apart: float = 0.5
    alike: float = 0.8

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)
        if not self.doubt > 0:
            raise ValueError(f"doubt must be positive, got {self.doubt!r}")

    def estimate(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """λ of every prompt, float32 [B]; as `Estimator` says."""
        return self.choose(signals(model, batch, self.tokens))

    def choose(self, found: Signals) -> Tensor:
        """λ that the signals of a trial answer stand for, float32 [B]."""
        agreement = found.gap.neg().exp().clamp(max=1)
        return (1 - found.confidence**self.doubt) * (self.apart + (self.alike - self.apart) * agreement)


@register_estimator("confidence router")
@dataclass(frozen=True)
class ConfidenceRouter:
    """λ = 0 where the instruct end is sure of a trial answer, λ = 1 where it is not: no training, no labels.

    For pairs whose middle is worse than their ends, which `ConfidenceEstimator` cannot know: `dami evaluate` shows it
    without labels too, as thoughts that do not come to their end.

    Attributes:
        tokens: of the trial answer, at most.
        sure: the confidence in it from which on it is believed, in (0, 1).
    """

    tokens: int = 3
    sure: float = 0.5

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)
        if not 0 < self.sure < 1:
            raise ValueError(f"sure must be between 0 and 1, got {self.sure!r}")

    def estimate(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """λ of every prompt, float32 [B]; as `Estimator` says."""
        return self.choose(confidence(model, batch, self.tokens))

    def choose(self, found: Tensor) -> Tensor:
        """λ that a confidence stands for, float32 [B]."""
        return (found < self.sure).float()


def _check_tokens(tokens: Any) -> None:
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tokens must be a positive integer, got {tokens!r}")
