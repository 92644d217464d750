"""Elementwise functions whose bits do not depend on the position of a row.

On the CPU, torch computes most elements of a tensor with vector instructions. It computes the last ones, of the whole
tensor or of a thread's share, one by one, with another approximation of exp or tanh. So a row's bits depend on how many
rows precede it.
"""

from __future__ import annotations

from typing import Any

import torch

from dami.upstream import TorchDispatchMode

NAMES = ("cos", "elu", "erf", "exp", "gelu", "log", "mish", "sigmoid", "silu", "sin", "softplus", "tanh")
FUNCTIONS = {getattr(torch.ops.aten, name) for name in NAMES}


class Rowwise(TorchDispatchMode):
    """A context in which elementwise functions of CPU tensors process each vector of the last dimension separately."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in FUNCTIONS:
            return func(*args, **kwargs)
        x: torch.Tensor = args[0]
        if x.dim() < 2 or x.device.type != "cpu" or x.numel() == 0:
            return func(*args, **kwargs)
        rows = x.reshape(-1, x.shape[-1])
        return torch.stack([func(row, *args[1:], **kwargs) for row in rows.unbind()]).view(x.shape)
