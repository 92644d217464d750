"""`join_products`: which products of a graph become one call, and which must not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from dami.generation.products import join_products
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dami_kernels import LerpWeight, lerp_linear

SIZES = (24, 8, 8)
Products = Callable[[Tensor, Tensor, Sequence[LerpWeight]], list[Tensor]]


def weights(format: str = "pair", sizes: Sequence[int] = SIZES, k: int = 64) -> list[LerpWeight]:
    base = torch.randn(sum(sizes), k)
    target = base + 0.1 * torch.outer(torch.randn(sum(sizes)), torch.randn(k))
    return [LerpWeight.pack(*ends, format) for ends in zip(base.split(sizes), target.split(sizes), strict=True)]


def joined(function: Products, packed: Sequence[LerpWeight], rows: int = 3) -> list[int]:
    """Returns the number of tensors that each call takes as weights once a function's products are joined.

    Inputs of the graph are x, λ and the tensors of the weights, as in torch's compiler. Results must keep their bits.
    """

    def of_tensors(x: Tensor, lam: Tensor, *tensors: Tensor) -> list[Tensor]:
        left = iter(tensors)
        return function(x, lam, [replace(each, tensors=tuple(next(left) for _ in each.tensors)) for each in packed])

    inputs = torch.randn(rows, 1, 64), torch.rand(rows), *(tensor for each in packed for tensor in each.tensors)
    graph = make_fx(of_tensors, tracing_mode="fake")(*inputs)
    wanted = graph(*inputs)
    join_products(graph.graph)
    graph.graph.lint()
    graph.recompile()
    for y, expected in zip(graph(*inputs), wanted, strict=True):
        assert torch.equal(y, expected)
    return [len(node.args[1]) for node in graph.graph.nodes if "lerp_linear" in str(node.target)]


def all_of(x: Tensor, lam: Tensor, packed: Sequence[LerpWeight]) -> list[Tensor]:
    return [lerp_linear(x, weight, lam) for weight in packed]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("format", "tensors"), [("pair", 2), ("int8", 3), ("int4", 3), ("w8d4", 4), ("lowrank", 3)])
def test_products_of_one_input_become_one_call(format: str, tensors: int, rows: int) -> None:
    assert joined(all_of, weights(format), rows) == [3 * tensors]


def test_biases_go_with_their_weights() -> None:
    biases = [LerpWeight.pack(torch.randn(size), torch.randn(size)) for size in SIZES]

    def function(x: Tensor, lam: Tensor, packed: Sequence[LerpWeight]) -> list[Tensor]:
        return [lerp_linear(x, w, lam, b) for w, b in zip(packed[:3], packed[3:], strict=True)]

    assert joined(function, [*weights(), *biases]) == [6]

    def some(x: Tensor, lam: Tensor, packed: Sequence[LerpWeight]) -> list[Tensor]:
        q, k, v, bias = packed
        return [lerp_linear(x, q, lam, bias), lerp_linear(x, k, lam), lerp_linear(x, v, lam)]

    assert joined(some, [*weights(), biases[0]]) == [2, 4]


def test_a_product_of_a_result_stays_where_it_is() -> None:
    def block(x: Tensor, lam: Tensor, packed: Sequence[LerpWeight]) -> list[Tensor]:
        q, k, v, down = packed
        y = lerp_linear(x, q, lam)
        return [lerp_linear(y, down, lam), y, lerp_linear(x, k, lam), lerp_linear(x, v, lam)]

    assert joined(block, [*weights(), *weights(sizes=[5], k=SIZES[0])]) == [6, 2]


@pytest.mark.parametrize(
    "differs",
    [
        lambda x, lam, w: lerp_linear(x, w, 1 - lam),
        lambda x, lam, w: lerp_linear(x, w, lam[:1].expand(3)),
        lambda x, lam, w: lerp_linear(x + 1, w, lam),
        lambda x, lam, w: lerp_linear(x.flip(0), w, lam),
        lambda x, lam, w: lerp_linear(x, w, lam, invariant=True),
        lambda x, lam, w: lerp_linear(x, replace(w, tensors=tuple(tensor + 1 for tensor in w.tensors)), lam),
    ],
    ids=["another λ", "one λ", "another input", "other rows", "invariant", "a weight that is computed"],
)
def test_what_differs_is_computed_by_itself(differs: Callable[[Tensor, Tensor, LerpWeight], Tensor]) -> None:
    def function(x: Tensor, lam: Tensor, packed: Sequence[LerpWeight]) -> list[Tensor]:
        q, k, v = packed
        return [lerp_linear(x, q, lam), differs(x, lam, k), lerp_linear(x, v, lam)]

    assert joined(function, weights()) == [4, 2]


def test_weights_of_another_format_are_computed_by_themselves() -> None:
    assert joined(all_of, [*weights("pair")[:2], *weights("int4")[2:]]) == [4, 3]
