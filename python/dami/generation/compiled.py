"""Decodes by a compiled step: `generate(compile=True)`.

transformers' `generate` compiles the forward pass of a step if its cache is static. This is added here:

- On a CPU, layers that are alike share one graph, so that a deep model compiles no longer than a shallow one
  (`regions`), and in a step torch calls it for one of them only (`repeated_calls`).
- Products of one input are one call (`products`).
- The cache has room for a power of two, so that one graph serves many lengths.
- Torch's guards on the model, hundreds for each layer, are not evaluated before every token, which would take as long
  as some of the layers: `structure` tells once per call whether what they are about has changed.
- Attention does not copy the cache for heads that share it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CompileConfig, PreTrainedConfig, StaticCache

from dami.dial.state import ModuleState
from dami.generation.attention import GROUPED
from dami.generation.pieces import CACHE
from dami.generation.products import join_products
from dami.generation.regions import Graph, Region, by_graphs, entered, regions_of
from dami.generation.repeated_calls import Recorder
from dami.generation.steering import SEVERAL_STEPS_IN_ONE, option
from dami.upstream import (
    HOOKS_AROUND,
    KEPT_BY_GENERATE,
    attention_of,
    compiler,
    compiles_steps,
    for_any_device,
    graph_pass,
    has_hooks,
    unsupported,
    without_recompile_limit,
)

LEAST_ROOM = 256  # tokens
KINDS = 4  # of layers that get a graph each; a model that has more of them is one graph
GRAPHS = 16  # of one model that are kept: with parts at a λ of their own, with an adapter, in another dtype
RECORDED = ("output_attentions", "output_router_logits")  # what transformers takes from inside layers, by hooks
# Types of most attributes, whose values a graph may depend on as they are.
PLAIN = {type(None), bool, int, float, str, frozenset, torch.dtype, torch.device, FunctionType, BuiltinFunctionType}

Known = dict[Hashable, Any]  # what has been compiled for a model, by the structure of the model or of a layer


class StepConfig(CompileConfig):
    """Tells transformers to compile, and `PreTrainedModel.get_compiled_call` that it is done here."""


def compiled_step(model: Any, options: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Returns what transformers' `generate` must be told besides its other arguments, in order to compile its steps.

    Args:
        model: a patched model.
        options: arguments of `generate` by name.
        length: tokens of the prompts.

    Raises:
        ValueError: another option excludes it, or transformers compiles no steps of this model.
    """
    others = "assistant_model", "custom_generate", "cache", "past_key_values"
    excluded = [name for name in others if options.get(name) is not None]
    excluded += [
        name for name in (*SEVERAL_STEPS_IN_ONE, "compile_config", "disable_compile") if option(model, options, name)
    ]
    if excluded:
        raise ValueError(f"compile=True excludes {excluded[0]}, got both")
    beams = option(model, options, "num_beams") or 1
    if beams > 1:
        raise ValueError(f"compile=True is for greedy decoding and sampling, got num_beams={beams}")
    if option(model, options, "use_cache") is False:
        raise ValueError("compile=True needs a cache, got use_cache=False")
    cache = option(model, options, "cache_implementation")
    if cache not in (None, "static"):
        raise ValueError(f"compile=True takes cache_implementation='static', got {cache!r}")
    config = for_any_device(StepConfig())
    if not compiles_steps(model, config):
        raise ValueError(
            f"compile=True is not for {type(model).__name__}: transformers compiles no steps of models that are "
            "offloaded or whose cache cannot be static"
        )
    more = option(model, options, "max_new_tokens")
    needed = length + more if more is not None else option(model, options, "max_length") or length + 20
    room = max(LEAST_ROOM, 1 << (needed - 1).bit_length(), option(model, options, "max_cache_len") or 0)
    return {"cache_implementation": "static", "compile_config": config, "max_cache_len": room}


@contextmanager
def compiling(model: Any) -> Iterator[None]:
    """Prepares a model for compiled steps, for the duration of a `with` block."""
    changes = attention_of(model) == "sdpa" and not model.config.sub_configs
    if changes:
        model.set_attn_implementation(GROUPED)
    try:
        with without_recompile_limit():
            yield
    finally:
        if changes:
            model.set_attn_implementation("sdpa")


def how(device: torch.device) -> dict[str, Any]:
    """Returns how `torch.compile` compiles a step for a device: on a GPU, it captures a graph."""
    on_gpu = {"triton.cudagraphs": True}
    # Shapes are known from guards and `structure`. Fewer elements than a step's are not worth waking a thread for.
    on_cpu = {"cpp_wrapper": True, "size_asserts": False, "cpp.min_chunk_size": 4096}
    return {
        "fullgraph": True,
        "options": {**(on_gpu if device.type == "cuda" else on_cpu), **graph_pass(join_products)},
    }


def compiled_call(model: Any, known: Known) -> Callable[..., Any]:
    """Returns a model's compiled forward pass, as the model is now. Call it until the model changes.

    On a CPU, each layer runs by the graph of its kind, and what is around the layers as it is. A GPU captures all of a
    step, so there the model is one graph; and so is a model whose layers are of many kinds or cannot have such graphs.

    Args:
        model: a model of transformers.
        known: what has been compiled for it, for this function to use and to add to.
    """
    layers = functools.cache(lambda: _layers(model, known))  # when the prompt is read, which may put hooks on modules
    one_graph = functools.cache(lambda: _kept(known, structure(model), _compiled, model))

    @torch.inference_mode()  # without it, the operators would ask Python whether a gradient is wanted
    def call(**inputs: Any) -> Any:
        cache, graphs = inputs.get(CACHE), layers()
        records = any(inputs.get(name, getattr(model.config, name, False)) for name in RECORDED)
        if not graphs or records or type(cache) is not StaticCache or any(graph.failed for graph in graphs.values()):
            return one_graph()(**inputs)
        with by_graphs(graphs, cache):
            return model(**inputs)

    return call


def _layers(model: Any, known: Known) -> dict[Region, Graph]:
    """Returns the layers of a model with their graphs; none where the model is to be one graph."""
    regions = regions_of(model) if model.device.type == "cpu" else []
    with entered(regions):
        kinds = {region: structure(region.layer, HOOKS_AROUND) for region in regions}
    if len({*kinds.values()}) > KINDS:
        return {}
    return {region: _kept(known, kind, _graph_of_layers, type(region.layer)) for region, kind in kinds.items()}


def _kept(known: Known, key: Hashable, make: Callable[..., Any], *given: Any) -> Any:
    """Returns what is known by a key, and makes it if need be. Only what was used last is kept."""
    known[key] = known.pop(key) if key in known else make(*given)
    while len(known) > GRAPHS:
        del known[next(iter(known))]
    return known[key]


def _graph(device: torch.device, forward: Callable[..., Any]) -> Graph:
    """Returns the graph of a module's forward pass."""
    wanted = how(device)
    options = {**wanted.pop("options", {}), "guard_filter_fn": of_inputs}
    return Graph(torch.compile(_alone(forward), **wanted, options=options))


def _graph_of_layers(layer: type[nn.Module]) -> Graph:
    """Returns the graph of layers on a CPU, whose calls are recorded."""
    wanted = how(torch.device("cpu"))
    recorder = Recorder(compiler(wanted.pop("options", {})))
    wanted |= {"backend": recorder, "options": {"guard_filter_fn": of_inputs}}
    return Graph(torch.compile(_alone(layer.forward), **wanted), recorder)


def _compiled(model: Any) -> Callable[..., Any]:
    """Returns a model's forward pass as one graph, or as several where torch cannot make one or there are hooks."""
    graph = _graph(model.device, nn.Module.__call__)
    # Hooks may change what a guard on the model would be about. The body has one of dami's own, which does not.
    hooked = any(has_hooks(module) for module in model.modules() if module is not model.base_model)
    several = torch.compile(_alone(nn.Module.__call__), **{**how(model.device), "fullgraph": False})  # with all guards

    def call(**inputs: Any) -> Any:
        if graph.failed or hooked:
            return several(model, **inputs)
        try:
            return graph.run(model, **inputs)
        except unsupported() as error:
            graph.failed = True
            said = str(error).splitlines()[0]
            warnings.warn(
                f"dami: {type(model).__name__} decodes in several graphs, which is slower, as torch cannot make one of "
                f"it at this intensity: {said}",
                UserWarning,
                stacklevel=2,
            )
            return several(model, **inputs)

    return call


def _alone(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of a module and its inputs. By its code, which is its own, torch finds what it compiled."""

    def run(module: nn.Module, *inputs: Any, **named_inputs: Any) -> Any:
        return forward(module, *inputs, **named_inputs)

    return FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)


def of_inputs(guards: Sequence[Any]) -> list[bool]:
    """Says which guards of a compiled forward pass are evaluated before every token.

    These are the guards on its inputs, on the shape of λ, and on torch's own state. `structure` stands for those on the
    model. If somebody replaces a function that a graph was traced from, that is not noticed.
    """
    return [
        not guard.name or "inputs" in guard.name or (guard.guard_type == "TENSOR_MATCH" and guard.name.endswith(".lam"))
        for guard in guards
    ]


def structure(model: nn.Module, left_out: Sequence[str] = KEPT_BY_GENERATE) -> Hashable:
    """Returns what a graph of a module depends on: its modules, their settings, and shapes and dtypes of its tensors.

    Not among it are the addresses and values of tensors, and λ: a compiled forward pass reads these at every call.

    Args:
        model: a module.
        left_out: attributes of this module itself that do not count.
    """
    shares: dict[int, int] = {}
    return tuple(
        (name, type(module), _frozen({k: v for k, v in vars(module).items() if name or k not in left_out}, shares))
        for name, module in model.named_modules()
    )


def _frozen(value: Any, shares: dict[int, int]) -> object:
    """Returns what a graph depends on in a value.

    Args:
        value: of a module's attribute, or in one.
        shares: numbers what modules share, by id: tensors, configs, dials and passes.
    """
    if type(value) in PLAIN:
        return value
    if isinstance(value, dict):
        return tuple([(key, _frozen(each, shares)) for key, each in value.items()]) if value else ()
    if isinstance(value, Tensor):
        which = shares.setdefault(id(value), len(shares))  # as a graph takes a tensor that is there twice once
        return which, type(value), value.shape, value.stride(), value.dtype, value.device, value.is_inference()
    if isinstance(value, (list, tuple)):
        return tuple([_frozen(each, shares) for each in value])
    if isinstance(value, PreTrainedConfig):
        known = id(value) in shares
        number = shares.setdefault(id(value), len(shares))
        return number if known else (number, _frozen(vars(value), shares))
    if isinstance(value, ModuleState):
        shared = [shares.setdefault(id(each), len(shares)) for each in (value.part or value.dial, value.running)]
        return *shared, value.part is None, _frozen(value.settings, shares), repr(value.stored), value.running.invariant
    if isinstance(value, Mapping):
        return _frozen(dict(value), shares)
    if isinstance(value, MethodType):
        return value.__func__, shares.setdefault(id(value.__self__), len(shares))
    if isinstance(value, functools.partial):
        return value.func, _frozen(value.args, shares), _frozen(value.keywords, shares)
    return frozenset(value) if isinstance(value, set) else value if isinstance(value, (int, str, Enum)) else type(value)
