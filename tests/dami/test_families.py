"""Every family, whole: each row of a mixed batch against a plain model merged at the row's λ."""

from __future__ import annotations

import dami
import pytest
import torch
from transformers import PreTrainedModel

from tests.dami.families import FAMILIES, VOCABULARY, batch, pair, references
from tests.tolerance import assert_as_accurate

LAM = [0.0, 0.37, 1.0, 1.2]


OPTIONS = [
    {"do_sample": False},
    {"cache_implementation": "static", "do_sample": False},
    {"padding": "right", "do_sample": False},
    {"do_sample": True, "top_k": 0},
    {"num_beams": 3, "do_sample": True},
    {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    {"num_return_sequences": 3, "do_sample": True, "top_k": 0},
    {"use_cache": False, "do_sample": False},
    {"prompt_lookup_num_tokens": 2, "do_sample": False},
]
IN_FULL = "qwen3", "gemma2", "gpt2"  # plain; windows, and a head that is capped; positions that are learned


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_logits_of_each_row_are_those_of_the_model_merged_at_its_lam(family: str, padding: str) -> None:
    inputs = batch(padding)
    logits = dami.patch_model(*pair(family))(**inputs, intensity=LAM).logits
    for row, (lam, seen) in enumerate(zip(LAM, inputs["attention_mask"].bool(), strict=True)):
        plain, oracle = references(family, lam)
        expected = oracle(inputs["input_ids"][row : row + 1, seen]).logits[0]
        # twice: some norms compute in float32 whatever comes, so that the oracle is not exact either
        assert_as_accurate(logits[row, seen], expected, plain(**inputs).logits[row, seen], factor=2)


@torch.no_grad()
def test_positions_shared_by_the_batch_take_each_row_at_its_lam(family: str) -> None:
    ids = torch.randint(3, VOCABULARY, (len(LAM), 6))
    logits = dami.patch_model(*pair(family))(ids, intensity=LAM).logits  # GPT-2 looks positions up once, [1, T]
    for row, lam in enumerate(LAM):
        plain, oracle = (reference(ids).logits[row] for reference in references(family, lam))
        assert_as_accurate(logits[row], oracle, plain, factor=2)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param(family, options, id="-".join((family, *options)), marks=[pytest.mark.slow] * marked)
        for family in FAMILIES
        for place, options in enumerate(OPTIONS)
        for marked in [place > 1 and family not in IN_FULL]
    ],
)
def test_generates_for_each_row_the_tokens_of_the_model_merged_at_its_lam(
    family: str, options: dict[str, object]
) -> None:
    options = {"padding": "left", "max_new_tokens": 6, "min_new_tokens": 6, **options}
    inputs = batch(str(options.pop("padding")), rows=1 if "prompt_lookup_num_tokens" in options else 4)
    del inputs["position_ids"]
    lams = LAM[1:2] if len(inputs["input_ids"]) == 1 else LAM

    def run(model: PreTrainedModel, **more: object) -> list[torch.Tensor]:
        torch.manual_seed(3)
        tokens = model.generate(**inputs, **options, **more)
        return list(tokens.unflatten(0, (len(lams), -1)))

    for row, tokens in enumerate(run(dami.patch_model(*pair(family)), intensity=lams)):
        assert torch.equal(tokens, run(references(family, lams[row])[0])[row]), f"row {row}"


def test_unpatching_gives_back_the_very_same_modules(family: str) -> None:
    model, thinking = pair(family)
    modules = [(module, type(module)) for module in model.modules()]
    parameters = [(parameter, parameter.clone(), parameter.stride()) for parameter in model.parameters()]
    keys, state = list(model.state_dict()), set(vars(model))
    other = {name: tensor.clone() for name, tensor in thinking.state_dict().items()}
    inputs = batch("left")
    logits = model(**inputs).logits
    dami.unpatch_model(dami.patch_model(model, thinking))
    assert [(module, type(module)) for module in model.modules()] == modules
    assert set(vars(model)) == state
    assert not any(hasattr(module, "lerp") for module in model.modules())
    assert list(model.state_dict()) == keys
    for (before, value, stride), now in zip(parameters, model.parameters(), strict=True):
        assert now is before
        assert now.requires_grad
        assert torch.equal(now, value)
        assert now.stride() == stride
    assert torch.equal(model(**inputs).logits, logits)
    assert all(torch.equal(tensor, other[name]) for name, tensor in thinking.state_dict().items())


def test_every_parameter_is_described_and_interpolated(family: str) -> None:
    model, thinking = pair(family)
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    description = dami.describe(dami.patch_model(model, thinking))
    assert {row.name for row in description.rows} == names
    assert all(row.interpolated for row in description.rows)
    assert description.nbytes == 2 * nbytes == sum(parameter.nbytes for parameter in model.parameters())
