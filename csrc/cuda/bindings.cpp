// The CUDA kernels as Python sees them. Addresses, sizes and strides come as integers, strides in elements.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "api.h"

namespace py = pybind11;
using namespace dami::cuda;

namespace {

using Address = uintptr_t;
using MatrixArgument = std::pair<Address, int64_t>;  // data, stride
using OperandArgument = std::tuple<MatrixArgument, MatrixArgument, int>;  // values, scales, bits of a code or 0

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Matrix matrix(const MatrixArgument& m) { return {at(m.first), m.second}; }
Operand operand(const OperandArgument& o) {
  const auto& [values, scales, bits] = o;
  return {bits == 0 ? Storage::numbers : bits == 8 ? Storage::int8 : Storage::int4, matrix(values), matrix(scales)};
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  py::enum_<Type>(module, "Type").value("bf16", Type::bf16).value("f16", Type::f16);
  module.def("decode", [](Type type, MatrixArgument x, OperandArgument base, OperandArgument other,
                          std::pair<Address, Address> bias, std::tuple<Address, Address, int64_t> lam, Address y, int m,
                          int n, int k, int warps, Address stream) {
    const Linear linear{matrix(x), operand(base), operand(other), {at(bias.first), at(bias.second)},
                        at<float>(std::get<0>(lam)), at<int32_t>(std::get<1>(lam)), std::get<2>(lam), at(y), m, n, k};
    const cudaError_t error = decode(type, linear, warps, at<CUstream_st>(stream));
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  });
}
