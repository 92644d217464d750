"""`LerpWeight`: a base and a target weight stored together, the operand of every operator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dami_kernels import formats
from dami_kernels.rows import lerp

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class LerpWeight:
    """Two ends of one weight, W(λ) = base + λ (target − base), in a storage format.

    Build it with `LerpWeight.pack`. In the format `pair` it shares memory with the tensors it was packed from. If you
    build it from stored tensors, they are checked against the format, and a mismatch raises ValueError or TypeError.

    Attributes:
        tensors: the stored tensors, as the format lays them out.
        format: the format's name, one of `dami_kernels.formats.names()`.
        shape: shape of each end: [N, K], [V, D], [E, N, K] for experts, [D] for a norm or a bias.
        dtype: dtype of both ends and of the operators' inputs and outputs.
    """

    tensors: tuple[Tensor, ...]
    format: str
    shape: torch.Size
    dtype: torch.dtype

    def __post_init__(self) -> None:
        formats.check(self.format, self.tensors, self.shape, self.dtype)

    @classmethod
    def pack(cls, base: Tensor, target: Tensor, format: str = "pair") -> LerpWeight:
        """Stores `base` (λ=0) and `target` (λ=1), two tensors of one shape, dtype and device, in `format`.

        Raises:
            TypeError: an end is not a tensor, or their dtypes differ or are not float32, bfloat16 or float16.
            ValueError: their shapes or devices differ, the format is unknown, or it cannot hold these ends.
        """
        for name, end in (("base", base), ("target", target)):
            if not isinstance(end, Tensor):
                raise TypeError(f"{name} must be a Tensor, got {type(end).__name__}")
        if base.dtype != target.dtype or base.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"base and target must share one dtype of {[str(d) for d in FLOAT_DTYPES]}, "
                f"got {base.dtype} and {target.dtype}"
            )
        if base.shape != target.shape:
            raise ValueError(f"base and target must have one shape, got {tuple(base.shape)} and {tuple(target.shape)}")
        if base.device != target.device:
            raise ValueError(f"base and target must be on one device, got {base.device} and {target.device}")
        packer = formats.get(format)
        if format != "pair" and base.is_meta:
            raise ValueError(f"base and target must hold values to be stored as {format!r}, got tensors on meta")
        if format != "pair" and base.dim() < 2:
            raise ValueError(f"format must be 'pair' for a weight of shape {list(base.shape)}, got {format!r}")
        return cls(packer.pack(base, target), format, base.shape, base.dtype)

    @property
    def device(self) -> torch.device:
        """The device of the stored tensors."""
        return self.tensors[0].device

    @property
    def nbytes(self) -> int:
        """Total size of the stored tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bytes_per_weight(self) -> float:
        """Bytes stored per element of one end: 4.0 for a bfloat16 `pair`."""
        return self.nbytes / max(self.shape.numel(), 1)

    def to(self, dtype: torch.dtype) -> LerpWeight:
        """Returns this weight converted to another operand dtype. Codes and scales keep theirs."""
        if dtype == self.dtype:
            return self
        layout = formats.get(self.format).layout(self.shape, dtype, *self.tensors)
        tensors = tuple(tensor.to(stored) for tensor, (_, stored) in zip(self.tensors, layout, strict=True))
        return LerpWeight(tensors, self.format, self.shape, dtype)

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Returns base and target as the operators see them: as stored, or dequantised to float32."""
        return formats.get(self.format).unpack(*self.tensors, columns=self.shape[-1])

    def materialize(self, lam: float) -> Tensor:
        """Returns a merged copy at λ, blended in float32 and rounded once to the weight's dtype."""
        merged = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for rows, base, target in formats.float_blocks(self.format, self.tensors, self.shape[-1]):
            merged[rows] = lerp(base, target, base.new_tensor(lam))
        return merged
