"""The controller of λ: what holds for any history, and how it does before a simulated engine."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean, pstdev

import pytest
from dami.serving.controller import HYSTERESIS, MEMORY, RISE, IntensityController
from hypothesis import given, settings
from hypothesis import strategies as st

TARGET, ROWS = 4.0, 16


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def controller(clock: Clock | None = None, floor: float = 0.0, ceiling: float = 1.0) -> IntensityController:
    return IntensityController(TARGET, ROWS, floor, ceiling, clock=clock or Clock())


def ask(subject: IntensityController, intensity: float, adjustable: bool = True) -> float:
    granted = subject.grant(intensity, adjustable)
    subject.start(granted)
    return granted


lams = st.floats(-2, 3, allow_nan=False)
events = st.lists(
    st.one_of(
        st.tuples(st.just("grant"), lams, st.booleans()),
        st.tuples(st.just("finish"), st.one_of(st.none(), st.integers(0, 5000))),
        st.tuples(st.just("observe"), st.integers(0, 40), st.floats(0, 2), st.floats(0, 20)),
        st.tuples(st.just("pass"), st.floats(0, 10)),
    ),
    max_size=60,
)


@dataclass
class History:
    """A controller that has been through events, and what it granted to requests that have not ended."""

    controller: IntensityController
    clock: Clock
    open: list[float] = field(default_factory=list)

    def through(self, story: list[tuple], check: Callable[[tuple, float | None], None] | None = None) -> History:
        for event in story:
            granted = None
            if event[0] == "grant":
                granted = ask(self.controller, event[1], event[2])
                self.open.append(granted)
            elif event[0] == "finish" and self.open:
                self.controller.finish(self.open.pop(0), event[1])
            elif event[0] == "observe":
                self.controller.observe(*event[1:])
            elif event[0] == "pass":
                self.clock.now += event[1]
            if check:
                check(event, granted)
        return self


def history(story: list[tuple], floor: float = 0.0, ceiling: float = 1.0) -> History:
    clock = Clock()
    return History(controller(clock, floor, ceiling), clock).through(story)


LOADED: list[tuple] = [  # answers of 100 tokens at 20 ms each: 2 s alone, half of the target
    *[("grant", 1.0, True), ("finish", 100)] * 2,
    ("observe", ROWS, 0.02, 0.0),
]


@given(events, st.floats(-1, 0.4), st.floats(0.5, 2))
@settings(max_examples=80, deadline=None)
def test_any_history_leaves_the_cap_within_its_limits(story: list[tuple], floor: float, ceiling: float) -> None:
    subject = History(controller(clock := Clock(), floor, ceiling), clock)

    def check(event: tuple, granted: float | None) -> None:
        assert floor <= subject.controller.cap <= ceiling
        assert subject.controller.pressure >= 0
        if granted is not None:
            asked, adjustable = event[1:]
            assert min(asked, floor) <= granted <= asked
            assert adjustable or granted == asked

    subject.through(story, check)


@given(events, lams)
@settings(max_examples=80, deadline=None)
def test_any_request_gets_what_it_asks_for_once_the_load_is_gone(story: list[tuple], asked: float) -> None:
    after = history(story)
    for granted in after.open:
        after.controller.finish(granted, None)
    after.clock.now += RISE * TARGET
    assert after.controller.pressure == 0
    assert after.controller.grant(asked, True) == asked


@given(events, st.integers(1, 40), lams)
@settings(max_examples=80, deadline=None)
def test_more_load_never_grants_more(story: list[tuple], more: int, asked: float) -> None:
    story = LOADED + story
    calm, busy = history(story), history(story)
    for _ in range(more):
        busy.controller.start(calm.controller.cap)
    assert busy.controller.grant(asked, True) <= calm.controller.grant(asked, True)


@given(events, st.floats(0, 20), st.floats(0, 20), lams)
@settings(max_examples=80, deadline=None)
def test_a_longer_wait_never_grants_more(story: list[tuple], wait: float, longer: float, asked: float) -> None:
    short = history([*story, ("grant", 0.5, True), ("observe", 1, 0.02, min(wait, longer))])
    long = history([*story, ("grant", 0.5, True), ("observe", 1, 0.02, max(wait, longer))])
    assert long.controller.grant(asked, True) <= short.controller.grant(asked, True)


@given(events, lams, lams)
@settings(max_examples=80, deadline=None)
def test_who_asks_for_more_never_gets_less(story: list[tuple], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert history(story).controller.grant(low, True) <= history(story).controller.grant(high, True)


@given(events, st.floats(0, 20))
@settings(max_examples=80, deadline=None)
def test_the_cap_rises_no_faster_than_it_may(story: list[tuple], seconds: float) -> None:
    after = history(LOADED + story)
    for granted in after.open:  # which may lower it, if a step of few rows took longer than one of many
        after.controller.finish(granted, None)
    before = after.controller.cap
    after.clock.now += seconds
    assert after.controller.cap == pytest.approx(min(1.0, before + seconds / (RISE * TARGET)))


def test_a_burst_is_granted_less_and_less_from_its_first_moment() -> None:
    subject = history(LOADED).controller
    granted = [ask(subject, 1.0) for _ in range(4 * ROWS)]
    assert granted[:ROWS] == [1.0] * ROWS  # those all run together, for half of the target
    assert granted == sorted(granted, reverse=True)
    assert len(set(granted[ROWS + 1 : 2 * ROWS])) == ROWS - 1
    assert granted[-1] == 0.0


def test_the_pressure_is_the_latency_by_littles_law_over_the_target() -> None:
    subject = history(LOADED).controller
    assert subject.pressure == 0
    for _ in range(ROWS):
        subject.start(1.0)
    assert subject.pressure == pytest.approx(100 * 0.02 / TARGET)
    for _ in range(ROWS):
        subject.start(1.0)
    assert subject.pressure == pytest.approx(2 * 100 * 0.02 / TARGET)  # as many wait as run
    subject.observe(ROWS, 0.02, waited=5.0)
    assert subject.pressure == 5.0 / TARGET


def test_load_is_counted_by_the_tokens_of_the_lam_granted() -> None:
    subject = controller()
    for lam, tokens in ((0.0, 10), (1.0, 100)):
        subject.start(lam)
        subject.finish(lam, tokens)
    subject.observe(1, 0.02, 0.0)
    subject.start(0.2)
    assert subject.pressure == pytest.approx(10 * 0.02 / TARGET)  # the nearest λ known
    subject.start(0.9)
    assert subject.pressure == pytest.approx((10 + 100) / 2 * 0.02 / TARGET)


def test_tokens_and_seconds_are_running_means() -> None:
    subject = controller()
    for tokens in (100, 300, *[200] * MEMORY):
        subject.start(1.0)
        subject.finish(1.0, tokens)
    for seconds in (0.02, 0.06, *[0.04] * MEMORY):
        subject.observe(1, seconds, 0.0)
    subject.start(1.0)
    assert subject.pressure == pytest.approx(200 * 0.04 / TARGET)  # of all so far
    subject.finish(1.0, 200 + MEMORY)
    subject.start(1.0)
    subject.observe(1, 0.04 + 0.01 * MEMORY, 0.0)
    assert subject.pressure == pytest.approx(201 * 0.05 / TARGET)  # each counts by a share of the memory


def test_requests_that_did_not_end_teach_no_length() -> None:
    subject = history(LOADED).controller
    subject.start(1.0)
    subject.finish(1.0, None)
    subject.start(1.0)
    assert subject.pressure == pytest.approx(100 * 0.02 / TARGET)


def test_before_anything_is_known_only_waiting_lowers() -> None:
    subject = controller()
    assert [ask(subject, 1.0) for _ in range(100)] == [1.0] * 100
    subject.observe(ROWS, 0.02, waited=0.75 * TARGET)
    assert subject.grant(1.0, True) == pytest.approx(0.5)


def test_the_cap_holds_where_the_line_is_only_a_little_above_it() -> None:
    clock = Clock()
    subject = controller(clock)
    subject.start(1.0)
    subject.observe(1, 0.02, waited=0.8 * TARGET)
    assert subject.cap == pytest.approx(0.4)
    subject.observe(1, 0.02, waited=(0.8 - 0.4 * HYSTERESIS) * TARGET)
    clock.now += 100
    assert subject.cap == pytest.approx(0.4)
    subject.observe(1, 0.02, waited=(0.8 - 0.6 * HYSTERESIS) * TARGET)
    clock.now += 100
    assert subject.cap == pytest.approx(0.4 + 1.2 * HYSTERESIS)


@dataclass
class Engine:
    """Decodes up to `rows` requests together, in steps of 10 ms and 1 ms a row; answers are longer the higher λ.

    At the defaults it carries 5 requests a second at λ=1, and 100 at λ=0.
    """

    controller: IntensityController
    clock: Clock
    rows: int = ROWS
    shortest: int = 6
    longest: int = 130

    def run(
        self,
        rate: Callable[[float], float],
        seconds: float,
        random_: random.Random | None = None,
        adjustable: bool = True,
    ) -> list[tuple[float, float, float]]:
        """Serves requests that come at a rate by the clock: moment of the end, latency and λ of each that ended."""
        queue: deque[list[float]] = deque()
        running: list[list[float]] = []
        ended = []
        coming, end = self.clock.now, self.clock.now + seconds
        while self.clock.now < end:
            while coming <= self.clock.now:
                granted = ask(self.controller, 1.0, adjustable)
                spread = random_.lognormvariate(-0.125, 0.5) if random_ else 1.0
                tokens = max(1, round((self.shortest + granted * (self.longest - self.shortest)) * spread))
                queue.append([coming, granted, tokens, tokens])
                coming += random_.expovariate(rate(coming)) if random_ else 1 / rate(coming)
            while queue and len(running) < self.rows:
                running.append(queue.popleft())
            if not running:
                self.clock.now = coming
                continue
            step = 0.01 + 0.001 * len(running)
            self.clock.now += step
            waited = self.clock.now - queue[0][0] if queue else 0.0
            self.controller.observe(len(running), step, waited)
            for request in running:
                request[2] -= 1
            for request in [request for request in running if request[2] == 0]:
                running.remove(request)
                self.controller.finish(request[1], int(request[3]))
                ended.append((self.clock.now, self.clock.now - request[0], request[1]))
        return ended


def engine(tokens: dict[float, float] | None = None) -> Engine:
    clock = Clock()
    return Engine(IntensityController(TARGET, ROWS, tokens=tokens, clock=clock), clock)


@pytest.mark.parametrize("rate", [8.0, 20.0, 40.0])
@pytest.mark.parametrize("noisy", [False, True])
def test_under_a_steady_load_the_target_holds_without_oscillation(rate: float, noisy: bool) -> None:
    ended = engine({0.0: 6, 1.0: 130}).run(lambda now: rate, 60.0, random.Random(0) if noisy else None)
    settled = [(latency, lam) for moment, latency, lam in ended if moment > 20]
    latencies, granted = ([each[i] for each in settled] for i in (0, 1))
    assert fmean(latencies) < TARGET
    assert fmean(granted) > 0.02  # no more is taken than needed: at the floor the engine carries 100 a second
    assert pstdev(granted) < (0.25 if noisy else 0.12)
    if not noisy:
        assert max(latencies) < 1.5 * TARGET


def test_without_the_controller_such_a_load_piles_up() -> None:
    ended = engine().run(lambda now: 20.0, 30.0, adjustable=False)
    assert max(latency for _, latency, _ in ended) > 4 * TARGET


def test_a_load_from_the_first_moment_is_mastered_at_once_if_the_tokens_are_known() -> None:
    known, unknown = (engine(tokens).run(lambda now: 40.0, 60.0) for tokens in ({0.0: 6, 1.0: 130}, None))
    assert max(latency for _, latency, _ in known) < 2 * TARGET
    assert fmean(latency for moment, latency, _ in unknown if moment > 50) < TARGET


def test_a_load_below_capacity_is_left_alone() -> None:
    subject = engine()
    assert {lam for _, _, lam in subject.run(lambda now: 2.0, 30.0)} == {1.0}


def test_after_a_rush_requests_get_all_they_ask_for_again() -> None:
    ended = engine().run(lambda now: 30.0 if 20 < now < 40 else 2.0, 80.0)
    rush = [lam for moment, _, lam in ended if 25 < moment < 40]
    assert max(rush) < 0.5
    assert {lam for moment, _, lam in ended if moment > 60} == {1.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 1), "target_latency must be finite and above 0, got 0.0"),
        ((float("inf"), 1), "target_latency must be finite and above 0, got inf"),
        ((float("nan"), 1), "target_latency must be finite and above 0, got nan"),
        ((1.0, 0), "rows must be at least 1, got 0"),
        ((1.0, 1, 0.5, 0.5), "floor and ceiling must be finite, the floor below, got 0.5 and 0.5"),
        ((1.0, 1, float("-inf")), "floor and ceiling must be finite, the floor below, got -inf and 1.0"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IntensityController(*arguments)
