"""The protocol `Format`, and `Matrices`, the formats that kernels can read."""

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
    """How a base and a target weight are stored together: an object or a module with these members.

    A format that is best computed with plain products may define two more functions, made of differentiable torch
    operations. They are then used instead of a kernel:

        linear(x, lam, *tensors) -> Tensor        # x [M, K] and λ per row [M] → [M, N]
        embedding(ids, lam, *tensors) -> Tensor   # ids [M] and λ per row [M] → [M, D]
    """

    @property
    def TENSORS(self) -> tuple[str, ...]:
        """A name suffix for each stored tensor; "" for a base that is stored unchanged.

        When a model's dtype changes, its floating-point tensors are cast, except those whose suffix ends in "_scale".
        """

    def pack(self, base: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        """Returns the tensors to store, in the order of `TENSORS`, given two floating-point ones [..., N, K]."""

    def unpack(self, *tensors: Tensor, columns: int, rows: Rows = ALL) -> tuple[Tensor, Tensor]:
        """Returns base and target, each as it is stored or in float32.

        Args:
            columns: K without the padding that the format may have added.
            rows: a slice or int64 indices of the first dimension, to read part of a weight without copying all of
                it.
        """

    def layout(self, shape: Sequence[int], dtype: torch.dtype, *tensors: Tensor) -> Sequence[Layout]:
        """Returns the shape and dtype that each stored tensor must have, for ends of this shape and dtype."""


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
    """A matrix stored as codes, with a bfloat16 scale for each group of `quantize.GROUP` codes along K.

    Attributes:
        suffix: of the codes, int8 [..., N, K'] or uint8 [..., N, K'/2]. The scales' suffix appends "_scale".
        bits: bits per code, 4 or 8.
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
        """Quantises float32 values."""
        codes, scales = quantize(values, self.bits)
        return (pack_nibbles(codes) if self.bits == 4 else codes), scales

    def unpack(self, codes: Tensor, scales: Tensor, *, columns: int) -> Tensor:
        """Returns the values in float32."""
        return dequantize(unpack_nibbles(codes) if self.bits == 4 else codes, scales, columns)


Matrix = Numbers | Codes


class Matrices:
    """A format of two matrices: the base and a second one. It holds all that kernels need to know of a format.

    If stored as numbers, the second matrix is the target. If stored as codes, it is the difference between the target
    and the base as stored, so that it compensates for the base's quantisation error.

    Attributes:
        base, second: how each matrix is stored.
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
        """Bytes stored per element of one end of this dtype, without padding."""
        return self.base.bytes_per_number(dtype) + self.second.bytes_per_number(dtype)

    def pack(self, base: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        """Packs both ends, copying only quantised ones. Raises ValueError if an end to quantise is not finite."""
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
        """Returns each end as stored (a view if `rows` is a slice), or in float32 if it has to be computed."""
        parts, first = [tensor[rows] for tensor in tensors], len(self.base.suffixes)
        base = self.base.unpack(*parts[:first], columns=columns)
        second = self.second.unpack(*parts[first:], columns=columns)
        return base, second if self.has_target else base.to(torch.float32) + second

    def layout(self, shape: Sequence[int], dtype: torch.dtype, *tensors: Tensor) -> Sequence[Layout]:
        return *self.base.layout(shape, dtype), *self.second.layout(shape, dtype)
