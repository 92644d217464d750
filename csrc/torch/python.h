// The operators for Python, see python.cpp.
#pragma once

#include <Python.h>

namespace dami {

int add_operators(PyObject* module);  // 0, or −1 with Python's error set

}  // namespace dami
