// The kernels, over a vector type V and a Dot, which every instruction set instantiates in a file of its own. V must lie in
// an anonymous namespace: then so does everything here, and the linker cannot put AVX-512 code where AVX2 code belongs.
//
//   V     W float32 lanes; tile_m, the height of a register tile; zero, set1, load and store of float, bf16 and f16,
//         + − ·, fma(a, b, c) = a·b + c; load_even and load_odd, every other one of 2 W bf16; keep, which holds it in a
//         register, for the compiler would rather read it again; sum4(a, b, c, d, to), which adds the sum of the lanes of
//         each to to[0..4); and Int8 and Int4, made from the scale of a group, whose load, load_even and load_odd turn its
//         codes into numbers. Where there is an IntDot also max, and store of a vector rounded to int16
//   Dot   how products are summed along K, `step` elements at a time: X, the type it reads x in; `block`, how much of k it
//         sums in vectors, and at_block(k), where a block of x begins; tile_m, the height of a register tile; any_rows,
//         whether it is good for more rows than `few`; loader and operand, what makes `step` numbers of a weight as stored
//         (some, as many as there are, if a step is more than a group), and multiply_add of these and x; begin and scaled,
//         what a sum over a block begins with and ends as; second, what else a block of rows of x is to be multiplied as, or
//         null; store, an operand as X. One that multiplies dense weights too has
//         load<part> and multiply_add for X in `parts`, widen, `step` numbers in float32, and their store
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
  static Numbers beside(const Numbers* rows, int n) { return rows[n]; }
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

// Rows that are bound by memory take so many blocks of a weight at a time; and so many groups those have, at most.
constexpr int64_t blocks_of_few = 8, most_groups = blocks_of_few * block_bytes / 2 / group_size;

// `per_byte` codes to a byte, and Loader, one of V's, for them. The scales are laid out as float32 first, those of the rows
// of a tile `most_groups` apart.
template <class V, class Loader, class Byte, int codes>
struct Codes {
  static constexpr bool padded = true;
  static constexpr int per_byte = codes;
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
  // rows[n], in such a way that the compiler knows how far its scales are from those of rows[0], and spares a register.
  static Codes beside(const Codes* rows, int n) { return {rows[n].p, rows->scales + n * most_groups}; }
  const Byte* at(int64_t i) const { return p + i / per_byte; }
  static constexpr int64_t bytes(int64_t i) { return i / per_byte; }
  Loader loader(int64_t i) const { return Loader(V::set1(scales[i / group_size])); }
  Codes group(int64_t i, int64_t, Buffer&) const { return {at(i), scales + i / group_size}; }
};

// Codes, stored as Row is, that a Dot has stored as X, in its order.
template <class V, class X, class Row>
struct Converted {
  static constexpr int per_byte = Row::per_byte;
  const X* p;
  const float* scales;

  static Converted beside(const Converted* rows, int n) { return {rows[n].p, rows->scales + n * most_groups}; }
  const X* at(int64_t i) const { return p + i; }
  static constexpr int64_t bytes(int64_t i) { return Row::bytes(i); }
  V loader(int64_t i) const { return V::set1(scales[i / group_size]); }
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
  static constexpr int step = 2 * V::W, parts = 2, tile_m = V::tile_m;
  static constexpr bool any_rows = true;
  static constexpr int64_t block = block_bytes / sizeof(X);
  static int64_t at_block(int64_t k) { return k; }
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
  template <class Row>
  static auto loader(const Row& row, int64_t i) {
    return row.loader(i);
  }
  template <class Row>
  static V begin(const Row&, int64_t, int64_t, const float*) {
    return V::zero();
  }
  static V scaled(V sum, const float*) { return sum; }
  static const float* second(const float*, int64_t, int) { return nullptr; }
};

// Writes f's vectors for a whole number of groups: f(i, j, left) gives what belongs at i + j.
template <class V, class Dot, class Row>
inline void fill(const Row& row, int64_t count, typename Dot::X* to) {
  typename Row::Buffer buffer;
  for (int64_t i = 0; i < count; i += group_size) {
    const Row group = row.group(i, count - i, buffer);
    const auto loader = Dot::loader(group, 0);
    for (int64_t j = 0; j < group_size; j += Dot::step) Dot::store(Dot::operand(group, j, loader), to + i + j);
  }
}

template <class V, int M, int N>
inline __attribute__((always_inline)) void add_sums(const V (&total)[M][N], float* sums) {
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    float* to = sums + m * tile_n;
    if constexpr (N == 4) {
      sum4(total[m][0], total[m][1], total[m][2], total[m][3], to);
    } else {
      float both[4] = {};
      sum4(total[m][0], total[m][1], V::zero(), V::zero(), both);
      to[0] += both[0], to[1] += both[1];
    }
  }
}

// What to fetch while a tile is multiplied: tile_n rows, `stride` bytes apart, with `bits` to an element.
struct Ahead {
  const char* rows;
  int64_t stride, bits;
  template <int count>
  void fetch(int64_t first, int64_t byte) const {
#pragma GCC unroll 4
    for (int n = 0; n < count; n++) __builtin_prefetch(rows + (first + n) * stride + byte, 0, 2);
  }
};

// Adds x[m] · w[n] to sums[m * tile_n + n] for M rows of x, `stride` apart, and tile_n rows of w, over k elements, whole groups.
template <class V, class Dot, int M>
void tile(const typename Dot::X* x, int64_t stride, const typename Dot::X* const* w, const Ahead& ahead, int64_t k,
          float* sums) {
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
  const int64_t bytes = Dot::step * ahead.bits / 8;
  for (int64_t i = 0, byte = 0; i < k; i += Dot::step, byte += bytes) {
    ahead.fetch<tile_n>(0, byte);
    part(std::integral_constant<int, 0>{}, i);
    if constexpr (Dot::parts == 2) part(std::integral_constant<int, 1>{}, i);
  }
  add_sums(total, sums);
}

// Adds x[m] · w[n] to total[m][n], over `count` elements from i on: a group, or a step of Dot if that is more; unless
// `whole`, as many groups as there are left.
template <class V, class Dot, bool whole, int M, int N, class Rows>
inline __attribute__((always_inline)) void multiply_add(const typename Dot::X* x, int64_t stride, const Rows& rows,
                                                        int64_t i, int64_t count, V (&total)[M][N]) {
#pragma GCC unroll 4
  for (int n = 0; n < N; n++) {
    const auto w = rows(n);
    const auto loader = Dot::loader(w, i);
    for (int64_t j = 0; j < count; j += Dot::step) {
      const auto operand = [&] {
        if constexpr (whole) return Dot::operand(w, i + j, loader);
        else return Dot::some(w, i, count, loader);
      }();
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) total[m][n] = Dot::multiply_add(x + m * stride + j, operand, total[m][n]);
    }
  }
}

// The same as `tile` with rows of w as they are stored or converted, as many at a time as the registers have room for, over
// any number of blocks of k.
template <class V, class Dot, int M, class Row>
void stream(const typename Dot::X* x, int64_t stride, const Row* w, const Ahead& ahead, int64_t k, float* sums) {
  constexpr int N = M <= Dot::tile_m ? tile_n : tile_n / 2;
  constexpr int64_t chunk = std::max<int64_t>(group_size, Dot::step);
  for (int64_t begin = 0; begin < k; begin += Dot::block, x += Dot::at_block(Dot::block) - Dot::at_block(0)) {
    const int64_t end = std::min(k, begin + Dot::block);
    const auto add_block = [&](const typename Dot::X* x, auto fetches) {
      for (int first = 0; first < tile_n; first += N) {
        const auto rows = [&](int n) { return Row::beside(w, first + n); };
        V total[M][N];
        for (int n = 0; n < N; n++)
          for (int m = 0; m < M; m++) total[m][n] = Dot::begin(rows(n), begin, end - begin, x + m * stride);
        int64_t i = begin;
        for (; i + chunk <= end; i += chunk) {
          if constexpr (fetches)
            if (Row::bytes(i) % 64 == 0)
              for (int64_t line = 0; line < Row::bytes(chunk); line += 64) ahead.fetch<N>(first, Row::bytes(i) + line);
          multiply_add<V, Dot, true>(x + i - begin, stride, rows, i, chunk, total);
        }
        if constexpr (chunk > group_size)
          if (i < end) multiply_add<V, Dot, false>(x + i - begin, stride, rows, i, end - i, total);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++)
          for (V& sum : total[m]) sum = Dot::scaled(sum, x + m * stride);
        add_sums(total, sums + first);
      }
    };
    add_block(x, std::true_type{});
    if (const auto* second = Dot::second(x, stride, M)) add_block(second, std::false_type{});
  }
}

// Dot multiplies dense weights and blended ones, CodesDot codes.
template <class V, class Dot, class CodesDot, class T>
struct LinearKernel {
  using X = typename Dot::X;
  static constexpr int64_t block_k = Dot::block;
  static constexpr int64_t cached_bytes = 256 * 1024;  // of x, which the rows of a weight pass by
  static constexpr int64_t few = 4;  // rows that are bound by memory, so that a weight is best converted in registers

  struct alignas(64) Scratch {
    X weight[2][tile_n][block_k];
    float scales[2][tile_n][most_groups];
    // Of the base and the other matrix, or of the blended one; of tile_n outputs those of all rows lie together.
    float sums[2][max_outputs * max_rows];
  };
  static_assert(sizeof(Scratch) == linear_scratch(max_rows));

  // Rows n to n + tile_n of a weight, of which those from `end` on are not there; columns [k, k + count).
  struct Piece {
    int64_t n, end, k, count;
    int64_t row(int i) const { return std::min(n + i, end - 1); }
    int64_t padded() const { return (count + group_size - 1) / group_size * group_size; }
  };

  // A row of x is there as Dot reads it, and behind that as CodesDot does, if that is another one.
  static constexpr bool two_dots = !std::is_same_v<Dot, CodesDot>;
  static int64_t x_bytes(int64_t k) {
    const int64_t padded = (k + group_size - 1) / group_size * group_size;
    const int64_t blocks = (k + CodesDot::block - 1) / CodesDot::block;
    const int64_t codes_x = two_dots ? CodesDot::at_block(blocks * CodesDot::block) * sizeof(typename CodesDot::X) : 0;
    return padded * sizeof(X) + codes_x;
  }
  static void prepare_x(const void* from, int64_t k, void* to) {
    X* const x = static_cast<X*>(to);
    const T* const numbers = static_cast<const T*>(from);
    fill<V, Dot>(Numbers<V, T>(numbers), k, x);
    if constexpr (two_dots)
      for (int64_t i = 0; i < k; i += CodesDot::block)
        CodesDot::prepare_block(numbers + i, std::min(CodesDot::block, k - i), codes_x(x, k) + CodesDot::at_block(i));
  }
  template <class At>
  static typename CodesDot::X* codes_x(At* x, int64_t k) {
    return reinterpret_cast<typename CodesDot::X*>(x + (k + group_size - 1) / group_size * group_size);
  }

  // Some rows of x against tile_n rows of a weight: where they begin in the block, and what their sums are added to.
  struct Rows {
    const Block& block;
    int64_t begin, end;
    float* sums;
  };

  template <class D>
  static const typename D::X* x_of(const Block& block, int64_t row, int64_t k) {
    const X* const x = reinterpret_cast<const X*>(block.x + row * block.x_stride);
    if constexpr (std::is_same_v<D, Dot>) return x + k;
    else return codes_x(const_cast<X*>(x), block.k) + D::at_block(k);
  }

  // Calls f(x, the distance of its rows, their sums, how many) for register tiles of nearly equal height up to `most`.
  template <class D, class F>
  static void for_tiles(const Rows& rows, int64_t k, int64_t most, F f) {
    const int64_t all = rows.end - rows.begin, count = (all + most - 1) / most;
    for (int64_t i = 0; i < count; i++) {
      const int64_t begin = all * i / count, end = all * (i + 1) / count;
      f(x_of<D>(rows.block, rows.begin + begin, k), rows.block.x_stride / static_cast<int64_t>(sizeof(typename D::X)),
        rows.sums + begin * tile_n, end - begin);
    }
  }

  static void tiles(const Rows& rows, const X* const* w, const Piece& piece, const Ahead& ahead) {
    static constexpr decltype(&tile<V, Dot, 1>) of_height[] = {tile<V, Dot, 1>, tile<V, Dot, 2>, tile<V, Dot, 3>,
                                                               tile<V, Dot, 4>, tile<V, Dot, 5>, tile<V, Dot, 6>};
    for_tiles<Dot>(rows, piece.k, V::tile_m, [&](const X* x, int64_t stride, float* sums, int64_t height) {
      of_height[height - 1](x, stride, w, ahead, piece.padded(), sums);
    });
  }

  template <class D, class Row>
  static void streams(const Rows& rows, const Row* w, const Piece& piece, const Ahead& ahead, int64_t most) {
    static constexpr decltype(&stream<V, D, 1, Row>) of_height[few] = {stream<V, D, 1, Row>, stream<V, D, 2, Row>,
                                                                       stream<V, D, 3, Row>, stream<V, D, 4, Row>};
    for_tiles<D>(rows, piece.k, most, [&](const typename D::X* x, int64_t stride, float* sums, int64_t height) {
      of_height[height - 1](x, stride, w, ahead, piece.padded(), sums);
    });
  }

  template <class Row>
  static Row row(const Stored& stored, const Piece& piece, int i, float* scales) {
    return Row(stored, piece.row(i), piece.k, piece.count, scales);
  }

  // Where a piece of a matrix lies. Fetches its scales at once: without them nothing begins.
  static Ahead look_ahead(const Stored& stored, const Piece& piece) {
    const bool dense = stored.storage == Storage::dense;
    const int64_t bits = dense ? 8 * static_cast<int64_t>(sizeof(T)) : stored.storage == Storage::int8 ? 8 : 4;
    const int64_t stride = stored.data.stride * (dense ? static_cast<int64_t>(sizeof(T)) : 1);
    for (int i = 0; i < tile_n && !dense; i++) {
      const auto* scales = static_cast<const bf16*>(stored.scale.data) + piece.row(i) * stored.scale.stride;
      for (int64_t k = piece.k; k < piece.k + piece.count; k += group_size * 64 / static_cast<int64_t>(sizeof(bf16)))
        __builtin_prefetch(scales + k / group_size, 0, 2);
    }
    return {static_cast<const char*>(stored.data.data) + piece.n * stride + piece.k * bits / 8, stride, bits};
  }

  // A matrix of the weight, for one piece: as it is stored, or converted once for all groups of rows.
  struct Operand {
    const Stored& stored;
    X (*const to)[block_k];
    float (*const scales)[most_groups];
    bool converted = false;
    const X* w[tile_n];

    void multiply(const Rows& rows, const Piece& piece, const Ahead& ahead) {
      const bool in_registers = static_cast<int64_t>(rows.block.rows.size()) <= few;
      with_rows<V, T>(stored.storage, [&](auto kind) {
        using Row = typename decltype(kind)::type;
        if constexpr (Row::padded && two_dots)
          if (CodesDot::any_rows || (in_registers && !rows.block.invariant))
            return multiply_by<CodesDot, Row>(rows, piece, ahead, in_registers);
        multiply_by<Dot, Row>(rows, piece, ahead, in_registers);
      });
    }

    template <class D, class Row>
    void multiply_by(const Rows& rows, const Piece& piece, const Ahead& ahead, bool in_registers) {
      if (in_registers && (Row::padded || piece.count % group_size == 0)) {
        const Row w[tile_n] = {row<Row>(stored, piece, 0, scales[0]), row<Row>(stored, piece, 1, scales[1]),
                               row<Row>(stored, piece, 2, scales[2]), row<Row>(stored, piece, 3, scales[3])};
        return streams<D>(rows, w, piece, ahead, few);
      }
      if constexpr (D::any_rows) {
        if (!converted)
          for (int i = 0; i < tile_n; i++) {
            const Row from = row<Row>(stored, piece, i, scales[i]);
            w[i] = to[i];
            if constexpr (std::is_same_v<Row, Numbers<V, X>>)
              if (piece.count % group_size == 0) {
                w[i] = from.p;
                continue;
              }
            fill<V, D>(from, piece.count, reinterpret_cast<typename D::X*>(to[i]));
          }
        converted = true;
        if constexpr (std::is_same_v<D, Dot>) {
          tiles(rows, w, piece, ahead);
        } else {
          using CodesX = typename D::X;
          const auto codes = [&](int i) {
            return Converted<V, CodesX, Row>{reinterpret_cast<const CodesX*>(to[i]), scales[i]};
          };
          const Converted<V, CodesX, Row> w[tile_n] = {codes(0), codes(1), codes(2), codes(3)};
          streams<D>(rows, w, piece, ahead, D::tile_m);
        }
      }
    }
  };

  static void blend_rows(const Weight& weight, float lam, const Piece& piece, X (*to)[block_k], Scratch& scratch) {
    with_rows<V, T>(weight, [&](auto base_kind, auto other_kind) {
      using Base = typename decltype(base_kind)::type;
      using Other = typename decltype(other_kind)::type;
      typename Base::Buffer base_buffer;
      typename Other::Buffer other_buffer;
      for (int n = 0; n < tile_n; n++) {
        const Base base = row<Base>(weight.base, piece, n, scratch.scales[0][n]);
        const Other other = row<Other>(weight.other, piece, n, scratch.scales[1][n]);
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
      }
    });
  }

  // All that a piece adds to the sums, while the next one is fetched.
  static void multiply(const Linear& p, const Block& block, const Piece& piece, const Piece& next, int64_t n0,
                       Scratch& scratch) {
    const int64_t all = static_cast<int64_t>(block.rows.size());
    const Ahead ahead[2] = {look_ahead(p.weight.base, next), look_ahead(p.weight.other, next)};
    Operand base{p.weight.base, scratch.weight[0], scratch.scales[0], false, {}};
    Operand other{p.weight.other, scratch.weight[1], scratch.scales[1], false, {}};
    const auto rows = [&](const Group& group, int which) {
      return Rows{block, group.begin, group.end, &scratch.sums[which][(piece.n - n0) * all + group.begin * tile_n]};
    };
    for (const Group& group : block.groups) switch (group.mode) {
        case Mode::base: base.multiply(rows(group, 0), piece, ahead[0]); break;
        case Mode::other: other.multiply(rows(group, 0), piece, ahead[1]); break;
        case Mode::both:
          base.multiply(rows(group, 0), piece, ahead[0]);
          other.multiply(rows(group, 1), piece, ahead[1]);
          break;
        case Mode::blend:
          blend_rows(p.weight, block.lam[group.begin], piece, scratch.weight[0], scratch);
          const X* const w[tile_n] = {scratch.weight[0][0], scratch.weight[0][1], scratch.weight[0][2], scratch.weight[0][3]};
          tiles(rows(group, 0), w, piece, ahead[0]);
          base.converted = other.converted = false;
      }
  }

  static void run(const Linear& p, const Block& block, int64_t n0, int64_t n1, void* memory) {
    Scratch& scratch = *static_cast<Scratch*>(memory);
    const int64_t rows = static_cast<int64_t>(block.rows.size());
    const size_t sums = static_cast<size_t>((n1 - n0 + tile_n - 1) / tile_n * tile_n * rows);
    for (float* each : {scratch.sums[0], scratch.sums[1]}) std::memset(each, 0, sums * sizeof(float));
    // As many columns of x as the cache holds stay there while rows of the weight pass by.
    const int64_t cached = std::max(block_k, cached_bytes / static_cast<int64_t>(sizeof(X)) / rows / block_k * block_k);
    const int64_t deep = rows <= few ? block.k : cached;
    // Pieces of a few rows are of nearly equal length, for while one is multiplied as much is fetched of the next.
    const int64_t blocks = (block.k + block_k - 1) / block_k, pieces = (blocks + blocks_of_few - 1) / blocks_of_few;
    const int64_t most = rows <= few && pieces ? (blocks + pieces - 1) / pieces * block_k : block_k;
    const auto at = [&](int64_t n, int64_t k) {
      const int64_t count = std::min(most, block.k - k);
      // What ends within a group is converted, which has room for a block.
      return Piece{n, n1, k, count > block_k && count % group_size ? count / block_k * block_k : count};
    };
    for (int64_t begin = 0; begin < block.k; begin += deep) {
      const int64_t end = std::min(block.k, begin + deep);
      for (int64_t n = n0; n < n1; n += tile_n)
        for (Piece piece = at(n, begin), next; piece.n == n; piece = next) {
          const int64_t k = piece.k + piece.count;
          next = k < end             ? at(n, k)
                 : n + tile_n < n1   ? at(n + tile_n, begin)
                 : end < block.k     ? at(n0, end)
                                     : at(n, begin);
          multiply(p, block, piece, next, n0, scratch);
          if (k >= end) break;
        }
    }
    for (const Group& group : block.groups)
      for (int i = group.begin; i < group.end; i++) finish(p, block, group.mode, i, n0, n1, scratch);
  }

  // λ, the bias and the one rounding.
  static void finish(const Linear& p, const Block& block, Mode mode, int i, int64_t n0, int64_t n1,
                     const Scratch& scratch) {
    float sums[2][max_outputs + V::W];
    for (int which = 0; which < (mode == Mode::both ? 2 : 1); which++)
      for (int64_t n = 0; n < n1 - n0; n += tile_n)
        std::memcpy(&sums[which][n], &scratch.sums[which][n * static_cast<int64_t>(block.rows.size()) + i * tile_n],
                    tile_n * sizeof(float));
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

// DotOfBf16 is what bfloat16 weights are multiplied with, CodesDot codes where x is bfloat16; the rest takes FloatDot.
template <class V, class DotOfBf16 = FloatDot<V, true>, class CodesDot = DotOfBf16>
constexpr Isa make_isa(const char* name, bool (*supported)(), int blend_rows, int blend_rows_of_bf16) {
  using Dot = FloatDot<V, false>;
  using OfF32 = LinearKernel<V, Dot, Dot, float>;
  using OfBf16 = LinearKernel<V, DotOfBf16, CodesDot, bf16>;
  using OfF16 = LinearKernel<V, Dot, Dot, f16>;
  return Isa{
      name,
      supported,
      V::tile_m,
      {blend_rows, blend_rows_of_bf16, blend_rows},
      {OfF32::x_bytes, OfBf16::x_bytes, OfF16::x_bytes},
      {OfF32::prepare_x, OfBf16::prepare_x, OfF16::prepare_x},
      {OfF32::run, OfBf16::run, OfF16::run},
      {embedding<V, float>, embedding<V, bf16>, embedding<V, f16>},
      {rms_norm<V, float>, rms_norm<V, bf16>, rms_norm<V, f16>},
      {layer_norm<V, float>, layer_norm<V, bf16>, layer_norm<V, f16>},
      {multiply_add<V, Dot>, multiply_add<V, DotOfBf16>, multiply_add<V, Dot>},
      read<V>,
  };
}

}  // namespace dami
