// A call of an operator with torch's tensors, however they came here: by Python or by torch's dispatcher. What a kernel can
// take is decided by what the tensors are at this call, so that nothing is remembered that could be stale.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "../cpu/api.h"

namespace dami {

enum class Dtype { f32, bf16, f16, i8, u8, i32, i64, boolean, other };

int64_t bytes_of(Dtype);

// A tensor in the memory of the CPU; sizes and strides belong to torch.
struct Tensor {
  void* data = nullptr;
  Dtype dtype = Dtype::other;
  int dims = 0;
  const int64_t* size = nullptr;
  const int64_t* stride = nullptr;  // in elements
  int64_t bytes = 0;  // of its storage from `data` on; weights only
};
using Tensors = std::vector<Tensor>;

// Whether it has elements but no memory, as torch's zero tensors and those whose storage was given back.
inline bool is_without_memory(const Tensor& t) {
  for (int d = 0; d < t.dims; d++)
    if (t.size[d] == 0) return false;
  return t.data == nullptr;
}

// Which λ each row takes, as the operators are told: see dami_kernels/rows.py.
struct LamArguments {
  Tensor lam;
  std::optional<Tensor> row_to_lam;
  std::optional<int64_t> rows_per_lam;
};

// Whether kernels take calls past Python. Tests that put others in their places say no.
inline bool takes_calls = true;

// A call that is ready to run once its output is known, which is dense.
struct LinearCall {
  Input input;
  std::vector<Linear> weights;
  Lams lams;
  std::vector<Linear> down, up;  // of each weight, if their difference is stored as two factors
  int64_t outputs() const;  // of all weights
  void run(bool invariant, int threads);  // once every weight's y has a place
  void run(void* y, bool invariant, int threads);  // [rows, n] of each weight after that of the one before
};
struct ExpertsCall {
  Input input;
  std::vector<Linear> experts;
  Lams lams;
  const int32_t* offsets;
  int64_t outputs;
  void run(void* y, bool invariant, int threads);
};
struct EmbeddingCall {
  Type type;
  const void* ids;
  bool ids_are_64_bit;
  int64_t count;
  Weight weight;
  int64_t vocabulary, columns;
  Lams lams;
  void run(void* y, int threads);
};
struct NormCall {
  Norm norm;
  int64_t rows;
  Lams lams;
  bool centred;  // a layer norm
  void run(void* y, int threads);
};
struct AttentionCall {
  Attention attention;
  std::vector<int32_t> numbers;  // what `attention` reads, if that is not torch's
  void run(void* y, int threads);  // [tokens, heads, value_size]
};

// Each is nothing where the arguments are wrong or need a copy first: Python then says what is wrong, or copies.
// `weights` are the tensors of one weight after those of the other, `biases` of each a base and a target, or none.
std::optional<LinearCall> linear_call(const Tensor& x, const Tensors& weights, const Tensors& biases, const LamArguments&,
                                      std::string_view format, int64_t columns);
std::optional<ExpertsCall> experts_call(const Tensor& x, const Tensors& weight, const Tensors& bias, const LamArguments&,
                                        const Tensor& offsets, std::string_view format, int64_t columns);
std::optional<EmbeddingCall> embedding_call(const Tensor& ids, const Tensors& weight, const LamArguments&,
                                            std::string_view format, Dtype dtype, int64_t columns);
std::optional<NormCall> rms_norm_call(const Tensor& x, const Tensors& weight, const LamArguments&, double eps,
                                      double offset);
std::optional<NormCall> layer_norm_call(const Tensor& x, const Tensors& weight, const Tensors& bias, const LamArguments&,
                                        double eps);
// query, key and value are [1, heads, tokens, size], the pages [pages, tokens, key heads, size], table [sequences, ·].
std::optional<AttentionCall> attention_call(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const Tensor& key_pages, const Tensor& value_pages, const Tensor& table,
                                            const Tensor& begins, const Tensor& key_begins, double scale, double softcap,
                                            const std::optional<Tensor>& sinks);
// query is [batch, heads, 1, size], key and value [batch, key heads, keys, size], mask [batch or 1, 1, 1, keys].
std::optional<AttentionCall> decode_attention_call(const Tensor& query, const Tensor& key, const Tensor& value,
                                                   const std::optional<Tensor>& mask, double scale);

// The formats of dami_kernels.formats that the kernels read: how they store the base, and the other matrix.
struct Format {
  const char* name;
  Storage base, other;
  int tensors() const { return tensors_of(base) + tensors_of(other); }
  static int tensors_of(Storage storage) { return storage == Storage::dense ? 1 : 2; }
};
constexpr Format formats[] = {
    {"pair", Storage::dense, Storage::dense},
    {"int8", Storage::dense, Storage::int8},
    {"int4", Storage::dense, Storage::int4},
    {"w8d4", Storage::int8, Storage::int4},
};
const Format* find_format(std::string_view name);
constexpr const char* low_rank = "lowrank";  // base [N, K], down [R, K] and up [N, R]: `linear_call` reads it as well

}  // namespace dami
