"""A guide decides before each token: λ, the end tag of a spent thought, biases, penalties and the grammar's tokens."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest
import torch
from dami.loading.load import example_pair
from dami.serving.guidance import span_of
from dami.serving.guiding import Guidance, Guide, Thoughts
from dami.serving.structured import Grammars, of_json
from dami.thoughts import Reader, Tags
from transformers import AutoTokenizer
from transformers.generation.continuous_batching.requests import RequestState

VOCABULARY = 768


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(example_pair()[0])


@pytest.fixture(scope="module")
def thoughts(tokenizer: Any) -> Thoughts:
    found = Thoughts.of(Reader.of(tokenizer))
    assert len(found.start) == len(found.end) == 1
    return found


class Run:
    """A request as the generation loop has it."""

    def __init__(self, guide: Guide, intensity: float = 0.9) -> None:
        self.guide, self.lams = guide, list[float]()
        arguments = {"intensity": intensity, "course": guide}
        self.state = RequestState("", [5] * guide.prompt, logit_processor_kwargs=arguments)
        self.step()

    def step(self) -> None:
        self.guide.follow(self.state)
        self.lams.append(self.guide.intensity)

    def take(self, *tokens: int) -> None:
        for token in tokens:
            self.state.generated_tokens.append(token)
            self.step()

    def evict(self) -> None:
        self.state = self.state.create_equivalent_initial_request()


def guide(guidance: Guidance, thoughts: Thoughts | None = None, inside: bool = False, prompt: int = 3) -> Guide:
    return Guide(prompt, VOCABULARY, guidance, frozenset({1}), thoughts, inside)


def test_lam_follows_a_schedule_and_the_answer_has_its_own(thoughts: Thoughts) -> None:
    [start], [end] = thoughts.start, thoughts.end
    run = Run(guide(Guidance(schedule=[(4, 0.1), (6, 0.5)], answer_intensity=-0.2), thoughts))
    run.take(start, *[9] * 6, end, 9, 9)
    assert run.lams == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1, 0.3, 0.5, 0.5, -0.2, -0.2, -0.2])
    assert run.guide.lams == run.lams
    assert Run(guide(Guidance())).guide.forced is None


def test_lam_may_be_turned_by_hand(thoughts: Thoughts) -> None:
    run = Run(guide(Guidance(schedule=[(100, 0.0)], answer_intensity=0.3), thoughts))
    run.take(*thoughts.start, 9)
    run.guide.turn(0.25)
    assert run.guide.intensity != 0.25
    run.take(9, *thoughts.end, 9)
    assert run.lams[3:] == [0.25] * 3


@pytest.mark.parametrize("evicted_after", [None, 2, 5])
def test_the_lam_of_every_token_is_remembered(thoughts: Thoughts, evicted_after: int | None) -> None:
    """In the request's arguments, so that a request that is read again is read as it was."""
    run = Run(guide(Guidance(schedule=[(2, 0.1), (5, 0.1), (6, 0.4)]), thoughts))
    for place in range(8):
        run.take(20 + place)
        if place == evicted_after:
            run.evict()
            assert run.state.logit_processor_kwargs["course"] is run.guide
    assert run.guide.tokens == list(range(20, 28))
    found, given = [], run.state.logit_processor_kwargs
    for until, lam in [*given["earlier"], (3 + 8, given["intensity"])]:
        found += [lam] * (until - len(found))
    assert found == pytest.approx([0.9] * 3 + run.lams[1:])


def test_a_thought_bends_and_is_ended_when_its_budget_is_spent(thoughts: Thoughts) -> None:
    [start], [end] = thoughts.start, thoughts.end
    run = Run(guide(Guidance(budget=8, span=4), thoughts))
    run.take(start, *[9] * 7)
    assert run.guide.forced is None
    assert run.lams == pytest.approx([0.9] * 6 + [0.675, 0.45, 0.225])
    run.take(9)
    assert (run.guide.forced, run.guide.intensity, run.guide.bias) == (end, 0, None)
    run.take(end)
    assert (run.guide.forced, run.guide.intensity) == (None, 0.9)
    assert run.guide.bias is not None
    assert run.guide.bias.isinf().nonzero().flatten().tolist() == [start]  # it may not begin another
    cut = Run(guide(Guidance(budget=8), thoughts))
    cut.take(start, *[9] * 8)
    assert (cut.guide.forced, cut.lams) == (end, [0.9] * 10)
    free = Run(guide(Guidance(budget=8, span=4), thoughts))
    free.take(*[9] * 20)
    assert free.lams == [0.9] * 21
    none = Run(guide(Guidance(budget=0), thoughts, inside=True))
    assert none.guide.forced == end


def test_a_thought_can_be_told_to_wrap_up(thoughts: Thoughts) -> None:
    run = Run(guide(Guidance(budget=100, span=20), thoughts))
    run.take(*thoughts.start, *[9] * 5)
    run.guide.turn(wrap_up=4)
    run.take(*[9] * 4)
    assert run.lams[7:] == pytest.approx([0.9, 0.675, 0.45, 0.225])
    run.take(9)
    assert run.guide.forced == thoughts.end[0]
    cut = Run(guide(Guidance(budget=100), thoughts))
    cut.take(*thoughts.start)
    cut.guide.turn(wrap_up=2)
    cut.take(9, 9, 9)
    assert (cut.guide.forced, set(cut.lams)) == (thoughts.end[0], {0.9})
    later = Run(guide(Guidance(budget=3), thoughts))
    later.take(*thoughts.start)
    later.guide.turn(wrap_up=50)  # does not lengthen its budget
    later.take(9, 9, 9)
    assert later.guide.forced == thoughts.end[0]


def test_an_end_tag_of_several_tokens_is_completed(tokenizer: Any) -> None:
    found = Thoughts.of(Reader(tokenizer, Tags("(think)", ("(/think)",))))
    assert len(found.end) > 2
    run = Run(guide(Guidance(budget=3), found, inside=True))
    run.take(9, 9, 9)
    for token in found.end:
        assert run.guide.forced == token
        run.take(token)
    assert run.guide.forced is None
    assert not run.guide.meter.inside
    begun = Run(guide(Guidance(budget=3), found, inside=True))
    begun.take(9, *found.end[:2])  # of itself
    assert begun.guide.forced == found.end[2]


def test_biases_and_penalties_add_up() -> None:
    run = Run(guide(Guidance({7: 2.5, 9: -100.0}, presence_penalty=0.5, frequency_penalty=0.25)))
    assert run.guide.bias is not None
    assert run.guide.bias.nonzero().flatten().tolist() == [7, 9]
    run.take(7, 8, 7)
    assert {token: run.guide.bias[token].item() for token in (7, 8, 9, 10)} == {7: 1.5, 8: -0.75, 9: -100.0, 10: 0.0}
    assert Run(guide(Guidance())).guide.bias is None


SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer"}, "steps": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}},
    "required": ["sum"],
    "additionalProperties": False,
}


def allowed(run: Run) -> set[int]:
    if run.guide.forced is not None:
        return {run.guide.forced}
    bias = run.guide.bias
    return set(range(VOCABULARY)) if bias is None else set(bias.isfinite().nonzero().flatten().tolist())


def random_answer(run: Run, choose: torch.Generator, most: int = 400) -> list[int]:
    said: list[int] = []
    while len(said) < most:
        options = sorted(allowed(run) - {*run.guide.thoughts.start})
        token = 1 if 1 in options else options[int(torch.randint(len(options), (), generator=choose))]
        said.append(token)
        if token == 1:
            break
        run.take(token)
    return said


def test_an_answer_obeys_a_schema_and_its_thought_does_not(tokenizer: Any, thoughts: Thoughts) -> None:
    pytest.importorskip("llguidance")
    jsonschema = pytest.importorskip("jsonschema_rs")
    grammar = Grammars(tokenizer, VOCABULARY).of(f"start: {of_json(SCHEMA)}")
    [start], [end], choose = thoughts.start, thoughts.end, torch.Generator().manual_seed(3)
    for thinks, inside in ((True, False), (False, False), (False, True)):
        run = Run(guide(Guidance(grammar=grammar), thoughts, inside))
        if inside or thinks:
            if thinks:
                assert start in allowed(run)
                run.take(start)
            assert allowed(run) == set(range(VOCABULARY)) - {1}  # an answer has to come
            run.take(*tokenizer.encode("12 + {", add_special_tokens=False), end)
            assert start not in allowed(run)
        else:
            assert {start, 1} & allowed(run) == {start}
        said = random_answer(run, choose)
        assert said[-1] == 1
        jsonschema.validate(SCHEMA, json.loads(tokenizer.decode(said, skip_special_tokens=True)))


def test_a_start_tag_of_several_tokens_may_come_before_a_constrained_answer(tokenizer: Any) -> None:
    pytest.importorskip("llguidance")
    found = Thoughts.of(Reader(tokenizer, Tags("(think)", ("(/think)",))))
    run = Run(guide(Guidance(grammar=Grammars(tokenizer, VOCABULARY).of(f"start: {of_json(SCHEMA)}")), found))
    assert found.start[0] in allowed(run)
    for token, after in zip(found.start, [*found.start[1:], None], strict=True):
        run.take(token)
        if after is not None:
            assert allowed(run) == {after}
    assert run.guide.meter.inside
    assert 9 in allowed(run)


@pytest.mark.parametrize(
    ("schema", "message"),
    [({"type": "wings"}, "the JSON schema is not supported: .*wings"), ({"minItems": "x"}, "is not supported: ")],
)
def test_schemas_that_llguidance_does_not_take(tokenizer: Any, schema: Any, message: str) -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(ValueError, match=message):
        Grammars(tokenizer, VOCABULARY).of(f"start: {of_json(schema)}")


def test_a_missing_llguidance_is_named(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ValueError, match="this server lacks llguidance, which it needs: pip install llguidance"):
        Grammars(tokenizer, VOCABULARY).of(f"start: {of_json(SCHEMA)}")


def test_a_tokenizer_that_llguidance_does_not_take() -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(ValueError, match="llguidance does not take the model's tokenizer: "):
        Grammars(object(), VOCABULARY).of(f"start: {of_json(SCHEMA)}")


def test_a_copy_of_a_request_keeps_its_course() -> None:
    course: Any = guide(Guidance())
    assert deepcopy({"course": course})["course"] is course


def frontier(*accuracy: float) -> dict[str, Any]:
    """Returns points at equally spaced λ, each with an interval of 0.1, of which the second has the most tokens."""
    tokens = [6.0, 50.5, *[40.0] * (len(accuracy) - 2)]
    return {
        "points": [
            {"intensity": number / 2, "accuracy": [value, value - 0.05, value + 0.05], "tokens": [length] * 3}
            for number, (value, length) in enumerate(zip(accuracy, tokens, strict=True))
        ]
    }


def test_lam_bends_over_a_thought_s_length_if_nothing_lies_in_its_way() -> None:
    assert span_of(frontier(0.5, 0.8, 0.7)) == 50.5
    assert span_of(frontier(0.7, 0.6, 0.4)) == 50.5  # downhill is no valley
    assert span_of(frontier(0.5, 0.46, 0.7)) == 50.5  # nor is what may be chance
    assert span_of(frontier(0.5, 0.44, 0.7)) == 0
    assert span_of(frontier(0.7, 0.8, 0.44, 0.5)) == 0
    assert span_of({}) == 0
