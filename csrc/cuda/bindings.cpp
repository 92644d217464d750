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
using OperandArgument = std::pair<MatrixArgument, MatrixArgument>;  // values, scales

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Matrix matrix(const MatrixArgument& m) { return {at(m.first), m.second}; }
Operand operand(const OperandArgument& o) { return {matrix(o.first), matrix(o.second)}; }

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  py::enum_<Type>(module, "Type").value("bf16", Type::bf16).value("f16", Type::f16);
  py::enum_<Format>(module, "Format")
      .value("pair", Format::pair)
      .value("int8", Format::int8)
      .value("int4", Format::int4)
      .value("w8d4", Format::w8d4);
  module.def("decode", [](Type type, Format format, MatrixArgument x, OperandArgument base, OperandArgument other,
                          std::pair<Address, Address> bias, std::tuple<Address, Address, int64_t> lam, Address y, int m,
                          int n, int k, int warps, Address stream) {
    const Linear linear{matrix(x), operand(base), operand(other), {at(bias.first), at(bias.second)},
                        at<float>(std::get<0>(lam)), at<int32_t>(std::get<1>(lam)), std::get<2>(lam), at(y), m, n, k};
    const cudaError_t error = decode(type, format, linear, warps, at<CUstream_st>(stream));
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  });
}
