// The operators for torch's dispatcher, so that compiled and exported programs run no Python: through torch's C interface
// (torch/csrc/stable/c/shim.h), whose functions are found by their names in the libtorch that is loaded. No header of torch
// is needed, and one build serves every version.
#include "dispatcher.h"

#ifdef _WIN32
namespace dami {
int add_dispatcher(PyObject*) { return 0; }
}  // namespace dami
#else

#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "calls.h"

namespace dami {
namespace {

using Value = uint64_t;  // StableIValue: a number, or a handle that its receiver owns
using Handle = void*;
using Kernel = void (*)(Value*, uint64_t, uint64_t);
constexpr uint64_t version = uint64_t{2} << 56 | uint64_t{11} << 48;  // of torch, whose conventions these are

// The functions of torch; each returns 0, or another number where it failed.
struct {
  int (*aoti_torch_library_init_impl)(const char* library, const char* key, const char* file, uint32_t line, Handle*);
  int (*torch_call_dispatcher)(const char* name, const char* overload, Value*, uint64_t version);
  int (*torch_library_impl)(Handle, const char* name, Kernel, uint64_t version);
  int (*aoti_torch_get_device_type)(Handle, int32_t*);
  int (*aoti_torch_get_layout)(Handle, int32_t*);
  int (*aoti_torch_get_dtype)(Handle, int32_t*);
  int (*aoti_torch_get_data_ptr)(Handle, void**);
  int (*aoti_torch_get_dim)(Handle, int64_t*);
  int (*aoti_torch_get_sizes)(Handle, int64_t**);
  int (*aoti_torch_get_strides)(Handle, int64_t**);
  int (*aoti_torch_get_storage_size)(Handle, int64_t*);
  int (*aoti_torch_get_storage_offset)(Handle, int64_t*);
  int (*aoti_torch_empty_strided)(int64_t dims, const int64_t*, const int64_t*, int32_t dtype, int32_t device, int32_t,
                                  Handle*);
  int (*aoti_torch_delete_tensor_object)(Handle);
  int (*torch_list_size)(Handle, size_t*);
  int (*torch_list_get_item)(Handle, size_t, Value*);
  int (*torch_delete_list)(Handle);
  int (*torch_string_c_str)(Handle, const char**);
  int (*torch_delete_string)(Handle);
  int (*torch_get_num_threads)(uint32_t*);
} torch;

struct {
  int32_t f32, bf16, f16, i8, u8, i32, i64, boolean, cpu, strided;
} code;  // torch's numbers

PyObject* raise;  // () → raises what the last operator in Python has raised in this thread, which returned a scalar then

void ok(int result) {
  if (result != 0) throw std::runtime_error("dami: a function of torch's C interface failed");
}

Dtype dtype_of(int32_t number) {
  if (number == code.f32) return Dtype::f32;
  if (number == code.bf16) return Dtype::bf16;
  if (number == code.f16) return Dtype::f16;
  if (number == code.i8) return Dtype::i8;
  if (number == code.u8) return Dtype::u8;
  if (number == code.i32) return Dtype::i32;
  if (number == code.i64) return Dtype::i64;
  if (number == code.boolean) return Dtype::boolean;
  return Dtype::other;
}

// What an argument of a schema is.
enum class Kind { tensor, tensors, maybe_tensor, maybe_tensors, integer, real, boolean, string, dtype };

struct NotTaken {};

class Arguments {
 public:
  template <int count>
  Arguments(const Kind (&kinds)[count], Value* values) : kinds_(kinds), values_(values, values + count) {
    tensors_.reserve(32);
    begins_.reserve(count + 1);
    for (int i = 0; i < count; i++) {
      begins_.push_back(tensors_.size());
      if (kinds[i] == Kind::tensor) tensors_.push_back(handle(values[i]));
      if (kinds[i] == Kind::maybe_tensor && values[i]) tensors_.push_back(handle(*reinterpret_cast<Value*>(values[i])));
      const Handle list = list_of(i);
      size_t size = 0;
      if (list) ok(torch.torch_list_size(list, &size));
      for (size_t j = 0; j < size; j++) {
        Value item;
        ok(torch.torch_list_get_item(list, j, &item));
        tensors_.push_back(handle(item));
      }
    }
    begins_.push_back(tensors_.size());
  }
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;
  ~Arguments() {
    if (released_) return;
    for (Handle tensor : tensors_) torch.aoti_torch_delete_tensor_object(tensor);
    for (size_t i = 0; i < values_.size(); i++) {
      if (const Handle list = list_of(static_cast<int>(i))) torch.torch_delete_list(list);
      if (kinds_[i] == Kind::maybe_tensor || kinds_[i] == Kind::maybe_tensors) delete reinterpret_cast<Value*>(values_[i]);
      if (kinds_[i] == Kind::string) torch.torch_delete_string(handle(values_[i]));
    }
  }

  Tensor tensor(int i) const { return read(tensors_[begins_[i]]); }
  std::optional<Tensor> maybe_tensor(int i) const {
    if (begins_[i] == begins_[i + 1]) return {};
    return tensor(i);
  }
  Tensors tensors(int i) const {
    Tensors result;
    result.reserve(begins_[i + 1] - begins_[i]);
    for (size_t j = begins_[i]; j < begins_[i + 1]; j++) result.push_back(read(tensors_[j]));
    return result;
  }
  LamArguments lams(int i) const {
    LamArguments result{tensor(i), maybe_tensor(i + 1), {}};
    if (!result.row_to_lam) result.rows_per_lam = integer(i + 2);
    return result;
  }
  int64_t integer(int i) const { return static_cast<int64_t>(values_[i]); }
  bool boolean(int i) const { return (values_[i] & 0xff) != 0; }
  int32_t dtype(int i) const { return static_cast<int32_t>(values_[i] & 0xffffffff); }
  double real(int i) const {
    double value;
    std::memcpy(&value, &values_[i], sizeof value);
    return value;
  }
  const char* string(int i) const {
    const char* text;
    ok(torch.torch_string_c_str(handle(values_[i]), &text));
    return text;
  }

  // Leaves all that the values hold to whom they are handed on to.
  Value* release() {
    released_ = true;
    return values_.data();
  }

 private:
  static Handle handle(Value value) { return reinterpret_cast<Handle>(value); }

  // The list that an argument is, if it is one; what is optional lies behind a pointer.
  Handle list_of(int i) const {
    if (kinds_[i] == Kind::tensors) return handle(values_[i]);
    return kinds_[i] == Kind::maybe_tensors && values_[i] ? handle(*reinterpret_cast<Value*>(values_[i])) : nullptr;
  }

  static Tensor read(Handle tensor) {
    int32_t device, layout, number;
    int64_t dims, storage, offset;
    int64_t *sizes, *strides;
    Tensor result;
    ok(torch.aoti_torch_get_device_type(tensor, &device));
    ok(torch.aoti_torch_get_layout(tensor, &layout));
    if (device != code.cpu || layout != code.strided) throw NotTaken{};
    ok(torch.aoti_torch_get_dtype(tensor, &number));
    ok(torch.aoti_torch_get_dim(tensor, &dims));
    ok(torch.aoti_torch_get_sizes(tensor, &sizes));
    ok(torch.aoti_torch_get_strides(tensor, &strides));
    ok(torch.aoti_torch_get_storage_size(tensor, &storage));
    ok(torch.aoti_torch_get_storage_offset(tensor, &offset));
    result = {nullptr, dtype_of(number), static_cast<int>(dims), sizes, strides, storage - offset * bytes_of(dtype_of(number))};
    ok(torch.aoti_torch_get_data_ptr(tensor, &result.data));
    if (is_without_memory(result)) throw NotTaken{};
    return result;
  }

  const Kind* kinds_;
  std::vector<Value> values_;
  std::vector<Handle> tensors_;
  std::vector<size_t> begins_;  // where those of each argument begin, and the end
  bool released_ = false;
};

// Python's error as what pybind11, and so torch, makes the same error of again.
struct Error {
  enum { index, value, type, other } kind;
  std::string message;

  [[noreturn]] void raise() const {
    switch (kind) {
      case index: throw std::out_of_range(message);
      case value: throw std::invalid_argument(message);
      case type: throw pybind11::type_error(message);
      default: throw std::runtime_error(message);
    }
  }
};

// Takes the error that is set.
Error python_error() {
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  PyErr_NormalizeException(&type, &value, &trace);
  const auto is = [&](PyObject* kind) { return type && PyErr_GivenExceptionMatches(type, kind); };
  PyObject* const text = value ? PyObject_Str(value) : nullptr;
  const char* const message = text ? PyUnicode_AsUTF8(text) : nullptr;
  const Error error{is(PyExc_IndexError)   ? Error::index
                    : is(PyExc_ValueError) ? Error::value
                    : is(PyExc_TypeError)  ? Error::type
                                           : Error::other,
                    message ? message : "an error without a text"};
  PyErr_Clear();
  for (PyObject* object : {text, type, value, trace}) Py_XDECREF(object);
  return error;
}

// What Python makes of a call that the kernels do not take: an operator of its own has the same schema.
Value serve_in_python(const char* name, Arguments& arguments) {
  const std::string in_python = std::string("dami::_") + name;
  Value* const values = arguments.release();
  ok(torch.torch_call_dispatcher(in_python.c_str(), "", values, version));
  int64_t dims;
  ok(torch.aoti_torch_get_dim(reinterpret_cast<Handle>(values[0]), &dims));
  if (dims != 0) return values[0];
  torch.aoti_torch_delete_tensor_object(reinterpret_cast<Handle>(values[0]));
  const PyGILState_STATE state = PyGILState_Ensure();
  Py_XDECREF(PyObject_CallNoArgs(raise));
  Error error = python_error();
  PyGILState_Release(state);
  error.raise();
}

// A dense tensor [rows, columns], or [rows · columns].
Handle empty(int64_t rows, int64_t columns, int32_t dtype, bool flat) {
  const int64_t sizes[] = {rows, columns}, strides[] = {std::max<int64_t>(columns, 1), 1}, size = rows * columns;
  Handle result;
  ok(torch.aoti_torch_empty_strided(flat ? 1 : 2, flat ? &size : sizes, flat ? strides + 1 : strides, dtype, code.cpu, 0,
                                    &result));
  return result;
}

int32_t number_of(Type type) { return type == Type::f32 ? code.f32 : type == Type::bf16 ? code.bf16 : code.f16; }

template <class Run>
Value run(int64_t rows, int64_t columns, Type type, Run run, bool flat = false) {
  uint32_t threads;
  void* data;
  ok(torch.torch_get_num_threads(&threads));
  const Handle y = empty(rows, columns, number_of(type), flat);
  try {
    ok(torch.aoti_torch_get_data_ptr(y, &data));
    run(data, static_cast<int>(threads));
  } catch (...) {
    torch.aoti_torch_delete_tensor_object(y);
    throw;
  }
  return reinterpret_cast<Value>(y);
}

// Each: a name, the arguments of its schema, and the call.
using K = Kind;

template <bool several>
struct Linears {
  static constexpr Kind kinds[] = {K::tensor, K::tensors, K::maybe_tensors, K::tensor, K::maybe_tensor, K::integer, K::string, K::boolean};
  static std::optional<Value> call(const Arguments& a) {
    const Tensor x = a.tensor(0);
    if (x.dims != 2) return {};
    auto call = linear_call(x, a.tensors(1), a.tensors(2), a.lams(3), a.string(6), x.size[1]);
    if (!call) return {};
    return run(
        x.size[0], call->outputs(), call->input.type,
        [&](void* y, int threads) { call->run(y, a.boolean(7), threads); }, several);
  }
};
struct LerpLinear : Linears<false> {
  static constexpr const char* name = "lerp_linear";
};
struct LerpLinears : Linears<true> {
  static constexpr const char* name = "lerp_linears";
};

struct LerpExperts {
  static constexpr const char* name = "lerp_experts";
  static constexpr Kind kinds[] = {K::tensor, K::tensors, K::maybe_tensors, K::tensor, K::maybe_tensor, K::integer, K::tensor, K::string, K::boolean};
  static std::optional<Value> call(const Arguments& a) {
    const Tensor x = a.tensor(0);
    if (x.dims != 2) return {};
    auto call = experts_call(x, a.tensors(1), a.tensors(2), a.lams(3), a.tensor(6), a.string(7), x.size[1]);
    if (!call) return {};
    return run(x.size[0], call->outputs, call->input.type,
               [&](void* y, int threads) { call->run(y, a.boolean(8), threads); });
  }
};

struct LerpEmbedding {
  static constexpr const char* name = "lerp_embedding";
  static constexpr Kind kinds[] = {K::tensor, K::tensors, K::tensor, K::maybe_tensor, K::integer, K::string, K::dtype, K::integer};
  static std::optional<Value> call(const Arguments& a) {
    const Tensor ids = a.tensor(0);
    if (ids.dims != 1) return {};
    auto call = embedding_call(ids, a.tensors(1), a.lams(2), a.string(5), dtype_of(a.dtype(6)), a.integer(7));
    if (!call) return {};
    return run(call->count, call->columns, call->type, [&](void* y, int threads) { call->run(y, threads); });
  }
};

template <class Norm>
std::optional<Value> norm(const Tensor& x, std::optional<Norm> call) {
  if (!call || x.dims != 2) return {};
  return run(call->rows, call->norm.d, call->norm.type, [&](void* y, int threads) { call->run(y, threads); });
}

struct LerpRMSNorm {
  static constexpr const char* name = "lerp_rms_norm";
  static constexpr Kind kinds[] = {K::tensor, K::tensors, K::tensor, K::maybe_tensor, K::integer, K::real, K::real};
  static std::optional<Value> call(const Arguments& a) {
    return norm(a.tensor(0), rms_norm_call(a.tensor(0), a.tensors(1), a.lams(2), a.real(5), a.real(6)));
  }
};

struct LerpLayerNorm {
  static constexpr const char* name = "lerp_layer_norm";
  static constexpr Kind kinds[] = {K::tensor, K::tensors, K::maybe_tensors, K::tensor, K::maybe_tensor, K::integer, K::real};
  static std::optional<Value> call(const Arguments& a) {
    return norm(a.tensor(0), layer_norm_call(a.tensor(0), a.tensors(1), a.tensors(2), a.lams(3), a.real(6)));
  }
};

struct DecodeAttention {
  static constexpr const char* name = "decode_attention";
  static constexpr Kind kinds[] = {K::tensor, K::tensor, K::tensor, K::maybe_tensor, K::real};
  static std::optional<Value> call(const Arguments& a) {
    auto call = decode_attention_call(a.tensor(0), a.tensor(1), a.tensor(2), a.maybe_tensor(3), a.real(4));
    if (!call) return {};
    const Attention& attention = call->attention;
    return run(attention.sequences, attention.heads * attention.value_size, attention.type,
               [&](void* y, int threads) { call->run(y, threads); });
  }
};

template <class Operator>
void kernel(Value* stack, uint64_t, uint64_t) {
  Arguments arguments(Operator::kinds, stack);
  std::optional<Value> y;
  try {
    if (takes_calls) y = Operator::call(arguments);
  } catch (const NotTaken&) {
  }
  stack[0] = y ? *y : serve_in_python(Operator::name, arguments);
}

template <class Operator>
bool add(Handle library) {
  return torch.torch_library_impl(library, Operator::name, kernel<Operator>, version) == 0;
}

// (path of libtorch_cpu, raise): registers the kernels for the CPU. ImportError if this torch lacks what they need.
PyObject* register_kernels(PyObject*, PyObject* arguments) {
  const char* path;
  if (!PyArg_ParseTuple(arguments, "sO", &path, &raise)) return nullptr;
  void* const libtorch = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  if (!libtorch) return PyErr_Format(PyExc_ImportError, "%s is not loaded", path);
  const char* missing = nullptr;
  const auto find = [&](const char* name, auto& function) {
    void* const found = dlsym(libtorch, name);
    if (!found) missing = name;
    std::memcpy(&function, &found, sizeof found);
  };
#define FIND(name) find(#name, torch.name)
  FIND(aoti_torch_library_init_impl), FIND(torch_library_impl), FIND(torch_call_dispatcher);
  FIND(aoti_torch_get_device_type), FIND(aoti_torch_get_layout);
  FIND(aoti_torch_get_dtype), FIND(aoti_torch_get_data_ptr), FIND(aoti_torch_get_dim), FIND(aoti_torch_get_sizes);
  FIND(aoti_torch_get_strides), FIND(aoti_torch_get_storage_size), FIND(aoti_torch_get_storage_offset);
  FIND(aoti_torch_empty_strided), FIND(aoti_torch_delete_tensor_object), FIND(torch_list_size), FIND(torch_list_get_item);
  FIND(torch_delete_list), FIND(torch_string_c_str), FIND(torch_delete_string), FIND(torch_get_num_threads);
#undef FIND
  const auto number = [&](const char* name, int32_t& to) {
    int32_t (*function)() = nullptr;
    find(name, function);
    if (function) to = function();
  };
  number("aoti_torch_device_type_cpu", code.cpu), number("aoti_torch_layout_strided", code.strided);
  number("aoti_torch_dtype_float32", code.f32), number("aoti_torch_dtype_bfloat16", code.bf16);
  number("aoti_torch_dtype_float16", code.f16), number("aoti_torch_dtype_int8", code.i8);
  number("aoti_torch_dtype_uint8", code.u8), number("aoti_torch_dtype_int32", code.i32);
  number("aoti_torch_dtype_int64", code.i64), number("aoti_torch_dtype_bool", code.boolean);
  if (missing) return PyErr_Format(PyExc_ImportError, "this torch has no %s", missing);
  Py_INCREF(raise);
  Handle library;  // stays as long as the process does
  const bool added = torch.aoti_torch_library_init_impl("dami", "CPU", __FILE__, __LINE__, &library) == 0 &&
                     add<LerpLinear>(library) && add<LerpLinears>(library) && add<LerpExperts>(library) &&
                     add<LerpEmbedding>(library) && add<LerpRMSNorm>(library) && add<LerpLayerNorm>(library) &&
                     add<DecodeAttention>(library);
  if (!added) return PyErr_Format(PyExc_ImportError, "torch did not register the kernels");
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"register_kernels", register_kernels, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_dispatcher(PyObject* module) { return PyModule_AddFunctions(module, methods); }

}  // namespace dami
#endif
