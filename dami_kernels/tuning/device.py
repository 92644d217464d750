"""`Device`: what the heuristics know about a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        arch: "sm_90", "gfx942", …
        processors: number of streaming multiprocessors or compute units.
        shared: bytes of shared memory that one program may use.
        name: its name in torch, used to find its table of measurements; empty for no table.
    """

    arch: str
    processors: int
    shared: int
    name: str = ""

    @property
    def is_amd(self) -> bool:
        return self.arch.startswith("gfx")

    @property
    def has_wide_mma(self) -> bool:
        """Whether its matrix instructions work on 64 rows or more and run asynchronously: wgmma and tcgen05."""
        return self.arch in ("sm_90", "sm_100", "sm_103")

    @property
    def has_tensor_memory(self) -> bool:
        """Whether accumulators live in tensor memory, from which they are loaded back into registers: tcgen05."""
        return self.arch in ("sm_100", "sm_103")


H100 = Device("sm_90", processors=132, shared=232448)


@cache
def device_of(device: torch.device) -> Device:
    """Returns the GPU of a torch device. For the CPU, where Triton's interpreter runs the kernels, returns an H100."""
    if device.type == "cpu":
        return H100
    properties = torch.cuda.get_device_properties(device)
    arch = f"sm_{properties.major}{properties.minor}" if torch.version.hip is None else properties.gcnArchName
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Device(arch.split(":")[0], properties.multi_processor_count, shared, properties.name)
