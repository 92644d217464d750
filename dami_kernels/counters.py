"""Zeros that the programs of one launch on a GPU count in."""

from __future__ import annotations

import torch
from torch import Tensor


def counters(device: torch.device, count: int) -> Tensor:
    """Returns int32 zeros [count] for a kernel that leaves zeros behind. No kernel that may run meanwhile has the same.

    Kernels of one stream run one after the other and share theirs. A captured kernel may run on any stream: it gets a
    part of its own of a tensor made before, or zeros that its graph fills at every replay.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        count = -(-count // 4) * 4  # the next part begins at 16 bytes, for which the kernel was compiled
        left = _for_graphs.get(device)
        if left is None or len(left) < count:
            return torch.zeros(count, dtype=torch.int32, device=device)
        _for_graphs[device] = left[count:]
        return left[:count]
    if device not in _for_graphs:
        _for_graphs[device] = torch.zeros(1 << 20, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device)
    zeros = _of_streams.get(stream)
    if zeros is None or len(zeros) < count:
        zeros = _of_streams[stream] = torch.zeros(max(count, 1 << 10), dtype=torch.int32, device=device)
    return zeros


_for_graphs: dict[torch.device, Tensor] = {}
_of_streams: dict[torch.cuda.Stream, Tensor] = {}
