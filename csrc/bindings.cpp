// The compiled part as Python sees it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/api.h"
#include "torch/calls.h"
#include "torch/dispatcher.h"
#include "torch/python.h"

namespace py = pybind11;
using namespace dami;

PYBIND11_MODULE(_C, module) {
  py::enum_<Type>(module, "Type").value("f32", Type::f32).value("bf16", Type::bf16).value("f16", Type::f16);

  py::dict tensors_of;
  for (const Format& format : formats) tensors_of[format.name] = format.tensors();
  module.attr("FORMATS") = tensors_of;  // the number of tensors of each

  if (add_operators(module.ptr()) != 0 || add_dispatcher(module.ptr()) != 0) throw py::error_already_set();

  module.def("take_calls", [](bool take) { takes_calls = take; });

  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  module.def("isa", [] { return isa().name; });
  module.def("supported_isas", &supported_isas);
  module.def("use_isa", &use_isa);
  module.def("peak_flops", &peak_flops, unlocked);
  module.def(
      "read_bandwidth",
      [](uintptr_t data, int64_t bytes, int threads) {
        return read_bandwidth(reinterpret_cast<const void*>(data), bytes, threads);
      },
      unlocked);
}
