// `rms_norm` and `layer_norm`, a row at a time.
#pragma once

#include "vector.h"

namespace dami {

// Σ f(vector, elements in it) over a row. Four sums, so that no addition waits for the one before it.
template <class V, class T, class F>
inline float row_sum(const T* x, int64_t d, F f) {
  V sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  for (int64_t i = 0; i < d; i += 4 * V::W)
    for (int j = 0; j < 4 && i + j * V::W < d; j++) {
      const int64_t left = d - i - j * V::W;
      sums[j] = sums[j] + f(load<V>(x + i + j * V::W, left), left);
    }
  float parts[4] = {};
  sum4(sums[0], sums[1], sums[2], sums[3], parts);
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// y = (x − mean) · scale · (offset + w(λ)) + b(λ)
template <class V, class T>
inline void scale_row(const Norm& p, int64_t row, float lam, float mean, float scale) {
  const T* x = static_cast<const T*>(p.x.data) + row * p.x.stride;
  T* y = static_cast<T*>(p.y) + row * p.d;
  for (int64_t i = 0; i < p.d; i += V::W) {
    const int64_t left = p.d - i;
    const auto at = [&](const Pair& ends) {
      return lerp_of<V>(
          lam, [&] { return load<V>(static_cast<const T*>(ends.base.data) + i, left); },
          [&] { return load<V>(static_cast<const T*>(ends.target.data) + i, left); });
    };
    V v = (load<V>(x + i, left) - V::set1(mean)) * V::set1(scale) * (V::set1(p.offset) + at(p.weight));
    if (p.bias.base.data) v = v + at(p.bias);
    store(v, y + i, left);
  }
}

template <class V, class T>
void rms_norm(const Norm& p, int64_t row, float lam) {
  const T* x = static_cast<const T*>(p.x.data) + row * p.x.stride;
  const float squares = row_sum<V>(x, p.d, [](V v, int64_t) { return v * v; });
  scale_row<V, T>(p, row, lam, 0, 1 / __builtin_sqrtf(squares / static_cast<float>(p.d) + p.eps));
}

template <class V, class T>
void layer_norm(const Norm& p, int64_t row, float lam) {
  const T* x = static_cast<const T*>(p.x.data) + row * p.x.stride;
  const float d = static_cast<float>(p.d);
  const float mean = row_sum<V>(x, p.d, [](V v, int64_t) { return v; }) / d;
  const float squares = row_sum<V>(x, p.d, [mean](V v, int64_t left) {
    v = v - V::set1(mean);
    v = v * v;
    if (left >= V::W) return v;
    float lanes[V::W];  // beyond the end of the row there is nothing to be far from the mean
    v.store(lanes);
    return load<V>(static_cast<const float*>(lanes), left);
  });
  scale_row<V, T>(p, row, lam, mean, 1 / __builtin_sqrtf(squares / d + p.eps));
}

}  // namespace dami
