// The operators for Python. Each takes torch's tensors and returns the result, or None where `calls.h` cannot take them. These
// are plain functions of CPython and not pybind11's, as a call of those costs more than a small kernel.
#include "python.h"

#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "calls.h"
#include "dlpack.h"

namespace dami {
namespace {

// What `connect` was given and found.
struct {
  const DLPackExchangeAPI* dlpack;
  PyObject *tensor, *parameter;  // the types that are taken: no subclass, whose operators may mean something else
  PyObject* get_num_threads;
} torch;

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

struct {
  PyObject *requires_grad = interned("requires_grad"), *is_neg = interned("is_neg"), *new_empty = interned("new_empty"),
           *untyped_storage = interned("untyped_storage"), *nbytes = interned("nbytes"), *dtype = interned("dtype"),
           *storage_offset = interned("storage_offset");
} name;

// An owned reference.
class Object {
 public:
  explicit Object(PyObject* owned) : object_(owned) {}
  Object(Object&& other) noexcept : object_(other.release()) {}
  ~Object() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

struct Failed {};  // Python's error is set

Object checked(PyObject* owned) {
  if (!owned) throw Failed{};
  return Object(owned);
}
Object call(PyObject* self, PyObject* method) { return checked(PyObject_CallMethodNoArgs(self, method)); }
int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw Failed{};
  return value;
}
bool truth(PyObject* object) {
  const int value = PyObject_IsTrue(object);
  if (value < 0) throw Failed{};
  return value;
}

Dtype dtype_of(const DLDataType& type) {
  if (type.lanes != 1) return Dtype::other;
  switch (type.code << 8 | type.bits) {
    case kDLFloat << 8 | 32: return Dtype::f32;
    case kDLFloat << 8 | 16: return Dtype::f16;
    case kDLBfloat << 8 | 16: return Dtype::bf16;
    case kDLInt << 8 | 8: return Dtype::i8;
    case kDLUInt << 8 | 8: return Dtype::u8;
    case kDLInt << 8 | 32: return Dtype::i32;
    case kDLInt << 8 | 64: return Dtype::i64;
    default: return Dtype::other;
  }
}

struct NotTaken {};

// Reads what Python passes for a tensor on one kind of device. With `graph` those that want a gradient are not taken.
class Reader {
 public:
  explicit Reader(bool graph, int64_t device_type = kDLCPU) : graph_(graph), device_type_(device_type) {}

  DLTensor plain(PyObject* object) const {
    DLTensor from;
    if (Py_TYPE(object) != reinterpret_cast<PyTypeObject*>(torch.tensor) &&
        Py_TYPE(object) != reinterpret_cast<PyTypeObject*>(torch.parameter))
      throw NotTaken{};
    if (graph_ && truth(checked(PyObject_GetAttr(object, name.requires_grad)).get())) throw NotTaken{};
    if (torch.dlpack->dltensor_from_py_object_no_sync(object, &from) != 0) {
      PyErr_Clear();  // a layout without strides, say
      throw NotTaken{};
    }
    if (from.device.device_type != device_type_ || truth(call(object, name.is_neg).get())) throw NotTaken{};
    return from;
  }

  Tensor operand(PyObject* object) const {
    const DLTensor from = plain(object);
    const Tensor tensor{from.data ? static_cast<char*>(from.data) + from.byte_offset : nullptr, dtype_of(from.dtype), from.ndim,
                        from.shape, from.strides, 0};
    if (is_without_memory(tensor)) throw NotTaken{};
    return tensor;
  }

  std::optional<Tensor> optional(PyObject* object) const {
    if (object == Py_None) return {};
    return operand(object);
  }

  Tensors stored(PyObject* sequence) const {
    if (!PyTuple_Check(sequence) && !PyList_Check(sequence)) throw NotTaken{};
    Tensors tensors(PySequence_Fast_GET_SIZE(sequence));
    for (size_t i = 0; i < tensors.size(); i++) {
      PyObject* object = PySequence_Fast_GET_ITEM(sequence, i);
      tensors[i] = operand(object);
      tensors[i].bytes = bytes(object, bytes_of(tensors[i].dtype));
    }
    return tensors;
  }

  // Of a tensor's storage, from its first element on.
  static int64_t bytes(PyObject* object, int64_t item) {
    const Object storage = call(object, name.untyped_storage);
    return integer(call(storage.get(), name.nbytes).get()) - integer(call(object, name.storage_offset).get()) * item;
  }

  LamArguments lams(PyObject* lam, PyObject* row_to_lam, PyObject* rows_per_lam) const {
    LamArguments result{operand(lam), optional(row_to_lam), {}};
    if (rows_per_lam != Py_None) {
      if (!PyLong_CheckExact(rows_per_lam)) throw NotTaken{};
      int overflow;
      result.rows_per_lam = PyLong_AsLongLongAndOverflow(rows_per_lam, &overflow);
      if (overflow) throw NotTaken{};
    }
    return result;
  }

 private:
  bool graph_;
  int64_t device_type_;
};

std::string_view text(PyObject* object) {
  Py_ssize_t size;
  const char* data = PyUnicode_AsUTF8AndSize(object, &size);
  if (!data) throw Failed{};
  return {data, static_cast<size_t>(size)};
}

double real(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1 && PyErr_Occurred()) throw Failed{};
  return value;
}

// like.new_empty([..., columns]) with the leading sizes of `x`, all its sizes if columns < 0; of another dtype if given.
Object new_empty(PyObject* like, const Tensor& x, int dims, int64_t columns, PyObject* dtype = nullptr) {
  const Object sizes = checked(PyTuple_New(dims + 1));
  for (int d = 0; d <= dims; d++) {
    PyObject* size = PyLong_FromLongLong(d < dims ? x.size[d] : columns);
    if (!size) throw Failed{};
    PyTuple_SET_ITEM(sizes.get(), d, size);
  }
  PyObject* arguments[] = {like, sizes.get(), dtype};
  static PyObject* const keywords = PyTuple_Pack(1, name.dtype);
  return checked(PyObject_VectorcallMethod(name.new_empty, arguments, 2, dtype ? keywords : nullptr));
}

void* address(const Object& tensor) {
  DLTensor view;
  if (torch.dlpack->dltensor_from_py_object_no_sync(tensor.get(), &view) != 0) throw Failed{};
  return static_cast<char*>(view.data) + view.byte_offset;
}

// Runs without Python's lock, and returns y.
template <class Run>
PyObject* run(Object y, Run run) {
  const auto threads = static_cast<int>(integer(checked(PyObject_CallNoArgs(torch.get_num_threads)).get()));
  PyThreadState* const state = PyEval_SaveThread();
  try {
    run(threads);
  } catch (...) {
    PyEval_RestoreThread(state);
    throw;
  }
  PyEval_RestoreThread(state);
  return y.release();
}

// f(arguments) as a function of CPython: its exceptions become Python's.
template <int count, PyObject* (*f)(PyObject* const*), bool is_kernel = true>
PyObject* function(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  if (given != count) return PyErr_Format(PyExc_TypeError, "takes %d arguments, got %zd", count, given);
  if (!torch.dlpack || (is_kernel && !takes_calls)) Py_RETURN_NONE;
  try {
    return f(arguments);
  } catch (const NotTaken&) {
    Py_RETURN_NONE;
  } catch (const Failed&) {
  } catch (const std::out_of_range& error) {
    PyErr_SetString(PyExc_IndexError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <class Call>
Call& taken(std::optional<Call>& call) {
  if (!call) throw NotTaken{};
  return *call;
}

// (graph, x, weights, biases, lam, row_to_lam, rows_per_lam, format, columns, invariant) → the result of each weight, a tuple
PyObject* linears(PyObject* const* a) {
  const Reader read(truth(a[0]));
  const Tensor x = read.operand(a[1]);
  auto made = linear_call(x, read.stored(a[2]), read.stored(a[3]), read.lams(a[4], a[5], a[6]), text(a[7]), integer(a[8]));
  LinearCall& call = taken(made);
  const bool invariant = truth(a[9]);
  Object results = checked(PyTuple_New(static_cast<Py_ssize_t>(call.weights.size())));
  for (size_t i = 0; i < call.weights.size(); i++) {
    Linear& weight = call.weights[i];
    Object y = new_empty(a[1], x, x.dims - 1, weight.n);
    weight.y = {address(y), weight.n};
    PyTuple_SET_ITEM(results.get(), static_cast<Py_ssize_t>(i), y.release());
  }
  return run(std::move(results), [&](int threads) { call.run(invariant, threads); });
}

// (graph, x, weight, bias, lam, row_to_lam, rows_per_lam, offsets, format, columns, invariant)
PyObject* experts(PyObject* const* a) {
  const Reader read(truth(a[0]));
  const Tensor x = read.operand(a[1]);
  auto made = experts_call(x, read.stored(a[2]), read.stored(a[3]), read.lams(a[4], a[5], a[6]), read.operand(a[7]),
                           text(a[8]), integer(a[9]));
  ExpertsCall& call = taken(made);
  const bool invariant = truth(a[10]);
  Object y = new_empty(a[1], x, x.dims - 1, call.outputs);
  void* const to = address(y);
  return run(std::move(y), [&](int threads) { call.run(to, invariant, threads); });
}

// (graph, ids, weight, lam, row_to_lam, rows_per_lam, format, dtype's number, dtype, columns)
PyObject* embedding(PyObject* const* a) {
  const Reader read(truth(a[0]));
  const Tensor ids = read.operand(a[1]);
  auto made = embedding_call(ids, read.stored(a[2]), read.lams(a[3], a[4], a[5]), text(a[6]),
                             static_cast<Dtype>(integer(a[7])), integer(a[9]));
  EmbeddingCall& call = taken(made);
  Object y = new_empty(a[1], ids, ids.dims, call.columns, a[8]);
  void* const to = address(y);
  return run(std::move(y), [&](int threads) { call.run(to, threads); });
}

// (graph, x, weight, lam, row_to_lam, rows_per_lam, eps, offset)
PyObject* rms_norm(PyObject* const* a) {
  const Reader read(truth(a[0]));
  const Tensor x = read.operand(a[1]);
  auto made = rms_norm_call(x, read.stored(a[2]), read.lams(a[3], a[4], a[5]), real(a[6]), real(a[7]));
  NormCall& call = taken(made);
  Object y = new_empty(a[1], x, x.dims - 1, call.norm.d);
  void* const to = address(y);
  return run(std::move(y), [&](int threads) { call.run(to, threads); });
}

// (graph, x, weight, bias, lam, row_to_lam, rows_per_lam, eps)
PyObject* layer_norm(PyObject* const* a) {
  const Reader read(truth(a[0]));
  const Tensor x = read.operand(a[1]);
  auto made = layer_norm_call(x, read.stored(a[2]), read.stored(a[3]), read.lams(a[4], a[5], a[6]), real(a[7]));
  NormCall& call = taken(made);
  Object y = new_empty(a[1], x, x.dims - 1, call.norm.d);
  void* const to = address(y);
  return run(std::move(y), [&](int threads) { call.run(to, threads); });
}

// (query, key, value, key_pages, value_pages, table, begins, key_begins, scale, softcap, sinks)
PyObject* attention(PyObject* const* a) {
  const Reader read(false);
  const Tensor query = read.operand(a[0]);
  auto made = attention_call(query, read.operand(a[1]), read.operand(a[2]), read.operand(a[3]), read.operand(a[4]),
                             read.operand(a[5]), read.operand(a[6]), read.operand(a[7]), real(a[8]), real(a[9]),
                             read.optional(a[10]));
  AttentionCall& call = taken(made);
  const int64_t sizes[] = {1, call.attention.tokens, call.attention.heads};
  Tensor leading;
  leading.size = sizes;
  Object y = new_empty(a[0], leading, 3, call.attention.value_size);
  void* const to = address(y);
  return run(std::move(y), [&](int threads) { call.run(to, threads); });
}

// What a launch on a GPU depends on in its operands, but for their addresses, as a key; and the addresses.
class Facts {
 public:
  explicit Facts(const Reader& read) : read_(read) {}
  const std::string& key() const { return key_; }

  // The address of a tensor, None or an integer itself, or a tuple of these for a tuple or list. A tensor in one belongs to
  // a weight and must lie inside its storage.
  Object add(PyObject* object, bool is_stored = false) {
    if (object == Py_None) return put('n'), Object(Py_NewRef(object));
    if (PyLong_CheckExact(object)) return put('i'), put(integer(object)), Object(Py_NewRef(object));
    if (!PyTuple_Check(object) && !PyList_Check(object)) return tensor(object, is_stored);
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(object);
    put('('), put(count);
    Object addresses = checked(PyTuple_New(count));
    for (Py_ssize_t i = 0; i < count; i++)
      PyTuple_SET_ITEM(addresses.get(), i, add(PySequence_Fast_GET_ITEM(object, i), true).release());
    return addresses;
  }

  // Of all operands, which as a whole are no weight.
  Object add_all(PyObject* operands) {
    if (!PyTuple_Check(operands)) throw NotTaken{};
    Object addresses = checked(PyTuple_New(PyTuple_GET_SIZE(operands)));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(operands); i++)
      PyTuple_SET_ITEM(addresses.get(), i, add(PyTuple_GET_ITEM(operands, i)).release());
    return addresses;
  }

 private:
  template <class T>
  void put(const T& value) {
    key_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }

  Object tensor(PyObject* object, bool is_stored) {
    const DLTensor from = read_.plain(object);
    const auto address = from.data ? reinterpret_cast<uint64_t>(from.data) + from.byte_offset : 0;
    put(from.dtype), put(from.ndim), put(from.device.device_id), put(address % 16);
    int64_t last = 0;
    bool is_empty = false;
    for (int d = 0; d < from.ndim; d++) {
      put(from.shape[d]), put(from.strides[d]);
      last += (from.shape[d] - 1) * from.strides[d];
      is_empty |= from.shape[d] == 0;
    }
    const int64_t item = from.dtype.bits / 8 * from.dtype.lanes;
    if (!is_empty && !address) throw NotTaken{};
    if (is_stored && !is_empty && (last + 1) * item > Reader::bytes(object, item)) throw NotTaken{};
    return checked(PyLong_FromUnsignedLongLong(address));
  }

  const Reader& read_;
  std::string key_;
};

// (device type as in DLPack, graph, operands) → (key, addresses), for tensors that all are plain and of that device.
PyObject* facts(PyObject* const* a) {
  const Reader read(truth(a[1]), integer(a[0]));
  Facts facts(read);
  const Object addresses = facts.add_all(a[2]);
  const Object key = checked(PyBytes_FromStringAndSize(facts.key().data(), static_cast<Py_ssize_t>(facts.key().size())));
  return checked(PyTuple_Pack(2, key.get(), addresses.get())).release();
}

// (Tensor, Parameter, get_num_threads): from now on calls are taken. ImportError if this torch offers no such exchange.
PyObject* connect(PyObject*, PyObject* const* arguments, Py_ssize_t) {
  const Object capsule(PyObject_GetAttrString(arguments[0], "__dlpack_c_exchange_api__"));
  if (!capsule.get()) return nullptr;
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api"));
  if (!api) return nullptr;
  if (api->header.version.major != 1)
    return PyErr_Format(PyExc_ImportError, "this torch exchanges tensors by DLPack %u, and DLPack 1 is wanted",
                        api->header.version.major);
  for (int i = 0; i < 3; i++) Py_INCREF(arguments[i]);
  torch = {api, arguments[0], arguments[1], arguments[2]};
  Py_RETURN_NONE;
}

template <class F>
PyCFunction fast(F f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyMethodDef methods[] = {
    {"connect", fast(connect), METH_FASTCALL, nullptr},
    {"linears", fast(function<10, linears>), METH_FASTCALL, nullptr},
    {"experts", fast(function<11, experts>), METH_FASTCALL, nullptr},
    {"embedding", fast(function<10, embedding>), METH_FASTCALL, nullptr},
    {"rms_norm", fast(function<8, rms_norm>), METH_FASTCALL, nullptr},
    {"layer_norm", fast(function<8, layer_norm>), METH_FASTCALL, nullptr},
    {"attention", fast(function<11, attention>), METH_FASTCALL, nullptr},
    {"facts", fast(function<3, facts, false>), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_operators(PyObject* module) { return PyModule_AddFunctions(module, methods); }

}  // namespace dami
