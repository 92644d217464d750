"""Patched models in the quantised formats, against plain models of the ends as these formats keep them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import dami
import pytest
import torch
from dami.layers.kinds import kind_of
from transformers import PreTrainedModel

from dami_kernels import LerpWeight, formats
from tests.dami.families import batch, merged, pair
from tests.dami.test_checkpoints import save
from tests.dami_kernels.test_formats import own_format  # noqa: F401 (a fixture)
from tests.tolerance import assert_as_accurate

LAM = [0.0, 0.37, 1.0, 1.2]
FORMATS = ["int8", "int4", "w8d4"]
every_format = pytest.mark.parametrize("format", FORMATS)


def as_kept(instruct: PreTrainedModel, thinking: PreTrainedModel, format: str) -> tuple[PreTrainedModel, ...]:
    """The ends in float64 after a round trip through the format."""
    ends = copy.deepcopy(instruct).double(), copy.deepcopy(thinking).double()
    kinds = {
        id(parameter): kind_of(module)[0]
        for module in instruct.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    }
    with torch.no_grad():
        for base, target, *kept in zip(*(end.parameters() for end in (instruct, thinking, *ends)), strict=True):
            if base.dim() == 2:
                kind = kinds[id(base)]
                weight = LerpWeight.pack(*(kind.as_operand(end).contiguous() for end in (base, target)), format)
                for end, unpacked in zip(kept, weight.unpack(), strict=True):
                    end.copy_(kind.as_operand(unpacked))
    return ends


@every_format
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
@torch.no_grad()
def test_each_row_is_the_model_of_the_ends_as_kept(family: str, format: str) -> None:
    ends, inputs = pair(family), batch("left")
    kept = as_kept(*ends, format)
    logits = dami.patch_model(*ends, format)(**inputs, intensity=LAM).logits
    for row, (lam, seen) in enumerate(zip(LAM, inputs["attention_mask"].bool(), strict=True)):
        plain, oracle = (merged(*kept, lam, dtype) for dtype in (torch.float32, torch.float64))
        expected = oracle(inputs["input_ids"][row : row + 1, seen]).logits[0]
        assert_as_accurate(logits[row, seen], expected, plain(**inputs).logits[row, seen], factor=2)


@every_format
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_taking_the_patch_off(family: str, format: str) -> None:
    """The very same model again; after `w8d4`, which does not keep it, the one that λ=0 ran with."""
    model, thinking = pair(family)
    before = copy.deepcopy(model)
    inputs = batch("left")
    parameters = list(model.parameters())
    with torch.no_grad():
        expected = dami.patch_model(model, thinking, format)(**inputs, intensity=0.0).logits
        dami.unpatch_model(model)
        assert [id(parameter) for parameter in model.parameters()] == [id(parameter) for parameter in parameters]
        torch.testing.assert_close(model(**inputs).logits, expected)
    for own, original in zip(model.parameters(), before.parameters(), strict=True):
        assert (own.shape, own.dtype, own.stride()) == (original.shape, original.dtype, original.stride())
        assert format == "w8d4" or torch.equal(own, original)


@torch.no_grad()
def test_a_base_that_is_not_kept_leaves_a_placeholder() -> None:
    """Of the right shape, dtype and device, for all who ask; without memory, even in another dtype or a copy."""
    model = dami.patch_model(*pair("llama"), "w8d4")
    copies = copy.deepcopy(model), dami.twin(model), pickle.loads(pickle.dumps(model))
    for kept in (model, model.half(), *copies):
        weight = kept.lm_head.weight
        assert (weight.shape, weight.dtype) == ((101, 24), kept.dtype)
        assert weight.isnan().all()
        assert weight.untyped_storage().nbytes() <= 4
    assert dami.unpatch_model(copy.deepcopy(model)).lm_head.weight.isfinite().all()


@torch.no_grad()
def test_a_pair_that_has_told_hidden_states_can_be_pickled() -> None:
    """As it does for "auto". transformers leaves hooks on a model then, which no pickle can hold."""
    model, inputs = dami.patch_model(*pair("llama")), batch("left")
    asked = {"intensity": [0.0, 0.2, 0.7, 1.0], "output_hidden_states": True}
    wanted = model(**inputs, **asked).hidden_states
    for other in (pickle.loads(pickle.dumps(model)), model):
        assert all(map(torch.equal, other(**inputs, **asked).hidden_states, wanted))


@every_format
@torch.no_grad()
def test_the_state_is_what_is_stored(format: str) -> None:
    """Without placeholders, and it loads into another patched model."""
    first, second = (dami.patch_model(*pair("llama"), format) for _ in range(2))
    for parameter in second.parameters():
        parameter.zero_()
    state = first.state_dict()
    assert sum(tensor.nbytes for tensor in state.values()) == dami.describe(first).nbytes
    second.load_state_dict(state)
    inputs = batch("left")
    assert torch.equal(second(**inputs, intensity=LAM).logits, first(**inputs, intensity=LAM).logits)
    del state["model.norm.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"model.norm.weight\""):
        second.load_state_dict(state)


@every_format
def test_half_precision_after_patching_leaves_the_scales_alone(format: str) -> None:
    model, inputs = dami.patch_model(*pair("llama"), format), batch("left")
    with torch.no_grad():
        before = model(**inputs, intensity=LAM).logits
        scales = {name: scale.clone() for name, scale in model.named_parameters() if name.endswith("_scale")}
        after = model.half()(**inputs, intensity=LAM).logits
    assert scales
    for name, scale in scales.items():
        assert torch.equal(model.get_parameter(name), scale)
    assert after.dtype == torch.float16
    assert (after.float() - before).abs().max() < 0.05 * before.abs().max()


@every_format
@torch.no_grad()
def test_loading_is_patching(format: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    ends = pair("qwen3")
    directories = [save(end, tmp_path / name) for end, name in zip(ends, ("instruct", "thinking"), strict=True)]
    loaded, inputs = dami.load_pair(*directories, format=format)[0], batch("left")
    patched = dami.patch_model(*ends, format)
    assert torch.equal(loaded(**inputs, intensity=LAM).logits, patched(**inputs, intensity=LAM).logits)
    description = dami.describe(loaded)
    assert {row.format for row in description.rows} == {format, "pair"}
    assert all(row.dtype == "float32" for row in description.rows)
    embedding = next(row for row in description.rows if row.name == "model.embed_tokens.weight")
    assert embedding.shape == (101, 24)
    # 24 weights a row make one group of 32
    assert embedding.nbytes == 101 * {"int8": 96 + 32 + 2, "int4": 96 + 16 + 2, "w8d4": 32 + 2 + 16 + 2}[format]


def test_what_a_format_cannot_hold_leaves_the_model_as_it_was() -> None:
    model, thinking = pair("llama")
    with torch.no_grad():
        thinking.lm_head.weight[3, 4] = float("inf")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for format, message in (("w8d4", "target must be finite to be quantised"), ("lowrank", "rank of at most")):
        with pytest.raises(ValueError, match=message):
            dami.patch_model(model, thinking, format)
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*runs as plain torch.*no kernel reads the format 'rows8'")
def test_a_format_of_ones_own_is_packed_saved_and_loaded(own_format: str, tmp_path: Path) -> None:  # noqa: F811
    ends, inputs = pair("qwen3"), batch("left")
    paths = [save(end, tmp_path / name) for end, name in zip(ends, ("instruct", "thinking"), strict=True)]
    model, _ = dami.load_pair(*paths, own_format)
    dami.save_pair(model, tmp_path / "saved")
    dami.pack(*paths, tmp_path / "packed", own_format)
    with torch.no_grad():
        logits = model(**inputs, intensity=LAM).logits
        for name in ("saved", "packed"):
            loaded, _ = dami.load_pair(tmp_path / name)
            assert torch.equal(loaded(**inputs, intensity=LAM).logits, logits)
            assert "the base as it is, the difference in 8 bits with" in (tmp_path / name / "README.md").read_text()
    half, _ = dami.load_pair(tmp_path / "saved", dtype=torch.float16)
    kept = {tensor.dtype for name, tensor in half.state_dict().items() if name.endswith("_scale")}
    assert kept == {torch.float32}


def test_a_format_must_be_registered_before_its_pairs_are_loaded(
    own_format: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends = pair("llama")
    paths = [save(end, tmp_path / name) for end, name in zip(ends, ("instruct", "thinking"), strict=True)]
    dami.pack(*paths, tmp_path / "packed", own_format)
    monkeypatch.delitem(formats._FORMATS, own_format)
    with pytest.raises(ValueError, match=r"format must be one of .*, got .rows8.; `register_format` adds others"):
        dami.load_pair(tmp_path / "packed")
