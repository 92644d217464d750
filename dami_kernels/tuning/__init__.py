"""How the GPU kernels cut their work up: pure functions of shape, dtype, format and device."""

from dami_kernels.tuning.device import H100, Device, device_of
from dami_kernels.tuning.experts import experts_config
from dami_kernels.tuning.linear import LinearConfig, linear_config
from dami_kernels.tuning.rows import RowConfig, row_config

__all__ = ["H100", "Device", "LinearConfig", "RowConfig", "device_of", "experts_config", "linear_config", "row_config"]
