"""The limits of GPUs, from their makers' publications: what `predict` divides by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuLimits:
    """What a GPU can do at best. Rates are those of one processor, a streaming multiprocessor or compute unit.

    Attributes:
        arch: as in `dami_kernels.tuning.Device`.
        processors: their number.
        clock: cycles a second. Of the boost, which a long product does not reach.
        memory: bytes a second.
        l2: bytes a cycle that a processor reads from the L2 cache.
        matrix: operations a cycle of the matrix unit, dense, in bfloat16.
        registers: 32-bit registers, for all threads.
        shared: bytes of shared memory.
        warps: that may be resident, of `lanes` threads.
    """

    name: str
    arch: str
    processors: int
    clock: float
    memory: float
    l2: float
    matrix: int
    registers: int = 65536
    shared: int = 233472
    warps: int = 64
    lanes: int = 32

    @property
    def peak(self) -> float:
        """Operations a second of all matrix units."""
        return self.processors * self.matrix * self.clock


# NVIDIA's data sheets give processors, bandwidth and the peak: 989 Tflop/s of H100 SXM and H200 SXM, 2250 of B200, from
# which the clock follows. L2 is the 5120 bytes a cycle of the A100 white paper, shared by 132 processors: NVIDIA has
# published none for the later ones, so that of B200 is assumed. MI300X: AMD's data sheet (5.3 TB/s, 1307 Tflop/s, 304
# compute units at 2.1 GHz) and the CDNA 3 white paper (L2: 2048 bytes a cycle for the 38 units of a die).
GPUS = [
    GpuLimits("H100", "sm_90", 132, 1.83e9, 3.35e12, 38.8, 4096),
    GpuLimits("H200", "sm_90", 132, 1.83e9, 4.8e12, 38.8, 4096),
    GpuLimits("B200", "sm_100", 148, 1.856e9, 8.0e12, 38.8, 8192),
    GpuLimits("MI300X", "gfx942", 304, 2.1e9, 5.3e12, 53.9, 2048, registers=131072, shared=65536, warps=32, lanes=64),
]

# Results a cycle of a processor, from the table of instruction throughput in the CUDA programming guide (9.0 and 10.0)
# and, for AMD, four units of 16 lanes. Conversions of integers are taken to be the slow ones, which that table has in
# another row for each generation. Instructions are known by how their names begin; the first that fits counts.
NVIDIA_PIPES = {
    "IMAD": ("fma", 64),
    "FFMA2 FADD2 FMUL2": ("fma", 64),
    "FFMA FADD FMUL HFMA2 HADD2 HMUL2": ("fma", 128),
    "F2FP": ("alu", 64),
    "I2F F2I MUFU F2F": ("convert", 16),
    "LDS STS": ("shared", 0),  # by bytes
    "LDGSTS": ("shared", 0),
    "HMMA IMMA HGMMA U R2UR WARP BRA BAR SYNCS LDG STG LDC LDT STT DEPBAR EXIT NOP S2 CS2R BSYNC BSSY": ("other", 0),
    "": ("alu", 64),
}
AMD_PIPES = {"v_mfma v_accvgpr": ("other", 0), "v_": ("alu", 64), "ds_": ("shared", 0), "": ("other", 0)}
SHARED = 128  # bytes a cycle that a processor reads from or writes to shared memory, on all of these
ISSUED = 4  # instructions a cycle of a warp that NVIDIA's four schedulers issue; AMD's issue each kind by itself
