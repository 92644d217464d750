"""Code shared by the operators: registration in the `dami` namespace, and argument checks.

Derivatives are registered for torch's autograd key, as C++ operators do, because
`torch.library.register_autograd` supports neither forward mode nor the transforms of `torch.func`.
"""

from __future__ import annotations

import importlib.util
import inspect
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dami_kernels import formats, native, upstream
from dami_kernels.installation import needs
from dami_kernels.launching import FirstCall
from dami_kernels.upstream import pytree
from dami_kernels.weight import FLOAT_DTYPES, LerpWeight

F = TypeVar("F", bound=Callable[..., Any])

LIBRARY = torch.library.Library("dami", "DEF")


PLAIN: dict[str, Callable[..., Any]] = {}  # every operator's version in plain torch
CHECKED: dict[str, Callable[..., Any]] = {}  # checks an operator's arguments and dispatches to its implementation

_raised = threading.local()


def reraise() -> None:
    """Raises the error that this thread's last operator `_NAME` caught, because torch's C interface loses it."""
    raise _raised.__dict__.pop("error")


def kernel_of(name: str, device: str) -> Callable[..., Any] | str:
    """Returns an operator's kernel for a device type, which takes its schema's arguments, or why there is none."""
    if device == "cpu":
        return native.WHY_NOT or getattr(native, name)
    if device == "cuda":
        if not _has_triton():
            return needs("a GPU", "triton", "triton")
        return getattr(importlib.import_module("dami_kernels.triton"), name)
    return f"there is no kernel for {device}"


def define(
    schema: str,
    *,
    check: Callable[..., None],
    fake: Callable[..., Any],
    plain: Callable[..., Any],
    gradients: Callable[..., tuple[Tensor | None, Tensor]],
    tangent: Callable[..., Tensor],
) -> None:
    """Registers an operator with everything torch needs to know about it.

    Kernels are found by the operator's name, see `kernel_of`. If they are missing or raise NotImplementedError, as
    they do for a format that they cannot read, `plain` runs instead and warns once.

    Args:
        schema: its torch schema. The first argument is x or ids, and one is called lam.
        check: raises ValueError or TypeError if the arguments would make a kernel read out of bounds.
        fake: computes only the output's shape and dtype, for torch.compile and the meta device.
        plain: the operator in plain torch, for any device.
        gradients: (dy, *arguments) → (dx, dλ): the gradients of x (None for ids) and of λ, given the output's gradient.
        tangent: (ẋ, λ̇, *arguments) → ẏ: the output's tangent, given the tangents of x (None for ids) and λ.
            Both are in plain torch without in-place changes, so that torch can differentiate and batch them again.
    """
    name = schema.split("(")[0]
    PLAIN[name] = plain

    def filled(args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Replaces None by empty lists: exported programs turn empty lists into None, so the schema allows it."""
        return upstream.without_none(op, args)

    def run(*args: Any) -> Any:
        args = filled(args)
        check(*args)
        # Kernels expect λ, its map, ids and offsets to be contiguous.
        args = tuple([x.contiguous() if isinstance(x, Tensor) and x.dim() == 1 else x for x in args])
        kernel = kernel_of(name, args[0].device.type)
        if isinstance(kernel, str):
            return slowly(kernel, *args)
        try:
            return kernel(*args)
        except NotImplementedError as error:
            return slowly(str(error), *args)

    def slowly(why: str, *args: Any) -> Any:
        _warn_once(f"dami::{name} runs as plain torch, many times slower: {why}")
        return plain(*args)

    op = register(schema, run, fake)
    derivatives = (
        lambda dy, *args: gradients(dy, *filled(args)),
        lambda dx, dlam, *args: tangent(dx, dlam, *filled(args)),
    )
    LIBRARY.impl(name, _differentiable(op, *derivatives), "Autograd", with_keyset=True)
    register_vmap(name)


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers an operator's implementation in Python and returns the operator.

    Kernels that call torch's C interface use another operator of the same schema, `_NAME`, for calls that they do not
    take: see `native.register`.
    """
    name = schema.split("(")[0]

    def caught(*args: Any) -> Any:
        try:
            return CHECKED[name](*args)
        except Exception as error:
            _raised.error = error
            return torch.empty(())

    CHECKED[name] = run
    LIBRARY.define(f"_{schema}")
    LIBRARY.impl(f"_{name}", caught, "CompositeExplicitAutograd")
    LIBRARY.impl(f"_{name}", torch.library.fallthrough_kernel, "Autograd")
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dami::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.dami, name).default


def _differentiable(
    op: Any, gradients: Callable[..., tuple[Tensor | None, Tensor]], tangent: Callable[..., Tensor]
) -> Callable[..., Any]:
    """Returns an operator's kernel for torch's autograd key."""
    lam_at = upstream.argument_names(op).index("lam")

    def below(keyset: Any, args: tuple[Any, ...]) -> Tensor:
        with upstream.below_autograd():
            return op.redispatch(keyset & upstream.after_autograd, *args)

    class Lerp(upstream.SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, x: Tensor, lam: Tensor, keyset: Any, args: tuple[Any, ...]) -> Tensor:
            leaves, ctx.structure = pytree.tree_flatten(args)
            ctx.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            tensors = [leaf if isinstance(leaf, Tensor) else None for leaf in leaves]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)
            with torch.enable_grad(), upstream.forward_gradients(True):  # for the transforms outside this one
                return below(keyset, args)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            args = _arguments(ctx)
            with _without_autocast(dy.device.type):
                return *gradients(dy, *args), None, None

        @staticmethod
        def jvp(ctx: Any, dx: Tensor | None, dlam: Tensor | None, *_: None) -> Tensor:
            args = pytree.tree_map_only(Tensor, lambda t: forward_ad.unpack_dual(t, level=0).primal, _arguments(ctx))
            x, lam = args[0], args[lam_at]
            if dx is None and x.is_floating_point():
                dx = torch.zeros_like(x)
            dlam = torch.zeros_like(lam) if dlam is None else dlam
            with _without_autocast(x.device.type), upstream.forward_gradients(True):
                return tangent(dx, dlam, *args)

    def run(keyset: Any, *args: Any) -> Tensor:
        x, lam = args[0], args[lam_at]
        backward = torch.is_grad_enabled() and (x.requires_grad or lam.requires_grad)
        forward = upstream.in_forward_mode() or upstream.in_transforms()
        if not backward and not forward:
            return below(keyset, args)
        with upstream.single_level_functions():
            return Lerp.apply(x, lam, keyset, args)  # type: ignore[attr-defined]  # apply exists in the C++ base class

    return run


def _arguments(ctx: Any) -> list[Any]:
    """Restores an operator's arguments from its autograd context."""
    saved = zip(ctx.saved_tensors, ctx.others, strict=True)
    return pytree.tree_unflatten([other if tensor is None else tensor for tensor, other in saved], ctx.structure)


def register_vmap(name: str) -> None:
    """Makes an operator work under `torch.vmap`: it runs once per index of the mapped dimension."""
    op = getattr(torch.ops.dami, name).default

    def batched(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        leaves, structure = pytree.tree_flatten(args)
        dims = pytree.tree_leaves(in_dims, is_leaf=lambda dim: dim is None)

        def at(index: int) -> Any:
            mapped = [leaf if dim is None else leaf.select(dim, index) for leaf, dim in zip(leaves, dims, strict=True)]
            return op(*pytree.tree_unflatten(mapped, structure))

        results = [at(index) for index in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])

    torch.library.register_vmap(f"dami::{name}", batched, lib=LIBRARY)


def is_eager() -> bool:
    """Whether a call only needs its kernel: nothing compiles, traces, transforms, intercepts or casts it."""
    return not torch.compiler.is_compiling() and not upstream.is_watched()


def public(kind: Literal["product", "norm", "lookup"], direct: Callable[..., Any]) -> Callable[[F], F]:
    """Makes a public function of x or ids call its kernel directly, and follow `torch.autocast` as torch's own do.

    `direct` takes a flag that says whether gradients are recorded, then the function's arguments. It returns None if
    it cannot handle the call, or a `FirstCall`. Through torch's dispatcher, a small call takes ten times as long.

    A product casts x, weights and biases to autocast's dtype, like `F.linear`. A norm computes in float32 and, like
    `F.layer_norm`, returns float32 on a GPU and x's dtype on the CPU. A lookup casts nothing, like `F.embedding`. λ
    always stays float32, and nothing inside is cast again.
    """

    def decorate(function: F) -> F:
        first = next(iter(inspect.signature(function).parameters))

        @wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            if not native.WHY_NOT and is_eager():
                y = direct(torch.is_grad_enabled(), *args, **options)
                if y is not None:
                    return y.run(function, *args, **options) if type(y) is FirstCall else y
            x = args[0] if args else options.get(first)
            if not isinstance(x, Tensor) or x.dtype == torch.float64 or not _is_autocast(x.device.type):
                return function(*args, **options)
            device = x.device.type
            if kind != "lookup":
                dtype = torch.get_autocast_dtype(device) if kind == "product" else torch.float32
                args = tuple(_cast(value, dtype) for value in args)
                options = {name: _cast(value, dtype) for name, value in options.items()}
                args, options = ((x.to(dtype), *args[1:]), options) if args else ((), {**options, first: x.to(dtype)})
            with _without_autocast(device):
                y = function(*args, **options)
            return y.to(x.dtype) if kind == "norm" and device == "cpu" else y

        return cast(F, run)

    return decorate


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Returns an argument with any weights in it cast to another dtype."""
    if isinstance(value, (list, tuple)):
        return [_cast(each, dtype) for each in value]
    return value.to(dtype) if isinstance(value, LerpWeight) else value


# Asked here, because torch 2.11 cannot compile the question.
_WITH_AUTOCAST = tuple(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu")))


def _is_autocast(device: str) -> bool:
    return device in _WITH_AUTOCAST and torch.is_autocast_enabled(device)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if _is_autocast(device) else nullcontext()


@cache
def _warn_once(message: str) -> None:
    warnings.warn(f"dami: {message}", UserWarning, stacklevel=4)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def check_rows(x: Tensor, dim: int, lam: Tensor, row_to_lam: Tensor | None, rows_per_lam: int) -> None:
    """Checks an operator's input of `dim` dimensions, and that each of its rows has a λ."""
    rows, device = x.shape[0] if x.dim() else 1, x.device
    if x.dim() != dim:
        raise ValueError(f"the input must have {dim} dimensions, got shape {list(x.shape)}")
    if lam.dtype != torch.float32 or lam.dim() != 1 or lam.device != device:
        raise ValueError(
            f"lam must be torch.float32 [L] on {device}, got {lam.dtype} {list(lam.shape)} on {lam.device}"
        )
    if row_to_lam is None:
        if lam.shape[0] * rows_per_lam != rows:
            raise ValueError(f"len(lam) * rows_per_lam must equal the {rows} rows, got {lam.shape[0]} * {rows_per_lam}")
    else:
        check_vector("row_to_lam", row_to_lam, rows, device)


def check_vector(name: str, vector: Tensor, size: int, device: torch.device) -> None:
    """Checks a vector of indices."""
    if vector.dtype != torch.int32 or vector.shape != (size,) or vector.device != device:
        raise ValueError(
            f"{name} must be torch.int32 [{size}] on {device}, "
            f"got {vector.dtype} {list(vector.shape)} on {vector.device}"
        )


def check_stored(
    format: str, tensors: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Checks that a weight's tensors are complete, match its format and are on the input's device."""
    formats.check(format, tensors, shape, dtype)
    if tensors[0].device != device:
        raise ValueError(f"the weight must be on {device} as the input is, got {tensors[0].device}")
    for tensor in tensors:
        last = sum([(n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)])
        needed = (tensor.storage_offset() + last + 1) * tensor.itemsize if tensor.numel() else 0
        if needed > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"a weight's tensor of shape {list(tensor.shape)} must have {needed} bytes of memory, "
                f"got {tensor.untyped_storage().nbytes()}: its storage was resized"
            )


def check_weight(name: str, weight: LerpWeight, x: Tensor | None = None, dim: int | None = None) -> None:
    """Checks one operand: a frozen LerpWeight of `dim` dimensions, with x's device and dtype if x is given."""
    if not isinstance(weight, LerpWeight):
        raise TypeError(f"{name} must be a LerpWeight, got {type(weight).__name__}")
    if dim is not None and len(weight.shape) != dim:
        raise ValueError(f"{name} must have {dim} dimensions, got shape {list(weight.shape)}")
    if x is not None and weight.device != x.device:
        raise ValueError(f"{name} must be on {x.device} as the input is, got {weight.device}")
    if x is not None and weight.dtype != x.dtype:
        raise TypeError(f"{name} must have the input's dtype {x.dtype}, got {weight.dtype}")
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be of float32, bfloat16 or float16, got {weight.dtype}")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in weight.tensors):
        raise ValueError(f"{name} requires grad, but the ends are frozen: call requires_grad_(False) on them")
    if upstream.in_forward_mode() and any(forward_ad.unpack_dual(t).tangent is not None for t in weight.tensors):
        raise ValueError(f"{name} has a tangent, but the ends are frozen: differentiate along x and lam")


def check_size(name: str, weight: LerpWeight, size: int, of: str) -> None:
    """Checks that the last dimension of `weight` has the size of `of`, `size`."""
    if weight.shape[-1] != size:
        raise ValueError(f"{name} must have a last dimension of {size}, {of}, got shape {list(weight.shape)}")


def check_norm(x: Tensor, operands: dict[str, LerpWeight]) -> int:
    """Checks a norm's input and its operands (given by name) and returns the number of rows."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    if x.dim() < 1:
        raise ValueError("x must have at least one dimension, got shape []")
    for name, operand in operands.items():
        check_weight(name, operand, x, dim=1)
        check_size(name, operand, x.shape[-1], "x's size")
        if operand.format != "pair":
            raise ValueError(f"{name} must have format 'pair', got {operand.format!r}")
    return x.shape[:-1].numel()
