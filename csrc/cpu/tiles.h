// Register tiles: a few rows of x times tile_n rows of a weight.
#pragma once

#include <algorithm>
#include <type_traits>

#include "dots.h"
#include "pieces.h"

namespace dami {

constexpr int64_t sums_stride = 64;  // from the sums of a row of x to those of the next

template <class V, int M, int N>
inline __attribute__((always_inline)) void add_sums(const V (&total)[M][N], float* sums) {
#pragma GCC unroll 8
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

constexpr int64_t tile_step = 128;  // elements of k from one step of Prefetch to the next

// Adds x[m] · w[n] to sums[m * sums_stride + n] for M rows of x, `stride` apart, and tile_n rows of w, over k elements, whole groups.
template <class V, class Dot, int M>
void tile(const typename Dot::X* x, int64_t stride, const typename Dot::X* const* w, Prefetch<tile_n>& prefetch, int64_t k,
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
  for (int64_t i = 0; i < k; i += Dot::step) {
    if (i % tile_step == 0) prefetch.step();
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
    const auto loader = Dot::loader(w, i, count);
    for (int64_t j = 0; j < count; j += Dot::step) {
      const auto operand = [&] {
        if constexpr (whole) return Dot::operand(w, i + j, loader);
        else return Dot::partial_operand(w, i, count, loader);
      }();
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) total[m][n] = Dot::multiply_add(x + m * stride + j, operand, total[m][n]);
    }
  }
}

// How many columns of how many rows of a weight `stream` takes at a time.
template <class Dot>
constexpr int64_t stream_chunk = std::max<int64_t>(group_size, Dot::step);
template <class Dot>
constexpr int stream_width(int64_t height) {
  return height <= Dot::tile_m ? tile_n : tile_n / 2;
}

// The same as `tile` with rows of w as they are stored or converted, as many at a time as the registers have room for, over
// any number of blocks of k. With every line of rows that come from memory, it fetches the one that lies `ahead` bytes on:
// with one row of x a line takes few instructions, and Prefetch would take more than the products.
template <class V, class Dot, int M, class Row>
void stream(const typename Dot::X* x, int64_t stride, const Row* w, int64_t ahead, int64_t k, float* sums) {
  constexpr int N = stream_width<Dot>(M);
  constexpr int64_t chunk = stream_chunk<Dot>;
  constexpr Blocking blocks = Dot::blocks;
  for (int64_t begin = 0, end; begin < k; begin = end, x += Dot::at_block(blocks.block) - Dot::at_block(0)) {
    end = blocks.end(begin, blocks.block, k);
    const auto add_block = [&](const typename Dot::X* x, auto fetches) {
      for (int first = 0; first < tile_n; first += N) {
        const auto rows = [&](int n) { return w[first + n]; };
        V total[M][N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++)
#pragma GCC unroll 4
          for (int m = 0; m < M; m++) total[m][n] = Dot::begin(rows(n), begin, end - begin, x + m * stride);
        const auto fetch = [&](int64_t i) __attribute__((always_inline)) {
          if constexpr (Row::streamed && fetches)
            if (Row::bytes(i) % 64 == 0)
#pragma GCC unroll 4
              for (int n = 0; n < N; n++)
                for (int64_t line = 0; line < Row::bytes(chunk); line += 64)
                  __builtin_prefetch(reinterpret_cast<const char*>(rows(n).at(i)) + ahead + line, 0, 2);
        };
        int64_t i = begin;
        for (; i + chunk <= end; i += chunk) {
          fetch(i);
          multiply_add<V, Dot, true>(x + i - begin, stride, rows, i, chunk, total);
        }
        if constexpr (chunk > group_size)
          if (i < end) {
            fetch(i);
            multiply_add<V, Dot, false>(x + i - begin, stride, rows, i, end - i, total);
          }
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

}  // namespace dami
