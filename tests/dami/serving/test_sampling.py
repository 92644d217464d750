"""Tokens are drawn from the distribution that transformers' warpers leave, and from nothing but their own row."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dami.generation import sampling
from dami.generation.batching import LerpProcessors
from dami.generation.sampling import Sampler, Sampling, draw, uniform
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

CASES = [(1.0, 1.0, 0), (0.7, 1.0, 0), (1.3, 0.8, 0), (1.0, 1.0, 5), (0.9, 0.6, 7), (1.0, 1e-6, 0), (2.0, 1.0, 1)]


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), CASES)
def test_draws_follow_the_warped_distribution(temperature: float, top_p: float, top_k: int) -> None:
    """Evenly spaced chances draw each token as often as its probability says, to one part in their number."""
    scores, n = 2 * torch.randn(1, 37), 4000
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    wanted = LogitsProcessorList(warpers)(None, scores)[0].softmax(0)
    chance = (torch.arange(n) + 0.5)[:, None] / n
    rows = torch.full((n, 1), temperature), torch.full((n, 1), top_p), torch.full((n,), top_k, dtype=torch.int32)
    drawn = draw(scores.expand(n, -1), *rows, chance).squeeze(1).bincount(minlength=37) / n
    assert (drawn - wanted).abs().max() <= 1.5 / n
    assert not (drawn[wanted == 0] > 0).any()


@pytest.mark.parametrize("top_k", [0, 3])
def test_the_ends_of_chance_draw_possible_tokens(top_k: int) -> None:
    scores = torch.tensor([[-torch.inf, 1.0, -torch.inf, 2.0, -torch.inf]]).expand(3, -1)
    chance = torch.tensor([[0.0], [0.5], [1 - 2**-24]])
    k = torch.full((3,), top_k, dtype=torch.int32)
    drawn = draw(scores, torch.ones(3, 1), torch.ones(3, 1), k, chance).squeeze(1)
    assert set(drawn.tolist()) <= {1, 3}


@pytest.mark.parametrize("temperature", [1e-10, 1e-37, 1e-38, 1e-41, 1e-44, 1e-45])
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.9, 0), (1.0, 3), (1e-44, 0)])
def test_low_temperatures_take_the_likeliest_token(temperature: float, top_p: float, top_k: int) -> None:
    """The smallest that a float32 can hold too, of scores of any size and with tokens that are ruled out."""
    scores = torch.randn(8, 50) * torch.logspace(-1, 4, 8)[:, None]
    scores[:, ::7] = -torch.inf
    rows = torch.full((8, 1), temperature), torch.full((8, 1), top_p), torch.full((8,), top_k, dtype=torch.int32)
    for chance in (0.0, 0.5, 1 - 2**-24):
        drawn = draw(scores, *rows, torch.full((8, 1), chance))
        assert torch.equal(drawn, scores.argmax(1, True))


def test_chance_is_uniform_and_of_its_arguments_only() -> None:
    numbers = torch.tensor([uniform(seed, place) for seed in range(100) for place in range(100)])
    assert uniform(3, 4) == uniform(3, 4)
    assert len(numbers.unique()) > 9900
    assert numbers.histc(10, 0, 1).sub(1000).abs().max() < 150
    assert numbers.min() >= 0
    assert numbers.max() < 1


def run(*asked: tuple[Sampling, int], scores: torch.Tensor) -> tuple[list[int], Any]:
    """The tokens that transformers' list of processors leaves the likeliest, and the log-probabilities of the step."""
    sampler = Sampler()
    processors = LerpProcessors(sampler.processors)
    requests = [
        FutureRequestState(RequestState(f"{n}", [0] * n, logit_processor_kwargs={"sampling": s}), True, {}, 1)
        for s, n in asked
    ]
    storage = torch.zeros(processors.tensors_required, 16, dtype=torch.int32)
    processors.fill_defaults(storage)
    processors.prepare_tensor_args(requests, storage)
    tokens = processors(torch.empty(1, 0, dtype=torch.int64), scores, storage).argmax(1)[: len(asked)].tolist()
    outputs: Any = SimpleNamespace(prepare_batch_update=lambda: ("requests", tokens, None))
    sampler.report_through(outputs)
    return tokens, outputs.prepare_batch_update()[2]


def test_a_row_draws_the_same_beside_others() -> None:
    scores = torch.randn(3, 50)
    greedy, warm = (Sampling(temperature=0), 9), (Sampling(temperature=2.0, seed=5), 12)
    cut = Sampling(temperature=1.5, top_k=4, seed=6), 7
    together, _ = run(greedy, warm, cut, scores=scores)
    assert together[0] == int(scores[0].argmax())
    assert together == [run(each, scores=scores[row : row + 1])[0][0] for row, each in enumerate((greedy, warm, cut))]
    # transformers gives a row to every request of the step, those without a new token at the end
    assert run(greedy, warm, scores=torch.cat([scores[:2], torch.full((2, 50), float("nan"))]))[0] == together[:2]


def test_greedy_rows_draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do they need a random number. If they want log-probabilities, they get them all the same."""
    scores, greedy = torch.randn(2, 50), Sampling(temperature=0)
    monkeypatch.setattr(sampling, "uniform", None)
    tokens, found = run((Sampling(temperature=0, logprobs=1), 5), (greedy, 6), scores=scores)
    assert tokens == scores.argmax(1).tolist()
    assert found[0].top == ((tokens[0], found[0].chosen),)
    monkeypatch.setattr(sampling, "draw", None)
    assert run((greedy, 5), (greedy, 6), scores=scores) == (tokens, None)


def test_logprobs_are_of_the_scores_as_they_came() -> None:
    scores = torch.randn(3, 50)
    asked = (Sampling(temperature=0, logprobs=2), 5), (Sampling(seed=1), 6), (Sampling(temperature=3.0, logprobs=0), 7)
    tokens, found = run(*asked, scores=scores)
    wanted = scores.log_softmax(1)
    assert found[1] is None
    assert found[0].chosen == pytest.approx(float(wanted[0].max()))
    assert [token for token, _ in found[0].top] == wanted[0].topk(2).indices.tolist()
    assert [logprob for _, logprob in found[0].top] == pytest.approx(wanted[0].topk(2).values.tolist())
    assert (found[2].chosen, found[2].top) == (pytest.approx(float(wanted[2, tokens[2]])), ())
    assert run((Sampling(), 5), scores=scores[:1])[1] is None


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=3), Sampling(top_p=0.5), Sampling(temperature=0)])
def test_rows_of_nan_give_some_token(sampling: Sampling) -> None:
    assert 0 <= run((sampling, 5), scores=torch.full((1, 50), float("nan")))[0][0] < 50
