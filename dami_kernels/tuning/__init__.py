"""Launch parameters of the GPU kernels: pure functions of shape, dtype, format and device."""

from dami_kernels.tuning.config import LinearConfig
from dami_kernels.tuning.device import H100, Device, device_of
from dami_kernels.tuning.experts import experts_config
from dami_kernels.tuning.linear import linear_candidates, linear_config, row_span
from dami_kernels.tuning.rows import RowConfig, row_config
from dami_kernels.tuning.tables import LinearEntry, load_table, save_table, table_path

__all__ = [
    "H100",
    "Device",
    "LinearConfig",
    "LinearEntry",
    "RowConfig",
    "device_of",
    "experts_config",
    "linear_candidates",
    "linear_config",
    "load_table",
    "row_config",
    "row_span",
    "save_table",
    "table_path",
]
