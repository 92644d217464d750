// `attention`: some queries of a sequence over its keys and values, which lie in pages.
#pragma once

#include <algorithm>
#include <cstring>

#include "norms.h"

namespace dami {

// eˣ for x ≤ 0, to 2 units in the last place; compilers make vectors of a loop over it.
static inline float exp_of(float x) {
  const float shifted = x * 1.44269504f + 0x1.8p23f;  // the whole part of x / ln 2 is in its low bits
  const float whole = shifted - 0x1.8p23f;
  const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts, the first of few bits
  float sum = 1.9875691500e-4f;
  for (float coefficient : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    sum = sum * r + coefficient;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : (sum * (r * r) + r + 1) * power;
}

static inline float max_of(const float* x, int64_t n, float least) {
  float lanes[16];
  for (float& lane : lanes) lane = least;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int lane = 0; lane < 16; lane++) lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
  for (; i < n; i++) lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
  for (float lane : lanes) least = lane > least ? lane : least;
  return least;
}

// The products of M rows of queries with four keys, of which `count` are wanted.
template <class V, class T, int M>
void multiply_keys(const float* queries, int64_t stride, const T* const* keys, int64_t size, int64_t count, float* scores,
                   int64_t scores_stride) {
  V total[M][4];
  for (auto& row : total)
    for (V& sum : row) sum = V::zero();
  for (int64_t i = 0; i < size; i += V::W)
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) {
      const V key = load<V>(keys[n] + i, size - i);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) total[m][n] = fma(V::load(queries + m * stride + i), key, total[m][n]);
    }
  for (int m = 0; m < M; m++) {
    float sums[4] = {};
    sum4(total[m][0], total[m][1], total[m][2], total[m][3], sums);
    std::memcpy(scores + m * scores_stride, sums, static_cast<size_t>(count) * sizeof(float));
  }
}

// Adds the products of M rows of weights with `count` values to M rows of sums.
template <class V, class T, int M>
void add_values(const float* weights, int64_t weights_stride, const T* values, int64_t stride, int64_t count, int64_t size,
                float* sums, int64_t sums_stride) {
  for (int64_t i = 0; i < size; i += 4 * V::W) {
    const int vectors = static_cast<int>(std::min<int64_t>(4, (size - i + V::W - 1) / V::W));
    V total[M][4];
    for (int m = 0; m < M; m++)
      for (int n = 0; n < 4; n++) total[m][n] = V::load(sums + m * sums_stride + i + n * V::W);
    for (int64_t j = 0; j < count; j++)
#pragma GCC unroll 4
      for (int n = 0; n < 4; n++) {
        if (n >= vectors) break;
        const V value = load<V>(values + j * stride + i + n * V::W, size - i - n * V::W);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) total[m][n] = fma(V::set1(weights[m * weights_stride + j]), value, total[m][n]);
      }
    for (int m = 0; m < M; m++)
      for (int n = 0; n < 4; n++) total[m][n].store(sums + m * sums_stride + i + n * V::W);
  }
}

template <class V, class T>
struct AttentionKernel {
  static constexpr decltype(&multiply_keys<V, T, 1>) multiply[] = {multiply_keys<V, T, 1>, multiply_keys<V, T, 2>,
                                                                   multiply_keys<V, T, 3>, multiply_keys<V, T, 4>,
                                                                   multiply_keys<V, T, 5>, multiply_keys<V, T, 6>};
  static constexpr decltype(&add_values<V, T, 1>) add[] = {add_values<V, T, 1>, add_values<V, T, 2>, add_values<V, T, 3>,
                                                           add_values<V, T, 4>, add_values<V, T, 5>, add_values<V, T, 6>};

  // Where a key or value head of a sequence lies in a page.
  static const T* in_page(const Attention& p, const Pages& pages, const Queries& at, int64_t page) {
    const int64_t number = p.table[at.sequence * p.table_stride + page];
    return static_cast<const T*>(pages.data) + number * pages.page_stride + at.key_head * pages.head_stride;
  }

  // A row is a query of one of the heads that share the key head; those of one query follow each other.
  static void run(const Attention& p, const Queries& at, float* memory) {
    const int64_t heads = p.heads / p.key_heads, rows = at.count * heads;
    const int64_t query_stride = padded_query(p.size), sums_stride = padded_sums(p.value_size);
    const int64_t keys = dami::seen(p, at.sequence, at.first + at.count - 1), pages = (keys + p.page_size - 1) / p.page_size;
    float *const queries = memory, *const scores = queries + rows * query_stride, *const sums = scores + rows * keys,
                *const totals = sums + rows * sums_stride;

    for (int64_t row = 0; row < rows; row++) {
      const T* from = static_cast<const T*>(p.query.data) + (at.first + row / heads) * p.query.token_stride +
                      (at.key_head * heads + row % heads) * p.query.head_stride;
      float* to = queries + row * query_stride;
      for (int64_t i = 0; i < query_stride; i += V::W)
        (i < p.size ? load<V>(from + i, p.size - i) * V::set1(p.scale) : V::zero()).store(to + i);
    }
    for (int64_t page = 0; page < pages; page++) {
      const T* const first = in_page(p, p.keys, at, page);
      const int64_t begin = page * p.page_size, count = std::min(p.page_size, keys - begin);
      for (int64_t j = 0; j < count; j += 4) {
        const T* of[4];
        for (int64_t n = 0; n < 4; n++) of[n] = first + std::min(j + n, count - 1) * p.keys.token_stride;
        for (int64_t row = 0; row < rows; row += V::tile_m)
          multiply[std::min<int64_t>(V::tile_m, rows - row) - 1](queries + row * query_stride, query_stride, of, p.size,
                                                                 std::min<int64_t>(4, count - j),
                                                                 scores + row * keys + begin + j, keys);
      }
    }
    std::memset(sums, 0, static_cast<size_t>(rows * sums_stride) * sizeof(float));
    for (int64_t row = 0; row < rows; row++) totals[row] = weigh(p, at, row, scores + row * keys);
    for (int64_t page = 0; page < pages; page++) {
      const T* const first = in_page(p, p.values, at, page);
      const int64_t begin = page * p.page_size;
      const auto add_rows = [&](int64_t row, int64_t height, int64_t from, int64_t to) {
        if (from < to)
          add[height - 1](scores + row * keys + from, keys, first + (from - begin) * p.values.token_stride,
                          p.values.token_stride, to - from, p.value_size, sums + row * sums_stride, sums_stride);
      };
      for (int64_t row = 0; row < rows; row += V::tile_m) {
        const int64_t height = std::min<int64_t>(V::tile_m, rows - row), end = begin + p.page_size;
        const int64_t by_all = std::min(end, seen(p, at, row));
        add_rows(row, height, begin, by_all);  // what follows, only later queries see
        for (int64_t later = row + 1; later < row + height; later++)
          add_rows(later, 1, std::max(begin, by_all), std::min(end, seen(p, at, later)));
      }
    }
    for (int64_t row = 0; row < rows; row++) {
      T* to = static_cast<T*>(p.y) + ((at.first + row / heads) * p.heads + at.key_head * heads + row % heads) * p.value_size;
      for (int64_t i = 0; i < p.value_size; i += V::W)
        store(totals[row] == 0 ? V::zero() : V::load(sums + row * sums_stride + i) * V::set1(1 / totals[row]), to + i, p.value_size - i);
    }
  }

  static int64_t seen(const Attention& p, const Queries& at, int64_t row) {
    return dami::seen(p, at.sequence, at.first + row / (p.heads / p.key_heads));
  }

  // Makes weights of the scores of a row, and returns their sum; 0 if it sees no key.
  static float weigh(const Attention& p, const Queries& at, int64_t row, float* scores) {
    const int64_t heads = p.heads / p.key_heads, n = seen(p, at, row);
    if (p.softcap > 0)
      for (int64_t j = 0; j < n; j++) scores[j] = p.softcap * __builtin_tanhf(scores[j] / p.softcap);
    if (const bool* mask = p.mask ? p.mask + (at.first + row / heads) * p.mask_stride : nullptr)
      for (int64_t j = 0; j < n; j++) scores[j] = mask[j] ? scores[j] : -__builtin_inff();
    const float* sink = p.sinks ? p.sinks + (at.first + row / heads) * p.heads + at.key_head * heads + row % heads : nullptr;
    const float most = max_of(scores, n, sink ? *sink : -__builtin_inff());
    if (most == -__builtin_inff()) return std::fill_n(scores, n, 0.0f), 0;
    for (int64_t j = 0; j < n; j++) scores[j] = exp_of(scores[j] - most);
    return row_sum<V>(scores, n, [](V v, int64_t) { return v; }) + (sink ? exp_of(*sink - most) : 0);
  }
};

template <class V, class T>
void attention(const Attention& p, const Queries& at, float* memory) {
  AttentionKernel<V, T>::run(p, at, memory);
}

}  // namespace dami
