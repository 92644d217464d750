// In which pieces `linear` takes a weight, and how the next one is fetched meanwhile.
#pragma once

#include <algorithm>

#include "api.h"

namespace dami {

// Rows of a weight from n on, of which those from `end` on are not there; columns [k, k + count).
struct Piece {
  int64_t n, end, k, count;
  int64_t row(int64_t i) const { return std::min(n + i, end - 1); }
  int64_t padded() const { return (count + group_size - 1) / group_size * group_size; }
};

// Sums are added up in blocks along K, of `block` columns each; but a last one of fewer than `tail` is part of the one before.
struct Blocking {
  int64_t block, tail;
  // Where `columns`, a number of blocks, that begin at `begin` end, if there are k.
  int64_t end(int64_t begin, int64_t columns, int64_t k) const {
    return k - begin - columns < tail ? k : begin + columns;
  }
  // Where the last block of so many columns begins.
  int64_t last(int64_t columns) const { return (columns - std::max<int64_t>(tail, 1)) / block * block; }
};

// How outputs are cut into pieces: so many rows, and up to so many columns, a number of blocks; first all rows of the first
// `columns`, then all rows of the next.
struct Cut {
  Blocking blocks;
  int64_t rows, most, columns;
};

// Calls f(piece, the next one) for all pieces of the outputs [n0, n1) of n. After the last one comes the first of the outputs
// from n1 on, which the same thread mostly takes next.
template <class F>
void for_pieces(const Cut& cut, int64_t n0, int64_t n1, int64_t of, int64_t k, F f) {
  const auto at = [&](int64_t n, int64_t begin) {
    int64_t count = cut.blocks.end(begin, cut.most, k) - begin;
    // What ends within a group is converted, which has room for a block.
    if (count % group_size)
      if (const int64_t last = cut.blocks.last(count); last > 0) count = last;
    return Piece{n, n1, begin, count};
  };
  for (int64_t begin = 0, end; begin < k; begin = end) {
    end = cut.blocks.end(begin, cut.columns, k);
    for (int64_t n = n0; n < n1; n += cut.rows)
      for (Piece piece = at(n, begin), next; piece.n == n; piece = next) {
        const int64_t after = piece.k + piece.count;
        next = after < end           ? at(n, after)
               : n + cut.rows < n1   ? at(n + cut.rows, begin)
               : end < k             ? at(n0, end)
               : n1 < of             ? Piece{n1, of, 0, cut.blocks.end(0, cut.most, k)}
                                     : at(n, begin);
        f(piece, next);
        if (after >= end) break;
      }
  }
}

// Fetches `bytes` of each of some rows, `stride` apart, while tiles are multiplied: in so many steps, a few lines in each. A
// core waits for some twenty lines at a time, and the tiles need lines, too.
template <int rows>
class Prefetch {
 public:
  Prefetch(const char* data, int64_t stride, int64_t bytes) : data(data), stride(stride), lines((bytes + 63) / 64 * rows) {}
  // As many lines in each of so many steps: the processor predicts a number that stays the same.
  void spread(int64_t steps) { rate = (lines - line + steps - 1) / steps; }
  inline __attribute__((always_inline)) void step() {  // as of all instruction sets' copies the linker would keep one
    for (const int64_t end = std::min(lines, line + rate); line < end; line++)
      __builtin_prefetch(data + line % rows * stride + line / rows * 64, 0, 2);
  }

  const char* const data;  // where the first row begins

 private:
  int64_t stride, lines, line = 0, rate = 0;
};

// Of a piece of a matrix, `item` bytes a number if it is dense. Fetches its scales at once: without them nothing begins.
template <int rows>
static Prefetch<rows> prefetch_of(const Stored& stored, const Piece& piece, int64_t item) {
  const bool dense = stored.storage == Storage::dense;
  const int64_t bits = dense ? 8 * item : stored.storage == Storage::int8 ? 8 : 4;
  const int64_t stride = stored.data.stride * (dense ? item : 1);
  for (int i = 0; i < rows && !dense; i++) {
    const auto* scales = static_cast<const bf16*>(stored.scale.data) + piece.row(i) * stored.scale.stride;
    for (int64_t k = piece.k; k < piece.k + piece.count; k += group_size * 64 / static_cast<int64_t>(sizeof(bf16)))
      __builtin_prefetch(scales + k / group_size, 0, 2);
  }
  const char* const data = static_cast<const char*>(stored.data.data);
  return {data + piece.n * stride + piece.k * bits / 8, stride, piece.count * bits / 8};
}

}  // namespace dami
