"""Joins the products of a graph that read one input into one call: queries, keys and values, or gate and up.

`layers.siblings` does so while a model runs. In a graph of torch's compiler it costs nothing but a look when compiling.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.fx import Graph, Node

import dami_kernels  # noqa: F401  (defines the operators)

ALONE, TOGETHER = torch.ops.dami.lerp_linear.default, torch.ops.dami.lerp_linears.default
aten = torch.ops.aten
VIEWS = {aten.view.default, aten.reshape.default, aten.select.int, aten.expand.default, aten.unsqueeze.default}


def join_products(graph: Graph) -> None:
    """Computes products of the same rows, with the same λ and weights of one format, by `lerp_linears`.

    Args:
        graph: of torch's operators, none of which changes a tensor.
    """
    alike: dict[Hashable, list[Node]] = {}
    for node in graph.find_nodes(op="call_function", target=ALONE):
        x, weight, bias, *rest = _arguments(node)
        there = all(operand.op == "placeholder" for operand in (*weight, *(bias or ())))
        if there and isinstance(node.meta["val"].shape[0], int):
            alike.setdefault((_value(x), bias is None, _value(rest)), []).append(node)
    for nodes in alike.values():
        if len(nodes) > 1:
            _join(graph, nodes)


def _join(graph: Graph, nodes: list[Node]) -> None:
    """Replaces products by the parts of one call, which comes where the first of them was."""
    x, _, bias, *rest = _arguments(nodes[0])
    weights = [each for node in nodes for each in _arguments(node)[1]]
    biases = None if bias is None else [each for node in nodes for each in _arguments(node)[2]]
    shapes = [node.meta["val"].shape for node in nodes]
    with graph.inserting_before(nodes[0]):
        y = graph.call_function(TOGETHER, (x, weights, biases, *rest))
        y.meta["val"] = nodes[0].meta["val"].new_empty(sum(shape.numel() for shape in shapes))
        parts, end = [], 0
        for shape in shapes:
            begin, end = end, end + shape.numel()
            flat = graph.call_function(aten.slice.Tensor, (y, 0, begin, end))
            flat.meta["val"] = y.meta["val"][begin:end]
            part = graph.call_function(aten.reshape.default, (flat, [*shape]))
            part.meta["val"] = flat.meta["val"].view(shape)
            parts.append(part)
    for node, part in zip(nodes, parts, strict=True):
        node.replace_all_uses_with(part)
        graph.erase_node(node)


def _arguments(node: Node) -> tuple[Any, ...]:
    return node.args


def _value(argument: object) -> Hashable:
    """Returns what an argument's value depends on: views of one tensor that are alike have the same."""
    if isinstance(argument, Node) and argument.target in VIEWS and not argument.kwargs:
        return argument.target, _value(argument.args)
    if isinstance(argument, (list, tuple)):
        return tuple(map(_value, argument))
    return argument
