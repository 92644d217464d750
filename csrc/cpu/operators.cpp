// The operators: which rows go together, what runs where. The arithmetic is in the kernels' headers.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>

#include "api.h"
#include "parallel.h"

namespace dami {
namespace {

// Below this much work for each thread, in bytes touched or operations done, waking another one costs more than it saves.
constexpr int64_t least_work = 32 * 1024;
constexpr int64_t attention_rows = 12;  // queries times heads that read keys together, unless the heads of one query are more
constexpr int64_t prepared_bytes = 32 << 20;  // the most that x, converted or padded, may take, but for single rows
constexpr int64_t kept_bytes = 32 << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// 64-byte aligned memory.
class Memory {
 public:
  Memory() = default;
  explicit Memory(int64_t bytes)
      : bytes_(round_up(std::max<int64_t>(bytes, 1), 64)), data_(std::aligned_alloc(64, static_cast<size_t>(bytes_))) {
    if (!data_) throw std::bad_alloc();
  }
  int64_t bytes() const { return bytes_; }
  char* data() const { return static_cast<char*>(data_.get()); }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  int64_t bytes_ = 0;
  std::unique_ptr<void, Free> data_;
};

// What this thread's calls need besides their results, for all workers. It is kept from call to call, as malloc tidies up
// before it gives away so much, and a small product would wait for that longer than it takes itself.
thread_local Memory kept_scratch, kept_x;

// Memory for one call: what is kept, or more, which is kept from then on unless it is much.
class Buffer {
 public:
  Buffer(Memory& kept, int64_t bytes) : kept_(kept) {
    if (kept.bytes() < bytes) kept = Memory(), kept = Memory(bytes);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (kept_.bytes() > kept_bytes) kept_ = Memory();
  }
  char* data() const { return kept_.data(); }

 private:
  Memory& kept_;
};

int64_t bytes_of(Type type) { return type == Type::f32 ? 4 : 2; }

const char* row_of(const Matrix& matrix, Type type, int64_t row) {
  return static_cast<const char*>(matrix.data) + row * matrix.stride * bytes_of(type);
}

bool has_codes(const Weight& weight) {
  return weight.base.storage != Storage::dense || weight.other.storage != Storage::dense;
}

int threads_for(int64_t work, int threads) {
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

// The rows [begin, end) of x by their λ, NaN last: rows of one λ then share a block.
std::vector<int64_t> by_lam(const Lams& lams, int64_t begin, int64_t end) {
  std::vector<int64_t> rows(end - begin);
  std::iota(rows.begin(), rows.end(), begin);
  const auto before = [&](int64_t a, int64_t b) {
    const float lam_a = lam_of(lams, a), lam_b = lam_of(lams, b);
    return lam_a < lam_b || (std::isnan(lam_b) && !std::isnan(lam_a));
  };
  if (!std::is_sorted(rows.begin(), rows.end(), before)) std::stable_sort(rows.begin(), rows.end(), before);
  return rows;
}

// Sorts rows of x, which lie by their λ, into groups, by what they take of `weight`.
Block block_of(const Isa& isa, Type type, const Lams& lams, const int64_t* first, const int64_t* end, const Linear& weight,
               bool invariant) {
  const bool has_target = weight.weight.other.storage == Storage::dense;  // λ = 1 needs no more than one matrix
  const auto of_type = static_cast<int>(type);
  Block block{};
  block.invariant = invariant;
  block.panel = end - first > max_stream_rows || invariant ? isa.panel[of_type] : 1;
  const auto add_group = [&](Mode mode, const int64_t* first, const int64_t* last) {
    const auto at = static_cast<int>(block.rows.size());
    block.groups.push_back({mode, at, at + static_cast<int>(last - first)});
    block.rows.insert(block.rows.end(), first, last);
    for (; first < last; first++) block.lam.push_back(lam_of(lams, *first));
    block.rows.resize(static_cast<size_t>(round_up(static_cast<int64_t>(block.rows.size()), block.panel)), -1);
    block.lam.resize(block.rows.size());
  };
  if (weight.part != Part::both) {
    add_group(Mode::base, first, end);
    return block;
  }
  // Runs of one λ that are worth a group of their own come first, the others share the last group.
  std::vector<int64_t> others;
  for (const int64_t *i = first, *j; i < end; i = j) {
    const float l = lam_of(lams, *i);
    for (j = i + 1; j < end && lam_of(lams, *j) == l;) j++;
    const Mode mode = l == 0 ? Mode::base : l == 1 && has_target ? Mode::other : Mode::blend;
    const int64_t count = j - i;
    const bool blends = !invariant && count >= isa.blend_rows[of_type];
    if (mode == Mode::blend ? blends : count >= isa.tile_rows[of_type] || count == end - first)
      add_group(mode, i, j);
    else
      others.insert(others.end(), i, j);
  }
  if (!others.empty()) add_group(Mode::both, others.data(), others.data() + others.size());
  return block;
}

// Runs f(row, λ of the row) for every row, each of `work` bytes.
template <class F>
void for_rows(int64_t rows, int64_t work, const Lams& lams, int threads, F f) {
  check(lams, rows);
  const int64_t at_once = std::max<int64_t>(1, least_work / 2 / std::max<int64_t>(work, 1));
  parallel_for(ceil_div(rows, at_once), threads_for(rows * work, threads), [&](int64_t task, int) {
    for (int64_t row = task * at_once; row < std::min(rows, (task + 1) * at_once); row++) f(row, lam_of(lams, row));
  });
}

// A block of rows and the weights [first, last) that take them: one, or all of them.
struct SharedBlock {
  Block block;
  size_t first, last;
};

struct Plan {
  std::vector<SharedBlock> blocks;
  int64_t work = 0;  // for threads_for
  int64_t outputs = 0;  // features of all weights, once for every block that takes them
};

// Cuts the rows of every weight into blocks of nearly equal height.
Plan plan_of(const Isa& isa, const Input& input, const std::vector<Linear>& weights, const Lams& lams, bool invariant) {
  Plan plan;
  for (size_t w = 0; w < weights.size(); w++) {
    const Linear& p = weights[w];
    const int64_t rows = p.end - p.begin, count = ceil_div(rows, isa.max_rows[static_cast<int>(input.type)]);
    plan.work += std::max(rows / 8, count) * p.n * input.k;  // few rows wait for each weight as long as for eight products
    plan.outputs += count * p.n;
    if (w > 0 && p.begin < weights[w - 1].end) {
      for (SharedBlock& shared : plan.blocks) shared.last = w + 1;
      continue;
    }
    const std::vector<int64_t> sorted = by_lam(lams, p.begin, p.end);
    for (int64_t i = 0; i < count; i++) {
      const int64_t *begin = sorted.data() + rows * i / count, *end = sorted.data() + rows * (i + 1) / count;
      plan.blocks.push_back({block_of(isa, input.type, lams, begin, end, p, invariant), w, w + 1});
    }
  }
  return plan;
}

// Some blocks of a plan whose rows are prepared together.
struct Blocks {
  SharedBlock *first, *last;
  SharedBlock* begin() const { return first; }
  SharedBlock* end() const { return last; }
};

// From `first` on, as many blocks as may be prepared at a time, but one at least.
Blocks blocks_at_once(SharedBlock* first, SharedBlock* end, int64_t x_stride) {
  SharedBlock* last = first;
  for (int64_t bytes = 0; last < end && (last == first || bytes < prepared_bytes); last++)
    bytes += static_cast<int64_t>(last->block.rows.size()) * x_stride;
  return {first, last};
}

int64_t rows_of(Blocks blocks) {
  int64_t rows = 0;
  for (const SharedBlock& shared : blocks) rows += static_cast<int64_t>(shared.block.rows.size());
  return rows;
}

// Writes the rows of x that blocks take to `x`, as the kernels read them, and says in the blocks where they are.
void prepare(const Isa& isa, const Input& input, bool codes, Blocks blocks, char* x, int64_t x_stride, int threads) {
  struct Panel {
    const Block* block;
    int64_t first;
  };
  std::vector<Panel> panels;
  for (SharedBlock& shared : blocks) {
    Block& block = shared.block;
    const auto count = static_cast<int64_t>(block.rows.size());
    for (int64_t first = 0; first < count; first += block.panel) panels.push_back({&block, first});
    block.x = x, block.x_stride = x_stride, block.k = input.k;
    x += count * x_stride;
  }
  const auto write = isa.prepare[static_cast<int>(input.type)];
  parallel_for(static_cast<int64_t>(panels.size()), threads_for(rows_of(blocks) * input.k, threads),
               [&](int64_t i, int) { write(input.x, codes, *panels[i].block, panels[i].first); });
}

// Some outputs of a weight for a block, from n on.
struct Task {
  const Linear* weight;
  const Block* block;
  int64_t n;
};

// All outputs of some blocks, `width` a task; tasks that read the same part of a weight follow each other.
std::vector<Task> tasks_of(Blocks blocks, const std::vector<Linear>& weights, int64_t width) {
  std::vector<Task> tasks;
  const SharedBlock *low = blocks.first, *high = blocks.first;
  for (size_t w = blocks.first->first; w < blocks.last[-1].last; w++) {
    while (low < blocks.last && low->last <= w) low++;
    while (high < blocks.last && high->first <= w) high++;
    for (int64_t n = 0; n < weights[w].n; n += width)
      for (const SharedBlock* shared = low; shared < high; shared++) tasks.push_back({&weights[w], &shared->block, n});
  }
  return tasks;
}

// Runs one of the norms, given its kernels by type.
void norm(void (*const (&kernels)[3])(const Norm&, int64_t row, float lam), const Norm& p, int64_t rows, const Lams& lams,
          int threads) {
  const auto kernel = kernels[static_cast<int>(p.type)];
  for_rows(rows, p.d * bytes_of(p.type), lams, threads, [&](int64_t row, float lam) { kernel(p, row, lam); });
}

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

void linear(const Input& input, const std::vector<Linear>& weights, const Lams& lams, bool invariant, int threads) {
  check(lams, input.rows);
  const Isa& isa = dami::isa();
  const int type = static_cast<int>(input.type);
  Plan plan = plan_of(isa, input, weights, lams, invariant);
  threads = threads_for(plan.work, threads);

  const bool codes = std::any_of(weights.begin(), weights.end(), [](const Linear& p) { return has_codes(p.weight); });
  // Rows that lie a multiple of 4 KiB apart would displace each other from L1.
  int64_t x_stride = round_up(isa.x_bytes[type](input.k, codes), 64);
  if (x_stride % 4096 == 0) x_stride += 2048;
  // Wide tasks read x less often, but leave fewer of them to balance.
  const int64_t width = std::clamp<int64_t>(plan.outputs / (threads * 8) / 16 * 16, 16, isa.max_outputs[type]);

  int64_t rows = 0;
  for (const SharedBlock& shared : plan.blocks) rows = std::max(rows, static_cast<int64_t>(shared.block.rows.size()));
  const int64_t scratch_bytes = round_up(isa.linear_scratch[type](rows, width), 64);
  const Buffer scratch(kept_scratch, scratch_bytes * threads);

  SharedBlock* const end = plan.blocks.data() + plan.blocks.size();
  for (Blocks blocks{plan.blocks.data(), plan.blocks.data()}; blocks.last < end;) {
    blocks = blocks_at_once(blocks.last, end, x_stride);
    const Buffer x(kept_x, rows_of(blocks) * x_stride);
    prepare(isa, input, codes, blocks, x.data(), x_stride, threads);
    const std::vector<Task> tasks = tasks_of(blocks, weights, width);
    parallel_for(static_cast<int64_t>(tasks.size()), threads, [&](int64_t i, int worker) {
      const Task& task = tasks[i];
      isa.linear[type](*task.weight, *task.block, task.n, std::min(task.weight->n, task.n + width),
                       scratch.data() + worker * scratch_bytes);
    });
  }
}

void experts(const Input& input, std::vector<Linear> weights, const int32_t* offsets, const Lams& lams, bool invariant,
             int threads) {
  int64_t begin = 0;
  for (size_t e = 0; e < weights.size(); e++) {
    if (offsets[e] < begin || offsets[e] > input.rows) {
      std::string all;
      for (size_t i = 0; i < weights.size(); i++) all += (i ? ", " : "") + std::to_string(offsets[i]);
      throw std::out_of_range("expert_offsets must not decrease and end within " + std::to_string(input.rows) +
                              " rows, got [" + all + "]");
    }
    weights[e].begin = begin;
    begin = weights[e].end = offsets[e];
  }
  if (weights.empty()) return;
  const Linear& first = weights[0];
  for (int64_t row = begin; row < input.rows; row++)
    std::memset(const_cast<char*>(row_of(first.y, input.type, row)), 0, static_cast<size_t>(first.n * bytes_of(input.type)));
  linear(input, weights, lams, invariant, threads);
}

void rms_norm(const Norm& p, int64_t rows, const Lams& lams, int threads) {
  norm(isa().rms_norm, p, rows, lams, threads);
}

void layer_norm(const Norm& p, int64_t rows, const Lams& lams, int threads) {
  norm(isa().layer_norm, p, rows, lams, threads);
}

void embedding(Type type, const void* ids, bool ids_are_64_bit, int64_t count, const Weight& weight, int64_t vocabulary,
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
    isa.embedding[static_cast<int>(type)](weight, id_of(row), lam, static_cast<char*>(y) + row * d * bytes_of(type), d);
  });
}

namespace {

// std::out_of_range unless every sequence's tokens and pages are there.
void check(const Attention& p) {
  const int64_t pages = std::min(p.keys.count, p.values.count);
  for (int64_t s = 0; s < p.sequences; s++) {
    const int64_t queries = p.begins[s + 1] - p.begins[s], keys = p.key_begins[s + 1] - p.key_begins[s];
    if (queries < 0 || keys < queries || ceil_div(keys, p.page_size) > p.table_columns)
      throw std::out_of_range("a sequence must have as many keys as queries at least, and pages for all of them, got " +
                              std::to_string(queries) + " queries, " + std::to_string(keys) + " keys and " +
                              std::to_string(p.table_columns) + " pages of " + std::to_string(p.page_size));
    for (int64_t i = 0; i < ceil_div(keys, p.page_size); i++)
      if (const int32_t page = p.table[s * p.table_stride + i]; page < 0 || page >= pages)
        throw std::out_of_range("table must be in [0, " + std::to_string(pages) + "), got " + std::to_string(page));
  }
  if (p.sequences > 0 && (p.begins[0] != 0 || p.begins[p.sequences] != p.tokens))
    throw std::out_of_range("begins must be from 0 to " + std::to_string(p.tokens) + ", got " +
                            std::to_string(p.begins[0]) + " to " + std::to_string(p.begins[p.sequences]));
}

// Writes keys or values of new tokens to their pages.
void write(const Attention& p, const Heads& from, const Pages& to, int64_t size) {
  const int64_t item = bytes_of(p.type);
  for (int64_t s = 0; s < p.sequences; s++)
    for (int64_t token = p.begins[s]; token < p.begins[s + 1]; token++) {
      const int64_t place = seen(p, s, token) - 1, page = p.table[s * p.table_stride + place / p.page_size];
      const int64_t row = page * to.page_stride + place % p.page_size * to.token_stride;
      for (int64_t head = 0; head < p.key_heads; head++)
        std::memcpy(static_cast<char*>(to.data) + (row + head * to.head_stride) * item,
                    static_cast<const char*>(from.data) + (token * from.token_stride + head * from.head_stride) * item,
                    static_cast<size_t>(size * item));
    }
}

}  // namespace

void attention(const Attention& p, int threads) {
  check(p);
  if (p.key.data) write(p, p.key, p.keys, p.size);
  if (p.value.data) write(p, p.value, p.values, p.value_size);
  const int64_t group = p.heads / p.key_heads, at_once = std::max<int64_t>(1, attention_rows / group);
  std::vector<Queries> tasks;
  int64_t most = 0, work = 0;
  for (int64_t s = 0; s < p.sequences; s++) {
    for (int64_t first = p.begins[s]; first < p.begins[s + 1]; first += at_once)
      for (int64_t head = 0; head < p.key_heads; head++)
        tasks.push_back({s, first, std::min<int64_t>(at_once, p.begins[s + 1] - first), head});
    const int64_t keys = p.key_begins[s + 1] - p.key_begins[s];
    most = std::max(most, keys);
    work += (p.begins[s + 1] - p.begins[s]) * keys * p.heads * (p.size + p.value_size) / 8;
  }
  threads = threads_for(work, threads);
  const int64_t floats = attention_scratch(at_once * group, most, p.size, p.value_size);
  const Buffer scratch(kept_scratch, floats * threads * static_cast<int64_t>(sizeof(float)));
  const auto kernel = isa().attention[static_cast<int>(p.type)];
  parallel_for(static_cast<int64_t>(tasks.size()), threads, [&](int64_t i, int worker) {
    kernel(p, tasks[i], reinterpret_cast<float*>(scratch.data()) + worker * floats);
  });
}

double peak_flops(Type type, int threads) {
  const Isa& isa = dami::isa();
  const int64_t steps = 1 << 20;
  const int64_t tasks = threads * 8;
  double best = 0;
  for (int repeat = 0; repeat < 5; repeat++) {
    double flops_per_step = 0;
    const double start = seconds();
    parallel_for(tasks, threads, [&](int64_t task, int) {
      const double flops = isa.multiply_add[static_cast<int>(type)](steps);
      if (task == 0) flops_per_step = flops;
    });
    best = std::max(best, flops_per_step * steps * static_cast<double>(tasks) / (seconds() - start));
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
