"""Decodes by a compiled step: `generate(compile=True)`.

transformers' `generate` compiles the forward pass of a step if its cache is static. Three things are added here. The
cache has room for a power of two, so that one graph serves many lengths. Torch's guards on the model, hundreds for each
layer, are not evaluated before every token, which would take as long as some of the layers: `structure` tells once per
call whether what they are about has changed. And attention does not copy the cache for heads that share it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CompileConfig, PreTrainedConfig

from dami.dial.patch import patch_of
from dami.dial.state import ModuleState
from dami.generation.attention import GROUPED
from dami.generation.steering import SEVERAL_STEPS_IN_ONE, option
from dami.upstream import KEPT_BY_GENERATE, attention_of, compiles_steps, for_any_device, unsupported

LEAST_ROOM = 256  # tokens
GRAPHS = 8  # of one model that are kept: with parts at a λ of their own, with an adapter, in another dtype


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
        yield
    finally:
        if changes:
            model.set_attn_implementation("sdpa")


def how(device: torch.device) -> dict[str, Any]:
    """Returns how `torch.compile` compiles a step for a device: on a GPU, it captures a graph."""
    return {
        "fullgraph": True,
        "options": {"triton.cudagraphs": True} if device.type == "cuda" else {"cpp_wrapper": True},
    }


def compiled_call(model: Any) -> Callable[..., Any]:
    """Returns a patched model's compiled forward pass, as the model is now. Call it until the model changes."""
    calls, key = patch_of(model).compiled, structure(model)
    if key not in calls:
        while len(calls) >= GRAPHS:
            del calls[next(iter(calls))]
        calls[key] = _compiled(model)
    return calls[key]


def _compiled(model: Any) -> Callable[..., Any]:
    """Returns a model's forward pass, to be compiled when it is first called."""
    wanted = how(model.device)
    options = wanted.get("options", {})
    one_graph = torch.compile(_alone(model), **{**wanted, "options": {**options, "guard_filter_fn": of_inputs}})
    calls = [one_graph]

    @torch.inference_mode()  # without it, the operators would ask Python whether a gradient is wanted
    def call(**inputs: Any) -> Any:
        try:
            return calls[-1](**inputs)
        except unsupported() as error:
            if calls[-1] is not one_graph:
                raise
            said = str(error).splitlines()[0]
            warnings.warn(
                f"dami: {type(model).__name__} decodes in several graphs, which is slower, as torch cannot make one of "
                f"it at this intensity: {said}",
                UserWarning,
                stacklevel=2,
            )
            calls.append(torch.compile(_alone(model), **{**wanted, "fullgraph": False}))  # with all guards
            return calls[-1](**inputs)

    return call


def _alone(model: Any) -> Callable[..., Any]:
    """Returns a function that calls a model, with code of its own, by which torch finds what it has compiled for it."""

    def run(**inputs: Any) -> Any:
        return model(**inputs)

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


def structure(model: nn.Module) -> Hashable:
    """Returns what a graph of a model depends on: its modules, their settings, and shapes and dtypes of its tensors.

    Not among it are the addresses and values of tensors, and λ: a compiled forward pass reads these at every call.
    """
    shares: dict[int, int] = {}
    return tuple(
        (name, type(module), _frozen({k: v for k, v in vars(module).items() if k not in KEPT_BY_GENERATE}, shares))
        for name, module in model.named_modules()
    )


def _frozen(value: Any, shares: dict[int, int]) -> object:
    """Returns what a graph depends on in a value. `shares` numbers what modules share: dials and passes, by id."""
    if isinstance(value, Tensor):
        return type(value), value.shape, value.stride(), value.dtype, value.device, value.is_inference()
    if isinstance(value, Mapping):
        return tuple((key, _frozen(each, shares)) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(each, shares) for each in value)
    if isinstance(value, PreTrainedConfig):
        return _frozen(vars(value), shares)
    if isinstance(value, ModuleState):
        shared = [shares.setdefault(id(each), len(shares)) for each in (value.part or value.dial, value.running)]
        return *shared, _frozen(value.settings, shares), repr(value.stored), value.running.invariant
    plain = (bool, int, float, str, frozenset, torch.dtype, torch.device, FunctionType)
    return value if isinstance(value, plain) else frozenset(value) if isinstance(value, set) else type(value)
