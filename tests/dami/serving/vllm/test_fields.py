"""What requests say about λ, and the trajectory that comes of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import dami
import numpy as np
import pytest
import torch
from dami.serving.guiding import Guidance, Guide
from dami.serving.guiding import Thoughts as Tags
from dami.thoughts import Reader
from transformers import AutoTokenizer

pytest.importorskip("vllm")

from dami.estimators.files import StoredIntensity
from dami.serving.protocol import DialRequest
from dami.serving.vllm import register, server, turning
from dami.serving.vllm.fields import granted, trajectory_of, wanted
from dami.serving.vllm.offers import Offer
from dami.serving.vllm.settings import PairSettings, RequestError
from dami.serving.vllm.thoughts import Thoughts
from dami.serving.vllm.trajectories import Trajectory, lams

register()

STATES: Any = SimpleNamespace(layers=(1, 2))
OFFER = Offer(PairSettings(intensity_range=(0.0, 1.0)), StoredIntensity(STATES, {"low": 0.25, "wild": 1.5}))


def bends_over(span: float) -> dict[str, Any]:
    """Returns the frontier of a pair whose λ bends over so many tokens."""
    return {"points": [{"intensity": 0.5, "accuracy": [0.9, 0.8, 1.0], "tokens": [span]}]}


def offer(**settings: Any) -> Offer:
    return Offer(PairSettings.of({"intensity_range": [0, 1], **settings}), OFFER.stored)


@pytest.mark.parametrize(
    ("given", "settings", "lam"),
    [
        ({}, {}, 0.0),
        ({}, {"default_intensity": "low"}, 0.25),
        ({}, {"default_intensity": "auto"}, None),
        ({"intensity": 0.5}, {"default_intensity": "auto"}, 0.5),
        ({"intensity": "wild"}, {}, 1.5),
        ({"intensity": "auto"}, {}, None),
        ({"max_intensity": 0.5}, {}, 0.5),
        ({"max_intensity": 0.5}, {"default_intensity": "auto"}, None),
        ({"max_intensity": 0.125, "intensity": "low"}, {}, 0.125),
        ({"max_intensity": 0.5, "intensity": "low"}, {}, 0.25),
        ({"max_intensity": 0.5, "intensity": "auto"}, {}, None),
    ],
)
def test_lambda_of_a_request(given: dict[str, Any], settings: dict[str, Any], lam: float | None) -> None:
    assert wanted(given, offer(**settings)) == lam


@pytest.mark.parametrize(
    ("chosen", "given", "lam"), [(1.2, {}, 1.0), (-0.1, {}, 0.0), (0.9, {"max_intensity": 0.5}, 0.5)]
)
def test_a_choice_is_granted_within_what_is_allowed(chosen: float, given: dict[str, Any], lam: float) -> None:
    assert granted(chosen, given, OFFER) == lam


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"intensity": "high"}, r"intensity must be a number, one of \['low', 'wild'\] or 'auto', got 'high'"),
        ({"intensity": "auto"}, "intensity 'auto' cannot be chosen for this kind of request"),
        (
            {"max_intensity": 0.5, "intensity": 0.2},
            "intensity and max_intensity exclude each other, unless intensity is",
        ),
        ({"max_intensity": "low"}, "max_intensity must be a number, got 'low'"),
        ({"max_intensity": 2}, "max_intensity must be in 0 to 1 on this server, got 2"),
        ({"prompt_intensity": 2}, "prompt_intensity must be in 0 to 1 on this server, got 2"),
        ({"prompt_intensity": "auto"}, "vLLM takes a number or a preset as prompt_intensity, got 'auto', which is for"),
        ({"prompt_tail": 3}, "prompt_tail says where prompt_intensity ends, which is that of the answer: give"),
        ({"prompt_intensity": "same", "prompt_tail": 3}, "prompt_tail says where prompt_intensity ends"),
        (
            {"prompt_intensity": 0, "prompt_tail": True},
            "prompt_tail must be an integer of at least 0, or 'turn' in a chat, got True",
        ),
        (
            {"prompt_intensity": 0, "prompt_tail": -1},
            "prompt_tail must be an integer of at least 0, or 'turn' in a chat, got -1",
        ),
        ({"intensity_schedule": []}, r"intensity_schedule must be 1 to 64 pairs \[tokens, λ\] in ascending order, got"),
        ({"intensity_schedule": [[0, 0.5]]}, "intensity_schedule must be 1 to 64 pairs"),
        ({"intensity_schedule": [[4, 0.5], [4, 0.6]]}, "intensity_schedule must be 1 to 64 pairs"),
        ({"intensity_schedule": [[n, 0.5] for n in range(1, 66)]}, "intensity_schedule must be 1 to 64 pairs"),
        ({"intensity_schedule": 0.5}, "intensity_schedule must be 1 to 64 pairs"),
        ({"intensity_schedule": [[4, 2]]}, "intensity_schedule must be in 0 to 1 on this server, got 2"),
    ],
)
def test_what_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trajectory_of(given, OFFER, [1] * 10)


@pytest.mark.parametrize(
    ("given", "moves", "message"),
    [
        ({"answer_intensity": 0.5}, True, "answer_intensity is not supported without a tokenizer"),
        ({"answer_intensity": 0.5}, False, "answer_intensity is not supported with speculation"),
        ({"answer_intensity": "auto"}, True, "vLLM takes a number or a preset as answer_intensity, got 'auto'"),
        ({"intensity_schedule": [[4, 0.5]]}, False, "intensity_schedule is not supported with speculation"),
    ],
)
def test_what_this_engine_cannot_do_is_refused(given: dict[str, Any], moves: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trajectory_of(given, replace(OFFER, moves=moves), [1] * 10)


def test_what_the_pair_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="intensity 'auto' needs an estimator, and this pair has none"):
        wanted({"intensity": "auto"}, Offer(PairSettings()))
    more = Offer(PairSettings(default_intensity="auto"), StoredIntensity(SimpleNamespace(layers=())))  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="default_intensity 'auto' needs an estimator that looks at nothing but the states"
    ):
        more.check()
    with pytest.raises(
        ValueError, match="prompt_intensity must be a number or a preset, of which the model has none, got"
    ):
        Offer(PairSettings(prompt_intensity="low")).check()


@pytest.mark.parametrize(
    ("given", "lam"),
    [
        ({"intensity": 0.5}, [0.5] * 10),
        ({"intensity": 0.5, "prompt_intensity": 0}, [0.0] * 5 + [0.5] * 5),
        ({"intensity": 0.5, "prompt_intensity": "low", "prompt_tail": 3}, [0.25] * 3 + [0.5] * 7),
        ({"intensity": 0.5, "prompt_intensity": 0, "prompt_tail": 0}, [0.0] * 6 + [0.5] * 4),
        ({"intensity": 0.5, "prompt_intensity": 0, "prompt_tail": 9}, [0.5] * 10),
        ({"intensity_schedule": [[2, 1.0]], "prompt_intensity": "same"}, [0.0] * 6 + [0.5, 1.0, 1.0, 1.0]),
        ({"intensity_schedule": [[1, 1.0], [3, 0.5]]}, [0.0] * 6 + [1.0, 0.75, 0.5, 0.5]),
    ],
)
def test_a_trajectory(given: dict[str, Any], lam: list[float]) -> None:
    """Of a prompt of 6 tokens: whole, in pieces, among others, and over the wire."""
    params: Any = SimpleNamespace(extra_args=given)
    trajectory_of(given, OFFER, [1] * 6).put(params)
    trajectory = Trajectory.of(params)
    assert trajectory is not None
    assert trajectory.lam(0, 10).tolist() == lam
    other = Trajectory(2, [(0, 0.125)], 2, 0.125)
    for start in range(10):
        found = lams([other, trajectory, other], np.array([5, start, 1]), np.array([2, 10 - start, 1]))
        assert found.tolist() == [0.125] * 2 + lam[start:] + [0.125]
    assert params.extra_args.items() >= given.items()


def test_turns_hold_from_their_place_on() -> None:
    trajectory = Trajectory(6, [(0, 0.0), (2, 1.0)], 6, 0.0)
    trajectory.turn(8, 0.25)
    trajectory.turn(9, 0.75)
    trajectory.turn(9, 0.5)
    assert trajectory.lam(5, 11).tolist() == [0.0, 0.5, 1.0, 0.25, 0.5, 0.5]


def test_a_key_has_the_lambda_of_each_token() -> None:
    plain, read = Trajectory(6, [(0, 0.5)], 6, 0.5), Trajectory(6, [(0, 0.5)], 1, 0.0)
    assert plain.key(0, 4) != read.key(0, 4) == Trajectory(9, [(0, 0.0)], 9, 0.0).key(0, 4)
    assert plain.key(4, 8) != read.key(4, 8) != Trajectory(6, [(0, 0.5)], 2, 0.0).key(4, 8)
    assert plain.key(8, 12) == read.key(8, 12) == Trajectory(4, [(0, 0.5)], 4, 0.5).key(0, 4)


def test_a_salt_is_lambda_alone_where_every_token_has_it() -> None:
    assert (
        Trajectory(4, [(0, 0.5)], 1, 0.5).salt
        == Trajectory(9, [(0, 0.5)], 1, 0.5).salt
        != Trajectory(9, [(0, 0.25)], 1, 0.25).salt
    )
    salts = [Trajectory(4, [(0, 0.5), (3, 1.0)], 1, 0.5).salt, Trajectory(4, [(0, 0.5)], 1, 0.0).salt]
    salts += [Trajectory(5, [(0, 0.5)], 1, 0.0).salt, Trajectory(4, [(0, 0.5)], 1, 0.5, answer=0.0).salt]
    assert len({Trajectory(4, [(0, 0.5)], 1, 0.5).salt, *salts}) == 5


THINKING: list[dict[str, Any]] = [
    {"answer_intensity": 0.25},
    {"thinking_token_budget": 20},
    {"thinking_token_budget": 5, "answer_intensity": 0.0, "intensity": 1.0},
    {"thinking_token_budget": 0, "intensity_schedule": [[10, 0.0]]},
    {"thinking_token_budget": 9, "intensity": -0.5},
    {"intensity": 0.5},
]


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("span", [0.0, 12.5])
def test_thoughts_are_followed_as_by_dami_s_own_server(opened: bool, span: float) -> None:
    """Requests of different lengths in one batch, one of which is read again after each third step."""
    reader = Reader.of(AutoTokenizer.from_pretrained(dami.example_pair()[0]))
    tags = Tags.of(reader)
    pair = Offer(PairSettings(), StoredIntensity(frontier=bends_over(span)))
    draw = np.random.default_rng(0)
    requests, followed = [], Thoughts("cpu", 99)
    for number, given in enumerate(THINKING):
        prompt = [9] * (3 + number) + ([*tags.start] if opened else [])
        budget = given.get("thinking_token_budget")
        trajectory = trajectory_of({"intensity": 0.75, **given}, pair, prompt, budget, reader.tokenizer)
        pieces = [[int(token)] for token in draw.integers(20, 60, 30)]
        pieces[number] = pieces[10 + 2 * number] = [*tags.start]
        pieces[7 + number] = [*tags.end]
        answer = [token for piece in pieces for token in piece]
        schedule = given.get("intensity_schedule", ())
        guidance = Guidance({}, 0.0, 0.0, schedule, given.get("answer_intensity"), budget, span)
        guide = Guide(len(prompt), 999, guidance, frozenset(), tags, opened)
        guide.begin(trajectory.points[0][1])
        wanted = []
        for token in answer:
            guide.tokens.append(token)
            guide.decide([token])
            wanted.append(guide.intensity)
        requests.append((trajectory, prompt + answer, [trajectory.points[0][1]] * len(prompt) + wanted))
    trajectories = [trajectory for trajectory, _, _ in requests]
    ends = np.zeros(len(requests), dtype=np.int64)
    for step in range(30):
        again = np.arange(len(requests)) % 3 == step % 3
        starts = np.where(again, 0, ends)
        ends = np.maximum(ends + 1, [trajectory.prompt for trajectory in trajectories])
        counts = ends - starts
        each = [*zip(requests, starts, ends, strict=True)]
        ids = [token for (_, tokens, _), start, end in each for token in tokens[start:end]]
        lam = torch.tensor(lams(trajectories, starts, counts))
        places = (x.tolist() for x in (np.cumsum(counts) - counts, starts, counts))
        followed.follow(lam, torch.tensor(ids), zip(trajectories, *places, strict=True))
        wanted = [one for (*_, own), start, end in each for one in own[start:end]]
        assert lam.tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(
    "given", [{"answer_intensity": 0.2}, {"thinking_token_budget": 40}, {"thinking_token_budget": 3}]
)
@pytest.mark.parametrize("asked", [0, 2, 9])
def test_a_thought_wraps_up_as_in_dami_s_own_server(opened: bool, given: dict[str, Any], asked: int) -> None:
    """Told so after this many tokens of its answer."""
    reader = Reader.of(AutoTokenizer.from_pretrained(dami.example_pair()[0]))
    tags = Tags.of(reader)
    prompt, budget = [9, 9, 9, *(tags.start if opened else [])], given.get("thinking_token_budget")
    pair = Offer(PairSettings(), StoredIntensity(frontier=bends_over(12.5)))
    trajectory = trajectory_of({"intensity": 0.75, **given}, pair, prompt, budget, reader.tokenizer)
    guidance = Guidance({}, 0.0, 0.0, (), given.get("answer_intensity"), budget, 12.5)
    guide = Guide(len(prompt), 999, guidance, frozenset(), tags, opened)
    guide.begin(0.75)
    followed = Thoughts("cpu", 99)
    for number, token in enumerate([*tags.start, *range(20, 34), *tags.end, 40, 41]):
        place = len(prompt) + number
        if number == asked:
            guide.turn(wrap_up=4)
            trajectory.turn(place, None, 4)
            followed.wrap_up(trajectory, 4)
        guide.tokens.append(token)
        guide.decide([token])
        lam = torch.tensor(trajectory.lam(place, place + 1))
        followed.follow(lam, torch.tensor([token]), [(trajectory, 0, place, 1)])
        assert lam.item() == pytest.approx(guide.intensity, abs=1e-6)


def test_a_pair_whose_lam_does_not_bend_is_not_told_to_wrap_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turning, "Offer", SimpleNamespace(of=lambda _: Offer(PairSettings())))
    with pytest.raises(RequestError, match="wrap_up bends λ of a thought, and does so only if the pair has a frontier"):
        asyncio.run(turning.turn(SimpleNamespace(vllm_config=None), [], None, 8))


def test_slots_of_requests_that_are_gone_are_used_again() -> None:
    followed = Thoughts("cpu", 9)
    for number in range(100):
        trajectory = Trajectory(1, [(0, 1.0)], 1, 1.0, answer=0.5, start=[3], end=[4])
        for place, (token, lam) in enumerate([(3, 1.0), (4, 0.5), (number + 5, 0.5)], 1):
            found = torch.ones(1)
            followed.follow(found, torch.tensor([token]), [(trajectory, 0, place, 1)])
            assert found.item() == lam
    assert len(followed._inside) == 16


def test_what_a_thinking_request_reads_is_keyed_by_all_that_it_follows_from() -> None:
    one, other = (Trajectory(4, [(0, 1.0)], 4, 1.0, budget=budget, start=[3], end=[4]) for budget in (5, 6))
    assert one.key(0, 4) == other.key(0, 4) == Trajectory(4, [(0, 1.0)], 4, 1.0).key(0, 4)
    before = one.key(4, 8)
    assert before != other.key(4, 8)
    one.turn(9, 0.0)
    assert one.key(4, 8) == before != one.key(8, 12)
    turned = one.key(8, 12)
    one.turn(9, None, 3)
    assert one.key(4, 8) == before
    assert one.key(8, 12) != turned


CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("body", "intensity", "budget"),
    [
        ({}, None, None),
        ({"reasoning_effort": "none"}, 0.0, 0),
        ({"reasoning_effort": "low"}, "low", None),
        ({"reasoning_effort": "low", "max_completion_tokens": 100}, "low", 20),
        ({"reasoning_effort": "medium", "max_tokens": 100, "thinking_token_budget": 30}, 0.5, 30),
        ({"reasoning_effort": "xhigh", "max_tokens": 100, "intensity": 1.0, "model": "pair:1"}, 1.0, 95),
        ({"reasoning_effort": "max", "max_tokens": 100}, 1.0, None),
        ({"model": "pair:auto"}, "auto", None),
    ],
)
def test_what_a_body_says(
    body: dict[str, Any], intensity: Any, budget: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    monkeypatch.setattr(server, "SERVED", {"pair": replace(OFFER, limits=True)})
    params = ChatCompletionRequest(**CHAT, **body).to_sampling_params(100, {})
    assert ((params.extra_args or {}).get("intensity"), params.thinking_token_budget) == (intensity, budget)
    monkeypatch.setattr(server, "SERVED", {"pair": OFFER})  # where vLLM cannot end a thought
    params = ChatCompletionRequest(**CHAT, **body).to_sampling_params(100, {})
    assert params.thinking_token_budget == body.get("thinking_token_budget")


def dialled(name: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], list[Any]]:
    """What the route answers while two prompts with two answers each run, one of which has ended; and who is turned."""
    turned: list[Any] = []

    async def turn(engine: Any, names: list[str], intensity: float | None, wrap_up: int | None) -> None:
        turned.append((names, intensity, wrap_up))

    states = {
        f"{prompt}{index}": SimpleNamespace(parent_req=SimpleNamespace(n=2), request_index=index)
        for prompt in "ab"
        for index in range(2)
    }
    states["c"] = SimpleNamespace(parent_req=None, request_index=0)
    outer = {"cmpl-1-1": ["b0", "b1"], "cmpl-1-0": ["a1"], "chatcmpl-2": ["c"], "cmpl-1-x": ["c"]}
    running = SimpleNamespace(external_req_ids=outer, request_states=states)
    engine = SimpleNamespace(vllm_config=None, output_processor=running)
    monkeypatch.setattr(server, "turn", turn)
    monkeypatch.setattr(server.PairQuantization, "of", lambda config: "a pair")
    monkeypatch.setattr(server.Offer, "of", lambda config: OFFER)
    request: Any = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(engine_client=engine)))
    return asyncio.run(server._dial(name, DialRequest(**body), request)), turned


def test_the_route_of_the_dial(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, turned = dialled("cmpl-1", {"intensity": "low"}, monkeypatch)
    assert answer["choices"] == [1, 2, 3]
    assert (answer["intensity"], turned) == (0.25, [(["a1", "b0", "b1"], 0.25, None)])
    assert dialled("cmpl-1", {"intensity": 1, "choice": 2}, monkeypatch)[1] == [(["b0"], 1.0, None)]
    answer, turned = dialled("chatcmpl-2", {"wrap_up": 8}, monkeypatch)
    assert (answer["intensity"], answer["wrap_up"], turned) == (None, 8, [(["c"], None, 8)])


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("cmpl-3", {"intensity": 1}, "there is no running request cmpl-3"),
        ("cmpl-1", {"intensity": 1, "choice": 0}, "there is no running request cmpl-1, choice 0"),
        ("cmpl-1", {"intensity": 2}, "intensity must be in 0 to 1 on this server, got 2"),
        ("cmpl-1", {"intensity": "auto"}, "vLLM takes a number or a preset as intensity, got 'auto'"),
    ],
)
def test_what_the_dial_refuses(name: str, body: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Exception, match=message):
        dialled(name, body, monkeypatch)
