#include "calls.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <numeric>
#include <utility>

namespace dami {
namespace {

std::optional<Type> type_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: return Type::f32;
    case Dtype::bf16: return Type::bf16;
    case Dtype::f16: return Type::f16;
    default: return {};
  }
}

bool is_dense_vector(const Tensor& t, Dtype dtype, int64_t size) {
  return t.dtype == dtype && t.dims == 1 && t.size[0] == size && (t.stride[0] == 1 || size <= 1);
}

// The rows of x, all its leading dimensions together, where they lie equally far apart.
struct Flat {
  Matrix matrix;
  int64_t rows, columns;
};

std::optional<Flat> flat(const Tensor& x) {
  if (x.dims < 1) return {};
  const int last = x.dims - 1;
  int64_t rows = 1, stride = x.size[last];  // where there is one row, or none, it has no say
  for (int d = last - 1; d >= 0; d--) {
    if (x.size[d] == 1) continue;
    if (rows == 1) stride = x.stride[d];
    else if (x.stride[d] != stride * rows) return {};
    rows *= x.size[d];
  }
  if (x.size[last] > 1 && x.stride[last] != 1 && rows > 0) return {};
  return Flat{{x.data, stride}, rows, x.size[last]};
}

std::optional<Lams> lams_of(const LamArguments& from, int64_t rows) {
  const Tensor& lam = from.lam;
  if (lam.dtype != Dtype::f32 || lam.dims > 1 || (from.row_to_lam && from.rows_per_lam)) return {};
  const auto* data = static_cast<const float*>(lam.data);
  if (lam.dims == 0) {
    if (from.row_to_lam || from.rows_per_lam) return {};
    return Lams{data, 1, nullptr, std::max<int64_t>(rows, 1)};
  }
  const int64_t count = lam.size[0];
  if (count > 1 && lam.stride[0] != 1) return {};
  if (from.row_to_lam) {
    if (!is_dense_vector(*from.row_to_lam, Dtype::i32, rows)) return {};
    return Lams{data, count, static_cast<const int32_t*>(from.row_to_lam->data), 1};
  }
  const int64_t each = from.rows_per_lam.value_or(1);
  if (rows == 0 ? count * each != 0 : each < 1 || rows % each != 0 || rows / each != count) return {};
  return Lams{data, count, nullptr, std::max<int64_t>(each, 1)};
}

// Whether a stored tensor is [..., columns], lies dense along its last dimension and inside its storage.
bool is_stored(const Tensor& t, Dtype dtype, int dims, const int64_t* lead, int64_t columns) {
  if (t.dtype != dtype || t.dims != dims || t.size[dims - 1] != columns) return false;
  if (!std::equal(lead, lead + dims - 1, t.size)) return false;
  if (columns > 1 && t.stride[dims - 1] != 1) return false;
  int64_t last = 0;
  for (int d = 0; d < dims; d++) {
    if (t.size[d] == 0) return true;
    last += (t.size[d] - 1) * t.stride[d];
  }
  return (last + 1) * bytes_of(dtype) <= t.bytes;
}

// The matrices of a weight, or of a stack of them, and how far apart those of two experts lie.
struct Stack {
  Weight weight;
  int64_t base, base_scale, other, other_scale;  // bytes

  Weight at(int64_t expert) const {
    const auto moved = [&](Matrix matrix, int64_t bytes) -> Matrix {
      return {matrix.data ? static_cast<const char*>(matrix.data) + expert * bytes : nullptr, matrix.stride};
    };
    Weight w = weight;
    w.base.data = moved(w.base.data, base), w.base.scale = moved(w.base.scale, base_scale);
    w.other.data = moved(w.other.data, other), w.other.scale = moved(w.other.scale, other_scale);
    return w;
  }
};

std::optional<Stack> stack(const Tensor* tensors, const Format& format, Dtype dtype, int64_t columns) {
  const int dims = tensors[0].dims;
  const int64_t* lead = tensors[0].size;
  if (dims != 2 && dims != 3) return {};
  const int64_t groups = (columns + group_size - 1) / group_size;
  const auto read = [&](Dtype wanted, int64_t size, Matrix& matrix, int64_t& step) {
    const Tensor& t = *tensors++;
    if (!is_stored(t, wanted, dims, lead, size)) return false;
    matrix = {t.data, t.stride[dims - 2]};
    step = dims == 3 ? t.stride[0] * bytes_of(wanted) : 0;
    return true;
  };
  const auto stored = [&](Storage storage, Stored& to, int64_t& step, int64_t& scale_step) {
    to.storage = storage;
    switch (storage) {
      case Storage::dense: return read(dtype, columns, to.data, step);
      case Storage::int8: return read(Dtype::i8, groups * group_size, to.data, step) &&
                                 read(Dtype::bf16, groups, to.scale, scale_step);
      case Storage::int4: return read(Dtype::u8, groups * group_size / 2, to.data, step) &&
                                 read(Dtype::bf16, groups, to.scale, scale_step);
    }
    return false;
  };
  Stack result{};
  if (!stored(format.base, result.weight.base, result.base, result.base_scale)) return {};
  if (!stored(format.other, result.weight.other, result.other, result.other_scale)) return {};
  return result;
}

// A matrix [n, columns] as a weight of which only the base is taken.
std::optional<Stack> alone(const Tensor& t, Dtype dtype, int64_t columns) {
  if (t.dims != 2 || !is_stored(t, dtype, 2, t.size, columns)) return {};
  const Stored stored{Storage::dense, {t.data, t.stride[0]}, {}};
  return Stack{{stored, stored}, 0, 0, 0, 0};
}

// A pair of vectors [size], or of one for each of so many experts.
bool is_pair(const Tensor* ends, Dtype dtype, int dims, const int64_t* size) {
  return is_stored(ends[0], dtype, dims, size, size[dims - 1]) && is_stored(ends[1], dtype, dims, size, size[dims - 1]);
}

// The type of some tensors of four dimensions, dense along the last, that all are of one.
std::optional<Type> type_of_heads(std::initializer_list<const Tensor*> tensors) {
  const Dtype dtype = (*tensors.begin())->dtype;
  for (const Tensor* t : tensors)
    if (t->dtype != dtype || t->dims != 4 || (t->size[3] > 1 && t->stride[3] != 1)) return {};
  return type_of(dtype);
}

bool is(const Tensor& t, int64_t a, int64_t b, int64_t c, int64_t d) {
  return t.size[0] == a && t.size[1] == b && t.size[2] == c && t.size[3] == d;
}

}  // namespace

int64_t bytes_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::i64: return 8;
    case Dtype::f32: case Dtype::i32: return 4;
    case Dtype::bf16: case Dtype::f16: return 2;
    default: return 1;
  }
}

const Format* find_format(std::string_view name) {
  for (const Format& format : formats)
    if (name == format.name) return &format;
  return nullptr;
}

std::optional<LinearCall> linear_call(const Tensor& x, const Tensors& weights, const Tensors& biases,
                                      const LamArguments& lam, std::string_view name, int64_t columns) {
  const auto type = type_of(x.dtype);
  const auto rows = flat(x);
  const Format* format = name == low_rank ? nullptr : find_format(name);
  if (!type || !rows || !(format || name == low_rank) || rows->columns != columns) return {};
  const size_t each = format ? format->tensors() : 3, count = weights.size() / each;
  if (count == 0 || weights.size() % each || (!biases.empty() && biases.size() != 2 * count)) return {};
  const auto lams = lams_of(lam, rows->rows);
  if (!lams) return {};
  LinearCall call{{*type, rows->matrix, rows->rows, columns}, {}, *lams, {}, {}};
  call.weights.reserve(count);
  for (size_t i = 0; i < count; i++) {
    const Tensor* const tensors = &weights[i * each];
    const auto weight = format ? stack(tensors, *format, x.dtype, columns) : alone(tensors[0], x.dtype, columns);
    if (!weight || tensors[0].dims != 2) return {};
    const int64_t n = tensors[0].size[0];
    Pair bias{};
    if (!biases.empty()) {
      if (!is_pair(&biases[2 * i], x.dtype, 1, &n)) return {};
      bias = {{biases[2 * i].data, 1}, {biases[2 * i + 1].data, 1}};
    }
    call.weights.push_back({weight->weight, bias, {}, n, 0, rows->rows});
    if (format) continue;
    const Tensor &down = tensors[1], &up = tensors[2];
    const int64_t rank = down.dims == 2 ? down.size[0] : 0;
    const auto first = alone(down, x.dtype, columns), second = alone(up, x.dtype, rank);
    if (!first || !second || up.size[0] != n) return {};
    call.weights.back().part = Part::base_added;
    call.down.push_back({first->weight, {}, {}, rank, 0, rows->rows, Part::base});
    call.up.push_back({second->weight, {}, {}, n, 0, rows->rows, Part::base_times_lam});
  }
  return call;
}

int64_t LinearCall::outputs() const {
  return std::accumulate(weights.begin(), weights.end(), int64_t{0}, [](int64_t n, const Linear& w) { return n + w.n; });
}

void LinearCall::run(void* y, bool invariant, int threads) {
  auto* to = static_cast<char*>(y);
  for (Linear& weight : weights) {
    weight.y = {to, weight.n};
    to += input.rows * weight.n * (input.type == Type::f32 ? 4 : 2);
  }
  run(invariant, threads);
}

void LinearCall::run(bool invariant, int threads) {
  int64_t ranks = 0;
  for (const Linear& each : down) ranks += each.n;
  const int64_t item = input.type == Type::f32 ? 4 : 2;
  std::vector<char> memory(static_cast<size_t>(input.rows * ranks * item));
  char* low = memory.data();
  for (Linear& each : down) {
    each.y = {low, each.n};
    low += input.rows * each.n * item;
  }
  if (!down.empty()) linear(input, down, lams, invariant, threads);
  for (size_t i = 0; i < up.size(); i++) {
    up[i].y = weights[i].y;
    linear({input.type, down[i].y, input.rows, down[i].n}, {up[i]}, lams, invariant, threads);
  }
  linear(input, weights, lams, invariant, threads);
}

std::optional<ExpertsCall> experts_call(const Tensor& x, const Tensors& weight, const Tensors& bias,
                                        const LamArguments& lam, const Tensor& offsets, std::string_view name,
                                        int64_t columns) {
  const auto type = type_of(x.dtype);
  const auto rows = flat(x);
  const Format* format = find_format(name);
  if (!type || !rows || x.dims != 2 || !format || rows->columns != columns) return {};
  if (static_cast<int>(weight.size()) != format->tensors() || weight[0].dims != 3) return {};
  const int64_t experts = weight[0].size[0], outputs = weight[0].size[1];
  const auto lams = lams_of(lam, rows->rows);
  const auto stored = stack(weight.data(), *format, x.dtype, columns);
  if (!lams || !stored || !is_dense_vector(offsets, Dtype::i32, experts)) return {};
  if (!bias.empty() && (bias.size() != 2 || !is_pair(bias.data(), x.dtype, 2, weight[0].size))) return {};
  ExpertsCall call{{*type, rows->matrix, rows->rows, columns}, {}, *lams, static_cast<const int32_t*>(offsets.data),
                   outputs};
  call.experts.reserve(experts);
  const auto end = [&](size_t i, int64_t expert) -> Matrix {
    if (bias.empty()) return {};
    return {static_cast<const char*>(bias[i].data) + expert * bias[i].stride[0] * bytes_of(x.dtype), 1};
  };
  for (int64_t e = 0; e < experts; e++)
    call.experts.push_back({stored->at(e), {end(0, e), end(1, e)}, {}, outputs, 0, 0});
  return call;
}

void ExpertsCall::run(void* y, bool invariant, int threads) {
  if (experts.empty()) {
    std::memset(y, 0, static_cast<size_t>(input.rows * outputs * (input.type == Type::f32 ? 4 : 2)));
    return;
  }
  for (Linear& expert : experts) expert.y = {y, outputs};
  dami::experts(input, std::move(experts), offsets, lams, invariant, threads);
}

std::optional<EmbeddingCall> embedding_call(const Tensor& ids, const Tensors& weight, const LamArguments& lam,
                                            std::string_view name, Dtype dtype, int64_t columns) {
  const auto type = type_of(dtype);
  const Format* format = find_format(name);
  if (!type || !format || static_cast<int>(weight.size()) != format->tensors() || weight[0].dims != 2) return {};
  if (ids.dtype != Dtype::i64 && ids.dtype != Dtype::i32) return {};
  int64_t count = 1;
  for (int d = ids.dims - 1; d >= 0; d--) {
    if (ids.size[d] != 1 && ids.stride[d] != count) return {};
    count *= ids.size[d];
  }
  const auto lams = lams_of(lam, count);
  const auto stored = stack(weight.data(), *format, dtype, columns);
  if (!lams || !stored) return {};
  return EmbeddingCall{*type,   ids.data, ids.dtype == Dtype::i64, count, stored->weight, weight[0].size[0],
                       columns, *lams};
}

void EmbeddingCall::run(void* y, int threads) {
  embedding(type, ids, ids_are_64_bit, count, weight, vocabulary, columns, y, lams, threads);
}

std::optional<NormCall> rms_norm_call(const Tensor& x, const Tensors& weight, const LamArguments& lam, double eps,
                                      double offset) {
  auto call = layer_norm_call(x, weight, {}, lam, eps);
  if (call) call->centred = false, call->norm.offset = static_cast<float>(offset);
  return call;
}

std::optional<NormCall> layer_norm_call(const Tensor& x, const Tensors& weight, const Tensors& bias,
                                        const LamArguments& lam, double eps) {
  const auto type = type_of(x.dtype);
  const auto rows = flat(x);
  if (!type || !rows || weight.size() != 2 || (!bias.empty() && bias.size() != 2)) return {};
  const auto lams = lams_of(lam, rows->rows);
  if (!lams || !is_pair(weight.data(), x.dtype, 1, &rows->columns)) return {};
  if (!bias.empty() && !is_pair(bias.data(), x.dtype, 1, &rows->columns)) return {};
  const auto ends = [](const Tensors& pair) -> Pair {
    return pair.empty() ? Pair{} : Pair{{pair[0].data, 1}, {pair[1].data, 1}};
  };
  const Norm norm{*type, rows->matrix, ends(weight), ends(bias), nullptr, rows->columns, static_cast<float>(eps), 0};
  return NormCall{norm, rows->rows, *lams, true};
}

void NormCall::run(void* y, int threads) {
  norm.y = y;
  centred ? layer_norm(norm, rows, lams, threads) : rms_norm(norm, rows, lams, threads);
}

std::optional<AttentionCall> attention_call(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const Tensor& key_pages, const Tensor& value_pages, const Tensor& table,
                                            const Tensor& begins, const Tensor& key_begins, double scale, double softcap,
                                            const std::optional<Tensor>& sinks) {
  const auto type = type_of_heads({&query, &key, &value, &key_pages, &value_pages});
  if (!type) return {};
  const int64_t heads = query.size[1], tokens = query.size[2], size = query.size[3];
  const int64_t key_heads = key.size[1], value_size = value.size[3], page_size = key_pages.size[1];
  if (key_heads < 1 || heads < 1 || heads % key_heads || page_size < 1 || !is(query, 1, heads, tokens, size)) return {};
  if (!is(key, 1, key_heads, tokens, size) || !is(value, 1, key_heads, tokens, value_size)) return {};
  if (!is(key_pages, key_pages.size[0], page_size, key_heads, size)) return {};
  if (!is(value_pages, value_pages.size[0], page_size, key_heads, value_size)) return {};
  if (table.dtype != Dtype::i32 || table.dims != 2 || (table.size[1] > 1 && table.stride[1] != 1)) return {};
  const int64_t sequences = table.size[0];
  if (!is_dense_vector(begins, Dtype::i32, sequences + 1) || !is_dense_vector(key_begins, Dtype::i32, sequences + 1)) return {};
  if (sinks && (sinks->dtype != Dtype::f32 || sinks->dims != 2 || sinks->size[0] != tokens || sinks->size[1] != heads ||
                sinks->stride[0] != heads || sinks->stride[1] != 1))
    return {};
  const auto of_tokens = [](const Tensor& t) { return Heads{t.data, t.stride[2], t.stride[1]}; };
  const auto in_pages = [](const Tensor& t) { return Pages{t.data, t.size[0], t.stride[0], t.stride[1], t.stride[2]}; };
  return AttentionCall{{*type, of_tokens(query), of_tokens(key), of_tokens(value), in_pages(key_pages), in_pages(value_pages),
                        static_cast<const int32_t*>(table.data), table.stride[0], table.size[1],
                        static_cast<const int32_t*>(begins.data), static_cast<const int32_t*>(key_begins.data), sequences,
                        tokens, heads, key_heads, size, value_size, page_size, static_cast<float>(scale),
                        static_cast<float>(softcap), sinks ? static_cast<const float*>(sinks->data) : nullptr, nullptr, 0,
                        nullptr},
                       {}};
}

std::optional<AttentionCall> decode_attention_call(const Tensor& query, const Tensor& key, const Tensor& value,
                                                   const std::optional<Tensor>& mask, double scale) {
  const auto type = type_of_heads({&query, &key, &value});
  if (!type) return {};
  const int64_t batch = query.size[0], heads = query.size[1], key_heads = key.size[1], keys = key.size[2];
  if (key_heads < 1 || heads < 1 || heads % key_heads || keys < 1 || !is(query, batch, heads, 1, query.size[3])) return {};
  if (!is(key, batch, key_heads, keys, query.size[3]) || !is(value, batch, key_heads, keys, value.size[3])) return {};
  if (mask && (mask->dtype != Dtype::boolean || mask->dims != 4 || (keys > 1 && mask->stride[3] != 1) ||
               !(is(*mask, batch, 1, 1, keys) || is(*mask, 1, 1, 1, keys))))
    return {};
  const bool* const seen = mask ? static_cast<const bool*>(mask->data) : nullptr;
  const int64_t seen_stride = mask && mask->size[0] > 1 ? mask->stride[0] : 0;
  std::vector<int32_t> numbers(3 * batch + 2);  // begins, key_begins and table: each sequence has one page
  int32_t *const begins = numbers.data(), *const key_begins = begins + batch + 1, *const table = key_begins + batch + 1;
  for (int64_t i = 0; i < batch; i++) {
    int64_t count = keys;
    while (seen && count > 1 && !seen[i * seen_stride + count - 1]) count--;
    begins[i + 1] = static_cast<int32_t>(i + 1);
    key_begins[i + 1] = static_cast<int32_t>(key_begins[i] + count);
    table[i] = static_cast<int32_t>(i);
  }
  const auto pages = [](const Tensor& t) { return Pages{t.data, t.size[0], t.stride[0], t.stride[2], t.stride[1]}; };
  return AttentionCall{{*type, {query.data, query.stride[0], query.stride[1]}, {}, {}, pages(key), pages(value), table, 1, 1,
                        begins, key_begins, batch, batch, heads, key_heads, query.size[3], value.size[3], keys,
                        static_cast<float>(scale), 0, nullptr, seen, seen_stride, nullptr},
                       std::move(numbers)};
}

void AttentionCall::run(void* y, int threads) {
  attention.y = y;
  dami::attention(attention, threads);
}

}  // namespace dami
