"""`pair`: both ends as they are. Exact at λ=0 and λ=1; twice the bytes of one weight."""

from torch import Tensor

TENSORS = ("", "_target")


def pack(base: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Keeps both tensors, without a copy."""
    return base, target


def unpack(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors, without a copy."""
    base, target = tensors
    return base, target
