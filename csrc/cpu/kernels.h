// All kernels of one instruction set, which instantiates them in a file of its own. Its vector type and Dots must lie in an
// anonymous namespace: then so does everything made of them, and the linker cannot put AVX-512 code where AVX2 code belongs.
#pragma once

#include "attention.h"
#include "embedding.h"
#include "linear.h"
#include "norms.h"

namespace dami {

// OfBf16 is the kernel of `linear` for bfloat16; other types take FloatDot.
template <class V, class OfBf16 = LinearKernel<V, FloatDot<V, true>, FloatDot<V, true>, bf16>>
constexpr Isa make_isa(const char* name, bool (*supported)(), int blend_rows, int blend_rows_of_bf16) {
  static_assert(is_vector<V>());
  using Dot = FloatDot<V, false>;
  using OfF32 = LinearKernel<V, Dot, Dot, float>;
  using OfF16 = LinearKernel<V, Dot, Dot, f16>;
  return Isa{
      name,
      supported,
      {OfF32::max_rows, OfBf16::max_rows, OfF16::max_rows},
      {OfF32::max_outputs, OfBf16::max_outputs, OfF16::max_outputs},
      {OfF32::panel, OfBf16::panel, OfF16::panel},
      {OfF32::tile_rows, OfBf16::tile_rows, OfF16::tile_rows},
      {blend_rows, blend_rows_of_bf16, blend_rows},
      {OfF32::RowOfX::bytes, OfBf16::RowOfX::bytes, OfF16::RowOfX::bytes},
      {OfF32::prepare, OfBf16::prepare, OfF16::prepare},
      {OfF32::scratch_bytes, OfBf16::scratch_bytes, OfF16::scratch_bytes},
      {OfF32::run, OfBf16::run, OfF16::run},
      {embedding<V, float>, embedding<V, bf16>, embedding<V, f16>},
      {rms_norm<V, float>, rms_norm<V, bf16>, rms_norm<V, f16>},
      {layer_norm<V, float>, layer_norm<V, bf16>, layer_norm<V, f16>},
      {attention<V, float>, attention<V, bf16>, attention<V, f16>},
      {OfF32::multiply_add, OfBf16::multiply_add, OfF16::multiply_add},
      read<V>,
  };
}

}  // namespace dami
