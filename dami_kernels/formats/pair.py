"""`pair`: both ends as they are. Exact at λ=0 and λ=1; twice the bytes of one weight."""

from torch import Tensor

from dami_kernels.formats import ALL, Rows

TENSORS = ("", "_target")


def pack(base: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Keeps both tensors, without a copy."""
    return base, target


def unpack(*tensors: Tensor, columns: int, rows: Rows = ALL) -> tuple[Tensor, Tensor]:
    """Both ends as they are; views where `rows` is a slice."""
    base, target = tensors
    return base[rows], target[rows]
