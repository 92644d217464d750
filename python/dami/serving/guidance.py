"""How a request wants its answer guided, as `dami.serving.guiding` takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dami.serving.guiding import Guidance
from dami.serving.protocol import SHARES, BadRequest, ChatRequest, CompletionRequest
from dami.serving.structured import Grammar


def guidance_of(
    body: ChatRequest | CompletionRequest,
    room: int,
    vocabulary: int,
    answer_intensity: float | None,
    reserve: int,
    span: float,
    grammar: Grammar | None,
) -> Guidance:
    """Returns how a request wants its answer guided.

    Args:
        body: the request.
        room: the most tokens that the answer and its thoughts may have.
        vocabulary: number of token ids that the model takes.
        reserve: how many tokens a thought must leave to its answer; 0 for none.
        answer_intensity, span, grammar: as in `Guidance`.

    Raises:
        BadRequest: it has a bias for a token that does not exist, or is to stop at one.
    """
    biases = body.biases
    for field, ids in (("logit_bias", biases), ("stop_token_ids", body.stop_token_ids or ())):
        if ids and max(ids) >= vocabulary:
            raise BadRequest(f"{field} has the id {max(ids)}, and the vocabulary {vocabulary} ids", field)
    return Guidance(
        biases,
        body.presence_penalty or 0.0,
        body.frequency_penalty or 0.0,
        body.intensity_schedule or (),
        answer_intensity,
        _budget(body, room, reserve) if isinstance(body, ChatRequest) else None,
        span,
        grammar,
    )


def _budget(body: ChatRequest, room: int, reserve: int) -> int | None:
    """Returns the most tokens that the thoughts of an answer may have; None for no limit."""
    budgets = [] if body.thinking_token_budget is None else [body.thinking_token_budget]
    share = SHARES.get(body.reasoning_effort or "")
    if share is not None and (body.wanted_tokens is not None or share == 0):
        budgets.append(int(share * room))
    if reserve:
        budgets.append(max(room - reserve, 0))
    return min(budgets, default=None)


def span_of(frontier: Mapping[str, Any]) -> float:
    """Returns over how many tokens λ bends, by a pair's frontier: the mean length of its longest answers.

    That is 0, which cuts thoughts off, if the frontier is not known or has a valley: a λ at which answers are worse
    than at both ends, beyond the 95 % interval. λ would slide through it, where thoughts break off.
    """
    points = sorted(frontier.get("points", ()), key=lambda point: point["intensity"])
    if not points:
        return 0.0
    worse_end = min(points[end]["accuracy"][0] for end in (0, -1))
    has_valley = any(point["accuracy"][2] < worse_end for point in points)
    return 0.0 if has_valley else max(point["tokens"][0] for point in points)
