"""What the launching sides of the kernels share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from dami_kernels import formats
from dami_kernels.quantize import GROUP

TENSORS = {"pair": 2, "int8": 3, "int4": 3, "w8d4": 4}  # of a weight in each format that `device.load_end` reads


def check_format(format: str) -> None:
    if format not in TENSORS:
        raise NotImplementedError(f"no kernel reads the format {format!r}")


def weights_of(tensors: list[Tensor], format: str) -> tuple[tuple[Tensor, ...], ...]:
    """The tensors of several weights of one format, each weight's together."""
    check_format(format)
    each = TENSORS[format]
    return tuple([tuple(tensors[i : i + each]) for i in range(0, len(tensors), each)])


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own takes a microsecond and a half on the host."""
    return -(-a // b)


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Makes x's GPU the current one, where Triton launches."""
    return torch.cuda.device_of(x)


def is_even(weights: Sequence[Sequence[Tensor]], format: str, K: int, block_k: int) -> bool:
    """Whether every step along K is whole, and its scales can be read two at a time, as words of 32 bits."""
    if K % block_k or K == 0:
        return False
    suffixes = formats.get(format).TENSORS
    scales = [
        tensor for weight in weights for tensor, suffix in zip(weight, suffixes, strict=True) if "scale" in suffix
    ]
    return block_k == GROUP or all(
        scale.stride(-1) == 1 and not any(stride % 2 for stride in scale.stride()[:-1]) and scale.data_ptr() % 4 == 0
        for scale in scales
    )


def strides_of(weight: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tensor.stride() for tensor in weight)


def with_rows_in_one_piece(x: Tensor) -> Tensor:
    """x [M, D] itself if each row lies in one piece, else a copy."""
    return x if x.stride(1) == 1 else x.contiguous()


def vectors(ends: list[Tensor]) -> tuple[Tensor, ...] | None:
    """The ends of a 1-d operand in one piece each, or None for an operand that is not there."""
    return tuple(end.contiguous() for end in ends) if ends else None
