// The operators: which rows go together, what runs where. The arithmetic is in kernels.h.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <stdexcept>

#include "api.h"
#include "parallel.h"

namespace dami {
namespace {

// Below this much work for each thread, in bytes touched or operations done, waking another one costs more than it saves.
constexpr int64_t least_work = 32 * 1024;
constexpr int64_t prepared_bytes = 32 << 20;  // the most that x, converted or padded, may take, but for single rows

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Buffer = std::unique_ptr<void, Free>;

Buffer allocate(int64_t bytes) {
  void* memory = std::aligned_alloc(64, static_cast<size_t>((std::max<int64_t>(bytes, 1) + 63) / 64 * 64));
  if (!memory) throw std::bad_alloc();
  return Buffer(memory);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

int64_t bytes_of(Type type) { return type == Type::f32 ? 4 : 2; }

const char* row_of(const Matrix& matrix, Type type, int64_t row) {
  return static_cast<const char*>(matrix.data) + row * matrix.stride * bytes_of(type);
}

int worth(int64_t work, int threads) {
  return static_cast<int>(std::clamp<int64_t>(work / least_work, 1, threads));
}

void check(const Lams& lams, int64_t rows) {
  if (!lams.row_to_lam) return;
  for (int64_t i = 0; i < rows; i++)
    if (lams.row_to_lam[i] < 0 || lams.row_to_lam[i] >= lams.count)
      throw std::out_of_range("row_to_lam must be in [0, " + std::to_string(lams.count) + "), got " +
                              std::to_string(lams.row_to_lam[i]));
}

float lam_of(const Lams& lams, int64_t row) {
  return lams.lam[lams.row_to_lam ? lams.row_to_lam[row] : row / lams.rows_per_lam];
}

// Sorts rows [begin, end) of x into groups.
Block block_of(const Linear& p, const Lams& lams, int64_t begin, int64_t end, const char* prepared, int64_t prepared_stride,
               const Isa& isa) {
  std::vector<float> lam(end - begin);
  std::vector<int> order(end - begin);
  for (int64_t i = begin; i < end; i++) lam[i - begin] = lam_of(lams, i);
  std::iota(order.begin(), order.end(), 0);
  if (std::any_of(lam.begin(), lam.end(), [&](float l) { return l != lam[0]; }))
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return lam[a] < lam[b] || (std::isnan(lam[b]) && !std::isnan(lam[a])); });

  // Runs of one λ that are worth a group of their own come first, the others share the last group.
  std::vector<Group> groups;
  std::vector<int> sorted, others;
  const int rows = static_cast<int>(order.size());
  for (int i = 0, j; i < rows; i = j) {
    for (j = i + 1; j < rows && lam[order[j]] == lam[order[i]];) j++;
    const float l = lam[order[i]];
    const Mode mode = l == 0 ? Mode::base : l == 1 ? Mode::target : Mode::blend;
    const int count = j - i;
    const bool blends = rows >= stream_rows && count >= isa.blend_rows[static_cast<int>(p.type)];
    if (mode == Mode::blend ? blends : count >= isa.tile_rows || count == rows) {
      groups.push_back({mode, static_cast<int>(sorted.size()), static_cast<int>(sorted.size()) + count});
      sorted.insert(sorted.end(), order.begin() + i, order.begin() + j);
    } else {
      others.insert(others.end(), order.begin() + i, order.begin() + j);
    }
  }
  if (!others.empty()) groups.push_back({Mode::both, static_cast<int>(sorted.size()), rows});
  sorted.insert(sorted.end(), others.begin(), others.end());

  Block block;
  block.groups = std::move(groups);
  for (int i : sorted) {
    block.x.push_back(prepared ? prepared + i * prepared_stride : row_of(p.x, p.type, begin + i));
    block.y.push_back(static_cast<char*>(p.y) + (begin + i) * p.n * bytes_of(p.type));
    block.lam.push_back(lam[i]);
  }
  return block;
}

// Runs f(row, λ of the row) for every row, each of `work` bytes.
template <class F>
void for_rows(int64_t rows, int64_t work, const Lams& lams, int threads, F f) {
  check(lams, rows);
  const int64_t at_once = std::max<int64_t>(1, least_work / 2 / std::max<int64_t>(work, 1));
  parallel_for(ceil_div(rows, at_once), worth(rows * work, threads), [&](int64_t task, int) {
    for (int64_t row = task * at_once; row < std::min(rows, (task + 1) * at_once); row++) f(row, lam_of(lams, row));
  });
}

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

void linear(const Linear& p, const Lams& lams, int threads) {
  check(lams, p.m);
  if (p.m == 0 || p.n == 0) return;
  const Isa& isa = dami::isa();
  const int type = static_cast<int>(p.type);
  threads = worth(p.m * p.n * p.k / 8, threads);

  // As many rows at a time as may be prepared, in blocks of nearly equal height.
  const int64_t x_bytes = round_up(p.k, x_multiple) * isa.x_size[type];
  const bool prepare = x_bytes != p.k * bytes_of(p.type);
  const int64_t at_once = prepare ? std::min(p.m, std::max(max_rows, prepared_bytes / std::max<int64_t>(x_bytes, 1))) : p.m;
  const Buffer prepared = prepare ? allocate(at_once * x_bytes) : nullptr;
  char* const x = static_cast<char*>(prepared.get());
  const int64_t scratch_bytes = linear_scratch(std::min(p.m, max_rows));
  const Buffer scratch = allocate(scratch_bytes * threads);

  for (int64_t first = 0; first < p.m; first += at_once) {
    const int64_t rows = std::min(at_once, p.m - first);
    if (prepare)
      parallel_for(rows, worth(rows * p.k, threads), [&](int64_t row, int) {
        isa.prepare_x[type](row_of(p.x, p.type, first + row), p.k, x + row * x_bytes);
      });
    std::vector<Block> blocks;
    const int64_t count = ceil_div(rows, max_rows);
    for (int64_t i = 0; i < count; i++) {
      const int64_t begin = rows * i / count, end = rows * (i + 1) / count;
      blocks.push_back(block_of(p, lams, first + begin, first + end, prepare ? x + begin * x_bytes : nullptr, x_bytes, isa));
    }
    // Wide tiles read x less often, but leave fewer tasks to balance.
    const int64_t tile = std::clamp<int64_t>(ceil_div(p.n * count, threads * 8) / 16 * 16, 16, max_outputs);
    const int64_t tiles = ceil_div(p.n, tile);
    parallel_for(tiles * count, threads, [&](int64_t task, int worker) {
      const int64_t n0 = task / count * tile;
      isa.linear[type](p, blocks[task % count], n0, std::min(p.n, n0 + tile),
                       static_cast<char*>(scratch.get()) + worker * scratch_bytes);
    });
  }
}

void rms_norm(const Norm& p, int64_t rows, const Lams& lams, int threads) {
  const Isa& isa = dami::isa();
  for_rows(rows, p.d * bytes_of(p.type), lams, threads,
           [&](int64_t row, float lam) { isa.rms_norm[static_cast<int>(p.type)](p, row, lam); });
}

void layer_norm(const Norm& p, int64_t rows, const Lams& lams, int threads) {
  const Isa& isa = dami::isa();
  for_rows(rows, p.d * bytes_of(p.type), lams, threads,
           [&](int64_t row, float lam) { isa.layer_norm[static_cast<int>(p.type)](p, row, lam); });
}

void embedding(Type type, const void* ids, bool ids_are_64_bit, int64_t count, const Pair& weight, int64_t vocabulary,
               int64_t d, void* y, const Lams& lams, int threads) {
  const Isa& isa = dami::isa();
  const auto id_of = [&](int64_t row) {
    return ids_are_64_bit ? static_cast<const int64_t*>(ids)[row] : static_cast<const int32_t*>(ids)[row];
  };
  for (int64_t row = 0; row < count; row++)
    if (id_of(row) < 0 || id_of(row) >= vocabulary)
      throw std::out_of_range("ids must be in [0, " + std::to_string(vocabulary) + "), got " +
                              std::to_string(id_of(row)));
  for_rows(count, d * bytes_of(type), lams, threads, [&](int64_t row, float lam) {
    isa.embedding[static_cast<int>(type)](row_of(weight.base, type, id_of(row)), row_of(weight.target, type, id_of(row)),
                                          lam, static_cast<char*>(y) + row * d * bytes_of(type), d);
  });
}

double peak_flops(Type type, int threads) {
  const Isa& isa = dami::isa();
  const int64_t steps = 1 << 20;
  const int64_t tasks = threads * 8;
  double best = 0;
  for (int repeat = 0; repeat < 5; repeat++) {
    double each = 0;
    const double start = seconds();
    parallel_for(tasks, threads, [&](int64_t task, int) {
      const double flops = isa.multiply_add[static_cast<int>(type)](steps);
      if (task == 0) each = flops;
    });
    best = std::max(best, each * steps * static_cast<double>(tasks) / (seconds() - start));
  }
  return best;
}

double read_bandwidth(const void* data, int64_t bytes, int threads) {
  const Isa& isa = dami::isa();
  const int64_t chunk = 256 * 1024, tasks = bytes / chunk;
  double best = 0;
  for (int repeat = 0; repeat < 5; repeat++) {
    const double start = seconds();
    parallel_for(tasks, threads,
                 [&](int64_t task, int) { isa.read(static_cast<const char*>(data) + task * chunk, chunk); });
    best = std::max(best, static_cast<double>(tasks * chunk) / (seconds() - start));
  }
  return best;
}

}  // namespace dami
