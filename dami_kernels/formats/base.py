"""What a format is, and the formats that kernels can read: those of two matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from dami_kernels.quantize import (
    GROUP,
    SCALE,
    code_layout,
    dequantize,
    pack_in_blocks,
    pack_nibbles,
    quantize,
    unpack_nibbles,
)

Rows = slice | Tensor
Layout = tuple[Sequence[int], torch.dtype]
ALL = slice(None)


class Format(Protocol):
    """How a base and a target weight are stored together: an object, or a module, with these.

    A format that plain products serve best may have two more, in differentiable torch operations. No kernel is then
    asked:

        linear(x, lam, *tensors) -> Tensor        # x [M, K] and λ per row [M] → [M, N]
        embedding(ids, lam, *tensors) -> Tensor   # ids [M] and λ per row [M] → [M, D]
    """

    @property
    def TENSORS(self) -> tuple[str, ...]:
        """A suffix for the name of each stored tensor; "" for a base that is left as it is.

        When a model's dtype changes, its floating-point tensors follow, but for those whose suffix ends with "_scale".
        """

    def pack(self, base: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        """The tensors to store, in the order of `TENSORS`, from two floating-point ones [..., N, K]."""

    def unpack(self, *tensors: Tensor, columns: int, rows: Rows = ALL) -> tuple[Tensor, Tensor]:
        """Base and target again, each as it is stored or in float32.

        Args:
            columns: K, which the format may have padded.
            rows: of the first dimension, a slice or int64 indices, so that some of a weight can be read without a copy
                of all of it.
        """

    def layout(self, shape: Sequence[int], dtype: torch.dtype, *tensors: Tensor) -> Sequence[Layout]:
        """The shape and dtype that each stored tensor must have, for ends of this shape and dtype."""


@dataclass(frozen=True)
class Numbers:
    """A matrix [..., N, K] stored as it is, in one tensor."""

    suffix: str
    bits: ClassVar[None] = None

    @property
    def suffixes(self) -> tuple[str, ...]:
        return (self.suffix,)

    def bytes_per_number(self, dtype: torch.dtype) -> float:
        return dtype.itemsize

    def layout(self, shape: Sequence[int], dtype: torch.dtype) -> Sequence[Layout]:
        return ((shape, dtype),)

    def unpack(self, tensor: Tensor, *, columns: int) -> Tensor:
        return tensor


@dataclass(frozen=True)
class Codes:
    """A matrix stored as codes, and as a bfloat16 scale for each `quantize.GROUP` of them along K.

    Attributes:
        suffix: of the codes, int8 [..., N, K'] or uint8 [..., N, K'/2]. That of the scales has "_scale" behind it.
        bits: of a code, 4 or 8.
    """

    suffix: str
    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {self.bits}")

    @property
    def suffixes(self) -> tuple[str, ...]:
        return self.suffix, f"{self.suffix}_scale"

    def bytes_per_number(self, dtype: torch.dtype) -> float:
        return self.bits / 8 + SCALE.itemsize / GROUP

    def layout(self, shape: Sequence[int], dtype: torch.dtype) -> Sequence[Layout]:
        return code_layout(shape, self.bits)

    def pack(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """From float32."""
        codes, scales = quantize(values, self.bits)
        return (pack_nibbles(codes) if self.bits == 4 else codes), scales

    def unpack(self, codes: Tensor, scales: Tensor, *, columns: int) -> Tensor:
        """In float32."""
        return dequantize(unpack_nibbles(codes) if self.bits == 4 else codes, scales, columns)


Matrix = Numbers | Codes


class Matrices:
    """A format of two matrices: the base, and a second one. All that kernels need to know of a format is here.

    Stored as numbers, the second matrix is the target. Stored as codes, it is the difference target − base, taken from
    the base as it is stored, so that it makes up for what the base has lost.

    Attributes:
        base, second: how each is stored.
    """

    def __init__(self, description: str, base: Matrix, second: Matrix) -> None:
        """`description` becomes the docstring."""
        if isinstance(second, Numbers) and not isinstance(base, Numbers):
            raise ValueError("second must be stored as codes where base is, got numbers")
        self.__doc__ = description
        self.base, self.second = base, second
        self.TENSORS = (*base.suffixes, *second.suffixes)

    @property
    def has_target(self) -> bool:
        """Whether the second matrix is the target."""
        return isinstance(self.second, Numbers)

    def bytes_per_weight(self, dtype: torch.dtype) -> float:
        """Bytes for each weight of ends of this dtype, without padding."""
        return self.base.bytes_per_number(dtype) + self.second.bytes_per_number(dtype)

    def pack(self, base: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        """What is stored as it is is not copied. ValueError if an end to be quantised is not finite."""
        if isinstance(self.second, Numbers):
            return base, target
        second = self.second

        def codes(base: Tensor, target: Tensor) -> tuple[Tensor, ...]:
            if isinstance(self.base, Numbers):
                return second.pack(target - base)
            stored = self.base.pack(base)
            return *stored, *second.pack(target - self.base.unpack(*stored, columns=base.shape[-1]))

        packed = pack_in_blocks(codes, base, target)
        return (base, *packed) if isinstance(self.base, Numbers) else packed

    def unpack(self, *tensors: Tensor, columns: int, rows: Rows = ALL) -> tuple[Tensor, Tensor]:
        """An end as it is stored, or else in float32; views where `rows` is a slice and nothing is computed."""
        parts, first = [tensor[rows] for tensor in tensors], len(self.base.suffixes)
        base = self.base.unpack(*parts[:first], columns=columns)
        second = self.second.unpack(*parts[first:], columns=columns)
        return base, second if self.has_target else base.to(torch.float32) + second

    def layout(self, shape: Sequence[int], dtype: torch.dtype, *tensors: Tensor) -> Sequence[Layout]:
        return *self.base.layout(shape, dtype), *self.second.layout(shape, dtype)
