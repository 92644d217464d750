"""Which intensities are taken where: the table, which docs/generation.md shows too, against every caller there is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dami
import numpy as np
import pytest
import torch
from dami.callers import CALLERS, INTENSITY_KINDS, from_text
from dami.chat import ask
from dami.dial.values import Intensity
from dami.estimators import StaticIntensity
from dami.generation.batching import Prompts
from dami.schedules import linear
from dami.sources import check_pair
from transformers import ContinuousBatchingConfig, GenerationConfig

from tests.dami.families import pair

TABLE = """
caller             number  numbers  preset  auto  schedule  parts  iterator
generate           yes     yes      yes     yes   yes       yes    yes
forward            yes     yes      yes     no    no        yes    no
dami.intensity     yes     yes      yes     no    no        yes    no
dami.set_intensity yes     yes      yes     no    no        yes    no
generate_batch     yes     yes      yes     yes   no        no     no
add_request        yes     no       yes     no    no        no     no
add_requests       yes     yes      yes     no    no        no     no
dami.chat.ask      yes     yes      yes     yes   no        no     no
dami.twin          yes     yes      yes     no    no        no     no
dami.materialize   yes     no       yes     no    no        no     no
"""
HEAD, *ROWS = ([*map(str.strip, re.split(r" +", line))] for line in TABLE.strip().splitlines())
TAKES = {caller: {kind for kind, yes in zip(HEAD[1:], row, strict=True) if yes == "yes"} for caller, *row in ROWS}
FALLING = linear(0.25, 0.0, 4)

VALUES: dict[str, tuple[set[str], Callable[[], Any], list[float]]] = {  # its kinds, and λ of two sequences
    "integer": ({"number"}, lambda: 1, [1.0, 1.0]),
    "float": ({"number"}, lambda: 0.5, [0.5, 0.5]),
    "numpy float": ({"number"}, lambda: np.float32(0.5), [0.5, 0.5]),
    "array []": ({"number"}, lambda: np.array(1), [1.0, 1.0]),
    "tensor []": ({"number"}, lambda: torch.tensor(0.5), [0.5, 0.5]),
    "tensor [] of an integer": ({"number"}, lambda: torch.tensor(1), [1.0, 1.0]),
    "list": ({"numbers"}, lambda: [0, 1], [0.0, 1.0]),
    "tuple": ({"numbers"}, lambda: (0.5, 1), [0.5, 1.0]),
    "range": ({"numbers"}, lambda: range(2), [0.0, 1.0]),
    "array": ({"numbers"}, lambda: np.array([0, 1]), [0.0, 1.0]),
    "tensor": ({"numbers"}, lambda: torch.tensor([0.5, 1.0]), [0.5, 1.0]),
    "tensor of integers": ({"numbers"}, lambda: torch.tensor([0, 1]), [0.0, 1.0]),
    "preset": ({"preset"}, lambda: "low", [0.25, 0.25]),
    "presets": ({"numbers", "preset"}, lambda: ["low", 1], [0.25, 1.0]),
    "auto": ({"auto"}, lambda: "auto", [0.75, 0.75]),
    "auto for some": ({"numbers", "auto"}, lambda: [1, "auto"], [1.0, 0.75]),
    "schedule": ({"schedule"}, lambda: FALLING, [0.25, 0.25]),
    "schedule for some": ({"numbers", "schedule"}, lambda: [FALLING, 1.0], [0.25, 1.0]),
    "parts": ({"parts"}, lambda: {"mlp": 1.0, "embed": "low"}, [0.25, 0.25]),
    "parts, each": ({"parts", "numbers"}, lambda: {"*": [0, 1]}, [0.0, 1.0]),
    "iterator": ({"iterator"}, lambda: iter([0.0, 0.5, 1.0]), [0.0, 0.5]),
}
RUBBISH: dict[str, tuple[type[Exception], Any]] = {
    "bool": (TypeError, True),
    "set": (TypeError, {0.5}),
    "bytes": (TypeError, b"01"),
    "none in a list": (TypeError, [None, 0.5]),
    "array of bools": (TypeError, np.array([True, False])),
    "nan": (ValueError, math.nan),
    "a number as text": (ValueError, "0.5"),
}

SHORT = GenerationConfig(do_sample=False, max_new_tokens=1, eos_token_id=-1)
SMALL = ContinuousBatchingConfig(page_size=4, num_blocks=16, max_batch_tokens=16)


@pytest.fixture(scope="module")
def subjects() -> tuple[Any, Any, Any]:
    """A pair with its tokenizer, and a manager of another model's continuous batching that is never started."""
    model, tokenizer = dami.load_pair(*dami.example_pair(), dtype=torch.float32)
    other = dami.patch_model(*pair("qwen3"))
    for each in (model, other):
        dami.attach(each, StaticIntensity(0.75), {"low": 0.25})
    return model, tokenizer, other.init_continuous_batching(SHORT, SMALL)


def lam_of_embedding(model: Any, run: Callable[[], Any]) -> list[float]:
    """λ that the embedding's two rows are read at, in the pass of what runs."""
    seen: list[torch.Tensor] = []
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda module, _: seen.append(module.lerp.lam))
    try:
        run()
    finally:
        hook.remove()
    return seen[0].expand(2).tolist()


def lam_of_prompts(model: Any, value: Any) -> list[float]:
    """λ of two prompts that `generate_batch` hands on to transformers' own."""

    def generate_batch(self: Any, inputs: Prompts, generation_config: Any = None, batching: Any = None) -> Any:
        return [lam for lam, *_ in inputs.lams]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model.dami_patch.original, "generate_batch", generate_batch)
        return list(model.generate_batch([[5], [6]], SHORT, SMALL, intensity=value))


def taken(caller: str, model: Any, tokenizer: Any, manager: Any, value: Any) -> list[float]:
    """λ of two sequences, where a caller is given a value."""
    ids, embedding = torch.tensor([[5], [6]]), model.get_input_embeddings()
    runs: dict[str, Callable[[], Any]] = {
        "generate": lambda: model.generate(ids, intensity=value, max_new_tokens=1, do_sample=False),
        "forward": lambda: model(ids, intensity=value),
    }
    if caller in runs:
        return lam_of_embedding(model, runs[caller])
    if caller == "dami.intensity":
        with dami.intensity(model, value):
            return embedding.lerp.lam.expand(2).tolist()
    if caller == "dami.set_intensity":
        try:
            dami.set_intensity(model, value)
            return embedding.lerp.lam.expand(2).tolist()
        finally:
            dami.set_intensity(model, 0.0)
    if caller == "dami.twin":
        return dami.twin(model, value).dami_patch.dial.lam.expand(2).tolist()
    if caller == "dami.materialize":
        merged = dami.materialize(model, value).get_input_embeddings().weight
        base, target = model.get_input_embeddings().ends("weight").tensors
        lam = ((merged - base) * (target - base)).sum() / (target - base).square().sum()
        return [round(float(lam), 4)] * 2
    if caller == "dami.chat.ask":
        answers = ask(model, tokenizer, ["1 + 1 =", "2 + 2 ="], value, max_new_tokens=1)
        return [answer.intensity for answer in answers if answer.intensity is not None]
    if caller == "generate_batch":
        return lam_of_prompts(model, value)
    if caller == "add_request":
        manager.add_request([5], intensity=value)
    else:
        manager.add_requests([[5], [6]], intensity=value)
    states = [manager.input_queue.get_nowait() for _ in range(manager.input_queue.qsize())]
    lam = [state.logit_processor_kwargs["intensity"] for state in sorted(states, key=lambda each: each.initial_tokens)]
    return lam * (2 // len(lam))


@pytest.mark.parametrize("caller", TAKES)
@torch.no_grad()
def test_what_a_caller_takes_and_refuses(caller: str, subjects: tuple[Any, Any, Any]) -> None:
    """One test for each caller and not for each value: a whole column is read at a glance where it fails."""
    found, wanted = {}, {}
    for name, (kinds, make, lam) in VALUES.items():
        wanted[name] = lam if kinds <= TAKES[caller] else "refused"
        try:
            found[name] = taken(caller, *subjects, make())
        except (TypeError, ValueError) as error:
            assert caller in str(error), str(error)  # noqa: PT017  # the refusals of several values
            found[name] = "refused"
    assert found == wanted


@pytest.mark.parametrize("caller", TAKES)
@torch.no_grad()
def test_what_no_caller_takes(caller: str, subjects: tuple[Any, Any, Any]) -> None:
    for name, (error, value) in RUBBISH.items():
        with pytest.raises(error, match=r"^intensity must be"):
            pytest.fail(f"{caller} has taken {name}: {taken(caller, *subjects, value)}")


def test_the_table_is_what_refusals_go_by_and_what_the_docs_show() -> None:
    assert HEAD[1:] == list(INTENSITY_KINDS)
    for caller, kinds in TAKES.items():
        assert CALLERS[caller].takes == kinds
    page = (Path(__file__).parents[2] / "docs" / "generation.md").read_text()
    shown = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == len(INTENSITY_KINDS) + 1 and set(cells[1:]) <= {"yes", "–"}:
            for name in re.findall("`(.+?)`", cells[0]):
                shown[name] = {kind for kind, cell in zip(INTENSITY_KINDS, cells[1:], strict=True) if cell == "yes"}
    assert shown == {name: set(caller.takes) for name, caller in CALLERS.items()} | {"prompt_intensity": _PROMPT}


_PROMPT = {"number", "numbers", "preset", "iterator"}


@pytest.mark.parametrize(
    ("caller", "value", "message"),
    [
        ("forward", FALLING, "forward takes a number, one per sequence, a preset or a mapping of parts as intensity, "
         "got a schedule, which is for generate$"),
        ("add_request", "auto", "add_request takes a number or a preset as intensity, got 'auto', which is for "
         "generate, generate_batch, dami.chat.ask, dami generate, dami serve and vLLM$"),
        ("add_requests", {"mlp": 0.5}, "got a mapping of parts, which is for generate, forward, dami.intensity and "
         "dami.set_intensity$"),
        ("dami.materialize", [0.1, 0.2], "^intensity must be one number, got 2: dami.materialize takes no more$"),
        ("vLLM", [0.1, 0.2], "^intensity must be one number, got 2: vLLM takes no more$"),
        ("generate", {"mlp": {"attn": 1}}, "^generate, for a part, takes a number, one per sequence, a preset, 'auto' "
         "or a schedule as intensity, got a mapping of parts"),
        ("dami.twin", {0.5}, "got set; dami.twin takes a number, one per sequence or a preset$"),
    ],
)  # fmt: skip
def test_a_refusal_says_who_takes_it(caller: str, value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Intensity.parse(value, CALLERS[caller], {"low": 0.25}, 2)


@pytest.mark.parametrize(
    ("text", "value"), [("0.5", 0.5), ("-0", 0.0), ("1e-1", 0.1), ("low", "low"), ("auto", "auto")]
)
def test_an_intensity_on_the_command_line(text: str, value: Any) -> None:
    assert from_text(text) == value
    assert math.copysign(1, from_text("-0")) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "", "0,5", "[0]", "half way"])
def test_what_is_no_intensity_on_the_command_line(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"must be a finite number such as 0.5, got {text!r}")):
        from_text(text)


def test_a_command_refuses_before_anything_is_loaded() -> None:
    ends = [str(end) for end in dami.example_pair()]
    check_pair(ends, None, ["auto", "low", 0.5])
    check_pair(ends, None, ["low"], CALLERS["dami merge"])
    with pytest.raises(TypeError, match=r"^dami merge takes a number or a preset as intensity, got 'auto'"):
        check_pair(ends, None, ["auto"], CALLERS["dami merge"])
    with pytest.raises(ValueError, match=r"^intensity must be a number or one of \['high'.*\], got 'lo'"):
        check_pair(ends, None, ["lo"], CALLERS["dami merge"])
