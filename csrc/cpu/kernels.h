// The kernels, over a vector type V and a Dot, which every instruction set instantiates in a file of its own. V must lie in
// an anonymous namespace: then so does everything here, and the linker cannot put AVX-512 code where AVX2 code belongs.
//
//   V     W float32 lanes; tile_m, the height of a register tile; zero, set1, load and store of float, bf16 and f16,
//         + − ·, fma(a, b, c) = a·b + c; load_even and load_odd, every other one of 2 W bf16; keep, which holds it in a
//         register, for the compiler would rather read it again; sum4(a, b, c, d, to), which adds the sum of the lanes of
//         each to to[0..4); and Int8 and Int4, made from the scale of a group, whose load, load_even and load_odd turn its
//         codes into numbers
//   Dot   how products are summed along K, `step` elements at a time and these in `parts`: X, the type it reads x in;
//         load<part> and multiply_add, of X; operand, `step` numbers of a weight as stored, as X would hold them; widen,
//         the same in float32; store, either to X; multiply_add, of X and an operand
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

template <class V>
struct Two {
  V a, b;
};

template <class V>
inline Two<V> lerp(float lam, Two<V> base, Two<V> target) {
  return {lerp(lam, base.a, target.a), lerp(lam, base.b, target.b)};
}

// What `loader` gives where there is nothing to scale.
template <class V>
struct AsItIs {
  template <class T>
  V load(const T* p) const {
    return V::load(p);
  }
  V load_even(const bf16* p) const { return V::load_even(p); }
  V load_odd(const bf16* p) const { return V::load_odd(p); }
};

// A row of a stored matrix from column k on, `count` columns of it. Both kinds have: `padded`, whether it may be read up to a
// whole number of groups; at(i), where column k + i lies; bytes(i), how far that is from column k; loader(i), what makes
// vectors of the numbers of i's group; group(i, left, buffer), the row from i on, good for one whole group, which is a copy
// where only `left` columns are there.
template <class V, class T>
struct Numbers {
  static constexpr bool padded = false;
  using Buffer = T[group_size];
  const T* p;

  Numbers(const T* p) : p(p) {}
  Numbers(const Stored& m, int64_t n, int64_t k, int64_t, float*)
      : p(static_cast<const T*>(m.data.data) + n * m.data.stride + k) {}
  const T* at(int64_t i) const { return p + i; }
  static constexpr int64_t bytes(int64_t i) { return i * static_cast<int64_t>(sizeof(T)); }
  AsItIs<V> loader(int64_t) const { return {}; }
  Numbers group(int64_t i, int64_t left, Buffer& buffer) const {
    if (left >= group_size) return p + i;
    std::memset(buffer, 0, sizeof buffer);
    std::memcpy(buffer, p + i, static_cast<size_t>(left) * sizeof(T));
    return buffer;
  }
};

// `per_byte` codes to a byte, and Loader, one of V's, for them. The scales are laid out as float32 first.
template <class V, class Loader, class Byte, int per_byte>
struct Codes {
  static constexpr bool padded = true;
  struct Buffer {};
  const Byte* p;
  const float* scales;

  Codes(const Byte* p, const float* scales) : p(p), scales(scales) {}
  Codes(const Stored& m, int64_t n, int64_t k, int64_t count, float* scales)
      : p(static_cast<const Byte*>(m.data.data) + n * m.data.stride + k / per_byte), scales(scales) {
    const bf16* from = static_cast<const bf16*>(m.scale.data) + n * m.scale.stride + k / group_size;
    const int64_t groups = (count + group_size - 1) / group_size;
    for (int64_t i = 0; i < groups; i += V::W) load<V>(from + i, groups - i).store(scales + i);
  }
  const Byte* at(int64_t i) const { return p + i / per_byte; }
  static constexpr int64_t bytes(int64_t i) { return i / per_byte; }
  Loader loader(int64_t i) const { return Loader(V::set1(scales[i / group_size])); }
  Codes group(int64_t i, int64_t, Buffer&) const { return {at(i), scales + i / group_size}; }
};

template <class Row>
struct Kind {
  using type = Row;
};

// Calls f with the kind of a matrix' rows, or with those of both matrices of a weight.
template <class V, class T, class F>
inline void with_rows(Storage storage, F f) {
  switch (storage) {
    case Storage::dense: return f(Kind<Numbers<V, T>>{});
    case Storage::int8: return f(Kind<Codes<V, typename V::Int8, int8_t, 1>>{});
    case Storage::int4: return f(Kind<Codes<V, typename V::Int4, uint8_t, 2>>{});
  }
}

template <class V, class T, class F>
inline void with_rows(const Weight& weight, F f) {
  if (weight.base.storage == Storage::dense)
    with_rows<V, T>(weight.other.storage, [&](auto other) { f(Kind<Numbers<V, T>>{}, other); });
  else  // codes all over: there is one such format
    f(Kind<Codes<V, typename V::Int8, int8_t, 1>>{}, Kind<Codes<V, typename V::Int4, uint8_t, 2>>{});
}

// Of internal linkage, as everything must be here.
static inline bool has_target(const Weight& weight) { return weight.other.storage == Storage::dense; }

// W(λ) of what the two matrices of a weight hold.
template <class V>
inline V blend(const Weight& weight, float lam, V base, V other) {
  return has_target(weight) ? lerp(lam, base, other) : fma(V::set1(lam), other, base);
}

// Multiplies in float32. bfloat16 becomes float32 cheapest as the even and the odd elements of a vector, a shift and a mask;
// so where `split`, weights are read in that order, and x lies in it.
template <class V, bool split>
struct FloatDot {
  using X = float;
  static constexpr int step = 2 * V::W, parts = 2;
  template <int part>
  static V load(const float* x) {
    return V::load(x + part * V::W);
  }
  static V multiply_add(V x, V w, V sum) { return fma(x, w, sum); }
  template <class Row, class Loader>
  static Two<V> operand(const Row& row, int64_t i, const Loader& loader) {
    if constexpr (split) return {loader.load_even(row.at(i)), loader.load_odd(row.at(i))};
    return {loader.load(row.at(i)), loader.load(row.at(i + V::W))};
  }
  template <class Row, class Loader>
  static Two<V> widen(const Row& row, int64_t i, const Loader& loader) {
    return operand(row, i, loader);
  }
  static void store(Two<V> v, float* to) {
    v.a.store(to);
    v.b.store(to + V::W);
  }
  static V multiply_add(const float* x, Two<V> w, V sum) { return fma(load<1>(x), w.b, fma(load<0>(x), w.a, sum)); }
};

// Writes f's vectors for a whole number of groups: f(i, j, left) gives what belongs at i + j.
template <class V, class Dot, class Row>
inline void fill(const Row& row, int64_t count, typename Dot::X* to) {
  typename Row::Buffer buffer;
  for (int64_t i = 0; i < count; i += group_size) {
    const Row group = row.group(i, count - i, buffer);
    const auto loader = group.loader(0);
    for (int64_t j = 0; j < group_size; j += Dot::step) Dot::store(Dot::operand(group, j, loader), to + i + j);
  }
}

template <class V, class Dot, class T>
void prepare_x(const void* from, int64_t k, void* to) {
  fill<V, Dot>(Numbers<V, T>(static_cast<const T*>(from)), k, static_cast<typename Dot::X*>(to));
}

// Sums of one row of x lie so far apart.
constexpr int64_t sums_stride = 2 * max_outputs;

template <class V, int M, int N>
inline void add_sums(V (&total)[M][N], float* sums) {
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

// Adds x[m] · w[n] to sums[m][n] for M rows of x, `stride` apart, and tile_n rows of w, over k elements, whole groups.
template <class V, class Dot, int M>
void tile(const typename Dot::X* x, int64_t stride, const typename Dot::X* const* w, int64_t k, float* sums) {
  V total[M][tile_n];
  for (auto& row : total)
    for (V& sum : row) sum = V::zero();
  const typename Dot::X *xs[M], *ws[tile_n];
  for (int m = 0; m < M; m++) xs[m] = x + m * stride;
  for (int n = 0; n < tile_n; n++) ws[n] = w[n];
  const auto part = [&](auto which, int64_t i) __attribute__((always_inline)) {
    decltype(Dot::template load<which>(x)) at[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      at[m] = Dot::template load<which>(xs[m] + i);
      if constexpr (Dot::parts == 2) at[m].keep();
    }
#pragma GCC unroll 4
    for (int n = 0; n < tile_n; n++) {
      const auto row = Dot::template load<which>(ws[n] + i);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) total[m][n] = Dot::multiply_add(at[m], row, total[m][n]);
    }
  };
  for (int64_t i = 0; i < k; i += Dot::step) {
    part(std::integral_constant<int, 0>{}, i);
    if constexpr (Dot::parts == 2) part(std::integral_constant<int, 1>{}, i);
  }
  add_sums(total, sums);
}

// The same with rows of w as they are stored, N of them at a time. Meanwhile fetches the rows that lie at `ahead`.
template <class V, class Dot, int M, class Row>
void stream(const typename Dot::X* x, int64_t stride, const Row* w, const char* const* ahead, int64_t k, float* sums) {
  constexpr int N = M <= V::tile_m ? tile_n : tile_n / 2;
  for (int first = 0; first < tile_n; first += N) {
    V total[M][N];
    for (auto& row : total)
      for (V& sum : row) sum = V::zero();
    for (int64_t i = 0; i < k; i += group_size) {
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        const Row& row = w[first + n];
        for (int64_t line = 0; line < Row::bytes(group_size); line += 64)
          __builtin_prefetch(ahead[first + n] + Row::bytes(i) + line, 0, 2);
        const auto loader = row.loader(i);
#pragma GCC unroll 4
        for (int64_t j = i; j < i + group_size; j += Dot::step) {
          const auto operand = Dot::operand(row, j, loader);
#pragma GCC unroll 4
          for (int m = 0; m < M; m++) total[m][n] = Dot::multiply_add(x + m * stride + j, operand, total[m][n]);
        }
      }
    }
    add_sums(total, sums + first);
  }
}

template <class V, class Dot, class T>
struct LinearKernel {
  using X = typename Dot::X;
  static constexpr int64_t block_k = block_bytes / sizeof(X);
  static constexpr int64_t cached_bytes = 256 * 1024;  // of x, that the rows of a weight pass by
  static constexpr int64_t few = 4;  // rows that are bound by memory, so that a weight is best converted in registers

  struct alignas(64) Scratch {
    X weight[2][tile_n][block_k];
    float scales[tile_n][block_bytes / 2 / group_size];
    float sums[max_rows][2][max_outputs];  // of the base and the other matrix, or of the blended one
  };
  static_assert(sizeof(Scratch) == linear_scratch(max_rows));

  // Rows n to n + tile_n of a weight, of which those from `end` on are not there; columns [k, k + count).
  struct Piece {
    int64_t n, end, k, count;
    int64_t row(int i) const { return std::min(n + i, end - 1); }
  };

  template <class Row>
  static Row row(const Stored& stored, const Piece& piece, int i, float* scales) {
    return Row(stored, piece.row(i), piece.k, piece.count, scales);
  }

  static const char* address(const Matrix& matrix, int64_t n, int64_t k, int64_t bits) {
    return static_cast<const char*>(matrix.data) + (n * matrix.stride) * std::max<int64_t>(bits / 8, 1) + k * bits / 8;
  }

  static int64_t bits(Storage storage) {
    return storage == Storage::dense ? 8 * static_cast<int64_t>(sizeof(T)) : storage == Storage::int8 ? 8 : 4;
  }

  // Fetches the `share`th of `shares` parts of a piece of a matrix.
  static void fetch(const Stored& stored, const Piece& piece, int64_t share, int64_t shares) {
    const int64_t lines = (piece.count * bits(stored.storage) / 8 + 63) / 64;
    for (int i = 0; i < tile_n; i++) {
      const char* from = address(stored.data, piece.row(i), piece.k, bits(stored.storage));
      for (int64_t line = lines * share / shares; line < lines * (share + 1) / shares; line++)
        __builtin_prefetch(from + 64 * line, 0, 2);
      if (stored.storage != Storage::dense && share == 0)
        __builtin_prefetch(address(stored.scale, piece.row(i), piece.k / group_size, 16), 0, 2);
    }
  }

  // A group of a few rows, with a matrix of the weight as it is stored. False if that cannot be read in whole groups.
  static bool few_rows(const Stored& stored, const Piece& piece, const Piece& next, const X* x, int64_t stride,
                       int64_t rows, float* sums, Scratch& scratch) {
    if (stored.storage == Storage::dense && piece.count % group_size) return false;
    with_rows<V, T>(stored.storage, [&](auto kind) {
      using Row = typename decltype(kind)::type;
      static constexpr decltype(&stream<V, Dot, 1, Row>) of_height[few] = {
          stream<V, Dot, 1, Row>, stream<V, Dot, 2, Row>, stream<V, Dot, 3, Row>, stream<V, Dot, 4, Row>};
      const Row w[tile_n] = {row<Row>(stored, piece, 0, scratch.scales[0]), row<Row>(stored, piece, 1, scratch.scales[1]),
                             row<Row>(stored, piece, 2, scratch.scales[2]), row<Row>(stored, piece, 3, scratch.scales[3])};
      const char* ahead[tile_n];
      for (int i = 0; i < tile_n; i++) ahead[i] = address(stored.data, next.row(i), next.k, bits(stored.storage));
      of_height[rows - 1](x, stride, w, ahead, (piece.count + group_size - 1) / group_size * group_size, sums);
    });
    return true;
  }

  // Lets w[i] point at the rows of a piece as Dot reads them: where they are stored, or converted in `to`.
  static void convert(const Stored& stored, const Piece& piece, X (*to)[block_k], const X** w, Scratch& scratch) {
    with_rows<V, T>(stored.storage, [&](auto kind) {
      using Row = typename decltype(kind)::type;
      for (int i = 0; i < tile_n; i++) {
        const Row from = row<Row>(stored, piece, i, scratch.scales[0]);
        if constexpr (std::is_same_v<Row, Numbers<V, X>>)
          if (piece.count % group_size == 0) {
            w[i] = from.p;
            continue;
          }
        fill<V, Dot>(from, piece.count, to[i]);
        w[i] = to[i];
      }
    });
  }

  static void blend_rows(const Weight& weight, float lam, const Piece& piece, X (*to)[block_k], const X** w,
                         Scratch& scratch) {
    with_rows<V, T>(weight, [&](auto base_kind, auto other_kind) {
      using Base = typename decltype(base_kind)::type;
      using Other = typename decltype(other_kind)::type;
      typename Base::Buffer base_buffer;
      typename Other::Buffer other_buffer;
      for (int n = 0; n < tile_n; n++) {
        const Base base = row<Base>(weight.base, piece, n, scratch.scales[0]);
        const Other other = row<Other>(weight.other, piece, n, scratch.scales[1]);
        for (int64_t i = 0; i < piece.count; i += group_size) {
          const Base b = base.group(i, piece.count - i, base_buffer);
          const Other o = other.group(i, piece.count - i, other_buffer);
          const auto base_loader = b.loader(0);
          const auto other_loader = o.loader(0);
          for (int64_t j = 0; j < group_size; j += Dot::step) {
            const Two<V> x = Dot::widen(b, j, base_loader), y = Dot::widen(o, j, other_loader);
            Dot::store(Two<V>{blend(weight, lam, x.a, y.a), blend(weight, lam, x.b, y.b)}, to[n] + i + j);
          }
        }
        w[n] = to[n];
      }
    });
  }

  // All that a piece adds to the sums, fetching the next one meanwhile.
  static void multiply(const Linear& p, const Block& block, const Piece& piece, const Piece& next, int64_t n0,
                       Scratch& scratch) {
    static constexpr decltype(&tile<V, Dot, 1>) of_height[] = {tile<V, Dot, 1>, tile<V, Dot, 2>, tile<V, Dot, 3>,
                                                               tile<V, Dot, 4>, tile<V, Dot, 5>, tile<V, Dot, 6>};
    const Stored* const matrices[2] = {&p.weight.base, &p.weight.other};
    const int64_t stride = block.x_stride / static_cast<int64_t>(sizeof(X)), all = static_cast<int64_t>(block.rows.size());
    const X* const x = reinterpret_cast<const X*>(block.x) + piece.k;
    bool reads[2] = {};
    int64_t share = 0, shares = 0;
    for (const Group& group : block.groups) {
      if (group.mode != Mode::other) reads[0] = true;
      if (group.mode != Mode::base) reads[1] = true;
      shares += (group.end - group.begin + V::tile_m - 1) / V::tile_m * (group.mode == Mode::both ? 2 : 1);
    }
    const auto sums = [&](int64_t row, int which) { return &scratch.sums[row][which][piece.n - n0]; };
    const auto tiles = [&](const Group& group, const X* const* w, int which) {
      const int64_t rows = group.end - group.begin, count = (rows + V::tile_m - 1) / V::tile_m;
      for (int64_t i = 0; i < count; i++, share++) {
        const int64_t begin = group.begin + rows * i / count, end = group.begin + rows * (i + 1) / count;
        for (int matrix = 0; matrix < 2; matrix++)
          if (reads[matrix] && next.count) fetch(*matrices[matrix], next, share, shares);
        of_height[end - begin - 1](x + begin * stride, stride, w, (piece.count + group_size - 1) / group_size * group_size,
                                   sums(begin, which));
      }
    };
    const X* w[2][tile_n];
    bool converted[2] = {};
    for (const Group& group : block.groups) {
      if (group.mode == Mode::blend) {
        const X* blended[tile_n];
        blend_rows(p.weight, block.lam[group.begin], piece, scratch.weight[0], blended, scratch);
        tiles(group, blended, 0);
        converted[0] = false;
        continue;
      }
      for (int matrix = group.mode == Mode::other; matrix < (group.mode == Mode::base ? 1 : 2); matrix++) {
        const int which = group.mode == Mode::both ? matrix : 0;
        if (all <= few && few_rows(*matrices[matrix], piece, next.count ? next : piece, x + group.begin * stride, stride,
                                   group.end - group.begin, sums(group.begin, which), scratch))
          continue;
        if (!converted[matrix]) convert(*matrices[matrix], piece, scratch.weight[matrix], w[matrix], scratch);
        converted[matrix] = true;
        tiles(group, w[matrix], which);
      }
    }
  }

  static void run(const Linear& p, const Block& block, int64_t n0, int64_t n1, void* memory) {
    Scratch& scratch = *static_cast<Scratch*>(memory);
    const int64_t rows = static_cast<int64_t>(block.rows.size());
    std::memset(scratch.sums, 0, static_cast<size_t>(rows) * sizeof scratch.sums[0]);
    // As many columns of x as the cache holds stay there while rows of the weight pass by.
    const int64_t deep = std::max(block_k, cached_bytes / static_cast<int64_t>(sizeof(X)) / rows / block_k * block_k);
    const auto at = [&](int64_t n, int64_t k) { return Piece{n, n1, k, std::min(block_k, block.k - k)}; };
    for (int64_t begin = 0; begin < block.k; begin += deep) {
      const int64_t end = std::min(block.k, begin + deep);
      for (int64_t n = n0; n < n1; n += tile_n)
        for (int64_t k = begin; k < end; k += block_k) {
          const Piece next = k + block_k < end   ? at(n, k + block_k)
                             : n + tile_n < n1   ? at(n + tile_n, begin)
                             : end < block.k     ? at(n0, end)
                                                 : Piece{n, n1, k, 0};
          multiply(p, block, at(n, k), next, n0, scratch);
        }
    }
    for (const Group& group : block.groups)
      for (int i = group.begin; i < group.end; i++) finish(p, block, group.mode, i, n0, n1, scratch.sums[i]);
  }

  // λ, the bias and the one rounding.
  static void finish(const Linear& p, const Block& block, Mode mode, int i, int64_t n0, int64_t n1,
                     const float (*sums)[max_outputs]) {
    const T *bias_base = static_cast<const T*>(p.bias.base.data), *bias_target = static_cast<const T*>(p.bias.target.data);
    T* y = static_cast<T*>(const_cast<void*>(p.y.data)) + block.rows[i] * p.y.stride;
    const float lam = block.lam[i];
    for (int64_t n = n0; n < n1; n += V::W) {
      const int64_t at = n - n0, left = n1 - n;
      V sum = V::load(sums[0] + at);
      if (mode == Mode::both && lam != 0) {
        const V other = V::load(sums[1] + at);
        sum = lam == 1 && has_target(p.weight) ? other : blend(p.weight, lam, sum, other);
      }
      if (bias_base)
        sum = sum + lerp_of<V>(
                        lam, [&] { return load<V>(bias_base + n, left); }, [&] { return load<V>(bias_target + n, left); });
      store(sum, y + n, left);
    }
  }
};

// A row of W(λ).
template <class V, class T>
void embedding(const Weight& weight, int64_t n, float lam, void* y, int64_t d) {
  with_rows<V, T>(weight, [&](auto base_kind, auto other_kind) {
    using Base = typename decltype(base_kind)::type;
    using Other = typename decltype(other_kind)::type;
    constexpr int64_t block = 512;
    float scales[2][block / group_size];
    typename Base::Buffer base_buffer;
    typename Other::Buffer other_buffer;
    for (int64_t k = 0; k < d; k += block) {
      const int64_t count = std::min(block, d - k);
      const Base base(weight.base, n, k, count, scales[0]);
      const Other other(weight.other, n, k, count, scales[1]);
      for (int64_t i = 0; i < count; i += group_size) {
        const Base b = base.group(i, count - i, base_buffer);
        const Other o = other.group(i, count - i, other_buffer);
        const auto base_loader = b.loader(0);
        const auto other_loader = o.loader(0);
        for (int64_t j = 0; j < std::min(group_size, count - i); j += V::W) {
          V v;
          if (lam == 1 && has_target(weight)) {
            v = other_loader.load(o.at(j));
          } else {
            v = base_loader.load(b.at(j));
            if (lam != 0) v = blend(weight, lam, v, other_loader.load(o.at(j)));
          }
          store(v, static_cast<T*>(y) + k + i + j, count - i - j);
        }
      }
    }
  });
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
template <class V, class DotOfBf16 = FloatDot<V, true>>
constexpr Isa make_isa(const char* name, bool (*supported)(), int blend_rows, int blend_rows_of_bf16) {
  using Dot = FloatDot<V, false>;
  return Isa{
      name,
      supported,
      V::tile_m,
      {blend_rows, blend_rows_of_bf16, blend_rows},
      {4, sizeof(typename DotOfBf16::X), 4},
      {LinearKernel<V, Dot, float>::run, LinearKernel<V, DotOfBf16, bf16>::run, LinearKernel<V, Dot, f16>::run},
      {prepare_x<V, Dot, float>, prepare_x<V, DotOfBf16, bf16>, prepare_x<V, Dot, f16>},
      {embedding<V, float>, embedding<V, bf16>, embedding<V, f16>},
      {rms_norm<V, float>, rms_norm<V, bf16>, rms_norm<V, f16>},
      {layer_norm<V, float>, layer_norm<V, bf16>, layer_norm<V, f16>},
      {multiply_add<V, Dot>, multiply_add<V, DotOfBf16>, multiply_add<V, Dot>},
      read<V>,
  };
}

}  // namespace dami
