// Every kernel of every instruction set of this machine against double precision, on operands that end where their memory
// ends. test_native_code.py builds it with sanitizers, and for ARM. Prints what is wrong; exits with how much.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "../../csrc/cpu/api.h"

using namespace dami;

namespace {

std::mt19937 generator(0);
int failures = 0;

double normal() { return std::normal_distribution<double>()(generator); }

// A float rounded to `bits` of mantissa, so that it is a number of the type.
float rounded(Type type, double value) {
  const double bits = type == Type::f32 ? 24 : type == Type::bf16 ? 8 : 11;
  if (value == 0) return 0;
  const double unit = std::exp2(std::floor(std::log2(std::fabs(value))) + 1 - bits);
  return static_cast<float>(std::nearbyint(value / unit) * unit);
}

struct Array {
  Type type;
  std::vector<double> values;
  std::vector<unsigned char> bytes;

  Array(Type type, size_t size, double scale) : type(type), values(size), bytes(size * (type == Type::f32 ? 4 : 2)) {
    for (size_t i = 0; i < size; i++) {
      const float value = rounded(type, scale * normal());
      values[i] = value;
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      if (type == Type::f32) std::memcpy(&bytes[4 * i], &bits, 4);
      if (type == Type::bf16) std::memcpy(&bytes[2 * i], reinterpret_cast<char*>(&bits) + 2, 2);
      if (type == Type::f16) {
        const uint32_t magnitude = bits & 0x7fffffff;
        const uint16_t half = static_cast<uint16_t>(bits >> 16 & 0x8000) |
                              (magnitude < 0x38800000 ? 0 : static_cast<uint16_t>((magnitude - (112u << 23)) >> 13));
        if (magnitude < 0x38800000) values[i] = 0;
        std::memcpy(&bytes[2 * i], &half, 2);
      }
    }
  }
  Matrix matrix(int64_t stride) const { return {bytes.data(), stride}; }

  double at(size_t i) const {  // as it is now, in memory
    uint32_t bits = 0;
    float value;
    if (type == Type::f32) std::memcpy(&bits, &bytes[4 * i], 4);
    if (type == Type::bf16) std::memcpy(reinterpret_cast<char*>(&bits) + 2, &bytes[2 * i], 2);
    if (type == Type::f16) {
      uint16_t half;
      std::memcpy(&half, &bytes[2 * i], 2);
      const int exponent = half >> 10 & 31;
      const double fraction = (half & 1023) / 1024.0;
      return (half & 0x8000 ? -1 : 1) * (exponent ? std::ldexp(1 + fraction, exponent - 15) : std::ldexp(fraction, -14));
    }
    std::memcpy(&value, &bits, 4);
    return value;
  }
};

// `scale`: how large the numbers are that may cancel each other.
void expect(const char* what, const Array& y, const std::vector<double>& oracle, double scale = 0) {
  const double eps = y.type == Type::f32 ? 0x1p-21 : y.type == Type::bf16 ? 0x1p-8 : 0x1p-11;
  for (double value : oracle) scale = std::fmax(scale, std::fabs(value));
  for (size_t i = 0; i < oracle.size(); i++) {
    if (std::fabs(y.at(i) - oracle[i]) <= eps * 1.5 * scale) continue;
    std::printf("%s %s type %d, element %zu of %zu: %g, expected %g\n", isa().name, what, static_cast<int>(y.type), i,
                oracle.size(), y.at(i), oracle[i]);
    failures++;
    return;
  }
}

// A matrix as it may be stored, and the numbers in it.
struct Operand {
  Storage storage;
  int64_t n, k, padded;
  Array numbers, scales;
  std::vector<unsigned char> codes;

  Operand(Storage storage, Type type, int64_t n, int64_t k, double scale)
      : storage(storage), n(n), k(k), padded((k + group_size - 1) / group_size * group_size), numbers(type, n * k, scale),
        scales(Type::bf16, n * padded / group_size, scale / 8), codes(n * padded / (storage == Storage::int4 ? 2 : 1)) {
    if (storage == Storage::dense) return;
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < padded; j++) {
        const int code = j >= k ? 0 : static_cast<int>(generator() % 16) - 8;
        if (storage == Storage::int8) codes[i * padded + j] = static_cast<unsigned char>(code);
        else codes[(i * padded + j) / 2] |= static_cast<unsigned char>((code + 8) << (j % 2 * 4));
        if (j < k) numbers.values[i * k + j] = code * scales.values[(i * padded + j) / group_size];
      }
  }
  Stored stored() const {
    if (storage == Storage::dense) return {storage, numbers.matrix(k), {}};
    return {storage, {codes.data(), static_cast<int64_t>(codes.size()) / n}, scales.matrix(padded / group_size)};
  }
};

void check(Type type, int64_t m, int64_t n, int64_t k, const std::vector<float>& values, Storage of_base, Storage of_other) {
  std::vector<float> lam(m);
  for (float& l : lam) l = values[generator() % values.size()];
  const Lams lams{lam.data(), m, nullptr, 1};
  const double scale = 1 / std::sqrt(std::fmax(1.0, static_cast<double>(k)));
  const Operand base(of_base, type, n, k, scale), other(of_other, type, n, k, scale);
  const Array x(type, m * k, 1), b0(type, n, 1), b1(type, n, 1);
  const Weight weight{base.stored(), other.stored()};
  const auto lerp = [](double b, double t, double l) { return b + l * (t - b); };
  const auto at = [&](int64_t i, float l) {
    const double b = base.numbers.values[i], o = other.numbers.values[i];
    return of_other == Storage::dense ? lerp(b, o, l) : b + l * o;
  };

  std::vector<double> oracle(m * n);
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) {
      double sum = lerp(b0.values[j], b1.values[j], lam[i]);
      for (int64_t l = 0; l < k; l++) sum += x.values[i * k + l] * at(j * k + l, lam[i]);
      oracle[i * n + j] = sum;
    }
  const Input input{type, x.matrix(k), m, k};
  for (bool invariant : {false, true}) {
    Array y(type, m * n, NAN);
    linear(input, {{weight, {b0.matrix(1), b1.matrix(1)}, y.matrix(n), n, 0, m}}, lams, invariant, 2);
    expect("linear", y, oracle);
  }
  Array y(type, m * 2 * n, NAN);  // twice, side by side
  std::vector<double> twice(m * 2 * n);
  for (int64_t i = 0; i < m * 2 * n; i++) twice[i] = oracle[i / (2 * n) * n + i % n];
  const Matrix second{y.bytes.data() + n * (type == Type::f32 ? 4 : 2), 2 * n};
  const Pair bias{b0.matrix(1), b1.matrix(1)};
  linear(input, {{weight, bias, y.matrix(2 * n), n, 0, m}, {weight, bias, second, n, 0, m}}, lams, false, 2);
  expect("linears", y, twice);

  const int32_t offsets[] = {static_cast<int32_t>(m / 3), static_cast<int32_t>(m / 3), static_cast<int32_t>(m - m / 4)};
  for (int64_t i = offsets[2] * n; i < m * n; i++) oracle[i] = 0;
  Array of_experts(type, m * n, NAN);
  const Linear expert{weight, bias, of_experts.matrix(n), n, 0, 0};
  experts(input, {expert, expert, expert}, offsets, lams, false, 2);
  expect("experts", of_experts, oracle);

  std::vector<int64_t> ids(m);
  std::vector<double> rows(m * k);
  for (int64_t i = 0; i < m; i++) {
    ids[i] = static_cast<int64_t>(generator() % n);
    for (int64_t l = 0; l < k; l++) rows[i * k + l] = at(ids[i] * k + l, lam[i]);
  }
  Array looked_up(type, m * k, NAN);
  embedding(type, ids.data(), true, m, weight, n, k, looked_up.bytes.data(), lams, 2);
  expect("embedding", looked_up, rows);
}

// The passes of a matrix and of the factors of its difference.
void check_low_rank(Type type, int64_t m, int64_t n, int64_t k, int64_t rank, const std::vector<float>& values) {
  std::vector<float> lam(m);
  for (float& l : lam) l = values[generator() % values.size()];
  const Lams lams{lam.data(), m, nullptr, 1};
  const auto scale = [](int64_t size) { return 1 / std::sqrt(static_cast<double>(size)); };
  const Array x(type, m * k, 1), base(type, n * k, scale(k)), down(type, rank * k, scale(k)), up(type, n * rank, scale(rank));
  const auto alone = [](const Array& w, int64_t columns) { return Weight{{Storage::dense, w.matrix(columns), {}}, {}}; };
  for (bool invariant : {false, true}) {
    Array inner(type, m * rank, NAN), y(type, m * n, NAN);
    std::vector<double> oracle(m * rank);
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < rank; j++)
        for (int64_t l = 0; l < k; l++) oracle[i * rank + j] += x.values[i * k + l] * down.values[j * k + l];
    linear({type, x.matrix(k), m, k}, {{alone(down, k), {}, inner.matrix(rank), rank, 0, m, Part::base}}, lams, invariant, 2);
    expect("down", inner, oracle);
    oracle.assign(m * n, 0);
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j++)
        for (int64_t l = 0; l < rank; l++) oracle[i * n + j] += lam[i] * inner.at(i * rank + l) * up.values[j * rank + l];
    linear({type, inner.matrix(rank), m, rank}, {{alone(up, rank), {}, y.matrix(n), n, 0, m, Part::base_times_lam}}, lams,
           invariant, 2);
    expect("up", y, oracle);
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j++) {
        oracle[i * n + j] = y.at(i * n + j);
        for (int64_t l = 0; l < k; l++) oracle[i * n + j] += x.values[i * k + l] * base.values[j * k + l];
      }
    linear({type, x.matrix(k), m, k}, {{alone(base, k), {}, y.matrix(n), n, 0, m, Part::base_added}}, lams, invariant, 2);
    expect("base and difference", y, oracle);
  }
}

void check_norms(Type type, int64_t m, int64_t k, const std::vector<float>& values) {
  std::vector<float> lam(m);
  for (float& l : lam) l = values[generator() % values.size()];
  const Lams lams{lam.data(), m, nullptr, 1};
  const auto lerp = [](double b, double t, double l) { return b + l * (t - b); };
  const Array x(type, m * k, 1);
  std::vector<double> rows(m * k);
  Array w0(type, k, 1), w1(type, k, 1), normed(type, m * k, NAN);
  const Pair w{w0.matrix(1), w1.matrix(1)};
  for (bool centred : {false, true}) {
    for (int64_t i = 0; i < m; i++) {
      double mean = 0, square = 0;
      for (int64_t l = 0; centred && l < k; l++) mean += x.values[i * k + l] / k;
      for (int64_t l = 0; l < k; l++) square += std::pow(x.values[i * k + l] - mean, 2) / k;
      for (int64_t l = 0; l < k; l++)
        rows[i * k + l] = (x.values[i * k + l] - mean) / std::sqrt(square + 1e-5f) *
                              ((centred ? 0 : 1) + lerp(w0.values[l], w1.values[l], lam[i])) +
                          (centred ? lerp(w0.values[l], w1.values[l], lam[i]) : 0);
    }
    const Norm norm{type, x.matrix(k), w, centred ? w : Pair{}, normed.bytes.data(), k, 1e-5f, centred ? 0.f : 1.f};
    (centred ? layer_norm : rms_norm)(norm, m, lams, 2);
    expect(centred ? "layer_norm" : "rms_norm", normed, rows, 1);
  }
}

// Two sequences of so many queries and keys, whose pages lie in another order than theirs.
void check_attention(Type type, int64_t group, int64_t size, int64_t value_size) {
  const int64_t page_size = 5, queries[] = {1, 7}, keys[] = {23, 9}, key_heads = 2, heads = key_heads * group;
  const int32_t table[] = {6, 0, 3, 5, 1, 2, 4, 0, 0, 0}, begins[] = {0, 1, 8}, key_begins[] = {0, 23, 32};
  const Array q(type, 8 * heads * size, 1), k(type, 8 * key_heads * size, 1), v(type, 8 * key_heads * value_size, 1);
  Array key_pages(type, 7 * page_size * key_heads * size, 1), value_pages(type, 7 * page_size * key_heads * value_size, 1);
  Array y(type, 8 * heads * value_size, NAN);
  const auto tokens = [](const Array& x, int64_t heads, int64_t size) { return Heads{x.bytes.data(), heads * size, size}; };
  const auto pages = [&](Array& x, int64_t size) {
    return Pages{x.bytes.data(), 7, page_size * key_heads * size, key_heads * size, size};
  };
  attention({type, tokens(q, heads, size), tokens(k, key_heads, size), tokens(v, key_heads, value_size),
             pages(key_pages, size), pages(value_pages, value_size), table, 5, 5, begins, key_begins, 2, 8, heads, key_heads,
             size, value_size, page_size, 0.25f, 0, nullptr, y.bytes.data()},
            2);
  std::vector<double> oracle;
  for (int64_t s = 0; s < 2; s++)
    for (int64_t seen = keys[s] - queries[s] + 1; seen <= keys[s]; seen++)
      for (int64_t head = 0; head < heads; head++) {
        const size_t token = oracle.size() / (heads * value_size);
        std::vector<double> out(value_size), weights;
        double sum = 0;
        const auto row = [&](int64_t j) { return (table[s * 5 + j / page_size] * page_size + j % page_size) * key_heads + head / group; };
        for (int64_t j = 0; j < seen; j++) {
          double score = 0;
          for (int64_t i = 0; i < size; i++) score += q.values[(token * heads + head) * size + i] * key_pages.at(row(j) * size + i);
          weights.push_back(std::exp(score / 4));
          sum += weights.back();
        }
        for (int64_t j = 0; j < seen; j++)
          for (int64_t i = 0; i < value_size; i++) out[i] += weights[j] / sum * value_pages.at(row(j) * value_size + i);
        oracle.insert(oracle.end(), out.begin(), out.end());
      }
  expect("attention", y, oracle);
}

}  // namespace

int main() {
  const int64_t shapes[][3] = {{1, 4, 1}, {2, 5, 31}, {6, 9, 64}, {12, 33, 40}, {14, 67, 1100}, {60, 7, 129}, {300, 3, 33}, {3, 9, 576}, {7, 5, 2080}};
  const std::pair<Storage, Storage> formats[] = {{Storage::dense, Storage::dense},
                                                 {Storage::dense, Storage::int8},
                                                 {Storage::dense, Storage::int4},
                                                 {Storage::int8, Storage::int4}};
  for (const std::string& name : supported_isas()) {
    use_isa(name);
    for (Type type : {Type::f32, Type::bf16, Type::f16}) {
      for (const auto& [group, size, value_size] : {std::array<int64_t, 3>{1, 64, 64}, {3, 40, 24}, {16, 7, 70}})
        check_attention(type, group, size, value_size);
      for (const auto& [m, n, k] : shapes)
        for (const std::vector<float>& values : {std::vector<float>{0}, {1}, {0.25f}, {0, 1, 0.75f, 0.5f, 1.25f, -0.5f}}) {
          for (const auto& [base, other] : formats) check(type, m, n, k, values, base, other);
          check_low_rank(type, m, n, k, 1 + k / 8, values);
          check_norms(type, m, k, values);
        }
    }
    std::printf("%s: %d wrong\n", name.c_str(), failures);
  }
  return failures;
}
