"""Launch parameters of the GPU kernels: pure functions of shape, dtype, format and device."""

from dami_kernels.tuning.config import LinearConfig, Route
from dami_kernels.tuning.device import H100, Device, device_of
from dami_kernels.tuning.experts import experts_config
from dami_kernels.tuning.linear import MIXED, linear_candidates, linear_config, row_span
from dami_kernels.tuning.routes import route, rows_together
from dami_kernels.tuning.rows import RowConfig, row_config
from dami_kernels.tuning.tables import LinearEntry, load_table, save_table, table_path

__all__ = [
    "H100",
    "MIXED",
    "Device",
    "LinearConfig",
    "LinearEntry",
    "Route",
    "RowConfig",
    "device_of",
    "experts_config",
    "linear_candidates",
    "linear_config",
    "load_table",
    "route",
    "row_config",
    "row_span",
    "rows_together",
    "save_table",
    "table_path",
]
