"""`LerpWeight`: a base and a target weight stored together, the operand of every operator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dami_kernels import formats

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class LerpWeight:
    """Two ends of one weight, W(λ) = base + λ (target − base), in a storage format.

    Build it with `LerpWeight.pack`. It holds no third tensor: `pair` shares memory with what it was packed from.

    Attributes:
        tensors: the stored tensors, as the format lays them out.
        format: name of the format, a file of `dami_kernels.formats`.
    """

    tensors: tuple[Tensor, ...]
    format: str

    @classmethod
    def pack(cls, base: Tensor, target: Tensor, format: str = "pair") -> LerpWeight:
        """Stores `base` (λ=0) and `target` (λ=1), two tensors of one shape, dtype and device, in `format`.

        Raises:
            TypeError: an end is not a tensor, or their dtypes differ or are not float32, bfloat16 or float16.
            ValueError: their shapes or devices differ, or the format is unknown.
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
        return cls(formats.get(format).pack(base, target), format)

    @property
    def shape(self) -> torch.Size:
        """Shape of either end."""
        return self.tensors[0].shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the base, and of what the operators take and return."""
        return self.tensors[0].dtype

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bytes_per_weight(self) -> float:
        """Bytes stored for each weight of one end: 4.0 for a bfloat16 `pair`."""
        return self.nbytes / max(self.shape.numel(), 1)

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Base and target, in the storage dtype."""
        return formats.get(self.format).unpack(*self.tensors)

    def materialize(self, lam: float) -> Tensor:
        """One merged weight, blended in float32 and rounded once to the storage dtype: the only way to get a copy."""
        base, target = self.unpack()
        return torch.lerp(base.float(), target.float(), float(lam)).to(self.dtype)
