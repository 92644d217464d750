"""The Triton kernels, called with the arguments of the operators' schemas."""

from dami_kernels.triton.compilations import log_compilations
from dami_kernels.triton.embedding import lerp_embedding
from dami_kernels.triton.experts import lerp_experts
from dami_kernels.triton.linear import lerp_linear, lerp_linears
from dami_kernels.triton.norms import lerp_layer_norm, lerp_rms_norm

__all__ = ["lerp_embedding", "lerp_experts", "lerp_layer_norm", "lerp_linear", "lerp_linears", "lerp_rms_norm"]

log_compilations()
