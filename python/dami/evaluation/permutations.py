"""Moves a model in weight space without changing its function, by permuting neurons and attention heads.

The hidden neurons of an MLP and the heads of an attention module can be in any order: the result is the same up to
rounding. The straight line to a permuted model passes through models unlike either end, as between unrelated training
runs (Entezari et al., arXiv 2110.06296). It is therefore a control for a path that is claimed to be special.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dami.upstream import compute_experts_one_by_one, parameters_of

Move = list[tuple[str, int, Tensor]]  # parameter name, dimension, and new order along it

SEPARATE = ("q_proj", "k_proj", "v_proj")
FUSED = ("qkv_proj", "c_attn", "query_key_value", "Wqkv")
OUTPUT = ("o_proj", "out_proj", "c_proj", "dense", "Wo")
TOLERANCE = 1e-6  # of a module's float64 output after a move, relative to its largest value


@torch.no_grad()
def permute(model: PreTrainedModel, batch: Mapping[str, Tensor], seed: int = 0) -> list[str]:
    """Permutes the neurons of every MLP and the heads of every attention module at random, in place.

    Heads that share keys and values stay together. Each module's output for its input in `batch` is compared in float64
    before and after. If it would change, as with ALiBi, which depends on the head's index, the module is left as it is.

    Args:
        model: an ordinary causal language model.
        batch: `input_ids` and the other arguments of its forward.
        seed: of the permutations.

    Returns:
        The names of the modules that were permuted.

    Raises:
        ValueError: no module can be permuted.
    """
    random = torch.Generator().manual_seed(seed)
    moves = {name: list(_moves(module, model.config, random)) for name, module in model.named_modules()}
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def remember(name: str) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] = args, kwargs

        return model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)

    hooks = [remember(name) for name, candidates in moves.items() if candidates]
    try:
        model(**batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    permuted = []
    for name, (args, kwargs) in calls.items():
        module = model.get_submodule(name)
        move = next((move for move in moves[name] if _is_same(module, move, args, kwargs)), None)
        if move is not None:
            _apply(module, move)
            permuted.append(name)
    if not permuted:
        raise ValueError(f"model must have MLPs or attention heads whose order is free, got {type(model).__name__}")
    return permuted


def _moves(module: nn.Module, config: PreTrainedConfig, random: torch.Generator) -> Iterator[Move]:
    """Yields permutations that may preserve a module's function. The caller has to verify that."""
    linears = {name: child for name, child in module.named_children() if isinstance(child, (nn.Linear, Conv1D))}
    out = next((name for name in OUTPUT if name in linears), None)
    if out and all(name in linears for name in SEPARATE):
        yield from _heads(module, SEPARATE, out, config, random)
    elif out and any(name in linears for name in FUSED):
        yield from _heads(module, tuple(name for name in FUSED if name in linears), out, config, random)
    elif len(linears) > 1:
        yield from _neurons(linears, module, random)
    elif {"gate_up_proj", "down_proj"} <= parameters_of(module).keys():
        yield from _expert_neurons(module, random)


def _heads(
    module: nn.Module, inputs: tuple[str, ...], out: str, config: PreTrainedConfig, random: torch.Generator
) -> Iterator[Move]:
    queries = getattr(config, "num_attention_heads", 1)
    shared = getattr(config, "num_key_value_heads", None) or queries
    width = _features(module.get_submodule(out))[0] // queries
    groups = torch.randperm(shared, generator=random)
    members = torch.stack([torch.randperm(queries // shared, generator=random) for _ in range(shared)])
    heads = (groups[:, None] * (queries // shared) + members).flatten()

    def rows(order: Tensor, size: int) -> Tensor:
        return (order[:, None] * size + torch.arange(size)).flatten()

    if torch.equal(heads, torch.arange(queries)):
        return
    of_queries, of_shared = rows(heads, width), rows(groups, width)
    beside = [(name, 0, heads) for name, parameter in parameters_of(module).items() if _is(parameter, queries)]
    for name, child in module.named_children():
        for index in (of_queries, of_shared):
            if name not in (*inputs, out) and _is(parameters_of(child).get("weight"), len(index)):
                beside.append((f"{name}.weight", 0, index))
                break
    orders: list[tuple[Tensor, ...]]
    if len(inputs) == 3:
        orders = [(of_queries, of_shared, of_shared)]
    else:
        whole = torch.cat([of_queries, queries * width + of_shared, (queries + shared) * width + of_shared])
        orders = [(whole,), *([(rows(heads, 3 * width),)] if queries == shared else [])]
    for order in orders:
        move = [each for name, index in zip(inputs, order, strict=True) for each in _outputs(module, name, index)]
        yield [*move, *_inputs(module, out, of_queries), *beside]


def _neurons(linears: Mapping[str, nn.Module], module: nn.Module, random: torch.Generator) -> Iterator[Move]:
    for down, matrix in linears.items():
        neurons, width = _features(matrix)
        ups = {n: out for n, (into, out) in ((n, _features(m)) for n, m in linears.items()) if into == width != out}
        if n_ups := [name for name, out in ups.items() if out in (neurons, 2 * neurons)]:
            order = torch.randperm(neurons, generator=random)
            both = torch.cat([order, neurons + order])
            move = [e for n in n_ups for e in _outputs(module, n, order if ups[n] == neurons else both)]
            between = [
                (f"{name}.{local}", 0, order)
                for name, child in module.named_children()
                for local, parameter in parameters_of(child).items()
                if name not in linears and _is(parameter, neurons)
            ]
            yield [*move, *_inputs(module, down, order), *between]


def _expert_neurons(module: nn.Module, random: torch.Generator) -> Iterator[Move]:
    """Yields moves for experts [experts, in, out] or [experts, out, in], with gate and up in halves or interleaved."""
    shape, doubled = (module.get_parameter(name).shape for name in ("down_proj", "gate_up_proj"))
    for dim in (2, 1):
        other = 3 - dim
        neurons = shape[dim]
        if doubled[other] == 2 * neurons:
            order = torch.randperm(neurons, generator=random)
            for both in (torch.cat([order, neurons + order]), torch.stack([2 * order, 2 * order + 1], 1).flatten()):
                biases = [(n, 1, both) for n in parameters_of(module) if n.startswith("gate_up_proj_bias")]
                yield [("gate_up_proj", other, both), ("down_proj", dim, order), *biases]


def _is(parameter: Tensor | None, size: int) -> bool:
    return parameter is not None and parameter.shape == (size,)


def _features(module: nn.Module) -> tuple[int, int]:
    """Returns the input and output features of a linear module."""
    shape: Any = module.weight.shape
    return (shape[0], shape[1]) if isinstance(module, Conv1D) else (shape[1], shape[0])


def _outputs(module: nn.Module, name: str, order: Tensor) -> Move:
    linear = module.get_submodule(name)
    move: Move = [(f"{name}.weight", 1 if isinstance(linear, Conv1D) else 0, order)]
    return move if linear.bias is None else [*move, (f"{name}.bias", 0, order)]


def _inputs(module: nn.Module, name: str, order: Tensor) -> Move:
    return [(f"{name}.weight", 0 if isinstance(module.get_submodule(name), Conv1D) else 1, order)]


def _apply(module: nn.Module, move: Move) -> None:
    for name, dim, order in move:
        parameter = module.get_parameter(name)
        parameter.data = parameter.data.index_select(dim, order.to(parameter.device))


def _is_same(module: nn.Module, move: Move, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a module's float64 output stays the same when its parameters are moved."""
    if any(len(order) != module.get_parameter(name).shape[dim] for name, dim, order in move):
        return False
    exact = copy.deepcopy(module).double()
    config: Any = getattr(exact, "config", None)
    if config is not None:
        compute_experts_one_by_one(config)  # the grouped product does not support float64
    args, kwargs = _double(args), _double(kwargs)
    before = _first(exact(*args, **kwargs))
    _apply(exact, move)
    return bool((_first(exact(*args, **kwargs)) - before).abs().max() <= TOLERANCE * before.abs().max())


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _double(each) for key, each in value.items()}
    return type(value)(map(_double, value)) if isinstance(value, (tuple, list)) else value
