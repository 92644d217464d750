"""What `patch_model` refuses, leaving the model as it was, and what `describe` prints."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import dami
import pytest
import torch
from dami.patching.compare import config_mismatches
from torch import nn
from transformers import CompileConfig, LlamaConfig, PreTrainedModel

from tests.dami.families import FAMILIES, VOCABULARY, batch, pair, references
from tests.marks import slow
from tests.tolerance import assert_as_accurate


def refused(
    model: PreTrainedModel, thinking: PreTrainedModel, error: type[Exception], format: str = "pair"
) -> list[str]:
    """Lines of the error that patching raises; the model is checked to be as it was."""
    classes = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    state = {name: (tensor, tensor.clone(), tensor.stride()) for name, tensor in model.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(error) as caught:
        dami.patch_model(model, thinking, format)
    assert classes == [type(module) for module in model.modules()]
    assert attributes == [set(vars(module)) for module in model.modules()]
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        before, value, stride = state[name]
        assert tensor.data_ptr() == before.data_ptr()
        assert tensor.stride() == stride
        assert torch.equal(tensor, value)
    assert trainable == [parameter.requires_grad for parameter in model.parameters()]
    return str(caught.value).split("\n  ")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_that_differs_and_cannot_be_interpolated_is_named(family: str) -> None:
    model, thinking = pair(family)
    block = "model.layers.0" if family == "llama" else "transformer.h.0"
    for end, fill in ((model, 0), (thinking, 1)):
        layer = end.get_submodule(block)
        layer.gain = nn.Parameter(torch.full((3,), fill, dtype=torch.float64))
        layer.same = nn.Parameter(torch.ones(3, dtype=torch.float64))
        layer.register_buffer("seen", torch.full((2,), fill))
        layer.register_buffer("scratch", torch.full((2,), fill), persistent=False)
        layer.norm = nn.BatchNorm1d(2)
        layer.norm.num_batches_tracked.fill_(fill)  # which only training reads
    name = type(model.get_submodule(block)).__name__
    assert refused(model, thinking, ValueError) == [
        "these tensors differ between the ends and cannot be interpolated:",
        f"{block} ({name}): gain, as float64",
        f"{block} ({name}): seen, as int64",
    ]


def test_an_unlike_pair_is_reported_at_once() -> None:
    model, thinking = pair("llama")
    thinking.config.rms_norm_eps = 1e-3
    thinking.config.pad_token_id = 7
    thinking.model.norm.half()
    thinking.lm_head.weight = nn.Parameter(torch.zeros(99, 24))
    assert refused(model, thinking, ValueError) == [
        "instruct_model and thinking_model do not match:",
        "config.rms_norm_eps: 1e-06 in the instruct end, 0.001 in the thinking end",
        "lm_head.weight: float32 [101, 24] in the instruct end, float32 [99, 24] in the thinking end",
        "model.norm.weight: float32 [24] in the instruct end, float16 [24] in the thinking end",
    ]


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({"eos_token_id": 9, "dtype": torch.float16, "max_position_embeddings": 99, "attention_dropout": 0.5}, []),
        ({"num_attention_heads": 8}, ["config.num_attention_heads: 4 in the instruct end, 8 in the thinking end"]),
        ({"hidden_act": "gelu"}, ["config.hidden_act: 'silu' in the instruct end, 'gelu' in the thinking end"]),
        ({"new_switch": True}, ["config.new_switch: None in the instruct end, True in the thinking end"]),
    ],
    ids=str,
)
def test_settings_that_differ_are_reported_unless_they_change_nothing(change: dict[str, Any], lines: list[str]) -> None:
    settings = FAMILIES["llama"]().to_dict()
    assert config_mismatches(LlamaConfig(**settings), LlamaConfig(**{**settings, **change})) == lines


def test_positions_count_where_the_rotary_embedding_depends_on_them() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    ends = [LlamaConfig(rope_parameters=rope, max_position_embeddings=positions) for positions in (64, 99)]
    assert config_mismatches(*ends) == [
        "config.max_position_embeddings: 64 in the instruct end, 99 in the thinking end"
    ]


def test_another_architecture_is_named_alone() -> None:
    lines = refused(pair("llama")[0], pair("gpt2")[0], ValueError)
    assert lines[1:] == [
        "config.model_type: 'llama' in the instruct end, 'gpt2' in the thinking end",
        "class: LlamaForCausalLM and GPT2LMHeadModel",
    ]


def test_what_else_is_tied_in_the_instruct_end_only() -> None:
    model, thinking = pair("llama")
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[0].mlp.gate_proj.weight
    assert refused(model, thinking, ValueError)[1:] == [
        "model.layers.0.mlp.up_proj.weight: tied to model.layers.0.mlp.gate_proj.weight in the instruct end only"
    ]


def untied(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a head of its own."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 0.1 * torch.randn_like(model.lm_head.weight))
    model.config.tie_word_embeddings = False
    return model


@pytest.mark.parametrize("end", [0, 1], ids=["instruct", "thinking"])
@torch.no_grad()
def test_a_head_may_be_tied_in_one_end_only(end: int, tmp_path: Path) -> None:
    """The tied end's is then its embedding: patched, saved and loaded; and tied again when the patch is off."""
    ends = pair("qwen3")
    untied(ends[end])
    inputs, names = batch("left"), sorted(ends[0].state_dict())
    expected = [model(**inputs).logits for model in copy.deepcopy(ends)]
    model, embedding = ends[0], ends[0].model.embed_tokens.weight
    dami.patch_model(*ends)
    packed = dami.save_pair(model, tmp_path / "packed")
    for pair_ in (model, dami.load_pair(packed)[0], dami.twin(model)):
        for lam in (0.0, 1.0):
            torch.testing.assert_close(pair_(**inputs, intensity=lam).logits, expected[int(lam)], rtol=1e-4, atol=1e-4)
        assert pair_.config.tie_word_embeddings is False
        torch.testing.assert_close(dami.materialize(pair_, 1)(**inputs).logits, expected[1], rtol=1e-4, atol=1e-4)
    dami.unpatch_model(model)
    assert (model.lm_head.weight is embedding) == (end == 1) == model.config.tie_word_embeddings
    assert sorted(model.state_dict()) == names
    torch.testing.assert_close(model(**inputs).logits, expected[0])


def test_a_head_is_tied_again_where_patching_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, thinking = pair("qwen3")
    monkeypatch.setattr("dami.layers.obstacles.FLOAT_DTYPES", ())
    assert "cannot be interpolated" in refused(model, untied(thinking), ValueError)[0]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True


def test_not_two_models() -> None:
    model, thinking = pair("llama")
    with pytest.raises(TypeError, match="instruct_model must be a transformers model, got Linear"):
        dami.patch_model(nn.Linear(2, 2), thinking)  # type: ignore[arg-type]
    adapted = SimpleNamespace(merge_and_unload=None)
    with pytest.raises(
        TypeError, match="must be a transformers model, got SimpleNamespace: merge its adapter, merge_and"
    ):
        dami.patch_model(model, adapted)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="thinking_model must be a transformers model, got str"):
        dami.patch_model(model, "thinking")  # type: ignore[arg-type]
    dami.patch_model(model, thinking)
    with pytest.raises(TypeError, match=r"instruct_model must not be patched already: call dami\.unpatch_model first"):
        dami.patch_model(model, thinking)
    with pytest.raises(TypeError, match="thinking_model must not be patched already"):
        dami.patch_model(copy.deepcopy(thinking), model)
    with pytest.raises(ValueError, match="thinking_model must be another model than instruct_model, got the same one"):
        dami.patch_model(thinking, thinking)


def test_an_unknown_format() -> None:
    assert re.match(
        r"format must be one of \[.*'pair'.*\], got 'triple'", refused(*pair("llama"), ValueError, "triple")[0]
    )


def test_an_offloaded_model() -> None:
    model, thinking = pair("llama")
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="instruct_model must be on devices, not offloaded, got 1 tensors on meta"):
        dami.patch_model(model, thinking)
    with pytest.raises(ValueError, match="thinking_model must be on devices, not offloaded, got 1 tensors on meta"):
        dami.patch_model(thinking, model)


def _dispatched(model: PreTrainedModel, folder: Path) -> None:
    places = {name: "cpu" for name, _ in model.model.named_children() if name != "layers"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu"}
    places = {name if "." in name or name == "lm_head" else f"model.{name}": place for name, place in places.items()}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


OFFLOADS: dict[str, Callable[[PreTrainedModel, Path], Any]] = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, folder, execution_device=torch.device("cpu")),
    "dispatch_model": _dispatched,
}


@pytest.mark.parametrize("how", OFFLOADS)
@pytest.mark.parametrize("format", ["pair", "int8", "int4", "w8d4"])
@torch.no_grad()
def test_accelerate_offloads_a_model_in_memory(format: str, how: str, tmp_path: Path) -> None:
    model, inputs, lam = dami.patch_model(*pair("qwen3"), format=format), batch("left"), [0.0, 0.3, 0.7, 1.0]
    wanted = model(**inputs, intensity=lam).logits
    tokens = model.generate(**inputs, intensity=lam, max_new_tokens=2, do_sample=False)
    OFFLOADS[how](model, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert model.device == torch.device("cpu")
    for each in (model, copy.deepcopy(model)):
        assert torch.equal(each(**inputs, intensity=lam).logits, wanted)
        assert torch.equal(each.generate(**inputs, intensity=lam, max_new_tokens=2, do_sample=False), tokens)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(model(**inputs, intensity=lam).logits, wanted)
    placeholders = [
        module.tensor(n) for module in model.modules() if hasattr(module, "lerp") for n in module.placeholders()
    ]
    assert bool(placeholders) is (format == "w8d4")
    assert all(tensor.untyped_storage().nbytes() == tensor.element_size() for tensor in placeholders)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_an_invariant_row_has_the_bits_it_has_alone(family: str) -> None:
    model = dami.patch_model(*pair(family), invariant=True)
    module = model.lm_head if family == "llama" else model.transformer.h[0].mlp.c_fc
    x, lam = torch.randn(70, 1, 24), torch.cat((torch.full((40,), 0.3), torch.rand(30)))
    with dami.intensity(model, lam):
        together = module(x)
    for row in (0, 39, 69):
        with dami.intensity(model, lam[row : row + 1]):
            assert torch.equal(module(x[row : row + 1]), together[row : row + 1])


def test_frozen_parameters_stay_frozen() -> None:
    model, thinking = pair("llama")
    model.lm_head.requires_grad_(False)
    dami.patch_model(model, thinking)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    dami.unpatch_model(model)
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["lm_head.weight"]


def test_patching_again_after_unpatching() -> None:
    model, thinking = pair("gpt2")
    inputs = batch("left")
    first = dami.patch_model(model, thinking)(**inputs, intensity=0.3).logits
    again = dami.patch_model(dami.unpatch_model(model), thinking)(**inputs, intensity=0.3).logits
    assert torch.equal(first, again)


def test_the_table_is_printed() -> None:
    model, thinking = pair("qwen3")
    with torch.no_grad():
        thinking.model.norm.weight.copy_(model.model.norm.weight)
    lines = str(dami.describe(dami.patch_model(model, thinking))).splitlines()
    assert lines[0].split() == ["parameter", "kind", "shape", "dtype", "ends", "bytes"]
    assert set(lines[1]) == {"─", " "}
    table = {line.split()[0]: line.split()[1:] for line in lines[2:-1]}
    embedding = 2 * 4 * 101 * 24
    assert table["model.embed_tokens.weight"] == [
        "embedding",
        "101×24",
        "float32",
        "interpolated",
        "(pair)",
        f"{embedding:,}",
    ]
    assert table["model.norm.weight"] == ["Qwen3RMSNorm", "24", "float32", "identical", "96"]
    assert table["lm_head.weight"][-3:] == ["tied", "to", "model.embed_tokens.weight"]
    total = 2 * sum(parameter.nbytes for parameter in thinking.parameters()) - 96
    assert lines[-1] == f"{len(table)} parameters, {len(table) - 1} interpolated, {total:,} bytes"


def counting() -> tuple[Callable[..., Any], list[Any]]:
    """A torch.compile backend that runs graphs as they are, and the list of those it was given."""
    graphs: list[Any] = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return backend, graphs


@pytest.mark.parametrize("family", ["qwen3", *slow("gpt2")])
@torch.no_grad()
def test_compiles_to_one_graph_that_serves_every_lam(family: str) -> None:
    torch._dynamo.reset()
    model, inputs = dami.patch_model(*pair(family)), batch("left")
    backend, graphs = counting()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for lam in ([0.0, 0.3, 0.7, 1.0], [0.0] * 4, [1.0] * 4, [-0.5, 2.0, 0.1, 0.2]):
        wanted = model(**inputs, intensity=lam).logits
        assert torch.equal(compiled(**inputs, intensity=torch.tensor(lam)).logits, wanted)
    assert len(graphs) == 1
    with dami.intensity(model, 0.3):
        assert torch.equal(compiled(**inputs).logits, model(**inputs).logits)


def test_generates_with_a_compiled_forward_and_a_static_cache() -> None:
    torch._dynamo.reset()
    model, inputs = dami.patch_model(*pair("qwen3")), batch("left")
    del inputs["position_ids"]
    backend, graphs = counting()
    how = CompileConfig(fullgraph=True, backend=backend, mode=None)
    how._compile_all_devices = True
    options = {"max_new_tokens": 5, "do_sample": False}
    counts = []
    for lam in ([0.0, 0.3, 0.7, 1.0], [1.0, 0.5, 0.0, 0.2]):
        wanted = model.generate(**inputs, intensity=lam, **options)
        tokens = model.generate(**inputs, intensity=lam, cache_implementation="static", compile_config=how, **options)
        assert torch.equal(tokens, wanted)
        counts.append(len(graphs))
    assert 0 < counts[0] == counts[1]


def test_a_head_that_is_no_part_of_the_patch_is_given_states_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """`F.linear` would copy its weight for each row of a slice: the last states of prompts are one."""
    model, thinking = pair("llama")
    thinking.lm_head.load_state_dict(model.lm_head.state_dict())
    inputs = batch("left")
    expected = model(**inputs, logits_to_keep=2).logits
    model = dami.patch_model(model, thinking)
    assert type(model.lm_head) is nn.Linear
    given: list[torch.Tensor] = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, *rest: (given.append(x), linear(x, *rest))[1])
    for kept in (1, 2):
        found = model(**inputs, logits_to_keep=kept, intensity=0.0).logits
        assert given[-1].shape[:2] == (4, kept)
        assert given[-1].is_contiguous()
    torch.testing.assert_close(found, expected)
    twin = copy.deepcopy(model)
    assert len(twin.lm_head._forward_pre_hooks) == 1
    assert not dami.unpatch_model(model).lm_head._forward_pre_hooks
    assert not dami.unpatch_model(twin).lm_head._forward_pre_hooks


RESIZES = {
    "much": {"new_num_tokens": VOCABULARY + 60_000},
    "by 8": {"new_num_tokens": VOCABULARY + 8},
    "smaller": {"new_num_tokens": VOCABULARY - 20},
    "padded": {"pad_to_multiple_of": 8},
}


@pytest.mark.parametrize("wanted", RESIZES.values(), ids=RESIZES.keys())
@pytest.mark.parametrize(
    ("family", "format"), [("llama", "pair"), ("qwen3", "pair"), ("qwen3", "w8d4"), ("gpt2", "int4")]
)
def test_resizing_one_end_is_refused_before_anything_changes(family: str, format: str, wanted: dict[str, int]) -> None:
    """With a head of its own and a tied one, in formats that keep the base and in one that does not."""
    model = dami.patch_model(*pair(family), format)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs, lam = batch("left"), [0.0, 0.4, 1.0, 0.7]
    logits = model(**inputs, intensity=lam).logits
    size = -(-wanted.get("new_num_tokens", VOCABULARY) // wanted.get("pad_to_multiple_of", 1))
    size *= wanted.get("pad_to_multiple_of", 1)
    message = f"new_num_tokens must be {VOCABULARY}, as many as both ends of the pair have, got {size}: call"
    with pytest.raises(ValueError, match=message):
        model.resize_token_embeddings(**wanted)
    assert model.config.vocab_size == VOCABULARY
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(**inputs, intensity=lam).logits, logits)


def test_resizing_to_the_same_size_is_not_refused() -> None:
    model = dami.patch_model(*pair("llama"))
    assert model.resize_token_embeddings(VOCABULARY) is model.get_input_embeddings()
    assert model.resize_token_embeddings() is model.get_input_embeddings()


def test_embeddings_that_the_ends_share_can_be_resized() -> None:
    model, thinking = pair("llama")
    for name in ("model.embed_tokens", "lm_head"):
        thinking.get_submodule(name).load_state_dict(model.get_submodule(name).state_dict())
    inputs = batch("left")
    before = dami.patch_model(model, thinking)(**inputs, intensity=0.6).logits
    model.resize_token_embeddings(VOCABULARY + 8)
    after = model(**inputs, intensity=0.6).logits
    torch.testing.assert_close(after[..., :VOCABULARY], before)
    assert after.shape[-1] == VOCABULARY + 8


@pytest.mark.parametrize("size", [VOCABULARY - 20, VOCABULARY + 60_000])
def test_an_end_that_was_resized_all_the_same_is_refused_when_it_is_read(size: int) -> None:
    """transformers' inner model knows nothing of the pair."""
    model = dami.patch_model(*pair("qwen3"))
    model.model.resize_token_embeddings(size)
    with pytest.raises(ValueError, match=rf"must be torch.float32 of shape \[{size}, 24\] on cpu, got .*\[101, 24\]"):
        model(**batch("left"), intensity=0.5)


@pytest.mark.parametrize("format", ["pair", "w8d4"])
def test_other_dtypes_are_refused_before_anything_has_changed(format: str) -> None:
    model = dami.patch_model(*pair("llama"), format)
    before = [parameter.dtype for parameter in model.parameters()]
    message = r"computes in float32, bfloat16 or float16, got torch\.float64: .* dami\.materialize\(model, intensity\)"
    for convert in (model.double, lambda: model.to(torch.float64), lambda: model.to("cpu", torch.float64)):
        with pytest.raises(TypeError, match=message):
            convert()
    with pytest.raises(TypeError, match=message):
        model.model.double()  # of a part
    assert [parameter.dtype for parameter in model.parameters()] == before
    model.share_memory()
    for convert, dtype in ((model.half, torch.float16), (model.bfloat16, torch.bfloat16), (model.float, torch.float32)):
        assert convert()(**batch("left"), intensity=[0.0, 0.3, 0.6, 1.0]).logits.dtype == dtype
    assert dami.materialize(model, 0.3).double()(**batch("left")).logits.dtype == torch.float64


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
@torch.no_grad()
def test_autocast_runs_a_patched_model_as_a_plain_one(family: str) -> None:
    """In float32, under bfloat16's autocast: the same dtype, and as near to the plain model in float32."""
    inputs, lam = batch("left"), [0.0, 0.37, 1.0, 0.37]
    model = dami.patch_model(*pair(family))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**inputs, intensity=lam).logits
        model.generate(**inputs, intensity=lam, max_new_tokens=2, do_sample=False)
    for row, value in enumerate(lam):
        plain, exact = references(family, value)
        with torch.autocast("cpu", torch.bfloat16):
            own = plain(**inputs).logits
        seen = inputs["attention_mask"][row].bool()
        assert own.dtype == logits.dtype
        assert_as_accurate(logits[row, seen], exact(**inputs).logits[row, seen], own[row, seen], factor=1.5)
