"""λ that changes while decoding, or differs between parts of the model, against plain models that take turns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import dami
import pytest
import torch
from dami import schedules
from dami.dial.choosing import estimates
from dami.dial.patch import Estimator
from dami.estimators import StaticIntensity
from dami.generation.budget import ThoughtLimit
from torch import Tensor
from transformers import (
    CompileConfig,
    DbrxConfig,
    LogitsProcessorList,
    Mamba2Config,
    PrefixConstrainedLogitsProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from tests.dami import architectures
from tests.dami.families import VOCABULARY, merged, pair, references
from tests.dami.test_generation import GREEDY, LAM, prompts
from tests.dami.test_patching import counting


@pytest.fixture
def model() -> PreTrainedModel:
    return dami.patch_model(*pair("qwen3"))


def taking_turns(lam_of: Callable[[int], float]) -> PreTrainedModel:
    """A plain model whose weights are changed before every forward pass to those merged at `lam_of(step)`.

    What earlier tokens left in the cache stays there, as it does when λ changes.
    """
    model = copy.deepcopy(references("qwen3", 0.0)[0])
    prepare, steps = model.prepare_inputs_for_generation, iter(range(1000))

    def prepare_inputs_for_generation(*args: Any, **kwargs: Any) -> Any:
        model.load_state_dict(references("qwen3", lam_of(next(steps)))[0].state_dict())
        return prepare(*args, **kwargs)

    model.prepare_inputs_for_generation = prepare_inputs_for_generation
    return model


FALLING = schedules.linear(1.0, 0.2, steps=4)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"cache_implementation": "static"}], ids="+".join
)
def test_a_schedule_is_asked_before_every_forward_pass(model: PreTrainedModel, options: dict[str, Any]) -> None:
    inputs = prompts()
    tokens = model.generate(**inputs, intensity=FALLING, **GREEDY | options)
    wanted = taking_turns(lambda step: 1.0 - 0.2 * min(step, 4))
    assert torch.equal(tokens, wanted.generate(**inputs, **GREEDY | options))


def test_each_sequence_has_a_schedule_of_its_own(model: PreTrainedModel) -> None:
    lams: list[Any] = [0.37, FALLING, lambda step, tokens: 0.1 * step, FALLING]
    of_row = [lambda _: 0.37, lambda n: 1 - 0.2 * min(n, 4), lambda n: 0.1 * n, lambda n: 1 - 0.2 * min(n, 4)]
    inputs = prompts()
    for options in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
        tokens = model.generate(**inputs, intensity=lams, **GREEDY | options)
        for row, lam_of in enumerate(of_row):
            wanted = taking_turns(lam_of).generate(**inputs, **GREEDY | options)
            assert torch.equal(tokens[row], wanted[row]), f"row {row}, {options}"


def test_the_prompt_may_be_read_at_another_lam(model: PreTrainedModel) -> None:
    inputs = prompts()
    read, said = [1.0, 0.0, 0.5, 0.2], LAM
    how = {"prompt_intensity": read, "prompt_tail": 0, **GREEDY}
    tokens = model.generate(**inputs, intensity=said, **how)
    chunks = model.generate(**inputs, intensity=said, prefill_chunk_size=3, **how)
    assert torch.equal(tokens, chunks)
    for row in range(4):
        lam_of = lambda step, row=row: said[row] if step else read[row]  # noqa: E731
        assert torch.equal(tokens[row], taking_turns(lam_of).generate(**inputs, **GREEDY)[row]), f"row {row}"
    with dami.intensity(model, said):  # the answer at whatever holds
        assert torch.equal(model.generate(**inputs, **how), tokens)
    assert torch.equal(model.generate(**inputs, intensity={"*": said}, **how), tokens)
    assert torch.equal(model.generate(**inputs, intensity=0.0, **GREEDY), model.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("ids", [[7], [7, 9]])
def test_switch_after_looks_at_what_each_row_has_said(model: PreTrainedModel, beams: int, ids: list[int]) -> None:
    """Forward passes are watched: each row, each beam, at the λ that its own tokens ask for."""
    inputs = prompts()
    length, seen = inputs["input_ids"].shape[1], []
    tag = ids * 10  # some rows are pushed through the tag, at different steps

    def push(place: int, tokens: Tensor) -> list[int]:
        step = len(tokens) - length
        return [tag[step - place % 4]] if step >= place % 4 and place < 3 else list(range(20, 60))

    prepare = model.prepare_inputs_for_generation
    switch = schedules.switch_after(ids, 1.0, 0.2)

    def prepare_inputs_for_generation(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        prepared = prepare(input_ids, *args, **kwargs)
        seen.append((input_ids[:, length:], model.dami_patch.dial.lam))
        return prepared

    model.prepare_inputs_for_generation = prepare_inputs_for_generation
    model.generate(**inputs, intensity=switch, prefix_allowed_tokens_fn=push, num_beams=beams, **GREEDY)
    both = set()
    for tokens, lam in seen:
        assert lam.shape == (4 * beams,)
        for row, value in zip(tokens.tolist(), lam.tolist(), strict=True):
            passed = any(row[i : i + len(ids)] == ids for i in range(len(row)))
            assert value == pytest.approx(0.2 if passed else 1.0)
            both.add(passed)
    assert len(seen) == 6
    assert both == {True, False}


@pytest.mark.parametrize(("start", "end"), [([7], [9]), ([7, 8], [7, 9]), ([7, 8, 7], [9, 7])])
@pytest.mark.parametrize("inside", [True, False])
def test_thoughts_are_counted_as_they_come(start: list[int], end: list[int], inside: bool) -> None:
    """As a plain loop over the tokens counts them."""
    tokens = torch.tensor([7, 8, 9])[torch.randint(3, (30, 17))]
    found = schedules.thinking(tokens, torch.tensor(start), torch.tensor(end), inside)
    for row, now, count in zip(tokens.tolist(), *map(Tensor.tolist, found), strict=True):
        state, used = inside, 0
        for place in range(1, len(row) + 1):
            used += state
            for tag, after in ((start, True), (end, False)):
                if row[max(place - len(tag), 0) : place] == tag:
                    state = after
        assert (now, count) == (state, used)
    nothing = schedules.thinking(tokens[:, :0], torch.tensor(start), torch.tensor(end), inside)
    assert [each.tolist() for each in nothing] == [[inside] * 30, [0] * 30]


def test_a_thought_bends_toward_the_end_of_its_budget() -> None:
    """λ(left) = λ − (λ − least) · (1 − clip(left / span, 0, 1)), inside a thought; elsewhere λ."""
    schedule = schedules.bend(0.9, budget=8, start=7, end=9, span=4, least=0.1)
    thought = torch.tensor([[7, *[1] * 12], [1] * 13, [7, 1, 1, 9, *[1] * 9], [7, 1, 1, 9, 7, *[1] * 8]])
    lams = torch.stack([torch.as_tensor(schedule(step, thought[:, :step])).expand(4) for step in range(14)])
    full, bending = [0.9] * 6, [0.7, 0.5, 0.3]  # 4, then 3, 2 and 1 of 8 tokens left: bends over the last 4
    assert lams[:, 0].tolist() == pytest.approx([*full, *bending, 0.1, 0.1, 0.1, 0.1, 0.1])
    assert lams[:, 1].tolist() == lams[:, 2].tolist() == pytest.approx([0.9] * 14)
    assert lams[:, 3].tolist() == pytest.approx([0.9] * 7 + [0.7, 0.5, 0.3, 0.1, 0.1, 0.1, 0.1])
    below = schedules.bend(-0.5, budget=2, start=7, end=9)
    assert [float(torch.as_tensor(below(step, thought[:1, :step]))) for step in (0, 3, 9)] == [-0.5] * 3
    short = schedules.bend(0.9, budget=2, start=7, end=9, span=6)  # begins at a third
    assert [float(torch.as_tensor(short(step, thought[:1, :step]))) for step in (0, 1, 2, 3)] == pytest.approx(
        [0.9, 0.3, 0.15, 0.0]
    )


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize(("start", "end"), [([7], [9]), ([7, 8], [9, 10])])
def test_thoughts_are_kept_within_their_budget(
    model: PreTrainedModel, beams: int, start: list[int], end: list[int]
) -> None:
    """Rows that begin a thought at once never end it; the limit does, and lets them begin no other."""
    inputs = prompts()
    length = inputs["input_ids"].shape[1]

    def think(place: int, tokens: Tensor) -> list[int]:
        said = tokens[length:].tolist()
        return [start[len(said)]] if len(said) < len(start) and place else list(range(20, 60))

    options = {**GREEDY, "max_new_tokens": 12, "min_new_tokens": 12, "num_beams": beams}
    limit = ThoughtLimit(length, 3, start, end)
    schedule = schedules.bend(1.0, 3, start, end)
    processors = LogitsProcessorList([PrefixConstrainedLogitsProcessor(think, beams), limit])
    tokens = model.generate(**inputs, intensity=schedule, logits_processor=processors, **options)[:, length:]
    for row, said in enumerate(tokens.tolist()):
        if row:
            assert said[: len(start)] == start
            assert said[len(start) + 3 : len(start) + 3 + len(end)] == end
        assert said.count(end[-1]) == bool(row)
    scores = torch.zeros(2, 30)
    open_again = torch.tensor([[*start, 1, 1, 1, *end], [*start, 1, 1, 1, *[1] * len(end)]])
    ruled = ThoughtLimit(0, 3, start, end)(open_again, scores)
    assert ruled[0, start[0]] == (-torch.inf if len(start) == 1 else 0)
    assert ruled[0].isfinite().sum() >= 29
    assert ruled[1].isfinite().nonzero().flatten().tolist() == [end[0]]
    assert ThoughtLimit(0, 9, start, end)(open_again, scores) is scores


def test_no_new_lam_recompiles(model: PreTrainedModel) -> None:
    torch._dynamo.reset()
    backend, graphs = counting()
    how = CompileConfig(fullgraph=True, backend=backend, mode=None)
    how._compile_all_devices = True
    options = {**GREEDY, "cache_implementation": "static"}
    inputs, counts = prompts(), []
    for lams in ([FALLING, 0.3, schedules.switch_after(7, 1.0, 0.0), 0.9], LAM, [FALLING] * 4):
        wanted = model.generate(**inputs, intensity=lams, **options)
        tokens = model.generate(**inputs, intensity=lams, compile_config=how, **options)
        assert torch.equal(tokens, wanted)
        counts.append(len(graphs))
    assert counts[0] == counts[1] == counts[2] > 0


@torch.no_grad()
def test_parts_at_a_lam_of_their_own(model: PreTrainedModel) -> None:
    """Per sequence, later parts before earlier ones; the others as they were."""
    attn, mlp = [0.0, 0.3, 0.7, 1.0], [1.0, 0.2, 0.0, 0.4]
    parts = {"*": 0.1, "attn": attn, "mlp": mlp, ("mlp", 1): 0.9, ("*.k_norm", range(2)): FALLING}

    def plain(row: int) -> PreTrainedModel:
        ends = pair("qwen3")
        model = merged(*ends, 0.1, torch.float32)
        for name, parameter in model.named_parameters():
            lam = attn[row] if "self_attn" in name and "norm" not in name else 0.1
            lam = (0.9 if "layers.1." in name else mlp[row]) if ".mlp." in name else lam
            lam = 1.0 if "k_norm" in name else lam
            base, target = (end.get_parameter(name).double() for end in ends)
            parameter.copy_(base + lam * (target - base))
        return model

    inputs = prompts()
    tokens = model.generate(**inputs, intensity=parts, **GREEDY | {"max_new_tokens": 1, "min_new_tokens": 1})
    fixed = {**parts, ("*.k_norm", range(2)): 1.0}
    logits = model(**inputs, intensity=fixed).logits
    with dami.intensity(model, fixed):
        assert torch.equal(model(**inputs, intensity=0.7).logits, logits)
        assert torch.equal(model.generate(**inputs, max_new_tokens=1, do_sample=False), tokens)
    for row in range(4):
        seen = inputs["attention_mask"][row].bool()
        wanted = plain(row)(**inputs).logits[row]
        torch.testing.assert_close(logits[row, seen], wanted[seen], rtol=1e-4, atol=1e-4)
        assert tokens[row, -1] == wanted[-1].argmax()
    assert all(module.lerp.part is None for module in model.modules() if hasattr(module, "lerp"))


@torch.no_grad()
def test_parts_compile_to_one_graph(model: PreTrainedModel) -> None:
    torch._dynamo.reset()
    backend, graphs = counting()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    inputs = prompts()
    for attn in ([0.0, 0.3, 0.7, 1.0], [1.0, 0.0, 0.1, 0.2]):
        with dami.intensity(model, {"attn": attn, "mlp": 0.3}):
            assert torch.equal(compiled(**inputs).logits, model(**inputs).logits)
    assert len(graphs) == 1
    parts = {"attn": 0.2, ("mlp", 1): 0.7}
    assert torch.equal(compiled(**inputs, intensity=parts).logits, model(**inputs, intensity=parts).logits)


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({}, ValueError, "intensity must name a part of the model, got an empty mapping"),
        ({7: 0.5}, TypeError, r"intensity must have keys such as 'mlp' or \('\*.q_proj', range\(4, 8\)\), got 7"),
        (
            {("mlp", 0.5): 0.5},
            TypeError,
            r"got \('mlp', 0.5\): layers must be the index of a layer, or several, got 0.5",
        ),
        ({("mlp", "01"): 0.5}, TypeError, "layers must be the index of a layer, or several, got '01'"),
        ({("mlp", (0, 9)): 0.5}, ValueError, r"name no interpolated module by \[9\]; there are layers \[0, 1\]"),
        ({(("mlp", "attn"), 0): 0.5}, TypeError, r"got \(\('mlp', 'attn'\), 0\)"),
        ({"mpl": 0.5}, ValueError, "modules='mpl' name no interpolated module"),
        ({"experts": 0.5}, ValueError, "modules='experts' name no interpolated module"),
        ({"mlp": float("nan")}, ValueError, "intensity must be finite"),
        ({"attn": 0.5, "mlp": [0.1, 0.2, 0.3]}, ValueError, "got 3 for"),
    ],
    ids=str,
)
def test_bad_parts_are_refused(
    model: PreTrainedModel, parts: dict[Any, Any], error: type[Exception], message: str
) -> None:
    for run in (model.forward, model.generate):
        with pytest.raises(error, match=message):
            run(**prompts(), intensity=parts)
    assert all(module.lerp.part is None for module in model.modules() if hasattr(module, "lerp"))
    assert model.dami_patch.program is None


def test_parts_exclude_layers_and_modules(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="layers and modules are for one intensity"):
        dami.intensity(model, {"mlp": 0.5}, layers=[0]).__enter__()


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        (lambda step, tokens: float("nan"), ValueError, "at step 0, for 4 rows: intensity must be finite, got nan"),
        (lambda step, tokens: 0.5 if step < 2 else [0.5], ValueError, "at step 2, for 4 rows: .*got 1 for 4 sequences"),
        (lambda step, tokens: "0.5", TypeError, "for 4 rows: intensity must be a real number.*got str"),
        (lambda step, tokens: torch.zeros(4, 1), ValueError, r"got shape \[4, 1\]"),
        (schedules.linear(0.0, float("inf"), 3), ValueError, r"linear\(start=0.0, end=inf, steps=3\) at step 0"),
    ],
)
def test_a_schedule_that_returns_something_else_is_named(
    model: PreTrainedModel, schedule: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model.generate(**prompts(), intensity=schedule, **GREEDY)
    assert model.dami_patch.program is None
    assert model.dami_patch.dial.lam == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.linear(1.0, 0.0, steps=0), "steps must be at least 1, got 0"),
        (lambda: schedules.switch_after([], 1.0, 0.0), "ids must hold at least one token"),
        (lambda: schedules.bend(1.0, 0, 7, 9), "budget must be at least 1, got 0"),
        (lambda: schedules.bend(1.0, 5, 7, 9, span=0), "span must be at least 1, got 0"),
        (lambda: schedules.bend(1.0, 5, [], 9), "start must hold at least one token, got none"),
        (lambda: ThoughtLimit(4, -1, 7, 9), "budget must be at least 0, got -1"),
        (lambda: ThoughtLimit(4, 1, 7, []), "end must hold at least one token, got none"),
    ],
)
def test_a_schedule_checks_its_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("intensity", [{"intensity": FALLING}, {"intensity": 0.5, "prompt_intensity": 0.0}], ids=str)
def test_assisted_decoding_has_one_lam_for_all_steps(model: PreTrainedModel, intensity: dict[str, Any]) -> None:
    ids = torch.randint(3, VOCABULARY, (1, 5))
    options = ({"assistant_model": pair("qwen3")[0]}, {"prompt_lookup_num_tokens": 2}, {"assistant_early_exit": 1})
    for option in options:
        with pytest.raises(ValueError, match=f"{next(iter(option))} takes one intensity for all steps"):
            model.generate(ids, **intensity, **option, **GREEDY)


def test_a_schedule_is_for_generate(model: PreTrainedModel) -> None:
    takes = "forward takes a number, one per sequence, a preset or a mapping of parts as intensity"
    for use, whose in (FALLING, "a schedule, which is for generate$"), ("auto", "'auto', which is for generate, "):
        with pytest.raises(TypeError, match=f"^{takes}, got {whose}"):
            model(**prompts(), intensity=use)


class ByLength:
    """An estimator that asks the model, too."""

    def estimate(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        model(**batch, intensity=1.0)
        model.generate(**batch, intensity=FALLING, max_new_tokens=2, do_sample=False)
        return batch["attention_mask"].sum(1) / 10


def test_auto_asks_the_estimator(model: PreTrainedModel) -> None:
    inputs = prompts()
    with pytest.raises(ValueError, match=r'intensity="auto" needs an estimator: attach one with dami.attach'):
        model.generate(**inputs, intensity="auto", **GREEDY)
    assert dami.attach(model, ByLength()) is model
    lams = [n / 10 for n in inputs["attention_mask"].sum(1).tolist()]
    wanted = model.generate(**inputs, intensity=lams, **GREEDY)
    assert torch.equal(model.generate(**inputs, intensity="auto", **GREEDY), wanted)
    assert torch.equal(dami.twin(model).generate(**inputs, intensity="auto", **GREEDY), wanted)
    inputs["inputs"] = inputs.pop("input_ids")
    assert torch.equal(model.generate(**inputs, intensity="auto", **GREEDY), wanted)
    static: Estimator = StaticIntensity(0.37)
    dami.attach(model, static)
    assert torch.equal(
        model.generate(**inputs, intensity="auto", **GREEDY), references("qwen3", 0.37)[0].generate(**inputs, **GREEDY)
    )
    with pytest.raises(TypeError, match=r"estimator must have a method estimate\(model, batch\), got int"):
        dami.attach(model, 3)


def test_auto_is_asked_about_the_prompts_that_want_it(model: PreTrainedModel) -> None:
    inputs = prompts()
    dami.attach(model, ByLength())
    lengths = inputs["attention_mask"].sum(1).tolist()
    lams = [0.2, *(n / 10 for n in lengths[1:])]
    found = model.generate(**inputs, intensity=[0.2, *["auto"] * (len(lams) - 1)], **GREEDY)
    assert torch.equal(found, model.generate(**inputs, intensity=lams, **GREEDY))
    with pytest.raises(ValueError, match="intensity must be a real number, or one per sequence, got 2 for"):
        model.generate(**inputs, intensity=["auto"] * 2, **GREEDY)


def test_auto_of_an_invariant_model_does_not_depend_on_neighbours() -> None:
    """The estimator sees each prompt by itself and without padding, be it as ids or as embeddings."""

    class Seen:
        def estimate(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
            assert all(tensor.shape[:2] == batch["attention_mask"].shape for tensor in batch.values())
            assert batch["attention_mask"].all()
            found = model(**batch, intensity=0.0).logits[:, -1]
            asked.append(next(iter(batch.values())))
            return found.softmax(1).amax(1)

    asked: list[Tensor] = []
    model = dami.attach(dami.patch_model(*pair("qwen3"), invariant=True), Seen())
    batch = prompts()
    rows = len(batch["input_ids"])
    with torch.no_grad():
        together = estimates(model, batch, rows)
        assert [len(ids) for ids in asked] == [1] * rows
        for row in range(rows):
            ids = batch["input_ids"][row : row + 1, batch["attention_mask"][row].bool()]
            assert torch.equal(asked[row], ids)
            assert estimates(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 1) == together[row]
        embedded = {
            "inputs_embeds": torch.randn(2, 3, model.config.hidden_size),
            "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        }
        asked.clear()
        estimates(model, embedded, 2)
        assert [each.shape[1] for each in asked] == [2, 3]


def test_a_preset_stands_for_its_number_wherever_a_number_does(model: PreTrainedModel) -> None:
    inputs = prompts()
    rows = len(inputs["input_ids"])
    dami.attach(model, None, {"low": 0.25, "high": 1})
    for name, lam in (("low", 0.25), (["high", 0.1, *["low"] * (rows - 2)], [1.0, 0.1, *[0.25] * (rows - 2)])):
        wanted = model.generate(**inputs, intensity=lam, **GREEDY)
        assert torch.equal(model.generate(**inputs, intensity=name, **GREEDY), wanted)
        assert torch.equal(model.generate(**inputs, intensity={"*": name}, **GREEDY), wanted)
        with dami.intensity(model, name):
            assert torch.equal(model(**inputs).logits, model(**inputs, intensity=lam).logits)
        assert torch.equal(model(**inputs, intensity=name).logits, model(**inputs, intensity=lam).logits)
    dami.attach(model, StaticIntensity(0.5))  # leaves the presets
    with pytest.raises(ValueError, match=r"intensity must be a number, one of \['high', 'low'\] or 'auto', got 'lo'"):
        model.generate(**inputs, intensity="lo", **GREEDY)
    dami.attach(model, None, {})
    with pytest.raises(ValueError, match="a preset, of which the model has none, or 'auto', got 'low'"):
        model.generate(**inputs, intensity="low")
    with pytest.raises(ValueError, match="a number or a preset, of which the model has none, got 'low'"):
        model(**inputs, intensity="low")
    with pytest.raises(ValueError, match='presets must have names other than "auto"'):
        dami.attach(model, None, {"auto": 0.5})
    with pytest.raises(ValueError, match=r"presets\['low'\] must be finite"):
        dami.attach(model, None, {"low": float("inf")})


@pytest.mark.parametrize("config", [Qwen3MoeConfig, Mamba2Config, DbrxConfig])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_list_of_one_is_one_lam_for_the_batch(config: type[PreTrainedConfig], beams: int) -> None:
    """Of one prompt, however it is said: also to those that take one λ for a batch only, and with beams."""
    model = dami.attach(dami.patch_model(*architectures.pair(config)), StaticIntensity(0.5))
    ids = torch.randint(4, architectures.VOCABULARY, (1, 7))
    options = {**GREEDY, "num_beams": beams, "pad_token_id": 0}
    wanted = model.generate(ids, intensity=0.5, **options)
    for one in ([0.5], torch.tensor([0.5]), "auto", ["auto"], lambda *_: 0.5, [lambda *_: 0.5], {"*": [0.5]}):
        assert torch.equal(model.generate(ids, intensity=one, **options), wanted), one
    assert torch.equal(model.generate(ids, intensity=[0.5], prompt_intensity=[0.5], **options), wanted)
    for part in ({}, {"modules": "*"}):
        with dami.intensity(model, [0.5], **part):
            assert torch.equal(model.generate(ids, **options), wanted)
    assert torch.equal(model(ids, intensity=[0.5]).logits, model(ids, intensity=0.5).logits)
