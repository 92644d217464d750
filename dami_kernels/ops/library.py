"""What the operator files share: registration in the `dami` namespace, and the checks on their arguments."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dami_kernels import formats, native
from dami_kernels.installation import needs
from dami_kernels.weight import LerpWeight

LIBRARY = torch.library.Library("dami", "DEF")


PLAIN: dict[str, Callable[..., Any]] = {}  # every operator's version in plain torch


def kernel_of(name: str, device: str) -> Callable[..., Any] | str:
    """The kernel that an operator runs on a type of device, with its schema's arguments, or why there is none."""
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
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    """Registers the operator of a schema with everything torch wants to know about it.

    Its kernels are found by its name, see `kernel_of`. `plain` stands in, with one warning, where they are missing or
    raise NotImplementedError, as they do for a format that they cannot read.

    Args:
        schema: its torch schema.
        check: raises ValueError or TypeError where the arguments would have a kernel read beside a tensor.
        fake: computes the output's shape and dtype only, for torch.compile.
        plain: the same in plain torch, for any device.
        setup_context, backward: as in `torch.library.register_autograd`.
    """
    name = schema.split("(")[0]
    PLAIN[name] = plain

    def run(*args: Any) -> Any:
        check(*args)
        # Of λ, its map, ids and offsets kernels take the numbers to lie side by side.
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

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dami::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"dami::{name}", backward, setup_context=setup_context, lib=LIBRARY)


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
    """Checks that a weight's tensors are what its format says, where the input is, and all there."""
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
    """Checks one operand: a frozen LerpWeight of `dim` dimensions, on x's device and of its dtype if there is an x."""
    if not isinstance(weight, LerpWeight):
        raise TypeError(f"{name} must be a LerpWeight, got {type(weight).__name__}")
    if dim is not None and len(weight.shape) != dim:
        raise ValueError(f"{name} must have {dim} dimensions, got shape {list(weight.shape)}")
    if x is not None and weight.device != x.device:
        raise ValueError(f"{name} must be on {x.device} as the input is, got {weight.device}")
    if x is not None and weight.dtype != x.dtype:
        raise TypeError(f"{name} must have the input's dtype {x.dtype}, got {weight.dtype}")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in weight.tensors):
        raise ValueError(f"{name} requires grad, but the ends are frozen: call requires_grad_(False) on them")


def check_size(name: str, weight: LerpWeight, size: int, of: str) -> None:
    """Checks that the last dimension of `weight` is `size`, the size of `of`."""
    if weight.shape[-1] != size:
        raise ValueError(f"{name} must have a last dimension of {size}, {of}, got shape {list(weight.shape)}")


def check_norm(x: Tensor, operands: dict[str, LerpWeight]) -> int:
    """Checks a norm's input and its operands, by name, and returns the number of rows."""
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
