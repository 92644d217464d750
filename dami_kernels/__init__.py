"""Operators that interpolate two weights by a coefficient λ per row, in one pass and without a merged copy."""

from dami_kernels.formats import register_format
from dami_kernels.ops import lerp_embedding, lerp_experts, lerp_layer_norm, lerp_linear, lerp_linears, lerp_rms_norm
from dami_kernels.weight import LerpWeight

__all__ = [
    "LerpWeight",
    "lerp_embedding",
    "lerp_experts",
    "lerp_layer_norm",
    "lerp_linear",
    "lerp_linears",
    "lerp_rms_norm",
    "register_format",
]
