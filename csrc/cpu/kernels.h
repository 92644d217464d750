// The kernels, over a vector type V and a Dot, which every instruction set instantiates in a file of its own. V must lie in
// an anonymous namespace: then so does everything here, and the linker cannot put AVX-512 code where AVX2 code belongs.
//
//   V     W float32 lanes: zero, set1, load and store of float, bf16 and f16, + − ·, fma(a, b, c) = a·b + c, and
//         sum4(a, b, c, d, to), which adds the sum of the lanes of each to to[0..4)
//   Dot   how products are summed along K: X (what x is read as), load and multiply_add, step elements at a time
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "api.h"

namespace dami {

// The first n elements at p, zeros behind them.
template <class V, class T>
inline V load(const T* p, int64_t n) {
  if (n >= V::W) return V::load(p);
  T buffer[V::W] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return V::load(buffer);
}

template <class V, class T>
inline void store(V v, T* p, int64_t n) {
  if (n >= V::W) return v.store(p);
  T buffer[V::W];
  v.store(buffer);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}

// base + λ (target − base), as torch.lerp rounds it: exact at both ends.
template <class V>
inline V lerp(float lam, V base, V target) {
  return lam < 0.5f ? fma(V::set1(lam), target - base, base) : fma(V::set1(lam - 1), target - base, target);
}

// The same of two functions that return a V. At an end the other one is not called, so that its NaN and Inf stay away.
template <class V, class Base, class Target>
inline V lerp_of(float lam, Base base, Target target) {
  if (lam == 0) return base();
  if (lam == 1) return target();
  return lerp<V>(lam, base(), target());
}

// Multiplies in float32, whatever the weights are stored as.
template <class V>
struct FloatDot {
  using X = float;
  static constexpr int step = V::W;
  template <class T>
  static V load(const T* p) {
    return V::load(p);
  }
  static V multiply_add(V x, V w, V sum) { return fma(x, w, sum); }
  static void store(V v, float* p) { v.store(p); }
};

template <class V, class Dot, class T>
struct LinearKernel {
  using X = typename Dot::X;
  static constexpr int tile_n = 4;  // rows of the weight in a register tile, as many as sum4 takes
  // Along K, the partial sums of a block are added up before the next begins. A register tile's operands then fit L1, and
  // the order of summation depends on K alone: neither on the mode nor on how many rows there are.
  static constexpr int64_t block_k = 2048 / sizeof(X);

  struct alignas(64) Scratch {
    X weight[tile_n][block_k];
    float sums[max_block_rows][2][max_tile_outputs];  // of the base and the target, or of the only weight there is
  };
  static_assert(sizeof(Scratch) == linear_scratch(max_block_rows));

  // sums[m][n] += x[m] · w[n] for M rows of x, over k elements from `offset` on in x.
  template <int M, class W>
  static void tile(const void* const* x, int64_t offset, const W* const* w, int64_t k, float* sums) {
    V total[M][tile_n];
    for (int m = 0; m < M; m++)
      for (int n = 0; n < tile_n; n++) total[m][n] = V::zero();
    const X* rows[M];
    for (int m = 0; m < M; m++) rows[m] = static_cast<const X*>(x[m]) + offset;
    const auto step = [&](auto load_x, auto load_w) {
      decltype(load_x(0)) xs[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) xs[m] = load_x(m);
#pragma GCC unroll 4
      for (int n = 0; n < tile_n; n++) {
        const auto ws = load_w(n);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) total[m][n] = Dot::multiply_add(xs[m], ws, total[m][n]);
      }
    };
    int64_t i = 0;
    for (; i + Dot::step <= k; i += Dot::step)
      step([&](int m) { return Dot::load(rows[m] + i); }, [&](int n) { return Dot::load(w[n] + i); });
    if (i < k) {
      const auto padded = [&](const auto* p) {
        std::remove_const_t<std::remove_pointer_t<decltype(p)>> buffer[Dot::step] = {};
        std::memcpy(buffer, p, static_cast<size_t>(k - i) * sizeof *p);
        return Dot::load(buffer);
      };
      step([&](int m) { return padded(rows[m] + i); }, [&](int n) { return padded(w[n] + i); });
    }
    for (int m = 0; m < M; m++)
      sum4(total[m][0], total[m][1], total[m][2], total[m][3], sums + m * 2 * max_tile_outputs);
  }

  // The same for any number of rows of x, in register tiles of nearly equal height.
  template <class W>
  static void tiles(const void* const* x, int64_t rows, int64_t offset, const W* const* w, int64_t k, float* sums) {
    static constexpr decltype(&tile<1, W>) of_height[] = {tile<1, W>, tile<2, W>, tile<3, W>,
                                                          tile<4, W>, tile<5, W>, tile<6, W>};
    static_assert(V::tile_m <= 6);
    const int64_t count = (rows + V::tile_m - 1) / V::tile_m;
    for (int64_t i = 0; i < count; i++) {
      const int64_t begin = rows * i / count, end = rows * (i + 1) / count;
      of_height[end - begin - 1](x + begin, offset, w, k, sums + begin * 2 * max_tile_outputs);
    }
  }

  static void fill(const T* w, int64_t k, X* to) {
    for (int64_t i = 0; i < k; i += V::W) Dot::store(load<V>(w + i, k - i), to + i);
  }

  static void blend(float lam, const T* base, const T* target, int64_t k, X* to) {
    for (int64_t i = 0; i < k; i += V::W)
      Dot::store(lerp(lam, load<V>(base + i, k - i), load<V>(target + i, k - i)), to + i);
  }

  // One group of rows times up to tile_n rows of the weight, over one block along K.
  static void step(const Linear& p, const Block& block, const Group& group, int64_t n, int64_t count, int64_t k0,
                   int64_t k, Scratch& scratch, float* sums) {
    const void* const* x = block.x.data() + group.begin;
    const int64_t rows = group.end - group.begin;
    const auto row = [&](const Matrix& weight, int64_t i) {
      return static_cast<const T*>(weight.data) + (n + std::min(i, count - 1)) * weight.stride + k0;
    };
    const X* filled[tile_n];
    for (int i = 0; i < tile_n; i++) filled[i] = scratch.weight[i];
    if (group.mode == Mode::blend) {
      for (int i = 0; i < count; i++)
        blend(block.lam[group.begin], row(p.weight.base, i), row(p.weight.target, i), k, scratch.weight[i]);
      return tiles(x, rows, k0, filled, k, sums);
    }
    const auto one = [&](const Matrix& weight, float* sums) {
      const T* stored[tile_n];
      for (int i = 0; i < tile_n; i++) stored[i] = row(weight, i);
      if (std::is_same_v<T, X> || rows <= V::tile_m) return tiles(x, rows, k0, stored, k, sums);
      for (int i = 0; i < count; i++) fill(stored[i], k, scratch.weight[i]);
      tiles(x, rows, k0, filled, k, sums);
    };
    if (group.mode != Mode::target) one(p.weight.base, sums);
    if (group.mode == Mode::target) one(p.weight.target, sums);
    if (group.mode == Mode::both) one(p.weight.target, sums + max_tile_outputs);
  }

  static void run(const Linear& p, const Block& block, int64_t n0, int64_t n1, void* memory) {
    Scratch& scratch = *static_cast<Scratch*>(memory);
    const int64_t rows = static_cast<int64_t>(block.x.size());
    std::memset(scratch.sums, 0, static_cast<size_t>(rows) * sizeof scratch.sums[0]);
    // Few rows of x stay in L2 over all of K, and the weights stream in long runs. Of many rows, only a block does.
    const int64_t run_k = rows * p.k * static_cast<int64_t>(sizeof(X)) <= 256 * 1024 ? p.k : block_k;
    for (int64_t from = 0; from < p.k; from += run_k)
      for (const Group& group : block.groups)
        for (int64_t n = n0; n < n1; n += tile_n)
          for (int64_t k0 = from; k0 < std::min(from + run_k, p.k); k0 += block_k)
            step(p, block, group, n, std::min<int64_t>(tile_n, n1 - n), k0, std::min(block_k, p.k - k0), scratch,
                 scratch.sums[group.begin][0] + (n - n0));
    for (const Group& group : block.groups)
      for (int i = group.begin; i < group.end; i++) finish(p, block, group.mode, i, n0, n1, scratch.sums[i]);
  }

  // λ, the bias and the one rounding.
  static void finish(const Linear& p, const Block& block, Mode mode, int i, int64_t n0, int64_t n1,
                     const float (*sums)[max_tile_outputs]) {
    const T *bias_base = static_cast<const T*>(p.bias.base.data), *bias_target = static_cast<const T*>(p.bias.target.data);
    const float lam = block.lam[i];
    for (int64_t n = n0; n < n1; n += V::W) {
      const int64_t at = n - n0, left = n1 - n;
      V y = V::load(sums[0] + at);
      if (mode == Mode::both) y = lerp_of<V>(lam, [&] { return y; }, [&] { return V::load(sums[1] + at); });
      if (bias_base)
        y = y + lerp_of<V>(
                    lam, [&] { return load<V>(bias_base + n, left); }, [&] { return load<V>(bias_target + n, left); });
      store(y, static_cast<T*>(block.y[i]) + n, left);
    }
  }
};

template <class V, class T>
void to_float(const void* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += V::W) store(load<V>(static_cast<const T*>(from) + i, count - i), to + i, count - i);
}

template <class V, class T>
void embedding(const void* base, const void* target, float lam, void* y, int64_t d) {
  if (lam == 0 || lam == 1) {
    std::memcpy(y, lam == 0 ? base : target, static_cast<size_t>(d) * sizeof(T));
    return;
  }
  for (int64_t i = 0; i < d; i += V::W)
    store(lerp(lam, load<V>(static_cast<const T*>(base) + i, d - i), load<V>(static_cast<const T*>(target) + i, d - i)),
          static_cast<T*>(y) + i, d - i);
}

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

template <class V, class Dot>
double multiply_add(int64_t steps) {
  constexpr int chains = 12;  // enough to hide the latency, few enough for 16 registers
  alignas(64) typename Dot::X ones[Dot::step] = {};
  asm volatile("" : : "r"(ones) : "memory");  // or the compiler would see what is multiplied
  V sums[chains];
  for (V& sum : sums) sum = V::zero();
  const auto x = Dot::load(static_cast<const typename Dot::X*>(ones));
  for (int64_t i = 0; i < steps; i++) {
#pragma GCC unroll 12
    for (int j = 0; j < chains; j++) sums[j] = Dot::multiply_add(x, x, sums[j]);
  }
  float result[4] = {};
  for (int j = 0; j < chains; j += 4) sum4(sums[j], sums[j + 1], sums[j + 2], sums[j + 3], result);
  asm volatile("" : : "r"(result) : "memory");
  return 2.0 * chains * Dot::step;
}

template <class V>
float read(const void* data, int64_t bytes) {
  return row_sum<V>(static_cast<const float*>(data), bytes / 4, [](V v, int64_t) { return v; });
}

// DotOfBf16 is what bfloat16 weights are multiplied with; the other types always take FloatDot.
template <class V, class DotOfBf16 = FloatDot<V>>
constexpr Isa make_isa(const char* name, bool (*supported)(), int blend_rows) {
  using Dot = FloatDot<V>;
  return Isa{
      name,
      supported,
      V::tile_m,
      blend_rows,
      {false, std::is_same_v<typename DotOfBf16::X, float>, true},
      {LinearKernel<V, Dot, float>::run, LinearKernel<V, DotOfBf16, bf16>::run, LinearKernel<V, Dot, f16>::run},
      {to_float<V, float>, to_float<V, bf16>, to_float<V, f16>},
      {embedding<V, float>, embedding<V, bf16>, embedding<V, f16>},
      {rms_norm<V, float>, rms_norm<V, bf16>, rms_norm<V, f16>},
      {layer_norm<V, float>, layer_norm<V, bf16>, layer_norm<V, f16>},
      {multiply_add<V, Dot>, multiply_add<V, DotOfBf16>, multiply_add<V, Dot>},
      read<V>,
  };
}

}  // namespace dami
