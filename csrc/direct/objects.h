// Python objects as the fast path reads them (direct.cpp): numbers, and tensors through DLPack's C exchange API; what
// it uses of torch, found once; and the tensors it makes.
#pragma once

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <ATen/dlpack.h>
#include <Python.h>

#include <algorithm>
#include <utility>

#include "direct.h"

namespace flashmla {
namespace {

// As torch numbers them (c10/core/DeviceType.h).
constexpr int kCpu = 0, kCuda = 1, kNumDeviceTypes = 2;

// Set once, when the module is made; never freed.
const DLPackExchangeAPI* exchange = nullptr;
PyTypeObject *tensor_type, *parameter_type;
PyObject *empty_like, *like_contiguous, *as_float32, *as_bytes;                         // a function, keywords
PyObject *name_untyped_storage, *name_nbytes, *name_storage_offset, *name_is_neg;       // of methods
PyObject *name_requires_grad, *name_new_empty, *name_current_level;                     // of attributes
PyObject *is_grad_enabled, *len_dispatch_stack, *has_function_mode, *peek_interpreter;  // functions
PyObject *is_profiling, *tracing_state, *forward_ad;

// A Python exception is set.
struct PythonError {};
// The operator must be called instead.
struct NotPlain {};

ScalarType dtype_of(const DLDataType& dtype) {
  if (dtype.lanes != 1) throw NotPlain{};
  const auto is = [&](int code, int bits) { return dtype.code == code && dtype.bits == bits; };
  if (is(kDLFloat, 32)) return ScalarType::Float;
  if (is(kDLFloat, 16)) return ScalarType::Half;
  if (is(kDLBfloat, 16)) return ScalarType::BFloat16;
  if (is(kDLInt, 32)) return ScalarType::Int;
  throw NotPlain{};
}

// A reference that is given back.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {
    if (object == nullptr) throw PythonError{};
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

int64_t integer_of(PyObject* object) {
  const long long number = PyLong_AsLongLong(object);
  if (number == -1 && PyErr_Occurred() != nullptr) throw PythonError{};
  return number;
}

double number_of(PyObject* object) {
  const double number = PyFloat_AsDouble(object);
  if (number == -1.0 && PyErr_Occurred() != nullptr) throw PythonError{};
  return number;
}

bool truth_of(PyObject* object) {
  const int truth = PyObject_IsTrue(object);
  if (truth < 0) throw PythonError{};
  return truth != 0;
}

int64_t number_from(PyObject* object, PyObject* method) {
  const Owned result(PyObject_CallMethodObjArgs(object, method, nullptr));
  return integer_of(result.get());  // of a bool, too
}

bool has_elements(const DLTensor& tensor) {
  return std::find(tensor.shape, tensor.shape + tensor.ndim, 0) == tensor.shape + tensor.ndim;
}

// Where a tensor comes from: the storage of one that was allocated for this call need not be looked at.
enum class Origin { kCaller, kFresh };

TensorInfo info_of(PyObject* object, Origin origin = Origin::kCaller) {
  DLTensor tensor;
  if (exchange->dltensor_from_py_object_no_sync(object, &tensor) != 0) {
    PyErr_Clear();  // DLPack cannot describe it
    throw NotPlain{};
  }
  TensorInfo info;
  info.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  info.dtype = dtype_of(tensor.dtype);
  if (tensor.device.device_type != kDLCPU && tensor.device.device_type != kDLCUDA) throw NotPlain{};
  // Zeros that autograd has not written anywhere are such a tensor.
  if (tensor.data == nullptr && has_elements(tensor)) throw NotPlain{};
  info.device_type = tensor.device.device_type == kDLCPU ? kCpu : kCuda;
  info.device_index = tensor.device.device_type == kDLCPU ? -1 : tensor.device.device_id;
  if (tensor.ndim > TensorInfo::kMostSizes) throw NotPlain{};
  info.dim = tensor.ndim;
  for (int i = 0; i < tensor.ndim; ++i) {
    info.sizes[i] = tensor.shape[i];
    info.strides[i] = tensor.strides[i];
  }
  if (origin == Origin::kFresh) {
    info.storage_bytes = std::numeric_limits<int64_t>::max();
    return info;
  }
  // A view that negates when read is not what its memory says.
  if (number_from(object, name_is_neg) != 0) throw NotPlain{};
  const Owned storage(PyObject_CallMethodObjArgs(object, name_untyped_storage, nullptr));
  info.storage_bytes = number_from(storage.get(), name_nbytes);
  info.storage_offset = number_from(object, name_storage_offset);
  return info;
}

std::optional<TensorInfo> optional_info_of(PyObject* object) {
  if (object == Py_None) return std::nullopt;
  return info_of(object);
}

// Objects of other types may hold anything.
void check_plain(PyObject* object) {
  if (Py_TYPE(object) != tensor_type && Py_TYPE(object) != parameter_type) throw NotPlain{};
}

void check_plain_or_none(PyObject* object) {
  if (object != Py_None) check_plain(object);
}

bool is_false(PyObject* function) {
  const Owned result(PyObject_CallObject(function, nullptr));
  return result.get() == Py_None || !truth_of(result.get());
}

// Refuses the fast path if a mode, a profiler, a tracer or torch.func observes operators.
void check_unobserved() {
  for (PyObject* const function :
       {len_dispatch_stack, has_function_mode, peek_interpreter, is_profiling, tracing_state}) {
    if (!is_false(function)) throw NotPlain{};
  }
  const Owned level(PyObject_GetAttr(forward_ad, name_current_level));
  if (integer_of(level.get()) >= 0) throw NotPlain{};
}

// A number that an argument of attention holds, if it is of Python's own types.
double plain_number_of(PyObject* object) {
  if (!PyFloat_CheckExact(object) && !PyLong_CheckExact(object)) throw NotPlain{};
  const double number = PyFloat_AsDouble(object);
  if (PyErr_Occurred() == nullptr) return number;
  PyErr_Clear();  // too large
  throw NotPlain{};
}

// A length that an argument of attention holds, or `otherwise` for None.
int64_t length_of(PyObject* object, int64_t otherwise) {
  if (object == Py_None) return otherwise;
  if (!PyLong_CheckExact(object)) throw NotPlain{};
  int overflow = 0;
  const long long length = PyLong_AsLongLongAndOverflow(object, &overflow);
  if (overflow != 0) throw NotPlain{};
  return length;
}

// A window's bound, -1 for None.
int64_t bound_of(PyObject* object) {
  const int64_t bound = length_of(object, -1);
  if (bound < -1) throw NotPlain{};
  return bound;
}

PyObject* tuple_of(std::initializer_list<int64_t> numbers) {
  Owned tuple(PyTuple_New(static_cast<Py_ssize_t>(numbers.size())));
  Py_ssize_t i = 0;
  for (const int64_t number : numbers) PyTuple_SetItem(tuple.get(), i++, Owned(PyLong_FromLongLong(number)).release());
  return tuple.release();
}

PyObject* call_with(PyObject* function, PyObject* argument, PyObject* keywords) {
  const Owned arguments(PyTuple_Pack(1, argument));
  return Owned(PyObject_Call(function, arguments.get(), keywords)).release();
}

// A contiguous tensor of x's dtype and device, of another shape or dtype.
PyObject* make_like(PyObject* x, std::initializer_list<int64_t> shape, PyObject* keywords) {
  const Owned method(PyObject_GetAttr(x, name_new_empty)), sizes(tuple_of(shape));
  return call_with(method.get(), sizes.get(), keywords);
}

// An attribute of an attribute of ... an object.
PyObject* find(PyObject* object, std::initializer_list<const char*> names) {
  Py_INCREF(object);
  for (const char* name : names) {
    PyObject* const next = PyObject_GetAttrString(object, name);
    Py_DECREF(object);
    if (next == nullptr) throw PythonError{};
    object = next;
  }
  return object;
}

// Finds everything of torch that this module uses. Throws PythonError if something is missing; the import then fails.
void find_torch() {
  const Owned torch(PyImport_ImportModule("torch")),
      forward_ad_module(PyImport_ImportModule("torch.autograd.forward_ad"));
  forward_ad = forward_ad_module.get();
  Py_INCREF(forward_ad);
  tensor_type = reinterpret_cast<PyTypeObject*>(find(torch.get(), {"Tensor"}));
  parameter_type = reinterpret_cast<PyTypeObject*>(find(torch.get(), {"nn", "Parameter"}));
  empty_like = find(torch.get(), {"empty_like"});
  is_grad_enabled = find(torch.get(), {"is_grad_enabled"});
  len_dispatch_stack = find(torch.get(), {"_C", "_len_torch_dispatch_stack"});
  has_function_mode = find(torch.get(), {"_C", "_is_torch_function_mode_enabled"});
  peek_interpreter = find(torch.get(), {"_C", "_functorch", "peek_interpreter_stack"});
  is_profiling = find(torch.get(), {"_C", "_autograd", "_profiler_enabled"});
  tracing_state = find(torch.get(), {"_C", "_get_tracing_state"});
  const Owned contiguous(find(torch.get(), {"contiguous_format"})), float32(find(torch.get(), {"float32"})),
      uint8(find(torch.get(), {"uint8"}));
  like_contiguous = Owned(Py_BuildValue("{sO}", "memory_format", contiguous.get())).release();
  as_float32 = Owned(Py_BuildValue("{sO}", "dtype", float32.get())).release();
  as_bytes = Owned(Py_BuildValue("{sO}", "dtype", uint8.get())).release();
  const std::pair<PyObject**, const char*> names[] = {
      {&name_untyped_storage, "untyped_storage"}, {&name_nbytes, "nbytes"},
      {&name_storage_offset, "storage_offset"},   {&name_is_neg, "is_neg"},
      {&name_requires_grad, "requires_grad"},     {&name_new_empty, "new_empty"},
      {&name_current_level, "_current_level"}};
  for (const auto& [place, name] : names) *place = Owned(PyUnicode_InternFromString(name)).release();

  const Owned capsule(find(torch.get(), {"Tensor", "__dlpack_c_exchange_api__"}));
  exchange = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api"));
  if (exchange == nullptr) throw PythonError{};
  if (exchange->header.version.major != DLPACK_MAJOR_VERSION || exchange->dltensor_from_py_object_no_sync == nullptr) {
    PyErr_Format(PyExc_ImportError, "expected DLPack %d with dltensor_from_py_object_no_sync, got DLPack %d",
                 DLPACK_MAJOR_VERSION, static_cast<int>(exchange->header.version.major));
    throw PythonError{};
  }
}

}  // namespace
}  // namespace flashmla
