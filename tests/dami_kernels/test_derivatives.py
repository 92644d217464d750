"""Derivatives of every operator beyond the plain gradient: forward mode, torch.func, ends that are not finite, meta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from dami_kernels import (
    LerpWeight,
    lerp_embedding,
    lerp_experts,
    lerp_layer_norm,
    lerp_linear,
    lerp_linears,
    lerp_rms_norm,
)
from tests.marks import slow

Function = Callable[[Tensor, Tensor], Tensor]
ROWS, K, N = 5, 7, 4
LAM = torch.tensor([0.0, 1.0, 0.3, 0.7, -0.2])
OFFSETS = torch.tensor([2, 2, 4], dtype=torch.int32)  # an expert without rows, and a row without an expert
EXPERT = [0, 0, 2, 2, None]
IDS = torch.tensor([3, 0, 1, 3, 2])
Ends = tuple[Tensor, Tensor]


def ends(*shape: int) -> Ends:
    return torch.randn(shape), torch.randn(shape)


class Case:
    """One operator, and the same in torch's own functions, of x [ROWS, K] and λ [ROWS]."""

    def __init__(self, name: str) -> None:
        self.name = name
        shape = {"linear": (N, K), "linears": (N, K), "embedding": (N, K), "experts": (3, N, K)}.get(name, (K,))
        self.weight, self.bias = ends(*shape), ends(*shape[:-1] or (K,))

    def ours(self, x: Tensor, lam: Tensor) -> Tensor:
        weight, bias = LerpWeight.pack(*self.weight), LerpWeight.pack(*self.bias)
        if self.name == "linear":
            return lerp_linear(x, weight, lam, bias)
        if self.name == "linears":
            return torch.cat(lerp_linears(x, [weight, weight], lam, [bias, bias]), -1)
        if self.name == "embedding":
            return lerp_embedding(IDS, weight, lam)
        if self.name == "experts":
            return lerp_experts(x, weight, lam, OFFSETS, bias)
        if self.name == "rms_norm":
            return lerp_rms_norm(x, weight, lam, 1e-6, offset=1.0)
        return lerp_layer_norm(x, weight, lam, bias, 1e-5)

    def plain(self, x: Tensor, lam: Tensor) -> Tensor:
        """The operator at both ends, interpolated: each is affine in its weights."""
        return torch.lerp(self.at(0, x), self.at(1, x), lam.unsqueeze(1))

    def at(self, end: int, x: Tensor) -> Tensor:
        weight, bias = self.weight[end], self.bias[end]
        if self.name == "linear":
            return F.linear(x, weight, bias)
        if self.name == "linears":
            return F.linear(x, weight, bias).repeat(1, 2)
        if self.name == "embedding":
            return weight[IDS]
        if self.name == "experts":
            rows = [x[i] @ weight[e].T + bias[e] if e is not None else 0 * x[i, :N] for i, e in enumerate(EXPERT)]
            return torch.stack(rows)
        if self.name == "rms_norm":
            return F.rms_norm(x, (K,), 1 + weight, 1e-6)
        # by hand: the second derivatives of torch's own are wrong in forward mode
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


NAMES = ["linear", "linears", "embedding", "experts", "rms_norm", "layer_norm"]
every_operator = pytest.mark.parametrize("name", NAMES)


def loss(f: Function) -> Function:
    return lambda x, lam: f(x, lam).square().sum()


def dual(f: Function, x: Tensor, lam: Tensor, dx: Tensor, dlam: Tensor) -> Any:
    """The tangent of torch.autograd's forward mode, and its gradient."""
    with forward_ad.dual_level():
        x = x.clone().requires_grad_()
        y = forward_ad.unpack_dual(f(forward_ad.make_dual(x, dx), forward_ad.make_dual(lam, dlam))).tangent
        return y.detach(), torch.autograd.grad(y.square().sum() + 0 * x.sum(), x)[0]


def same(x: Tensor) -> Tensor:
    return torch.stack([x, 2 * x])


TRANSFORMS: dict[str, Callable[[Function, Tensor, Tensor, Tensor, Tensor], Any]] = {
    "jvp": lambda f, x, lam, dx, dlam: jvp(f, (x, lam), (dx, dlam)),
    "jvp in λ": lambda f, x, lam, dx, dlam: jvp(lambda lam: f(x, lam), (lam,), (dlam,)),
    "dual numbers": dual,
    "grad": lambda f, x, lam, *_: grad(loss(f), (0, 1))(x, lam),
    "vmap over λ": lambda f, x, lam, *_: vmap(lambda lam: f(x, lam))(same(lam)),
    "vmap over both": lambda f, x, lam, *_: vmap(f, in_dims=(2, 0))(same(x).permute(1, 2, 0), same(lam)),
    "jacobian, forward": lambda f, x, lam, *_: jacfwd(f, (0, 1))(x, lam),
    "jacobian, reverse": lambda f, x, lam, *_: jacrev(f, (0, 1))(x, lam),
    "hessian": lambda f, x, lam, *_: hessian(loss(f), (0, 1))(x, lam),
    "reverse over reverse": lambda f, x, lam, *_: jacrev(jacrev(loss(f), (0, 1)), (0, 1))(x, lam),
    "forward over forward": lambda f, x, lam, *_: jacfwd(jacfwd(loss(f), (0, 1)), (0, 1))(x, lam),
    "grad of vmap": lambda f, x, lam, *_: grad(lambda x, lam: vmap(f)(x, lam).square().sum(), (0, 1))(
        same(x), same(lam)
    ),
    "vmap of grad": lambda f, x, lam, *_: vmap(grad(loss(f), (0, 1)))(same(x), same(lam)),
}


@every_operator
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_transform_of_torch_is_right(name: str, transform: str) -> None:
    """In x and in λ, at the ends as well, as torch's own functions have it."""
    case, directions = Case(name), (torch.randn(ROWS, K), torch.randn(ROWS))
    inputs = torch.randn(ROWS, K), LAM, *directions
    torch.testing.assert_close(
        TRANSFORMS[transform](case.ours, *inputs), TRANSFORMS[transform](case.plain, *inputs), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap over both"])
def test_transforms_compile(transform: str) -> None:
    case, inputs = Case("linear"), (torch.randn(ROWS, K), LAM, torch.randn(ROWS, K), torch.randn(ROWS))
    compiled = torch.compile(lambda *inputs: TRANSFORMS[transform](case.ours, *inputs), backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), TRANSFORMS[transform](case.plain, *inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", ["int4", *slow("int8", "w8d4")])
def test_gradients_by_the_real_compiler(format: str) -> None:
    """Of codes with a part of a group at their end, which it has compiled wrongly."""
    weight = LerpWeight.pack(*ends(N, 33), format)
    inputs = torch.randn(ROWS, 33), torch.rand(ROWS)

    def gradients(x: Tensor, lam: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(lerp_linear(x, weight, lam).square().sum(), (x, lam))

    def compiled(x: Tensor, lam: Tensor) -> tuple[Tensor, ...]:
        y = torch.compile(lambda x, lam: lerp_linear(x, weight, lam), fullgraph=True)(x, lam)
        return torch.autograd.grad(y.square().sum(), (x, lam))

    with torch._inductor.config.patch(force_disable_caches=True):
        found, expected = (run(*(each.clone().requires_grad_() for each in inputs)) for run in (compiled, gradients))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_padded_and_ragged_rows_have_tangents() -> None:
    weight, lam, dlam = LerpWeight.pack(*ends(N, K)), torch.rand(2), torch.randn(2)
    index, x = torch.tensor([0, 0, 1, 1], dtype=torch.int32), torch.randn(4, K)
    expected = jvp(lambda lam: lerp_linear(x, weight, lam.repeat_interleave(2)), (lam,), (dlam,))
    for rows in ({"rows_per_lam": 2}, {"row_to_lam": index}):
        actual = jvp(lambda lam, rows=rows: lerp_linear(x, weight, lam, **rows), (lam,), (dlam,))
        torch.testing.assert_close(actual, expected)


def test_low_rank_has_tangents() -> None:
    base, x, dlam = torch.randn(30, 40), torch.randn(ROWS, 40), torch.randn(ROWS)
    weight = LerpWeight.pack(base, base + torch.outer(torch.randn(30), torch.randn(40)), "lowrank")
    _, tangent = jvp(lambda lam: lerp_linear(x, weight, lam), (LAM,), (dlam,))
    difference = weight.unpack()[1] - weight.unpack()[0]
    torch.testing.assert_close(tangent, dlam.unsqueeze(1) * (x @ difference.T), rtol=1e-4, atol=1e-4)


@every_operator
@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_derivatives_at_an_end_do_not_see_the_other(name: str, end: int, bad: float) -> None:
    """Those in x. The derivative in λ is the difference of the ends, and needs both."""
    case, x, lam = Case(name), torch.randn(ROWS, K), torch.full((ROWS,), float(end))
    lam[2] = 0.3
    rows, dx = torch.arange(ROWS) != 2, torch.randn(ROWS, K)

    def derivatives() -> list[Tensor]:
        y, tangent = jvp(lambda x: case.ours(x, lam), (x,), (dx,))
        if name == "embedding":
            return [y]
        return [y, tangent, grad(lambda x: case.ours(x, lam)[rows].square().sum())(x)]

    expected = derivatives()
    case.weight[1 - end].fill_(bad)
    case.bias[1 - end].fill_(bad)
    for actual, right in zip(derivatives(), expected, strict=True):
        assert torch.equal(actual[rows], right[rows])
    of_lam = grad(lambda lam: case.ours(x, lam).nan_to_num().sum())(lam)
    assert not of_lam[0].isfinite()


@pytest.mark.parametrize("end", [0, 1])
def test_a_merged_copy_of_an_end_does_not_see_the_other(end: int) -> None:
    both = ends(N, K)
    both[1 - end][0, 0] = torch.nan
    assert torch.equal(LerpWeight.pack(*both).materialize(end), both[end])


@every_operator
def test_meta_tensors_have_shapes_and_gradients(name: str) -> None:
    case, x, lam = Case(name), torch.randn(ROWS, K), LAM.clone()
    expected = case.ours(x, lam)
    case.weight, case.bias = (tuple(end.to("meta") for end in both) for both in (case.weight, case.bias))  # type: ignore[assignment]
    with pytest.MonkeyPatch.context() as patch:
        for constant in ("IDS", "OFFSETS"):
            patch.setitem(globals(), constant, globals()[constant].to("meta"))
        x, lam = (value.to("meta").requires_grad_() for value in (x, lam))
        y = case.ours(x, lam)
        assert (y.shape, y.dtype, y.device) == (expected.shape, expected.dtype, x.device)
        y.sum().backward()
        assert lam.grad is not None
        assert lam.grad.shape == lam.shape
        _, tangent = jvp(case.ours, (x.detach(), lam.detach()), (x.detach(), lam.detach()))
        assert tangent.shape == y.shape
        assert vmap(lambda lam: case.ours(x, lam))(lam.detach().expand(3, -1)).shape == (3, *y.shape)


def test_ends_with_a_tangent_are_refused() -> None:
    base, target = ends(N, K)
    x = torch.randn(ROWS, K)
    with pytest.raises(ValueError, match="weight has a tangent, but the ends are frozen: differentiate along x and"):
        jvp(lambda base: lerp_linear(x, LerpWeight.pack(base, target), LAM), (base,), (target,))


def test_meta_tensors_are_not_packed_into_codes() -> None:
    end = torch.empty(N, K, device="meta")
    with pytest.raises(
        ValueError, match="base and target must hold values to be stored as 'int4', got tensors on meta"
    ):
        LerpWeight.pack(end, end, "int4")


def test_a_weight_of_another_dtype_is_refused() -> None:
    end = torch.zeros(N, K, dtype=torch.float64)
    weight = LerpWeight((end, end), "pair", end.shape, end.dtype)
    with pytest.raises(TypeError, match=r"weight must be of float32, bfloat16 or float16, got torch\.float64"):
        lerp_linear(torch.zeros(ROWS, K, dtype=torch.float64), weight, LAM)
