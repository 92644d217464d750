"""The operators. Each has a file with its schema, shape function, gradients and dispatch."""

from dami_kernels import native
from dami_kernels.ops import library
from dami_kernels.ops.attention import decode_attention
from dami_kernels.ops.embedding import lerp_embedding
from dami_kernels.ops.experts import lerp_experts
from dami_kernels.ops.layer_norm import lerp_layer_norm
from dami_kernels.ops.linear import lerp_linear, lerp_linears
from dami_kernels.ops.rms_norm import lerp_rms_norm

__all__ = [
    "decode_attention",
    "lerp_embedding",
    "lerp_experts",
    "lerp_layer_norm",
    "lerp_linear",
    "lerp_linears",
    "lerp_rms_norm",
]

if not native.WHY_NOT:
    native.register(library.reraise)
