"""λ as a user gives it: to forward, to generate, to a part of the model for a while."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import warnings
from collections.abc import Callable
from fractions import Fraction
from itertools import repeat
from pathlib import Path
from typing import Any

import accelerate
import dami
import numpy as np
import pytest
import torch
import transformers
from dami.dial.values import as_lam
from dami.estimators.confidence import ConfidenceEstimator
from dami.keywords import meant
from dami.layers.status import Status
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.models.qwen3 import modeling_qwen3
from transformers.utils import TransformersKwargs

from tests.dami.families import batch, pair

CPU = torch.device("cpu")


@pytest.fixture
def model() -> PreTrainedModel:
    return dami.patch_model(*pair("qwen3"))


@pytest.mark.parametrize(
    ("intensity", "lam"),
    [
        (0.25, torch.tensor(0.25)),
        (1, torch.tensor(1.0)),
        (np.float32(0.5), torch.tensor(0.5)),
        ([0, 0.5, -1.5], torch.tensor([0.0, 0.5, -1.5])),
        ((0.25,), torch.tensor([0.25])),
        (np.array([0.0, 2.0]), torch.tensor([0.0, 2.0])),
        (np.array(0.5), torch.tensor(0.5)),
        (np.array([0, 1], dtype=np.uint8), torch.tensor([0.0, 1.0])),
        (np.int64(1), torch.tensor(1.0)),
        ([np.float16(0.5), Fraction(1, 4), 1], torch.tensor([0.5, 0.25, 1.0])),
        (range(2), torch.tensor([0.0, 1.0])),
        (torch.tensor(1), torch.tensor(1.0)),
        (torch.tensor([0, 1], dtype=torch.uint8), torch.tensor([0.0, 1.0])),
        (torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.5)),
        (torch.tensor([0.5, 1.0], dtype=torch.bfloat16), torch.tensor([0.5, 1.0])),
    ],
    ids=repr,
)
def test_intensity_is_a_number_or_one_per_sequence(intensity: Any, lam: torch.Tensor) -> None:
    got = as_lam(intensity, CPU)
    assert got.dtype == torch.float32
    assert torch.equal(got, lam)


BAD = [
    (float("nan"), ValueError, "intensity must be finite, got nan"),
    ([0.0, 0.5, 1.0, float("inf")], ValueError, r"intensity must be finite, got \[0.0, 0.5, 1.0, inf\]"),
    (torch.tensor(float("nan")), ValueError, "intensity must be finite"),
    ([0.0, 1.0], ValueError, "intensity must be a real number, or one per sequence, got 2 for 4 sequences"),
    ([], ValueError, r"intensity must be a real number, or one per sequence, got shape \[0\]"),
    (torch.zeros(4, 1), ValueError, r"intensity must be a real number, or one per sequence, got shape \[4, 1\]"),
    (torch.zeros(4, dtype=torch.bool), TypeError, "as a tensor of floats or integers, got torch.bool"),
    (torch.zeros(4, dtype=torch.complex64), TypeError, "as a tensor of floats or integers, got torch.complex64"),
    (np.zeros(4, dtype=bool), TypeError, "as an array of floats or integers, got bool"),
    (np.bool_(True), TypeError, "as an array of floats or integers, got bool"),
    (np.array(["0.5"] * 4), TypeError, "as an array of floats or integers, got <U3"),
    (np.array([0.5] * 4, dtype=object), TypeError, "as an array of floats or integers, got object"),
    (np.zeros((4, 1)), ValueError, r"intensity must be a real number, or one per sequence, got shape \[4, 1\]"),
    (b"0101", TypeError, "intensity must be a real number, or one per sequence, got bytes"),
    (bytearray(4), TypeError, "intensity must be a real number, or one per sequence, got bytearray"),
    ({0.0, 0.1, 0.2, 0.3}, TypeError, "intensity must be a real number, or one per sequence, got set"),
    ({0: 1}.values(), TypeError, "intensity must be a real number, or one per sequence, got dict_values"),
    ([[0.0], [1.0], [0.0], [1.0]], TypeError, r"intensity must be a real number, or one per sequence, got \[\[0.0\]"),
    ([True] * 4, TypeError, r"intensity must be a real number, or one per sequence, got \[True"),
    (1e300, ValueError, r"intensity must be finite, got 1e\+300"),
    (10**400, ValueError, "intensity must be a real number, or one per sequence, within the range of floats"),
    ("0.5", ValueError, "intensity must be a number,? (or )?a preset, of which the model has none,.* got '0.5'"),
    ([0.0, "1", 0.5, 1.0], ValueError, "intensity must be a number,? (or )?a preset, of which the model has none,"),
    (True, TypeError, "intensity must be a real number, or one per sequence, got True"),
    (1j, TypeError, "intensity must be a real number, or one per sequence, got complex"),
]


@pytest.mark.parametrize(("intensity", "error", "message"), BAD, ids=[repr(case[0])[:40] for case in BAD])
@torch.no_grad()
def test_a_bad_intensity_is_refused_and_leaves_the_model_as_it_was(
    model: PreTrainedModel, intensity: Any, error: type[Exception], message: str
) -> None:
    inputs = batch("left")
    before = model(**inputs, intensity=0.3).logits
    with dami.intensity(model, 0.3):
        with pytest.raises(error, match=message):
            model(**inputs, intensity=intensity)
        with pytest.raises(error, match=message):
            model.generate(**inputs, intensity=intensity, max_new_tokens=2)
        if "for 4 sequences" not in message:
            with pytest.raises(error, match=message), dami.intensity(model, intensity):
                pass
        assert torch.equal(model(**inputs).logits, before)


def test_forward_takes_no_iterator_which_may_not_end(model: PreTrainedModel) -> None:
    with pytest.raises(TypeError, match="intensity must be a real number, or one per sequence, got repeat"):
        model(**batch("left"), intensity=repeat(0.5))


def test_errors_name_the_argument(model: PreTrainedModel) -> None:
    with pytest.raises(TypeError, match=r"^prompt_intensity must be a real number, or one per sequence, got bytes"):
        model.generate(**batch("left"), prompt_intensity=b"0000")
    with pytest.raises(ValueError, match=r"^prompt_intensity must be finite, got nan"):
        model.generate(**batch("left"), prompt_intensity=float("nan"))
    with pytest.raises(TypeError, match=r"^presets\['low'\] must be a real number.*got \[{0.5}\]"):
        dami.attach(model, None, {"low": [{0.5}]})
    with pytest.raises(ValueError, match=r"^presets\['low'\] must be one number, got 2"):
        dami.attach(model, None, {"low": [0.1, 0.2]})


@torch.no_grad()
def test_intensity_is_zero_until_given_and_again_afterwards(model: PreTrainedModel) -> None:
    inputs = batch("left")
    plain = model(**inputs, intensity=0.0).logits
    half = model(**inputs, intensity=0.5).logits
    assert not torch.equal(plain, half)
    assert torch.equal(model(**inputs).logits, plain)
    with dami.intensity(model, 0.5):
        assert torch.equal(model(**inputs).logits, half)
        assert torch.equal(model(**inputs, intensity=0.0).logits, plain)
        with dami.intensity(model, [0.0] * 4):
            assert torch.equal(model(**inputs).logits, plain)
        assert torch.equal(model(**inputs).logits, half)
        with pytest.raises(KeyError, match="on the way"), dami.intensity(model, 0.9):
            raise KeyError("on the way")
        assert torch.equal(model(**inputs).logits, half)
    assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize(
    ("chosen", "pattern"),
    [
        ({"layers": [1]}, r"layers\.1\."),
        ({"layers": range(2)}, r"layers\."),
        ({"modules": "attn"}, r"self_attn\.._proj"),
        ({"modules": "mlp"}, r"mlp"),
        ({"modules": ["norm"]}, r"norm"),
        ({"modules": ["embed", "head"]}, r"embed_tokens|lm_head"),
        ({"modules": "*.q_proj"}, r"q_proj"),
        ({"layers": [0], "modules": ["mlp", "*.k_norm"]}, r"layers\.0\.(mlp|self_attn\.k_norm)"),
    ],
    ids=repr,
)
@torch.no_grad()
def test_a_part_of_the_model_at_its_own_intensity(chosen: dict[str, Any], pattern: str) -> None:
    """Against a plain model with those parameters of the thinking end, and all others of the instruct end."""
    import re

    instruct, thinking = pair("qwen3")
    inputs = batch("left")
    reference, _ = pair("qwen3")
    other = dict(thinking.named_parameters())
    for name, parameter in reference.named_parameters():
        if re.search(pattern, name):
            parameter.copy_(other[name])
    if "embed" in str(chosen):  # tied, and both are named
        reference.tie_weights()
    model = dami.patch_model(instruct, thinking)
    plain = model(**inputs).logits
    with dami.intensity(model, [1.0] * 4, **chosen):
        part = model(**inputs, intensity=0.0).logits
    torch.testing.assert_close(part, reference(**inputs).logits)
    assert not torch.allclose(part, plain)
    assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
def test_of_two_parts_the_inner_holds(model: PreTrainedModel) -> None:
    inputs = batch("left")
    with dami.intensity(model, 0.4, layers=[0]):
        outer = model(**inputs).logits
        with dami.intensity(model, 0.9, layers=[0, 1]):
            inner = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, outer)
    with dami.intensity(model, 0.9, layers=[0, 1]):
        assert torch.equal(model(**inputs).logits, inner)


COPIES: dict[str, Callable[[Any], Any]] = {
    "twin": dami.twin,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("how", COPIES)
@torch.no_grad()
def test_a_copy_made_in_a_block_or_a_pass_is_at_rest(
    model: PreTrainedModel, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands where the model does outside, runs as the model does, and what runs on in the model is not its own."""
    inputs, lam = batch("left"), [0.0, 0.3, 0.7, 1.0]
    wanted = [model(**inputs).logits, model(**inputs, intensity=lam).logits]
    copies = []
    make = lambda: copies.append(COPIES[how](model))  # noqa: E731
    with dami.intensity(model, 0.9), dami.intensity(model, lam, modules="mlp"):
        make()
        with dami.intensity(model, {"attn": 0.5, ("mlp", 1): 0.2}):
            make()
    with monkeypatch.context() as patched:
        rotate = modeling_qwen3.apply_rotary_pos_emb
        patched.setattr(modeling_qwen3, "apply_rotary_pos_emb", lambda *args: (make(), rotate(*args))[1])
        model(**inputs, intensity=lam)
        model.generate(**inputs, intensity={"mlp": lambda step, tokens: 0.5}, max_new_tokens=1)
    assert len(copies) == 2 + 2 * len(model.model.layers)
    for each in copies:
        assert each.dami_patch.program is None
        assert torch.equal(each.model.norm.weight, model.model.norm.weight)  # as it is seen outside a pass
        assert torch.equal(each(**inputs).logits, wanted[0])
        assert torch.equal(each(**inputs, intensity=lam).logits, wanted[1])
        if how != "twin":
            dami.unpatch_model(each)


def _untied(instruct: Any, thinking: Any) -> Any:
    thinking.lm_head.weight = torch.nn.Parameter(thinking.lm_head.weight + 0.1)
    return dami.patch_model(instruct, thinking)


def _offloaded(instruct: Any, thinking: Any) -> Any:
    return accelerate.cpu_offload(dami.patch_model(instruct, thinking), execution_device="cpu")


def _compiled(instruct: Any, thinking: Any) -> Any:
    model = dami.patch_model(instruct, thinking)
    model.compile(backend="eager")
    return model


def _adapted(instruct: Any, thinking: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)
    return peft.get_peft_model(dami.patch_model(instruct, thinking), config).eval()


@pytest.mark.parametrize("make", [dami.patch_model, _untied, _offloaded, _compiled, _adapted])
@torch.no_grad()
def test_a_deep_copy_of_any_model_runs_as_it_does(make: Callable[..., Any]) -> None:
    model, inputs, lam = make(*pair("qwen3")), batch("left"), [0.0, 0.3, 0.7, 1.0]
    wanted = model(**inputs, intensity=lam).logits
    other = copy.deepcopy(model)
    assert {id(p) for p in model.parameters()}.isdisjoint(id(p) for p in other.parameters())
    with dami.intensity(model, 0.5):
        assert torch.equal(other(**inputs, intensity=lam).logits, wanted)
    tied, kept = (
        each.get_output_embeddings()._parameters["weight"] is each.get_input_embeddings()._parameters["weight"]
        for each in (model, other)
    )
    assert tied is kept


@torch.no_grad()
def test_a_copied_module_leaves_the_part_behind(model: PreTrainedModel) -> None:
    x = torch.randn(2, 3, 24)
    wanted = model.model.layers[0].mlp(x)
    with dami.intensity(model, 1.0, modules="mlp"):
        copied = copy.deepcopy(model.model.layers[0].mlp)
        assert not torch.allclose(model.model.layers[0].mlp(x), wanted)
    assert torch.equal(copied(x), wanted)


@torch.no_grad()
def test_a_copy_of_a_twin_stands_where_the_twin_does(model: PreTrainedModel) -> None:
    inputs = batch("left")
    wanted = model(**inputs, intensity=0.4).logits
    with torch.enable_grad():
        computed = torch.tensor(0.2, requires_grad=True) * 2
    twin = dami.twin(model, computed)
    with dami.intensity(twin, 0.9):
        other = copy.deepcopy(twin)
    assert torch.equal(other(**inputs).logits, wanted)


THERE = r"; there are layers \[0, 1\] and modules \['attn', 'embed', 'head', 'mlp', 'norm'\], or patterns such as"


@pytest.mark.parametrize(
    ("chosen", "error", "message"),
    [
        ({"layers": [7], "modules": "mlp"}, ValueError, r"layers=\[7\] and modules='mlp' name .* by \[7\]" + THERE),
        ({"modules": ["mlp", "atn"]}, ValueError, r"modules=\['mlp', 'atn'\] name no .* by \['atn'\]" + THERE),
        ({"modules": ["*.q_proj", "*.p_proj"]}, ValueError, r"name no interpolated module by \['\*.p_proj'\]"),
        ({"modules": ["mlp", "experts"]}, ValueError, r"name no interpolated module by \['experts'\]"),
        ({"layers": 0, "modules": ["mlp", "embed"]}, ValueError, r"name no interpolated module by \['embed'\]"),
        ({"layers": [1, 99, -1]}, ValueError, r"name no interpolated module by \[-1, 99\]"),
        ({"layers": []}, ValueError, r"layers=\[\] and modules=None name no interpolated module by \['\*'\]"),
        ({"modules": []}, ValueError, r"layers=None and modules=\[\] name no interpolated module by \[\]"),
        ({"layers": "12"}, TypeError, "layers must be the index of a layer, or several, got '12'"),
        ({"layers": b"01"}, TypeError, "layers must be the index of a layer, or several, got b'01'"),
        ({"layers": 1.0}, TypeError, r"layers must be the index of a layer, or several, got 1\.0"),
        ({"layers": [0, 1.5]}, TypeError, r"layers must be the index of a layer, or several, got \[0, 1\.5\]"),
        ({"layers": [torch.tensor(1.0)]}, TypeError, r"layers must be the index of a layer, .* got \[tensor\(1\.\)\]"),
        ({"layers": True}, TypeError, "layers must be the index of a layer, or several, got True"),
        ({"modules": 3}, TypeError, "modules must be a group, a pattern of names, or several, got 3"),
        ({"modules": ["mlp", 3]}, TypeError, r"modules must be a group, a pattern .* got \['mlp', 3\]"),
        ({"modules": b"mlp"}, TypeError, "modules must be a group, a pattern of names, or several, got b'mlp'"),
    ],
    ids=repr,
)
def test_a_part_that_does_not_exist_is_refused(
    model: PreTrainedModel, chosen: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message), dami.intensity(model, 0.5, **chosen):
        pass
    assert all(module.lerp.part is None for module in model.modules() if hasattr(module, "lerp"))


@torch.no_grad()
def test_a_layer_is_named_by_any_integer(model: PreTrainedModel) -> None:
    inputs = batch("left")
    with dami.intensity(model, 0.5, layers=[1]):
        wanted = model(**inputs).logits
    for layers in (1, np.int64(1), torch.tensor(1), torch.tensor([1]), np.array([1]), range(1, 2), {1}):
        with dami.intensity(model, 0.5, layers=layers):
            assert torch.equal(model(**inputs).logits, wanted)
    for layers in (1, np.int64(1), range(1, 2)):
        assert torch.equal(model(**inputs, intensity={("*", layers): 0.5}).logits, wanted)


def test_a_layer_with_equal_ends_may_be_among_those_named() -> None:
    instruct, thinking = pair("qwen3")
    thinking.model.layers[1].load_state_dict(instruct.model.layers[1].state_dict())
    model = dami.patch_model(instruct, thinking)
    with dami.intensity(model, 0.5, layers=range(2)), dami.intensity(model, 0.5, layers=range(2), modules="attn"):
        pass
    with pytest.raises(ValueError, match=r"layers=1 and modules=None name no interpolated module by \['\*'\]"):
        dami.intensity(model, 0.5, layers=1).__enter__()


def test_only_a_patched_model_has_an_intensity() -> None:
    plain, _ = pair("qwen3")
    for use in (
        lambda: dami.intensity(plain, 0.5).__enter__(),
        lambda: dami.describe(plain),
        lambda: dami.unpatch_model(plain),
    ):
        with pytest.raises(
            TypeError, match=r"model must be patched by dami.patch_model or dami.load_pair, got Qwen3ForCausalLM"
        ):
            use()


@torch.no_grad()
def test_a_batch_that_is_no_multiple_of_the_intensities_is_refused(model: PreTrainedModel) -> None:
    inputs = batch("left")
    with dami.intensity(model, [0.0, 0.5, 1.0]):
        with pytest.raises(ValueError, match="intensity must hold one number per sequence, got 3 for 4 sequences"):
            model(**inputs)
        with pytest.raises(ValueError, match=r"one number per sequence, got 3 for an input of shape \[4, 7\]"):
            model.model(**inputs)


@pytest.mark.parametrize("chosen", [{}, {"modules": "mlp"}, {"layers": 0}], ids=repr)
@torch.no_grad()
def test_lam_is_one_for_each_row_however_it_is_given(model: PreTrainedModel, chosen: dict[str, Any]) -> None:
    """Blocks of rows are copies of a sequence, and only `generate` makes them."""
    inputs, lam = batch("left"), [0.0, 1.0]
    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2, "num_return_sequences": 2}
    two = {name: tensor[:2] for name, tensor in inputs.items()}
    with pytest.raises(ValueError, match="got 2 for 4 sequences"):
        model(**inputs, intensity=lam)
    for several in (lam, [0.5]):
        with dami.intensity(model, several, **chosen):
            with pytest.raises(ValueError, match=f"one number per sequence, got {len(several)} for 4 sequences"):
                model(**inputs)
            with pytest.raises(ValueError, match=f"one per sequence, got {len(several)} for 4 sequences"):
                model.generate(**inputs, **options)
    with dami.intensity(model, lam, **chosen):
        found = model.generate(**two, **options)
        assert model(**two).logits.shape[0] == 2
    for row, each in enumerate(lam):
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        with dami.intensity(model, each, **chosen):
            assert torch.equal(found[2 * row : 2 * row + 2], model.generate(**one, **options))
    assert not model.dami_patch.parts


TAKES = "intensity, prompt_intensity and prompt_tail"


@pytest.mark.parametrize("name", ["intensty", "intesity", "Intensity", "intensities", "lam", "λ"])
def test_a_misspelt_intensity_is_refused(model: PreTrainedModel, name: str) -> None:
    with pytest.raises(TypeError, match=f"^forward takes λ as intensity, got '{name}'$"):
        model(**batch("left"), **{name: 1.0})
    with pytest.raises(TypeError, match=f"^generate takes λ as {TAKES}, got '{name}'$"):
        model.generate(**batch("left"), **{name: 1.0})
    with pytest.raises(TypeError, match=f"^generate_batch takes λ as {TAKES}, got '{name}'$"):
        model.generate_batch([[5, 6]], **{name: 1.0})


@torch.no_grad()
@pytest.mark.parametrize("compiles", [False, True])
def test_a_model_inside_the_pair_refuses_an_intensity_which_it_would_swallow(
    model: PreTrainedModel, compiles: bool
) -> None:
    inner, inputs = model.model, batch("left")
    call = torch.compile(inner, backend="eager") if compiles else inner
    for name in ("intensity", "intensty"):
        message = f"a Qwen3Model inside a pair takes no λ, got '{name}': call the pair itself, or call this within dami"
        with pytest.raises(TypeError, match=message):
            call(**inputs, **{name: 0.5})
    with dami.intensity(model, 0.5):
        inside = inner(**inputs)
    wanted = model(**inputs, intensity=0.5, output_hidden_states=True)
    assert torch.equal(inside.last_hidden_state, wanted.hidden_states[-1])
    dami.unpatch_model(model)
    assert not inner._forward_pre_hooks
    inner(**inputs, intensity=0.5)  # as transformers' own do


def test_prompt_intensity_is_for_generate(model: PreTrainedModel) -> None:
    for name in ("prompt_tail", "prompt_tial"):
        with pytest.raises(TypeError, match=f"forward takes .* got '{name}'; prompt_tail is for generate"):
            model(**batch("left"), **{name: 1})
    for name in ("prompt_intensity", "prompt_intensty"):
        with pytest.raises(TypeError, match=f"forward takes .* got '{name}'; prompt_intensity is for generate"):
            model(**batch("left"), **{name: 1.0})
    with pytest.raises(TypeError, match=f"generate takes λ as {TAKES}, got 'promt_intensity'"):
        model.generate(**batch("left"), promt_intensity=1.0)


def test_a_compiled_model_refuses_a_misspelt_intensity_too(model: PreTrainedModel) -> None:
    torch._dynamo.reset()
    with pytest.raises(TypeError, match="forward takes λ as intensity, got 'intensty'"):
        torch.compile(model, backend="eager")(**batch("left"), intensty=1.0)
    torch.compile(model, fullgraph=True, backend="eager")(**batch("left"), unheard_of=None)


def test_no_keyword_of_transformers_is_taken_for_ours() -> None:
    """All parameters and keywords that its models' code has."""
    words = set(GenerationConfig().to_dict()) | TransformersKwargs.__optional_keys__
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        words |= set(re.findall(r"\b\w+(?=\s*[:=])", file.read_text(encoding="utf-8")))
    assert len(words) > 5000
    assert {word: meant(word) for word in words if meant(word)} == {}


@torch.no_grad()
def test_embeddings_may_stand_for_ids(model: PreTrainedModel) -> None:
    inputs = batch("left")
    lam = [0.0, 0.3, 0.7, 1.0]
    wanted = model(**inputs, intensity=lam).logits
    tokens = model.generate(**inputs, intensity=lam, max_new_tokens=3, do_sample=False)[:, -3:]
    with dami.intensity(model, lam):
        embedded = {"inputs_embeds": model.get_input_embeddings()(inputs.pop("input_ids")), **inputs}
    assert torch.equal(model(**embedded, intensity=lam).logits, wanted)
    assert torch.equal(model.generate(**embedded, intensity=lam, max_new_tokens=3, do_sample=False), tokens)
    with pytest.raises(ValueError, match="got 3 for 4 sequences"):
        model.generate(**embedded, intensity=lam[:3], max_new_tokens=3)


def test_transformers_reads_the_signatures_it_knows(model: PreTrainedModel) -> None:
    for name in ("forward", "generate"):
        patched = inspect.signature(getattr(model, name)).parameters
        original = inspect.signature(getattr(model.dami_patch.original, name)).parameters
        added = ("intensity", "prompt_intensity", "prompt_tail", "compile")
        assert [key for key in patched if key not in added] == [key for key in original if key != "self"]
        assert patched["intensity"].kind is inspect.Parameter.KEYWORD_ONLY
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.can_generate()


def _seen(model: PreTrainedModel) -> dict[str, Any]:
    """λ that modules of three groups read."""
    layer = model.model.layers[1]
    modules = {"embed": model.model.embed_tokens, "attn": layer.self_attn.q_proj, "mlp": layer.mlp.up_proj}
    return {group: module.lerp.lam.tolist() for group, module in modules.items()}


@torch.no_grad()
def test_an_intensity_that_is_set_holds_until_it_is_set_anew(model: PreTrainedModel) -> None:
    inputs = batch("left")
    wanted = {lam: model(**inputs, intensity=lam).logits for lam in (0.0, 0.25, 0.5)}
    dami.set_intensity(model, 0.25)
    assert torch.equal(model(**inputs).logits, wanted[0.25])
    assert torch.equal(model(**inputs, intensity=0.5).logits, wanted[0.5])
    with dami.intensity(model, 0.5):
        assert torch.equal(model(**inputs).logits, wanted[0.5])
        assert torch.equal(model(**inputs, intensity=0.0).logits, wanted[0.0])
    assert torch.equal(model(**inputs).logits, wanted[0.25])
    generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, model.generate(**inputs, intensity=0.25, max_new_tokens=3, do_sample=False))
    dami.set_intensity(model, [0.0, 0.25, 0.5, 1.0])
    assert torch.equal(model(**inputs).logits, model(**inputs, intensity=[0.0, 0.25, 0.5, 1.0]).logits)
    dami.set_intensity(model, 0.0)
    assert torch.equal(model(**inputs).logits, wanted[0.0])


@torch.no_grad()
def test_parts_that_are_set_apart_stay_so_and_blocks_go_over_them(model: PreTrainedModel) -> None:
    inputs = batch("left")
    dami.set_intensity(model, {"attn": 0.75, "*": 0.25, ("mlp", 1): 0.5})  # "*" comes later, and has the attention
    with dami.intensity(model, {"*": 0.25, ("mlp", 1): 0.5}):
        wanted = model(**inputs).logits
    assert _seen(model) == {"embed": 0.25, "attn": 0.25, "mlp": 0.5}
    assert torch.equal(model(**inputs).logits, wanted)
    assert torch.equal(model(**inputs, intensity={("mlp", 1): 0.5, "embed": 0.25}).logits, wanted)
    with dami.intensity(model, 0.0):
        assert _seen(model) == {"embed": 0.0, "attn": 0.0, "mlp": 0.5}
        with dami.intensity(model, 1.0, modules="mlp"):
            assert _seen(model) == {"embed": 0.0, "attn": 0.0, "mlp": 1.0}
    assert _seen(model) == {"embed": 0.25, "attn": 0.25, "mlp": 0.5}
    dami.set_intensity(model, {"attn": 1.0})  # the last one's part follows the whole model again
    assert _seen(model) == {"embed": 0.25, "attn": 1.0, "mlp": 0.25}
    dami.set_intensity(model, 0.5)
    assert _seen(model) == {"embed": 0.5, "attn": 0.5, "mlp": 0.5}
    assert torch.equal(model(**inputs).logits, model(**inputs, intensity=0.5).logits)


@pytest.mark.parametrize("how", COPIES)
@torch.no_grad()
def test_a_copy_keeps_what_is_set_and_a_twin_stands_where_it_is_told(model: PreTrainedModel, how: str) -> None:
    dami.set_intensity(model, {"*": 0.25, "mlp": 0.5})
    with dami.intensity(model, 1.0), dami.intensity(model, 0.75, modules="mlp"):
        other = COPIES[how](model)
    wanted = {"embed": 0.0, "attn": 0.0, "mlp": 0.0} if how == "twin" else {"embed": 0.25, "attn": 0.25, "mlp": 0.5}
    assert _seen(other) == wanted
    dami.set_intensity(other, 1.0)
    assert _seen(other) == {"embed": 1.0, "attn": 1.0, "mlp": 1.0}
    assert _seen(model) == {"embed": 0.25, "attn": 0.25, "mlp": 0.5}


@torch.no_grad()
def test_a_pair_is_saved_and_unpatched_without_what_is_set(model: PreTrainedModel, tmp_path: Path) -> None:
    inputs = batch("left")
    wanted = model(**inputs).logits
    dami.set_intensity(model, {"*": 0.25, "mlp": 0.5})
    dami.save_pair(model, tmp_path / "pair")
    assert torch.equal(dami.load_pair(tmp_path / "pair")[0](**inputs).logits, wanted)
    plain = dami.unpatch_model(model)
    assert not hasattr(plain, "dami")
    again = dami.patch_model(plain, pair("qwen3")[1])
    assert _seen(again) == {"embed": 0.0, "attn": 0.0, "mlp": 0.0}


def test_an_intensity_is_set_outside_of_blocks_and_calls_only(model: PreTrainedModel) -> None:
    dami.set_intensity(model, 0.25)
    for block in ({}, {"modules": "mlp"}):
        with dami.intensity(model, 0.5, **block), pytest.raises(RuntimeError, match="sets λ for good: call it outside"):
            dami.set_intensity(model, 1.0)

    def meddles(step: int, tokens: torch.Tensor) -> float:
        dami.set_intensity(model, 1.0)
        return 0.5

    with pytest.raises(RuntimeError, match="sets λ for good: call it outside"):
        model.generate(**batch("left"), intensity=meddles, max_new_tokens=2)
    for bad, error in (
        ({"nothing": 0.5}, ValueError),
        ({"mlp": 0.5, "*": float("nan")}, ValueError),
        ("auto", TypeError),
    ):
        with pytest.raises(error):
            dami.set_intensity(model, bad)
    assert _seen(model) == {"embed": 0.25, "attn": 0.25, "mlp": 0.25}
    with pytest.raises(TypeError, match="model must be patched"):
        dami.set_intensity(pair("qwen3")[0], 0.5)


def test_the_gradient_of_a_checkpointed_pass_is_at_the_part_that_was_set(model: PreTrainedModel) -> None:
    """Though λ is set anew before the backward pass runs the layers again."""
    inputs = batch("left")
    model.train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        lam = torch.tensor(0.25, requires_grad=True)
        dami.set_intensity(model, {"*": 0.5, "mlp": lam})
        loss = model(**inputs).logits.square().mean()
        dami.set_intensity(model, 0.0)
        loss.backward()
        gradients.append(lam.grad)
    torch.testing.assert_close(*gradients)


def test_the_status_of_a_model(model: PreTrainedModel) -> None:
    model = dami.patch_model(*pair("qwen3"), format="int4")
    status = model.dami
    assert (status.format, status.nbytes) == ("int4", dami.describe(model).nbytes)
    assert (status.intensity, status.parts, status.ends) == (0.0, (), (None, None))
    assert (status.presets, status.estimator, status.frontier) == ({}, None, {})
    dami.attach(model, dami.estimators.StaticIntensity(0.5), {"low": 0.2})
    dami.set_intensity(model, {"*": [0.0, 0.3, 0.7, 1.0], ("mlp", 1): 0.4})
    assert status.intensity == [0.0, 0.3, 0.7, 1.0]
    [part] = status.parts
    assert (part.intensity, part.groups) == (0.4, ("mlp",))
    assert part.modules == tuple(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down"))
    with dami.intensity(model, 0.9, layers=1, modules="mlp"):
        assert [part.intensity for part in status.parts] == [0.9]
    assert (status.presets, type(status.estimator).__name__) == ({"low": 0.2}, "StaticIntensity")
    lines = [line.split(maxsplit=1) for line in str(status).splitlines()]
    assert lines[0] == ["Qwen3ForCausalLM"]
    assert dict(lines[1:]) == {
        "instruct": "not known",
        "thinking": "not known",
        "format": f"int4; {_counted(model)}",
        "bytes": f"{status.nbytes:,}",
        "intensity": "[0.0, 0.3, 0.7, 1.0]; 0.4 in 3 modules (mlp)",
        "presets": "low 0.2",
        "estimator": "StaticIntensity",
        "tail": "not known",
        "frontier": "not measured",
    }
    shipped, _ = dami.load_pair(*dami.example_pair())
    assert shipped.dami.ends == ("instruct", "thinking")
    assert shipped.dami.frontier == shipped.dami_patch.frontier != {}
    assert "frontier   measured at 6 λ" in str(shipped.dami)
    with pytest.raises(TypeError, match="model must be patched"):
        Status(pair("qwen3")[0])


def _counted(model: PreTrainedModel) -> str:
    formats = [row.format for row in dami.describe(model).rows]
    kinds = f"{formats.count('int4')} as int4, {formats.count('pair')} as pair"
    return f"{len(formats)} of {len(formats)} parameters differ: {kinds}"


def test_the_default_dtype_of_a_program_changes_nothing() -> None:
    """λ is float32, and so is all that chooses it."""
    prompts, before = [[3, 4, 5], [6, 7]], torch.get_default_dtype()
    options: dict[str, Any] = {"intensity": [0.0, "auto"], "max_new_tokens": 3}
    small = ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=16)

    def said() -> list[Any]:
        model, tokenizer = dami.load_pair(*dami.example_pair(), dtype=torch.float32)
        words = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        greedy = GenerationConfig(do_sample=False, eos_token_id=tokenizer.eos_token_id)
        packed = model.generate_batch(prompts, greedy, small, **options).values()
        found: list[Any] = [each.generated_tokens for each in packed]
        for estimator in (model.dami.estimator, ConfidenceEstimator(tokens=2)):
            dami.attach(model, estimator)
            found.append(model.generate(**words, **options, do_sample=False).tolist())
        return found

    wanted = said()
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # that a model cannot be checked
                assert said() == wanted
    finally:
        torch.set_default_dtype(before)
