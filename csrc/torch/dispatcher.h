// The operators for torch's dispatcher, see dispatcher.cpp.
#pragma once

#include <Python.h>

namespace dami {

int add_dispatcher(PyObject* module);  // 0, or −1 with Python's error set

}  // namespace dami
