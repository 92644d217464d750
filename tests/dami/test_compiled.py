"""`generate(compile=True)`: the tokens of a plain `generate`, and one graph for every λ."""

from __future__ import annotations

import copy
from collections.abc import Callable
from enum import Enum
from functools import partial
from types import MethodType
from typing import Any

import dami
import pytest
import torch
import torch.nn.functional as F
from dami import schedules
from dami.cli import app
from dami.dial.patch import patch_of
from dami.estimators import StaticIntensity
from dami.generation import compiled, regions
from dami.generation.attention import grouped_attention
from dami.generation.pieces import CACHE
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from transformers import CompileConfig, PreTrainedModel, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from typer.testing import CliRunner

from tests.dami.families import pair
from tests.dami.test_generation import LAM, prompts
from tests.marks import slow

OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
FALLING = schedules.linear(1.0, 0.2, steps=4)
Graphs = list[Any]


@pytest.fixture
def model() -> PreTrainedModel:
    model = dami.patch_model(*pair("qwen3"))
    dami.attach(model, StaticIntensity(0.4))
    patch_of(model).presets = {"low": 0.2, "high": 0.8}
    return model


def both(model: Any, inputs: dict[str, Tensor], **options: Any) -> None:
    """Generates by a compiled step and without it, and compares the tokens."""
    wanted = model.generate(**inputs, **OPTIONS | options)
    assert torch.equal(model.generate(**inputs, **OPTIONS | options, compile=True), wanted)


@pytest.mark.parametrize("rows", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_no_kind_of_intensity_compiles_again(model: PreTrainedModel, graphs: Graphs, rows: int) -> None:
    inputs = {name: tensor[:rows] for name, tensor in prompts().items()}
    lists = [0.3, 0.9, 0.0, 1.0], ["low", "high", 0.5, -0.5], ["auto", 0.1, 1.5, "low"], [FALLING, 0.1, FALLING, 0.2]
    for lam in (0.7, 0.0, 1.0, "low", "auto", FALLING, torch.tensor(0.3), *(each[:rows] for each in lists)):
        both(model, inputs, intensity=lam)
    both(model, inputs, intensity=0.3, prompt_intensity=0.8)
    both(model, inputs)
    dami.set_intensity(model, 0.6)
    both(model, inputs)
    with dami.intensity(model, LAM[:rows]):
        both(model, inputs)
    assert len(graphs) == 1


def test_parts_compile_once_for_all_their_lam(model: PreTrainedModel, graphs: Graphs) -> None:
    for attn, mlp in (0.2, LAM), (LAM, 0.9), ("high", "auto"), (FALLING, 0.0):
        both(model, prompts(), intensity={"attn": attn, ("mlp", 1): mlp})
    assert len(graphs) == 2  # the layers differ
    both(model, prompts(), intensity={"attn": 0.2, "mlp": 0.3})  # layers such as the second was
    assert len(graphs) == 2
    both(model, prompts(), intensity={"attn": 0.2, ("mlp", 1): 0.3})
    both(model, prompts(), intensity=0.5)
    both(model, prompts(), intensity=LAM)
    assert len(graphs) == 3


def test_other_lengths_need_no_new_graph_up_to_a_power_of_two(model: PreTrainedModel, graphs: Graphs) -> None:
    for tokens in (3, 40, 200):
        model.generate(**prompts(), max_new_tokens=tokens, intensity=0.3, compile=True)
    assert len(graphs) == 1
    both(model, {name: tensor[:, -5:] for name, tensor in prompts().items()}, intensity=0.4)
    assert len(graphs) == 1


@pytest.mark.parametrize("family", ["mistral", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_families(family: str, graphs: Graphs) -> None:
    """Windows; learned positions."""
    model, inputs = dami.patch_model(*pair(family)), prompts()
    both(model, inputs, intensity=LAM)
    count = len(graphs)  # a window that fills up takes another
    both(model, inputs, intensity=0.3)
    assert len(graphs) == count <= 2


def test_a_model_that_is_not_one_graph_decodes_in_several_and_says_so(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Gemma 2, which reads a parameter that differs by row, if its layers have no graphs of their own."""
    monkeypatch.setattr(compiled, "KINDS", 0)
    ends = pair("gemma2")
    for end in ends:
        deepen(end, 1)
    model = dami.patch_model(*ends)
    with pytest.warns(UserWarning, match="Gemma2ForCausalLM decodes in several graphs, which is slower, as torch"):
        both(model, prompts(), intensity=LAM)
    both(model, prompts(), intensity=LAM[::-1])


@pytest.mark.parametrize("layers", [1, 4])
def test_layers_that_are_alike_share_a_graph(layers: int, graphs: Graphs) -> None:
    ends = pair("qwen3")
    for end in ends:
        deepen(end, layers)
    model = dami.patch_model(*ends)
    for lam in (LAM, 0.3):
        both(model, prompts(), intensity=lam)
    assert len(graphs) == 1
    assert len([node for node in graphs[0].graph.nodes if "lerp_linear" in str(node.target)]) == 7


def deepen(model: Any, layers: int) -> None:
    """Gives a model so many layers, each with weights of its own."""
    first = model.model.layers[0]
    model.model.layers = nn.ModuleList(copy.deepcopy(first) for _ in range(layers))
    model.config.num_hidden_layers = layers
    if hasattr(model.config, "layer_types"):
        model.config.layer_types = model.config.layer_types[:1] * layers
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = index
            for parameter in layer.parameters():
                parameter.add_(0.05 * index)


class Indexed(nn.Module):
    """An activation that is another one in the first layer."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) if self.layer_idx == 0 else F.silu(x)


def test_layers_that_ask_for_their_index_are_in_one_graph(model: Any, graphs: Graphs) -> None:
    for index, layer in enumerate(model.model.layers):
        layer.mlp.act_fn = Indexed(index)
    for lam in (LAM, 0.3):
        both(model, prompts(), intensity=lam)
    assert len(graphs) == 1
    calls = [node for node in graphs[0].graph.nodes if node.target is torch.ops.dami.decode_attention]
    assert len(calls) == len(model.model.layers)


def test_the_index_of_any_layer_is_only_handed_on() -> None:
    for use in (bool, hash, str, [0].__getitem__, lambda index: index == 0, lambda index: index != 0):
        with pytest.raises(TypeError, match="a layer that is compiled for all that are alike asks for its index"):
            use(regions.OWN)  # type: ignore[operator]
    layer, new = StaticCache(config=pair("qwen3")[0].config, max_cache_len=8).layers[0], torch.ones(1, 2, 1, 8)
    one = regions.OneLayer(layer)
    assert one.update(new, new, regions.OWN)[0].shape[2] == 8
    assert one.get_seq_length(regions.OWN) == 1
    with pytest.raises(TypeError, match="a layer reads what another has cached"):
        one.update(new, new, 0)
    with pytest.raises(TypeError, match="a layer reads how much another has cached"):
        one.get_seq_length(0)


def test_recorded_outputs(model: Any, graphs: Graphs) -> None:
    """Those of the last token. Hidden states are taken around the layers, attention weights inside: in one graph."""
    inputs, options = prompts(), {**OPTIONS, "intensity": LAM, "return_dict_in_generate": True}
    for name, count in {"hidden_states": 1, "attentions": 2}.items():
        if name == "attentions":
            model.set_attn_implementation("eager")
        found, wanted = (
            getattr(model.generate(**inputs, **options, **{f"output_{name}": True}, compile=compile), name)
            for compile in (True, False)
        )
        for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a[..., -1, : b.shape[-1]], b[..., -1, :], msg=f"{name} of step {step}")
        assert len(graphs) == count
    both(model, inputs, intensity=LAM)
    assert len(graphs) == 3, "another attention, but not another graph for each layer"


def test_guidance(model: PreTrainedModel, graphs: Graphs) -> None:
    for lam in (0.3, LAM):
        both(model, prompts(), intensity=lam, guidance_scale=1.5)
    assert graphs


def test_samples_as_a_plain_generate_does(model: PreTrainedModel, graphs: Graphs) -> None:
    options = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 2, "intensity": [0.9, 0.1, FALLING, 0.5]}
    tokens = []
    for compile in (False, True):
        torch.manual_seed(0)
        tokens.append(model.generate(**prompts(), **options, compile=compile))
    assert torch.equal(*tokens)
    assert graphs


def _gives_other_weights(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight_target.add_(0.2)


def _replaces_a_weight(model: Any) -> None:
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight_target = nn.Parameter(layer.weight_target.detach() + 0.3, requires_grad=False)


def _adds_a_hook(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, y: y * 1.5)


def _changes_the_activation(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = nn.ReLU()


def _replaces_a_module(model: Any) -> None:
    model.model.layers[1].mlp = copy.deepcopy(model.model.layers[0].mlp)


def _converts(model: Any) -> None:
    model.to(torch.bfloat16)


def _scales_attention(model: Any) -> None:
    model.model.layers[0].self_attn.scaling = 0.9


@pytest.mark.parametrize(
    "changes",
    [
        [_gives_other_weights, _replaces_a_weight, _scales_attention, _adds_a_hook],
        *slow([_changes_the_activation], [_replaces_a_module], [_converts]),
    ],
)
def test_a_changed_model_runs_as_it_is_now(
    model: PreTrainedModel, graphs: Graphs, changes: list[Callable[[Any], None]]
) -> None:
    """Though the guards on the model are not evaluated at every token. Weights are read anew by the same graph, and
    layers in which a hook runs have none."""
    both(model, prompts(), intensity=LAM)
    seen, before = 1, model.generate(**prompts(), **OPTIONS, intensity=LAM)
    for change in changes:
        change(model)
        both(model, prompts(), intensity=LAM)
        now = model.generate(**prompts(), **OPTIONS, intensity=LAM)
        assert not torch.equal(now, before), change
        seen, before = seen + (change not in (_gives_other_weights, _replaces_a_weight, _adds_a_hook)), now
        assert len(graphs) == seen, change


def test_functions_and_ties_that_change_are_noticed(graphs: Graphs) -> None:
    model = dami.patch_model(*pair("llama"))
    mlp = model.model.layers[1].mlp
    mlp.up_proj.weight_target = mlp.gate_proj.weight_target
    both(model, prompts(), intensity=0.6)
    mlp.up_proj.weight_target = nn.Parameter(mlp.up_proj.weight_target.detach() + 0.3, requires_grad=False)
    both(model, prompts(), intensity=0.6)
    for function in (torch.tanh, torch.relu):
        del mlp.act_fn  # a module at first
        mlp.act_fn = function
        both(model, prompts(), intensity=0.6)


class Rounding(Enum):
    UP, DOWN = range(2)


@pytest.mark.parametrize(
    ("some", "other"),
    [
        (torch.tanh, torch.relu),
        (partial(F.leaky_relu, negative_slope=0.1), partial(F.leaky_relu, negative_slope=0.2)),
        (MethodType(F.silu, 0), MethodType(F.gelu, 0)),
        (Rounding.UP, Rounding.DOWN),
    ],
)
def test_a_structure_tells_values_apart(some: Any, other: Any) -> None:
    module = nn.Module()
    seen = []
    for value in (some, other, some):
        module.value = value
        seen.append(compiled.structure(module))
    assert seen[0] == seen[2] != seen[1]


def test_any_number_of_batch_sizes_compiles(model: PreTrainedModel, graphs: Graphs) -> None:
    """torch by itself compiles a function for eight shapes and then fails."""
    ids = prompts()["input_ids"][:1]
    for rows in range(1, 11):
        both(model, {"input_ids": ids.repeat(rows, 1)}, intensity=0.3)
    assert len(graphs) == 10


def test_another_batch_and_a_longer_cache_get_graphs_of_their_own(model: PreTrainedModel, graphs: Graphs) -> None:
    both(model, prompts(), intensity=LAM)
    both(model, {name: tensor[:1] for name, tensor in prompts().items()}, intensity=LAM[:1])
    both(model, prompts(), intensity=LAM, max_cache_len=600)
    assert len(graphs) == 3


def test_twins_do_not_share_what_is_compiled(model: PreTrainedModel, graphs: Graphs) -> None:
    both(model, prompts(), intensity=LAM)
    both(dami.twin(model), prompts(), intensity=LAM)
    other = dami.patch_model(*reversed(pair("qwen3")))
    both(other, prompts(), intensity=LAM)
    assert len(graphs) == 3


def test_a_step_costs_little_beside_its_kernels(
    model: PreTrainedModel, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It copies no cache, few guards are evaluated before it, and no operator asks Python about gradients."""
    counts: list[tuple[int, int]] = []
    of_inputs = compiled.of_inputs

    def count(guards: Any) -> list[bool]:
        kept = of_inputs(guards)
        counts.append((sum(kept), len(kept)))
        return kept

    seen: list[bool] = []
    compiles = torch.compile

    def compile(run: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        call = compiles(run, **options)
        return lambda *inputs, **named: seen.append(torch.is_inference_mode_enabled()) or call(*inputs, **named)

    monkeypatch.setattr(compiled, "of_inputs", count)
    monkeypatch.setattr(torch, "compile", compile)
    both(model, prompts(), intensity=LAM)

    assert len(counts) == 1
    kept, among = counts[0]
    assert 10 < kept < among / 10
    # The operators' kernel for autograd's key, which is in Python, is left out in inference mode. Torch calls one
    # layer, and the other repeats its call.
    assert seen == [True] * (OPTIONS["max_new_tokens"] - 1)
    assert model.config._attn_implementation == "sdpa"
    calls = [node.args for node in graphs[0].graph.nodes if node.target is torch.ops.dami.decode_attention]
    assert len(calls) == 1
    heads = {operand.meta["example_value"].shape[1] for call in calls for operand in call[1:3]}
    assert heads == {model.config.num_key_value_heads}


@pytest.mark.slow
def test_keeps_only_so_many_graphs(model: Any, graphs: Graphs) -> None:
    for number in range(compiled.GRAPHS + 2):
        model.model.layers[0].self_attn.scaling = 0.1 * (number + 1)
        model.generate(**prompts(), max_new_tokens=2, intensity=0.3, compile=True)
    assert len(graphs) == compiled.GRAPHS + 2 + 1  # one is the second layer's
    assert len(patch_of(model).compiled) == compiled.GRAPHS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": "yes"}, "compile must be True or False, got 'yes'"),
        ({"use_cache": False}, "compile=True needs a cache, got use_cache=False"),
        ({"cache_implementation": "dynamic"}, "compile=True takes cache_implementation='static', got 'dynamic'"),
        ({"cache_implementation": "paged"}, "compile=True takes cache_implementation='static', got 'paged'"),
        ({"num_beams": 2}, "compile=True is for greedy decoding and sampling, got num_beams=2"),
        ({"disable_compile": True}, "compile=True excludes disable_compile, got both"),
        ({"prompt_lookup_num_tokens": 2}, "compile=True excludes prompt_lookup_num_tokens, got both"),
        ({"custom_generate": lambda *args, **options: None}, "compile=True excludes custom_generate, got both"),
    ],
)
def test_what_excludes_it_is_refused(model: PreTrainedModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        model.generate(**prompts(), **{"compile": True, **options}, intensity=0.3)


def test_an_assistant_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="compile=True excludes assistant_model, got both"):
        model.generate(**prompts(), compile=True, assistant_model=dami.twin(model))


def test_a_model_that_transformers_does_not_compile_is_refused(model: Any) -> None:
    model.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match="compile=True is not for Qwen3ForCausalLM: transformers compiles no steps of"):
        model.generate(**prompts(), compile=True)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, 3])
def test_heads_of_a_group_attend_as_in_transformers(heads: int, queries: int) -> None:
    module = nn.Module()
    module.num_key_value_groups = 4 // heads
    q, (k, v) = torch.randn(2, 4, queries, 8), torch.randn(2, 2, heads, 9, 8)
    for mask in (None, torch.rand(2, 1, queries, 9) < 0.7, torch.randn(2, 4, queries, 9)):
        wanted, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=0.3)
        found, _ = grouped_attention(module, q, k, v, mask, scaling=0.3)
        torch.testing.assert_close(found, wanted)


def test_the_door_of_transformers_stays_open(model: Any) -> None:
    call = model.get_compiled_call(CompileConfig(backend="eager", mode=None))
    assert call is model._compiled_call


def test_the_command_line_compiles(graphs: Graphs) -> None:
    options = ["--greedy", "--json", "-l", "0.3", "-l", "0.8", "--max-new-tokens", "4", "--dtype", "float32"]
    lines = [CliRunner().invoke(app, ["generate", "2 + 3 =", *options, *more]) for more in ([], ["--compile"])]
    assert lines[0].exit_code == lines[1].exit_code == 0, lines[1].output
    assert lines[0].stdout == lines[1].stdout
    assert graphs


@pytest.mark.slow
def test_the_compiler_gives_the_same_tokens() -> None:
    """The real one, with its C++ wrapper; in its graphs, products of one input are one call."""
    torch._dynamo.reset()
    model = dami.patch_model(*pair("qwen3"))
    for lam in (LAM, 0.3, [1.0, 0.5, 0.0, 0.2]):
        both(model, prompts(), intensity=lam)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        model.generate(**prompts(), **OPTIONS, intensity=0.4, compile=True)
    calls = {event.key: event.count for event in profiler.key_averages()}
    steps, layers = OPTIONS["max_new_tokens"] - 1, len(model.model.layers)
    assert calls["dami::lerp_linears"] == 2 * steps * layers


@torch.no_grad()
def test_a_step_touches_nothing_on_the_host(model: Any, graphs: Graphs) -> None:
    """As a GPU's capture needs it, for which the meta device stands in: it has no numbers that the host could read."""
    model.to("meta")
    cache = StaticCache(config=model.config, max_cache_len=64)
    sequences = {"intensity": torch.empty(4, device="meta"), CACHE: cache, "use_cache": True}
    patch_of(model).checked = True
    with compiled.compiling(model):
        model(torch.empty(4, 3, dtype=torch.int64, device="meta"), **sequences)
        lam = sequences.pop("intensity")
        patch_of(model).dial.lam = lam
        call = compiled.compiled_call(model, {})
        logits = call(input_ids=torch.empty(4, 1, dtype=torch.int64, device="meta"), **sequences).logits
    assert logits.device.type == "meta"
    values = [node.meta.get("example_value") for node in graphs[0].graph.nodes]
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    assert len(tensors) > 100
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert any(tensor.shape == lam.shape and tensor.dtype == torch.float32 for tensor in tensors)
