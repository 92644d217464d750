"""Host-side helpers for launching kernels."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence

import torch
from torch import Tensor
from triton import knobs
from triton.language import target_info

from dami_kernels import formats
from dami_kernels.quantize import GROUP


def bits_of(format: str) -> dict[str, int]:
    """Returns the constants that tell kernels how a format stores its two matrices, see `device.load_end`.

    Raises NotImplementedError for a format that the kernels do not support.
    """
    both = formats.matrices(format)
    return {"BASE_BITS": both.base.bits or 0, "SECOND_BITS": both.second.bits or 0}


def weights_of(tensors: list[Tensor], format: str) -> tuple[tuple[Tensor, ...], ...]:
    """Returns the tensors of several weights of one format, grouped by weight."""
    stride = len(formats.get(format).TENSORS)
    return tuple([tuple(tensors[i : i + stride]) for i in range(0, len(tensors), stride)])


def cdiv(a: int, b: int) -> int:
    """Returns a / b rounded up. Triton's own function takes 1.5 µs on the host."""
    return -(-a // b)


def is_even(weights: Sequence[Sequence[Tensor]], format: str, K: int, block_k: int) -> bool:
    """Whether every step along K is whole, and codes of 8 bits and scales can be read two at a time, as one word."""
    if K % block_k or K == 0:
        return False
    both = formats.matrices(format)
    by_twos = []
    for matrix in (both.base, both.second):
        scales = [block_k > GROUP] * (len(matrix.suffixes) - 1)  # a step of one group has no second scale
        by_twos += [matrix.bits == 8, *scales]

    def fits(tensor: Tensor) -> bool:
        *strides, last = tensor.stride()
        return (
            last == 1 and not any(stride % 2 for stride in strides) and tensor.data_ptr() % (2 * tensor.itemsize) == 0
        )

    return all(fits(tensor) for weight in weights for tensor in itertools.compress(weight, by_twos))


def in_words(weights: Sequence[Sequence[Tensor]], format: str) -> tuple[tuple[Tensor, ...], ...]:
    """Returns the weights themselves if kernels can read their codes and scales four at a time, else copies."""
    both = formats.matrices(format)
    coded = [matrix.bits is not None for matrix in (both.base, both.second) for _ in matrix.suffixes]

    def fits(tensor: Tensor) -> bool:
        *strides, last = tensor.stride()
        return last == 1 and not any(stride % 4 for stride in strides) and tensor.data_ptr() % 4 == 0

    if all(fits(tensor) for weight in weights for tensor in itertools.compress(weight, coded)):
        return tuple(tuple(weight) for weight in weights)
    return tuple(
        tuple(
            tensor.clone(memory_format=torch.contiguous_format) if codes else tensor
            for tensor, codes in zip(weight, coded, strict=True)
        )
        for weight in weights
    )


def early() -> dict[str, bool]:
    """Returns the launch options of a kernel that calls `device.start`: it may then begin before the last one's end.

    Only on sm_90 and later, and not if the variable DAMI_PDL is 0.
    """
    target = None if knobs.runtime.interpret else target_info.current_target()
    can = target is not None and target.backend == "cuda" and target.arch >= 90
    return {"launch_pdl": True} if can and os.environ.get("DAMI_PDL") != "0" else {}


def strides_of(weight: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tensor.stride() for tensor in weight)


def with_rows_in_one_piece(x: Tensor) -> Tensor:
    """Returns x [M, D] itself if each row is contiguous, else a copy."""
    return x if x.stride(1) == 1 else x.contiguous()


def vectors(ends: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """Returns the ends of a 1-d operand, each contiguous, or None if there is no such operand."""
    return tuple(end.contiguous() for end in ends) if ends else None
