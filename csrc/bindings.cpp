// The compiled part as Python sees it. Addresses, sizes and strides come as integers, strides in elements.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/api.h"

namespace py = pybind11;
using namespace dami;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Address = uintptr_t;
using MatrixArgument = std::pair<Address, int64_t>;  // data, stride
using PairArgument = std::pair<MatrixArgument, MatrixArgument>;  // base, target
using LamsArgument = std::tuple<Address, int64_t, Address, int64_t>;  // lam, its length, row_to_lam, rows_per_lam
using StackArgument = std::tuple<Address, int64_t, int64_t>;  // data, stride of the experts, stride of their rows

Matrix matrix(const MatrixArgument& m) { return {at<void>(m.first), m.second}; }
Pair pair(const PairArgument& p) { return {matrix(p.first), matrix(p.second)}; }
Lams lams(const LamsArgument& l) {
  return {at<float>(std::get<0>(l)), std::get<1>(l), at<int32_t>(std::get<2>(l)), std::get<3>(l)};
}

// The formats of dami_kernels.formats that the kernels read, with their tensors in that order.
const std::pair<const char*, std::pair<Storage, Storage>> formats[] = {
    {"pair", {Storage::dense, Storage::dense}},
    {"int8", {Storage::dense, Storage::int8}},
    {"int4", {Storage::dense, Storage::int4}},
    {"w8d4", {Storage::int8, Storage::int4}},
};

std::pair<Storage, Storage> storages(const std::string& format) {
  for (const auto& [name, storages] : formats)
    if (name == format) return storages;
  throw std::invalid_argument("format must be one of FORMATS, got '" + format + "'");
}

int tensors(Storage storage) { return storage == Storage::dense ? 1 : 2; }

// The weight of an expert, or the only one. A scale is two bytes, a byte of codes one.
Weight weight(const std::string& format, const StackArgument* tensors, Type type, int64_t expert = 0) {
  const auto next = [&](int64_t bytes) -> Matrix {
    const auto& [data, step, stride] = *tensors++;
    return {at<char>(data) + expert * step * bytes, stride};
  };
  const auto stored = [&](Storage storage) -> Stored {
    if (storage == Storage::dense) return {storage, next(type == Type::f32 ? 4 : 2), {}};
    const Matrix codes = next(1);
    return {storage, codes, next(2)};
  };
  const auto [base, other] = storages(format);
  const Stored first = stored(base);
  return {first, stored(other)};
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  py::enum_<Type>(module, "Type").value("f32", Type::f32).value("bf16", Type::bf16).value("f16", Type::f16);

  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  py::dict tensors_of;
  for (const auto& [name, storages] : formats) tensors_of[name] = tensors(storages.first) + tensors(storages.second);
  module.attr("FORMATS") = tensors_of;  // the number of tensors of each

  module.def(
      "linear",
      [](Type type, MatrixArgument x, int64_t rows, int64_t k, const std::string& format,
         const std::vector<StackArgument>& weights, const std::vector<PairArgument>& biases,
         const std::vector<int64_t>& outputs, MatrixArgument y, LamsArgument lam, bool invariant, int threads) {
        std::vector<Linear> problems;
        const size_t each = weights.size() / outputs.size();
        for (size_t i = 0; i < outputs.size(); i++) {
          const Pair bias = biases.empty() ? Pair{} : pair(biases[i]);
          problems.push_back({weight(format, &weights[i * each], type), bias, matrix(y), outputs[i], 0, rows});
          y.first += static_cast<Address>(outputs[i] * (type == Type::f32 ? 4 : 2));
        }
        linear({type, matrix(x), rows, k}, problems, lams(lam), invariant, threads);
      },
      unlocked);
  module.def(
      "experts",
      [](Type type, MatrixArgument x, int64_t rows, int64_t k, const std::string& format,
         const std::vector<StackArgument>& weights, PairArgument biases, Address offsets, int64_t experts, int64_t n,
         Address y, LamsArgument lam, bool invariant, int threads) {
        std::vector<Linear> problems;
        const int64_t bytes = type == Type::f32 ? 4 : 2;
        const auto bias_of = [&](const MatrixArgument& end, int64_t e) -> Matrix {
          return {end.first ? at<char>(end.first) + e * end.second * bytes : nullptr, 1};
        };
        for (int64_t e = 0; e < experts; e++)
          problems.push_back({weight(format, weights.data(), type, e),
                              {bias_of(biases.first, e), bias_of(biases.second, e)},
                              {at<void>(y), n}, n, 0, 0});
        dami::experts({type, matrix(x), rows, k}, problems, at<int32_t>(offsets), lams(lam), invariant, threads);
      },
      unlocked);
  module.def(
      "rms_norm",
      [](Type type, MatrixArgument x, PairArgument weight, Address y, int64_t rows, int64_t d, float eps, float offset,
         LamsArgument lam, int threads) {
        rms_norm({type, matrix(x), pair(weight), {}, at<void>(y), d, eps, offset}, rows, lams(lam), threads);
      },
      unlocked);
  module.def(
      "layer_norm",
      [](Type type, MatrixArgument x, PairArgument weight, PairArgument bias, Address y, int64_t rows, int64_t d,
         float eps, LamsArgument lam, int threads) {
        layer_norm({type, matrix(x), pair(weight), pair(bias), at<void>(y), d, eps, 0}, rows, lams(lam), threads);
      },
      unlocked);
  module.def(
      "embedding",
      [](Type type, Address ids, bool ids_are_64_bit, int64_t count, const std::string& format,
         const std::vector<StackArgument>& tensors, int64_t vocabulary, int64_t d, Address y, LamsArgument lam, int threads) {
        embedding(type, at<void>(ids), ids_are_64_bit, count, weight(format, tensors.data(), type), vocabulary, d, at<void>(y),
                  lams(lam), threads);
      },
      unlocked);

  module.def("isa", [] { return isa().name; });
  module.def("supported_isas", &supported_isas);
  module.def("use_isa", &use_isa);
  module.def("peak_flops", &peak_flops, unlocked);
  module.def(
      "read_bandwidth",
      [](Address data, int64_t bytes, int threads) { return read_bandwidth(at<void>(data), bytes, threads); }, unlocked);
}
