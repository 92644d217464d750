"""`prompt_intensity` with `prompt_tail`, against plain models: one goes on from what another has read."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dami
import pytest
import torch
from dami import schedules
from dami.estimators import StaticIntensity
from dami.generation.pieces import CACHE, generate_in_pieces
from torch import Tensor
from transformers import (
    BartConfig,
    BertConfig,
    BigBirdConfig,
    CpmAntConfig,
    JambaConfig,
    MambaConfig,
    PreTrainedModel,
    Qwen3NextConfig,
)

from tests.dami import architectures
from tests.dami.families import merged, pair, references
from tests.dami.test_generation import GREEDY, LAM, allowed, prompts, seq2seq

READ = [1.0, 0.0, 0.5, 0.0]
FALLING = schedules.linear(1.0, 0.2, steps=4)


@pytest.fixture
def model() -> PreTrainedModel:
    return dami.patch_model(*pair("qwen3"))


def continued(
    reads: PreTrainedModel, says: PreTrainedModel, inputs: dict[str, Tensor], tail: int, **options: Any
) -> Tensor:
    """What `says` generates when `reads` has read all but the last `tail` tokens of the prompts."""
    torch.manual_seed(3)
    if tail >= inputs["input_ids"].shape[1]:
        return says.generate(**inputs, **options)
    mask = inputs["attention_mask"]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        cache = reads(inputs["input_ids"][:, :-tail], attention_mask=mask[:, :-tail], position_ids=places[:, :-tail])
    copies = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    cache[CACHE].batch_repeat_interleave(copies)
    return says.generate(**inputs, **{CACHE: cache[CACHE]}, **options)


def assert_rows_are_continued(
    family: str, found: Tensor, inputs: dict[str, Tensor], read: list[float], tails: list[int], **options: Any
) -> None:
    rows = len(tails)
    exact = family != "gemma2"  # in float64, transformers' eager attention gives NaN where there is padding
    for row, tail in enumerate(tails):
        reads, says = references(family, read[row])[exact], references(family, LAM[row])[exact]
        wanted = continued(reads, says, inputs, tail, **options).unflatten(0, (rows, -1))[row]
        assert torch.equal(found.unflatten(0, (rows, -1))[row], wanted), f"row {row}"


@contextmanager
def counted(model: Any) -> Iterator[list[Tensor]]:
    """Collects the shapes of what the model computes: sequences and tokens of each pass."""
    passes: list[Any] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, given: passes.append(given[0].shape))
    try:
        yield passes
    finally:
        hook.remove()


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2", "gpt2"])  # two attend to 4 tokens only
@pytest.mark.parametrize("tail", [1, 3])
def test_the_beginning_is_read_at_another_lam(family: str, tail: int) -> None:
    model, inputs = dami.patch_model(*pair(family)), prompts()
    found = model.generate(**inputs, intensity=LAM, prompt_intensity=READ, prompt_tail=tail, **GREEDY)
    assert_rows_are_continued(family, found, inputs, READ, [tail] * 4, **GREEDY)
    if tail == 1:
        assert torch.equal(model.generate(**inputs, intensity=LAM, prompt_intensity=READ, **GREEDY), found)


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 2},
        {"prefill_chunk_size": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"prefix_allowed_tokens_fn": allowed},
        {"sequence_bias": [[[7], 5.0]], "repetition_penalty": 1.3},
        {"guidance_scale": 1.5},
    ],
    ids="+".join,
)
@pytest.mark.parametrize("tails", [2, [1, 3, 2, 9]], ids=str)
def test_every_mode_goes_on_from_the_beginning(family: str, options: dict[str, Any], tails: Any) -> None:
    model, inputs = dami.patch_model(*pair(family)), prompts()
    torch.manual_seed(3)
    found = model.generate(**inputs, intensity=LAM, prompt_intensity=READ, prompt_tail=tails, **{**GREEDY, **options})
    each = tails if isinstance(tails, list) else [tails] * 4
    plain = {
        name: value for name, value in options.items() if name not in ("cache_implementation", "prefill_chunk_size")
    }
    assert_rows_are_continued(family, found, inputs, READ, each, **{**GREEDY, **plain})


def taking_turns(read: float, said: float) -> PreTrainedModel:
    """A plain model that is at one λ while it reads the prompt, and at another from its first step on."""
    model = copy.deepcopy(references("qwen3", read)[1])
    prepare = model.prepare_inputs_for_generation

    def prepare_inputs_for_generation(*args: Any, **kwargs: Any) -> Any:
        lam = read if kwargs.get("is_first_iteration") else said
        model.load_state_dict(references("qwen3", lam)[1].state_dict())
        return prepare(*args, **kwargs)

    model.prepare_inputs_for_generation = prepare_inputs_for_generation
    return model


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_without_a_tail_the_first_token_follows_the_prompts_lam(
    model: PreTrainedModel, options: dict[str, Any]
) -> None:
    """Also in a batch whose other prompts have one."""
    inputs, tails = prompts(), [0, 2, 0, 1]
    for each in (0, tails):
        found = model.generate(
            **inputs, intensity=LAM, prompt_intensity=READ, prompt_tail=each, **{**GREEDY, **options}
        )
        for row in (0, 2):
            wanted = taking_turns(READ[row], LAM[row]).generate(**inputs, **{**GREEDY, **options})
            assert torch.equal(found[row], wanted[row]), f"row {row}"


def test_what_prompts_share_is_read_once_and_at_one_lam(model: PreTrainedModel) -> None:
    """A sweep over λ reads its question once; prompts that begin alike, their beginning; whatever the padding."""
    torch.manual_seed(0)
    ids = torch.randint(3, 101, (1, 9))
    lams: list[Tensor] = []
    model.register_forward_pre_hook(lambda *_: lams.append(model.dami_patch.dial.lam))
    with counted(model) as passes:
        model.generate(ids.repeat(4, 1), intensity=LAM, prompt_intensity=0.5, **GREEDY)
    assert passes[:3] == [(1, 8), (4, 1), (4, 1)]
    assert lams[0] == 0.5
    assert lams[0].dim() == 0  # no row at another λ
    assert lams[1].tolist() == pytest.approx(LAM)
    start, questions = torch.randint(3, 101, (5,)), [torch.randint(3, 101, (n,)) for n in (2, 4, 3)]
    rows = torch.zeros(3, 9, dtype=torch.int64)
    for row, question in zip(rows, questions, strict=True):
        row[9 - 5 - len(question) :] = torch.cat([start, question])
    inputs = {"input_ids": rows, "attention_mask": (rows != 0).long()}
    with counted(model) as passes:
        model.generate(**inputs, intensity=LAM[:3], prompt_intensity=0.5, prompt_tail=[2, 4, 3], **GREEDY)
    assert passes[:2] == [(1, 5), (3, 4)]
    with counted(model) as passes:  # another λ is another beginning
        model.generate(
            **inputs, intensity=0.5, prompt_intensity=[0.5, 0.2, 0.5], prompt_tail=[2, 4, 3], num_beams=2, **GREEDY
        )
    assert passes[:2] == [(2, 5), (6, 4)]
    with counted(model) as passes:
        model.generate(**inputs, intensity=LAM[:3], prompt_intensity=0.5, prompt_tail=9, **GREEDY)
    assert passes[0] == (3, 9)


def test_parts_and_schedules_start_with_the_tail(model: PreTrainedModel) -> None:
    inputs, steps = prompts(), []

    def falling(step: int, tokens: Tensor) -> float:
        steps.append((step, tokens.shape))
        return FALLING(step, tokens)

    how = {"prompt_intensity": 0.0, "prompt_tail": 2, **GREEDY}
    found = model.generate(**inputs, intensity=falling, **how)
    assert steps == [(n, (4, n)) for n in range(6)]
    assert torch.equal(model.generate(**inputs, intensity={"*": falling}, **how), found)
    of_rows = model.generate(**inputs, intensity=LAM, **how)
    with dami.intensity(model, LAM):
        assert torch.equal(model.generate(**inputs, **how), of_rows)


def test_a_part_set_around_the_call_keeps_its_lam_in_beginnings(model: PreTrainedModel) -> None:
    """One per sequence, so that equal beginnings differ."""
    ids = torch.randint(3, 101, (1, 7)).repeat(4, 1)
    ids[2:, 0] = 5
    mlp = [0.0, 1.0, 1.0, 1.0]
    how = {"intensity": 0.3, "prompt_intensity": 0.8, **GREEDY}
    with dami.intensity(model, mlp, modules="mlp"), counted(model) as passes:
        found = model.generate(ids, **how)
    assert passes[0] == (3, 6)
    for row, lam in enumerate(mlp):
        with dami.intensity(model, lam, modules="mlp"):
            assert torch.equal(model.generate(ids[row : row + 1], **how)[0], found[row])


def test_embeddings_have_beginnings_too(model: PreTrainedModel) -> None:
    inputs = prompts()
    how = {"intensity": LAM, "prompt_intensity": 0.4, "prompt_tail": [2, 1, 3, 2], **GREEDY}
    with dami.intensity(model, 0.4), torch.no_grad():
        embedded = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    del embedded["input_ids"]
    seen: list[Any] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[:2]))
    found = model.generate(**embedded, **how)
    assert found.shape == (4, 6)
    assert seen[:2] == [(3, 5), (4, 3)]  # one prompt is all tail
    repeated = {name: x[:1].repeat(4, *[1] * (x.dim() - 1)) for name, x in embedded.items()}
    seen.clear()
    model.generate(**repeated, **how | {"prompt_tail": 1})
    assert seen[:2] == [(1, 6), (4, 1)]
    one = {**embedded, "intensity": 0.4, "prompt_intensity": 0.4, "prompt_tail": 2, **GREEDY}
    assert torch.equal(model.generate(**one), model.generate(**inputs, intensity=0.4, **GREEDY)[:, -6:])


@pytest.mark.parametrize("whole", [True, False])
def test_a_cache_is_continued(model: PreTrainedModel, whole: bool) -> None:
    """Of a first turn read at one λ, the second turn's beginning at another, its tail and the answer at a third."""
    inputs, past = prompts(), 3
    ids, mask = inputs["input_ids"], inputs["attention_mask"]

    def caches(*models: Any) -> Any:
        """The cache when each model has read some columns, the last ones up to column 5."""
        cache, start = None, 0
        for each, end in zip(models, (past, 5), strict=False):
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, start:end]
            with torch.no_grad():
                cache = each(ids[:, start:end], attention_mask=mask[:, :end], position_ids=places, **{CACHE: cache})
            cache, start = cache[CACHE], end
        return cache

    given = ids if whole else ids[:, past:]
    with dami.intensity(model, 0.2):
        own = caches(model)
    found = model.generate(
        given, attention_mask=mask, intensity=1.0, prompt_intensity=0.6, prompt_tail=2, **{CACHE: own}, **GREEDY
    )
    plain = caches(references("qwen3", 0.2)[1], references("qwen3", 0.6)[1])
    wanted = references("qwen3", 1.0)[1].generate(ids, attention_mask=mask, **{CACHE: plain}, **GREEDY)
    assert torch.equal(found[:, -6:], wanted[:, -6:])
    with pytest.raises(ValueError, match="prompt_tail must be one number for all prompts, as a cache was given, got"):
        model.generate(
            ids, attention_mask=mask, prompt_intensity=0.6, prompt_tail=[1, 2, 1, 1], **{CACHE: caches(model)}, **GREEDY
        )


@pytest.mark.parametrize("config", [MambaConfig, JambaConfig, Qwen3NextConfig])
@pytest.mark.parametrize("tail", [1, 3])
def test_a_state_goes_on_from_the_beginning(config: Any, tail: int) -> None:
    """Caches that hold more than keys and values are read in place, and shared as well."""
    reads, says = architectures.pair(config)
    model = dami.patch_model(*copy.deepcopy((reads, says)))
    torch.manual_seed(0)
    ids = torch.randint(4, architectures.VOCABULARY, (1, 7))
    options = {**GREEDY, "pad_token_id": 0, "eos_token_id": 2}
    with counted(model) as passes:
        found = model.generate(ids.repeat(2, 1), intensity=1.0, prompt_intensity=0.0, prompt_tail=tail, **options)
    assert passes[0] == (1, 7 - tail)
    with torch.no_grad():
        cache = reads(ids[:, :-tail], use_cache=True)[CACHE]
        for token in ids[0, -tail:]:
            logits = says(token.view(1, 1), use_cache=True, **{CACHE: cache}).logits
        wanted = []
        for _ in range(6):
            logits[:, -1, 2] = -torch.inf
            wanted.append(logits[:, -1].argmax(1, True))
            logits = says(wanted[-1], use_cache=True, **{CACHE: cache}).logits
    assert torch.equal(found[:, -6:], torch.cat(wanted, 1).repeat(2, 1))
    with pytest.raises(ValueError, match=r"as the cache of .* holds more than keys and values, got"):
        model.generate(ids.repeat(2, 1), prompt_intensity=0.0, prompt_tail=[1, 2], **options)


class ByState:
    """An estimator that goes on from a cache."""

    takes_cache = True

    def __init__(self) -> None:
        self.asked: list[int] = []

    def estimate(self, model: Any, batch: dict[str, Any]) -> Tensor:
        past = batch[CACHE].get_seq_length() if CACHE in batch else 0
        ids, mask = batch["input_ids"], batch["attention_mask"]
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        self.asked.append(past)
        more = {CACHE: batch[CACHE]} if past else {}
        logits = model(ids[:, past:], attention_mask=mask, position_ids=places, intensity=0.0, **more).logits[:, -1]
        return logits.double().softmax(1).amax(1)


def test_an_estimator_goes_on_from_a_beginning_read_at_0(model: PreTrainedModel) -> None:
    """It then costs the tails alone, and chooses what it would have chosen."""
    estimator, inputs = ByState(), prompts()
    dami.attach(model, estimator)
    lams = estimator.estimate(model, inputs).tolist()
    estimator.asked.clear()
    for tails, cached, first in ((1, 6, 6), (2, 5, 5), ([1, 3, 2, 2], 4, 6)):
        wanted = model.generate(**inputs, intensity=lams, prompt_intensity=0.0, prompt_tail=tails, **GREEDY)
        with counted(model) as passes:
            found = model.generate(**inputs, intensity="auto", prompt_intensity=0.0, prompt_tail=tails, **GREEDY)
        assert torch.equal(found, wanted)
        assert [model.dami.chosen[row] for row in range(4)] == pytest.approx(lams)
        assert passes[:3] == [(4, first), (4, 7 - cached), (4, 7 - cached)]
        assert estimator.asked.pop() == cached
    parts = {"attn": "auto", "mlp": ["auto", 0.5, 0.2, "auto"]}
    asked = {"attn": lams, "mlp": [lams[0], 0.5, 0.2, lams[3]]}
    how = {"prompt_intensity": 0.0, "prompt_tail": 2, "num_beams": 2, **GREEDY}
    assert torch.equal(
        model.generate(**inputs, intensity=parts, **how), model.generate(**inputs, intensity=asked, **how)
    )
    some = [0.3, "auto", 0.7, "auto"]
    with counted(model) as passes:
        found = model.generate(**inputs, intensity=some, prompt_intensity=[1.0, 0.0, 0.5, 0.0], **GREEDY)
    assert passes[:3] == [(4, 6), (2, 1), (4, 1)]
    assert [*model.dami.chosen] == [1, 3]
    parts = {"*": some, "mlp": some}
    of_parts = model.generate(**inputs, intensity=parts, prompt_intensity=[1.0, 0.0, 0.5, 0.0], **GREEDY)
    assert torch.equal(of_parts, found)
    some[1::2] = lams[1::2]
    assert torch.equal(found, model.generate(**inputs, intensity=some, prompt_intensity=[1.0, 0.0, 0.5, 0.0], **GREEDY))


@pytest.mark.parametrize("how", [{"prompt_intensity": 0.1}, {"prompt_intensity": 0.0, "prompt_tail": 0}, {}], ids=str)
def test_an_estimator_reads_the_prompts_itself_where_it_must(model: PreTrainedModel, how: dict[str, Any]) -> None:
    estimator, inputs = ByState(), prompts()
    dami.attach(model, estimator)
    lams = estimator.estimate(model, inputs).tolist()
    found = model.generate(**inputs, intensity="auto", **how, **GREEDY)
    assert estimator.asked == [0, 0]
    assert torch.equal(found, model.generate(**inputs, intensity=lams, **how, **GREEDY))
    assert torch.equal(  # nothing left to share
        model.generate(**inputs, intensity="auto", prompt_intensity=0.0, prompt_tail=7, **GREEDY),
        model.generate(**inputs, intensity=lams, **GREEDY),
    )
    assert estimator.asked == [0, 0, 0]


def test_an_encoder_reads_and_the_decoder_answers() -> None:
    ends = seq2seq()
    reads, says = (merged(*ends, lam, torch.float64) for lam in (0.2, 1.0))
    inputs = prompts()
    with torch.no_grad():
        encoded = reads.get_encoder()(**inputs)
    wanted = says.generate(encoder_outputs=encoded, attention_mask=inputs["attention_mask"], **GREEDY)
    model = dami.patch_model(*ends)
    assert torch.equal(model.generate(**inputs, intensity=1.0, prompt_intensity=0.2, **GREEDY), wanted)
    without = model.generate(**inputs, intensity=1.0, prompt_intensity=0.2, prompt_tail=0, **GREEDY)
    assert without.shape == wanted.shape


@pytest.mark.parametrize(
    ("tail", "error", "message"),
    [
        (-1, ValueError, "prompt_tail must be an integer of at least 0, or one per prompt, got -1"),
        ([1, 2], ValueError, "prompt_tail must be .*, got 2 for 4 prompts"),
        (1.5, TypeError, "prompt_tail must be an integer of at least 0, or one per prompt, got 1.5"),
        (True, TypeError, "prompt_tail must be .*, got True"),
        ([1, True, 1, 1], TypeError, "prompt_tail must be"),
        (torch.ones(4), TypeError, "prompt_tail must be"),
        ("all", TypeError, "prompt_tail must be .*, got 'all'"),
        (
            "turn",
            TypeError,
            "prompt_tail must be .*, got 'turn', which is for callers that are given messages, such as",
        ),
    ],
)
def test_a_bad_tail_is_refused(model: PreTrainedModel, tail: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        model.generate(**prompts(), prompt_intensity=0.0, prompt_tail=tail, **GREEDY)
    assert model.dami_patch.program is None


@pytest.mark.parametrize("tail", [1, 0, [1, 1, 1, 1]])
def test_a_tail_needs_a_beginning_at_another_lam(model: PreTrainedModel, tail: Any) -> None:
    with pytest.raises(ValueError, match=r"^prompt_tail says where prompt_intensity ends, and needs one"):
        model.generate(**prompts(), intensity=0.5, prompt_tail=tail, **GREEDY)


def test_tails_may_be_an_array(model: PreTrainedModel) -> None:
    inputs, how = prompts(), {"intensity": LAM, "prompt_intensity": 0.0, **GREEDY}
    wanted = model.generate(**inputs, prompt_tail=[1, 3, 2, 2], **how)
    for each in (torch.tensor([1, 3, 2, 2]), torch.tensor([1, 3, 2, 2]).numpy(), (1, 3, 2, 2)):
        assert torch.equal(model.generate(**inputs, prompt_tail=each, **how), wanted)
    assert torch.equal(
        model.generate(**inputs, prompt_tail=torch.tensor(2), **how), model.generate(**inputs, prompt_tail=2, **how)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cache": False}, "for Qwen3ForCausalLM without a cache of transformers' own, as with use_cache=False"),
        (
            {"position_ids": torch.arange(7).expand(3, 4, 7)},
            r"with position_ids, whose shape \[3, 4, 7\] does not tell",
        ),
    ],
    ids=["use_cache", "position_ids"],
)
def test_what_cannot_be_divided_is_named(model: PreTrainedModel, options: dict[str, Any], message: str) -> None:
    inputs, how = prompts(), {"intensity": 1.0, "prompt_intensity": 0.3, **GREEDY}
    with pytest.raises(ValueError, match=f"^prompt_tail must be 0, so that the whole prompt is read .*, {message}"):
        model.generate(**inputs, **how, **options)
    assert model.dami_patch.program is None
    if "use_cache" in options:  # each step recomputes the prompt at its λ
        assert model.generate(**inputs, **how, prompt_tail=0, **options).shape == (4, 13)


@pytest.mark.parametrize(
    ("config", "tails", "message"),
    [
        (BertConfig, 1, "BertLMHeadModel with is_decoder=False, where tokens see those after them"),
        (BigBirdConfig, 2, "BigBirdForCausalLM with is_decoder=False"),
        (CpmAntConfig, 1, "CpmAntForCausalLM, whose cache does not hold what it has read"),
        (BartConfig, [1, 2], "prompt_tail must be one number .*, as BartForCausalLM takes no position_ids, got"),
    ],
)
def test_models_that_cannot_divide_are_named(config: Any, tails: Any, message: str) -> None:
    model = dami.patch_model(*architectures.pair(config))
    how = {**GREEDY, "pad_token_id": 0, "prompt_intensity": 0.3}
    with pytest.raises(ValueError, match=message):
        model.generate(torch.ones(2, 5, dtype=torch.int64), prompt_tail=tails, **how)
    assert model.dami_patch.program is None


def test_decoding_loops_that_read_the_prompt_at_once_are_refused(model: PreTrainedModel) -> None:
    def loop(model: Any, input_ids: Tensor, **inputs: Any) -> Tensor:
        return input_ids

    inputs = prompts()
    with pytest.raises(ValueError, match=r"^custom_generate takes prompt_tail=0"):
        model.generate(**inputs, prompt_intensity=0.3, custom_generate=loop, **GREEDY)
    assert torch.equal(
        model.generate(**inputs, prompt_intensity=0.3, prompt_tail=0, custom_generate=loop, **GREEDY),
        inputs["input_ids"],
    )


@pytest.mark.parametrize("tails", [1, [1, 3, 2, 2]], ids=str)
def test_compiled_steps_follow_a_beginning(model: PreTrainedModel, tails: Any, graphs: list[Any]) -> None:
    dami.attach(model, StaticIntensity(0.4))
    for lam, read in ((0.3, 0.8), (LAM, READ), ("auto", 0.0)):
        inputs = {**prompts(), "intensity": lam, "prompt_intensity": read, "prompt_tail": tails, **GREEDY}
        assert torch.equal(model.generate(**inputs, compile=True), model.generate(**inputs))
    assert len(graphs) == 1


def test_pieces_go_on_where_the_first_ended(model: PreTrainedModel) -> None:
    """With beginnings, schedules and choices of an estimator, as in one call."""
    dami.attach(model, ByState())
    inputs = prompts()
    lams = [FALLING, "auto", schedules.linear(0.0, 1.0, steps=30), 0.4]
    how = {"prompt_intensity": 0.0, "prompt_tail": [1, 2, 3, 1], "max_new_tokens": 40, "do_sample": False}
    whole = model.generate(**inputs, intensity=lams, num_beams=1, **how)[:, 7:]
    pieces = generate_in_pieces(model, inputs, lams, **how)
    for row in range(4):
        end = (whole[row] == 2).int().argmax().item() + 1 if (whole[row] == 2).any() else whole.shape[1]
        assert torch.equal(pieces[row, :end], whole[row, :end]), f"row {row}"
    parts = {"*": lams, "mlp": [0.5, FALLING, "auto", 0.1]}
    whole = model.generate(**inputs, intensity=parts, num_beams=1, **how)[:, 7:]
    pieces = generate_in_pieces(model, inputs, parts, **how)
    assert torch.equal(pieces[:, :17], whole[:, :17])
