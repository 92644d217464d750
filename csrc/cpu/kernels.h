// The kernels, over a vector type V and a Dot, which every instruction set instantiates in a file of its own. V must lie in
// an anonymous namespace: then so does everything here, and the linker cannot put AVX-512 code where AVX2 code belongs.
//
//   V     W float32 lanes; tile_m and stream_m, the heights of a register tile where the weights lie in L2 and where they
//         stream from memory; zero, set1, load and store of float, bf16 and f16, + − ·, fma(a, b, c) = a·b + c;
//         load_even and load_odd, every other one of 2 W bf16; keep, which holds it in a register, for the compiler would
//         rather read it again; and sum4(a, b, c, d, to), which adds the sum of the lanes of each to to[0..4)
//   Dot   how products are summed along K, `step` elements at a time and these in `parts`: X, the type it reads x in;
//         load<part>, what multiply_add takes, from X or from a weight as stored; widen, a weight in float32; store, the
//         same as X
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

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

template <class V>
struct Two {
  V a, b;
};

template <class V>
inline Two<V> lerp(float lam, Two<V> base, Two<V> target) {
  return {lerp(lam, base.a, target.a), lerp(lam, base.b, target.b)};
}

// Multiplies in float32. bfloat16 becomes float32 cheapest as the even and the odd elements of a vector, a shift and a mask;
// so converted weights lie in that order, and x too.
template <class V>
struct FloatDot {
  using X = float;
  static constexpr int step = 2 * V::W, parts = 2;
  template <int part>
  static V load(const bf16* p) {
    return part == 0 ? V::load_even(p) : V::load_odd(p);
  }
  template <int part, class T>
  static V load(const T* p) {
    return V::load(p + part * V::W);
  }
  static V multiply_add(V x, V w, V sum) { return fma(x, w, sum); }
  template <class T>
  static Two<V> widen(const T* p) {
    return {load<0>(p), load<1>(p)};
  }
  static void store(Two<V> v, float* p) {
    v.a.store(p);
    v.b.store(p + V::W);
  }
};

// The `count` elements at p, behind them zeros up to N: at p if they are there, else in a copy.
template <class T, int N>
struct Padded {
  T copy[N];
  const T* operator()(const T* p, int64_t count) {
    if (count >= N) return p;
    std::memset(copy, 0, sizeof copy);
    std::memcpy(copy, p, static_cast<size_t>(count) * sizeof(T));
    return copy;
  }
};

template <class V, class Dot, class T>
struct LinearKernel {
  using X = typename Dot::X;
  static constexpr int tile_n = 4;  // rows of the weight in a register tile, as many as sum4 takes
  static constexpr int64_t block_k = block_bytes / sizeof(X);
  static constexpr bool converted = !std::is_same_v<T, X>;

  struct alignas(64) Scratch {
    X weight[max_outputs][block_k];
    float sums[max_rows][2][max_outputs];  // of the base and the target, or of the only weight there is
  };
  static_assert(sizeof(Scratch) == linear_scratch(max_rows));
  static constexpr int64_t sums_stride = 2 * max_outputs;

  template <int which, int M, int N, class W>
  static inline __attribute__((always_inline)) void part(const X* const (&x)[M], const W* const (&w)[N], int64_t i,
                                                         V (&total)[M][N]) {
    decltype(Dot::template load<which>(x[0])) xs[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      xs[m] = Dot::template load<which>(x[m] + i);
      if constexpr (Dot::parts == 2) xs[m].keep();
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      const auto ws = Dot::template load<which>(w[n] + i);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) total[m][n] = Dot::multiply_add(xs[m], ws, total[m][n]);
    }
  }

  // sums[m][n] += x[m] · w[n] for M rows of x and N of w, over k elements, whole steps, from `offset` on in x. Meanwhile
  // fetches as many elements from each row of `ahead`, if that is not null.
  template <int M, int N, class W>
  static void tile(const void* const* x, int64_t offset, const W* const* w, int64_t k, float* sums, const T* const* ahead) {
    V total[M][N];
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) total[m][n] = V::zero();
    const X* xs[M];
    for (int m = 0; m < M; m++) xs[m] = static_cast<const X*>(x[m]) + offset;
    const W* ws[N];
    for (int n = 0; n < N; n++) ws[n] = w[n];
    const T* next[N] = {};
    for (int n = 0; ahead && n < N; n++) next[n] = ahead[n];
    const auto run = [&](auto fetch) __attribute__((always_inline)) {
      for (int64_t i = 0; i < k; i += Dot::step) {
        if constexpr (fetch)
          for (int n = 0; n < N; n++)
            for (int line = 0; line < Dot::step; line += 64 / sizeof(T)) __builtin_prefetch(next[n] + i + line, 0, 2);
        part<0, M, N>(xs, ws, i, total);
        if constexpr (Dot::parts == 2) part<1, M, N>(xs, ws, i, total);
      }
    };
    ahead ? run(std::true_type{}) : run(std::false_type{});
    for (int m = 0; m < M; m++) {
      float* to = sums + m * sums_stride;
      if constexpr (N == 4) {
        sum4(total[m][0], total[m][1], total[m][2], total[m][3], to);
      } else {
        float both[4] = {};
        sum4(total[m][0], total[m][1], V::zero(), V::zero(), both);
        to[0] += both[0], to[1] += both[1];
      }
    }
  }

  // The same for tile_n rows of w, one half after the other where the registers do not hold all sums; converting takes some.
  template <int M, class W>
  static void tile(const void* const* x, int64_t offset, const W* const* w, int64_t k, float* sums, const T* const* ahead) {
    constexpr int N = M <= V::tile_m - (converted && !std::is_same_v<W, X>) ? tile_n : tile_n / 2;
    for (int n = 0; n < tile_n; n += N) tile<M, N>(x, offset, w + n, k, sums + n, ahead ? ahead + n : nullptr);
  }

  // The same for any number of rows of x and up to max_outputs of w, in register tiles of nearly equal height up to `most`.
  template <class W>
  static void tiles(int most, const void* const* x, int64_t rows, int64_t offset, const W* const* w, int64_t outputs,
                    int64_t k, float* sums, const T* const* ahead = nullptr, const T* const* then = nullptr) {
    static constexpr decltype(&tile<1, W>) of_height[] = {tile<1, W>, tile<2, W>, tile<3, W>,
                                                          tile<4, W>, tile<5, W>, tile<6, W>};
    const int64_t count = (rows + most - 1) / most;
    for (int64_t i = 0; i < count; i++) {
      const int64_t begin = rows * i / count, end = rows * (i + 1) / count;
      for (int64_t n = 0; n < outputs; n += tile_n)
        of_height[end - begin - 1](x + begin, offset, w + n, k, sums + begin * sums_stride + n, ahead ? ahead + n : nullptr);
      ahead = std::exchange(then, nullptr);
    }
  }

  static void fill(const T* w, int64_t k, X* to) {
    Padded<T, Dot::step> padded;
    for (int64_t i = 0; i < k; i += Dot::step) Dot::store(Dot::widen(padded(w + i, k - i)), to + i);
  }

  static void prepare_x(const void* from, int64_t k, void* to) {
    fill(static_cast<const T*>(from), k, static_cast<X*>(to));
  }

  static void blend(float lam, const T* base, const T* target, int64_t k, X* to) {
    Padded<T, Dot::step> padded_base, padded_target;
    for (int64_t i = 0; i < k; i += Dot::step)
      Dot::store(lerp(lam, Dot::widen(padded_base(base + i, k - i)), Dot::widen(padded_target(target + i, k - i))), to + i);
  }

  static const T* row(const Matrix& weight, int64_t n, int64_t k) {
    return static_cast<const T*>(weight.data) + n * weight.stride + k;
  }

  // Calls f(weight, where its sums lie) for each weight that the group needs.
  template <class F>
  static void for_ends(const Linear& p, const Group& group, Scratch& scratch, F f) {
    float* sums = scratch.sums[group.begin][0];
    if (group.mode != Mode::target) f(p.weight.base, sums);
    if (group.mode == Mode::target) f(p.weight.target, sums);
    if (group.mode == Mode::both) f(p.weight.target, sums + max_outputs);
  }

  // Few rows: time is what it takes to read the weights. A register tile runs over all of K, and while it does, the next
  // one's weights are fetched.
  static void stream(const Linear& p, const Block& block, int64_t n0, int64_t n1, Scratch& scratch) {
    const int64_t steps = p.k / Dot::step * Dot::step;
    for (const Group& group : block.groups)
      for (int64_t n = n0; n < n1; n += tile_n)
        for_ends(p, group, scratch, [&](const Matrix& weight, float* sums) {
          const T *stored[tile_n], *ahead[tile_n];
          const X* tail[tile_n];
          for (int i = 0; i < tile_n; i++) {
            stored[i] = row(weight, std::min(n + i, n1 - 1), 0);
            ahead[i] = row(weight, n + i + tile_n, 0);
            if (steps < p.k) fill(stored[i] + steps, p.k - steps, scratch.weight[i]);
            tail[i] = scratch.weight[i];
          }
          const void* const* x = block.x.data() + group.begin;
          const int64_t rows = group.end - group.begin;
          tiles(V::stream_m, x, rows, 0, stored, tile_n, steps, sums + (n - n0), ahead);
          if (steps < p.k) tiles(V::stream_m, x, rows, steps, tail, tile_n, Dot::step, sums + (n - n0));
        });
  }

  // Many rows: time is what it takes to multiply. A block of the weights' columns stays in L2 while the rows pass by, each
  // register tile of them in L1.
  static void panel(const Linear& p, const Block& block, int64_t n0, int64_t n1, Scratch& scratch) {
    const X* filled[max_outputs];
    for (int64_t i = 0; i < max_outputs; i++) filled[i] = scratch.weight[i];
    for (int64_t k0 = 0; k0 < p.k; k0 += block_k) {
      const int64_t k = std::min(block_k, p.k - k0), steps = (k + Dot::step - 1) / Dot::step * Dot::step;
      const auto rows_at = [&](const Matrix& weight, int64_t k0, const T** to) {
        for (int64_t i = 0; i < max_outputs; i++) to[i] = row(weight, std::min(n0 + i, n1 - 1), k0);
      };
      const T *stored[max_outputs], *ahead[max_outputs], *then[max_outputs];
      for (const Group& group : block.groups) {
        const void* const* x = block.x.data() + group.begin;
        const int64_t rows = group.end - group.begin;
        if (group.mode == Mode::blend) {
          rows_at(p.weight.base, k0 + block_k, ahead);
          rows_at(p.weight.target, k0 + block_k, then);
          for (int64_t n = n0; n < n1; n++)
            blend(block.lam[group.begin], row(p.weight.base, n, k0), row(p.weight.target, n, k0), k, scratch.weight[n - n0]);
          tiles(V::tile_m, x, rows, k0, filled, n1 - n0, steps, scratch.sums[group.begin][0], ahead, then);
          continue;
        }
        for_ends(p, group, scratch, [&](const Matrix& weight, float* sums) {
          rows_at(weight, k0 + block_k, ahead);
          if (converted || k < steps) {
            for (int64_t n = n0; n < n1; n++) fill(row(weight, n, k0), k, scratch.weight[n - n0]);
            return tiles(V::tile_m, x, rows, k0, filled, n1 - n0, steps, sums, ahead);
          }
          rows_at(weight, k0, stored);
          tiles(V::tile_m, x, rows, k0, stored, n1 - n0, steps, sums, ahead);
        });
      }
    }
  }

  static void run(const Linear& p, const Block& block, int64_t n0, int64_t n1, void* memory) {
    Scratch& scratch = *static_cast<Scratch*>(memory);
    const int64_t rows = static_cast<int64_t>(block.x.size());
    std::memset(scratch.sums, 0, static_cast<size_t>(rows) * sizeof scratch.sums[0]);
    (rows < stream_rows ? stream : panel)(p, block, n0, n1, scratch);
    for (const Group& group : block.groups)
      for (int i = group.begin; i < group.end; i++) finish(p, block, group.mode, i, n0, n1, scratch.sums[i]);
  }

  // λ, the bias and the one rounding.
  static void finish(const Linear& p, const Block& block, Mode mode, int i, int64_t n0, int64_t n1,
                     const float (*sums)[max_outputs]) {
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
  const auto x = Dot::template load<0>(static_cast<const typename Dot::X*>(ones));
  for (int64_t i = 0; i < steps; i++) {
#pragma GCC unroll 12
    for (int j = 0; j < chains; j++) sums[j] = Dot::multiply_add(x, x, sums[j]);
  }
  float result[4] = {};
  for (int j = 0; j < chains; j += 4) sum4(sums[j], sums[j + 1], sums[j + 2], sums[j + 3], result);
  asm volatile("" : : "r"(result) : "memory");
  return 2.0 * chains * Dot::step / Dot::parts;
}

template <class V>
float read(const void* data, int64_t bytes) {
  const auto* p = static_cast<const float*>(data);
  V sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  for (int64_t i = 0; i + 64 <= bytes / 4; i += 64) {  // four lines; and asks for those 1 KiB on
    for (int64_t line = 0; line < 64; line += 16) __builtin_prefetch(p + i + line + 256, 0, 2);
    for (int64_t j = 0; j < 64; j += 4 * V::W)
      for (int64_t l = 0; l < 4; l++) sums[l] = sums[l] + V::load(p + i + j + l * V::W);
  }
  float parts[4] = {};
  sum4(sums[0], sums[1], sums[2], sums[3], parts);
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// DotOfBf16 is what bfloat16 weights are multiplied with; the other types always take FloatDot.
template <class V, class DotOfBf16 = FloatDot<V>>
constexpr Isa make_isa(const char* name, bool (*supported)(), int blend_rows, int blend_rows_of_bf16) {
  using Dot = FloatDot<V>;
  return Isa{
      name,
      supported,
      V::tile_m,
      {blend_rows, blend_rows_of_bf16, blend_rows},
      {4, sizeof(typename DotOfBf16::X), 4},
      {LinearKernel<V, Dot, float>::run, LinearKernel<V, DotOfBf16, bf16>::run, LinearKernel<V, Dot, f16>::run},
      {LinearKernel<V, Dot, float>::prepare_x, LinearKernel<V, DotOfBf16, bf16>::prepare_x,
       LinearKernel<V, Dot, f16>::prepare_x},
      {embedding<V, float>, embedding<V, bf16>, embedding<V, f16>},
      {rms_norm<V, float>, rms_norm<V, bf16>, rms_norm<V, f16>},
      {layer_norm<V, float>, layer_norm<V, bf16>, layer_norm<V, f16>},
      {multiply_add<V, Dot>, multiply_add<V, DotOfBf16>, multiply_add<V, Dot>},
      read<V>,
  };
}

}  // namespace dami
