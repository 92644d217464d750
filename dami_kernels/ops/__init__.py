"""The operators: one file each, with its schema, shape function, gradient and dispatch."""

from dami_kernels.ops.embedding import lerp_embedding
from dami_kernels.ops.layer_norm import lerp_layer_norm
from dami_kernels.ops.linear import lerp_linear
from dami_kernels.ops.rms_norm import lerp_rms_norm

__all__ = ["lerp_embedding", "lerp_layer_norm", "lerp_linear", "lerp_rms_norm"]
