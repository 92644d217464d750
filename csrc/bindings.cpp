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

Matrix matrix(const MatrixArgument& m) { return {at<void>(m.first), m.second}; }
Pair pair(const PairArgument& p) { return {matrix(p.first), matrix(p.second)}; }
Lams lams(const LamsArgument& l) {
  return {at<float>(std::get<0>(l)), std::get<1>(l), at<int32_t>(std::get<2>(l)), std::get<3>(l)};
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  py::enum_<Type>(module, "Type").value("f32", Type::f32).value("bf16", Type::bf16).value("f16", Type::f16);

  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  module.def(
      "linear",
      [](Type type, MatrixArgument x, PairArgument weight, PairArgument bias, Address y, int64_t m, int64_t n, int64_t k,
         LamsArgument lam, int threads) {
        linear({type, matrix(x), pair(weight), pair(bias), at<void>(y), m, n, k}, lams(lam), threads);
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
      [](Type type, Address ids, bool ids_are_64_bit, int64_t count, PairArgument weight, int64_t vocabulary, int64_t d,
         Address y, LamsArgument lam, int threads) {
        embedding(type, at<void>(ids), ids_are_64_bit, count, pair(weight), vocabulary, d, at<void>(y), lams(lam), threads);
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
