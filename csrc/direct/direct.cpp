// flashmla_hf._direct: a fast path from Python to a backend that skips torch's dispatcher, which takes longer than the
// launch of a short kernel. An extension module of Python's limited API: one file for every Python >= 3.10.
//
// Tensors are read through DLPack's C exchange API, which torch.Tensor has since torch 2.10; nothing is owned or kept.
// Outputs come from torch.empty_like and torch.Tensor.new_empty. The fast path takes plain calls only. If a tensor is
// of a subclass or must be copied first, if a dispatch mode, a profiler or torch.func observes the call, or if an
// argument is invalid, it computes nothing and returns None; the caller then takes the normal path, which reports
// errors.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include "direct.h"

#include <ATen/dlpack.h>
#include <Python.h>
#include <dlfcn.h>

#include <algorithm>
#include <utility>

namespace flashmla {
namespace {

// A backend's library; null if its device type has none.
struct Library {
  PyObject* name = nullptr;
  DirectForwardFunction* forward = nullptr;
  DirectBackwardFunction* backward = nullptr;
};

// As torch numbers them (c10/core/DeviceType.h).
constexpr int kCpu = 0, kCuda = 1, kNumDeviceTypes = 2;

// Set once, when the module is made; never freed.
const DLPackExchangeAPI* exchange = nullptr;
Library libraries[kNumDeviceTypes];
PyTypeObject *tensor_type, *parameter_type;
PyObject *empty_like, *like_contiguous, *as_float32, *as_bytes;                         // a function, keywords
PyObject *name_untyped_storage, *name_nbytes, *name_storage_offset, *name_is_neg;       // of methods
PyObject *name_requires_grad, *name_new_empty, *name_current_level;                     // of attributes
PyObject *is_grad_enabled, *len_dispatch_stack, *has_function_mode, *peek_interpreter;  // functions
PyObject *is_profiling, *tracing_state, *forward_ad, *with_gradient;

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

// The positions of the arguments that both operators share (flashmla_hf/ops.py).
struct Shared {
  enum Position {
    kQ,
    kK,
    kV,
    kSinks,
    kCuSeqlensQ,
    kCuSeqlensKV,
    kMaxSeqlenQ,
    kMaxSeqlenKV,
    kScale,
    kWindowLeft,
    kWindowRight,
    kSoftcap,
    kDeterministic,
    kCount
  };
};

// Of backward's arguments, before the shared ones.
struct Saved {
  enum Position { kDOut, kDLse, kOut, kLse, kNeedsDQ, kNeedsDK, kNeedsDV, kNeedsDSinks, kCount };
};

// Of attention's arguments (flashmla_hf.attention).
struct Attend {
  enum Position {
    kQ,
    kK,
    kV,
    kScale,
    kIsCausal,
    kWindow,
    kSoftcap,
    kSinks,
    kDropoutP,
    kCuSeqlensQ,
    kCuSeqlensKV,
    kMaxSeqlenQ,
    kMaxSeqlenKV,
    kDeterministic,
    kImpl,
    kReturnLse,
    kCount
  };
};

Arguments arguments_of(PyObject* const* values) {
  return {info_of(values[Shared::kQ]),
          info_of(values[Shared::kK]),
          info_of(values[Shared::kV]),
          optional_info_of(values[Shared::kSinks]),
          optional_info_of(values[Shared::kCuSeqlensQ]),
          optional_info_of(values[Shared::kCuSeqlensKV]),
          integer_of(values[Shared::kMaxSeqlenQ]),
          integer_of(values[Shared::kMaxSeqlenKV]),
          number_of(values[Shared::kScale]),
          integer_of(values[Shared::kWindowLeft]),
          integer_of(values[Shared::kWindowRight]),
          number_of(values[Shared::kSoftcap]),
          truth_of(values[Shared::kDeterministic])};
}

const Library& library_for(const TensorInfo& q) {
  const Library& library = libraries[q.device_type];
  if (library.forward == nullptr) throw NotPlain{};
  return library;
}

void check_count(Py_ssize_t count, Py_ssize_t expected) {
  if (count == expected) return;
  PyErr_Format(PyExc_TypeError, "flashmla_hf._direct: expected %zd arguments, got %zd", expected, count);
  throw PythonError{};
}

// The result of `body`, None if the fast path does not apply, or null with an exception set.
template <class Body>
PyObject* guarded(const Body& body) {
  try {
    return body();
  } catch (const NotPlain&) {
    Py_RETURN_NONE;
  } catch (const PythonError&) {
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
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

// Releases Python's lock: a CPU kernel takes long, and so may a full launch queue.
template <class Function, class Call>
DirectResult run_unlocked(Function* function, const Call& call, DirectError& failure) {
  PyThreadState* const state = PyEval_SaveThread();
  const DirectResult result = function(call, failure);  // throws nothing
  PyEval_RestoreThread(state);
  return result;
}

template <class Function, class Call>
void run(PyObject* q, Function* function, const Call& call) {
  DirectError failure;
  DirectResult result = run_unlocked(function, call, failure);
  if (result == kDirectOutOfMemory) {
    // The same allocation through torch raises torch's own error. If there is memory now, the call runs again.
    Owned(make_like(q, {failure.bytes}, as_bytes));
    result = run_unlocked(function, call, failure);
    if (result == kDirectOutOfMemory)
      throw std::runtime_error("out of memory: torch could not allocate " + std::to_string(failure.bytes) + " bytes");
  }
  if (result == kDirectNotApplicable) throw NotPlain{};
  if (result == kDirectFailed) throw std::runtime_error(failure.message);
}

// (out, lse) of the call, allocated and computed; lse is None if it is not wanted.
PyObject* compute(PyObject* q, const Arguments& arguments, bool wants_lse) {
  const Library& library = library_for(arguments.q);
  const TensorInfo& like = arguments.q;
  const int64_t rank = arguments.cu_seqlens_q ? 3 : 4;
  if (like.dim != rank || arguments.v.dim != rank) throw NotPlain{};
  const int64_t width = arguments.v.sizes[rank - 1];
  const int64_t* sizes = like.sizes;
  const Owned out(sizes[rank - 1] == width ? call_with(empty_like, q, like_contiguous)
                  : rank == 4              ? make_like(q, {sizes[0], sizes[1], sizes[2], width}, nullptr)
                                           : make_like(q, {sizes[0], sizes[1], width}, nullptr));
  Py_INCREF(Py_None);
  Owned lse(Py_None);
  DirectForward call{arguments, info_of(out.get(), Origin::kFresh), std::nullopt};
  if (wants_lse) {
    Py_DECREF(lse.release());
    const Owned made(rank == 4 ? make_like(q, {sizes[0], sizes[2], sizes[1]}, as_float32)
                               : make_like(q, {sizes[1], sizes[0]}, as_float32));
    call.lse = info_of(made.get(), Origin::kFresh);
    run(q, library.forward, call);
    return PyTuple_Pack(2, out.get(), made.get());
  }
  run(q, library.forward, call);
  return PyTuple_Pack(2, out.get(), lse.get());
}

// backward(dout, dlse, out, lse, needs_dq, needs_dk, needs_dv, needs_dsinks, *arguments) -> (dq, dk, dv, dsinks), each
// a tensor or None, or None.
PyObject* backward(PyObject*, PyObject* const* values, Py_ssize_t count) {
  return guarded([&] {
    check_count(count, int{Saved::kCount} + int{Shared::kCount});
    PyObject* const* inputs = values + Saved::kCount;
    // Hooks on saved tensors and callers of backward may hand over any object.
    for (int i = Saved::kDOut; i <= Saved::kLse; ++i) check_plain_or_none(values[i]);
    for (int i = Shared::kQ; i <= Shared::kCuSeqlensKV; ++i) check_plain_or_none(inputs[i]);
    check_unobserved();
    DirectBackward call{arguments_of(inputs), {}};
    BackwardTensors& tensors = call.tensors;
    tensors.dout = info_of(values[Saved::kDOut]);
    tensors.dlse = optional_info_of(values[Saved::kDLse]);
    tensors.out = info_of(values[Saved::kOut]);
    tensors.lse = info_of(values[Saved::kLse]);
    const Library& library = library_for(call.arguments.q);
    Owned gradients(PyTuple_New(4));
    std::optional<TensorInfo>* const infos[] = {&tensors.dq, &tensors.dk, &tensors.dv, &tensors.dsinks};
    for (int i = 0; i < 4; ++i) {  // of q, k, v and sinks: the first of the shared arguments, in their order
      PyObject* gradient = Py_None;
      if (truth_of(values[Saved::kNeedsDQ + i])) {
        gradient = call_with(empty_like, inputs[i], like_contiguous);
        *infos[i] = info_of(gradient, Origin::kFresh);
      } else {
        Py_INCREF(Py_None);
      }
      PyTuple_SetItem(gradients.get(), i, gradient);
    }
    run(inputs[Shared::kQ], library.backward, call);
    return gradients.release();
  });
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

// attend(*values in the order of Attend) -> the result of flashmla_hf.attention, or None. The arguments are
// attention's, unchecked. If a gradient is needed, `with_gradient` gets the computed outputs and records the backward.
PyObject* attend(PyObject*, PyObject* const* values, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    check_count(count, Attend::kCount);
    PyObject *const q = values[Attend::kQ], *const k = values[Attend::kK], *const v = values[Attend::kV],
                    *const scale = values[Attend::kScale], *const window = values[Attend::kWindow],
                    *const sinks = values[Attend::kSinks], *const impl = values[Attend::kImpl],
                    *const cu_seqlens_q = values[Attend::kCuSeqlensQ],
                    *const cu_seqlens_kv = values[Attend::kCuSeqlensKV],
                    *const max_seqlen_q = values[Attend::kMaxSeqlenQ],
                    *const max_seqlen_kv = values[Attend::kMaxSeqlenKV];
    const bool is_packed = cu_seqlens_q != Py_None || cu_seqlens_kv != Py_None;
    const bool returns_lse = truth_of(values[Attend::kReturnLse]);
    check_plain(q), check_plain(k), check_plain(v);
    for (PyObject* const tensor : {sinks, cu_seqlens_q, cu_seqlens_kv}) check_plain_or_none(tensor);
    check_unobserved();
    if (plain_number_of(values[Attend::kDropoutP]) != 0.0) throw NotPlain{};
    Arguments arguments;
    arguments.window_left = arguments.window_right = -1;
    if (window != Py_None) {
      if (!PyTuple_CheckExact(window) || PyTuple_Size(window) != 2) throw NotPlain{};
      arguments.window_left = bound_of(PyTuple_GetItem(window, 0));
      arguments.window_right = bound_of(PyTuple_GetItem(window, 1));
    }
    if (truth_of(values[Attend::kIsCausal])) arguments.window_right = 0;
    arguments.softcap = plain_number_of(values[Attend::kSoftcap]);
    arguments.deterministic = truth_of(values[Attend::kDeterministic]);

    arguments.q = info_of(q);
    const Library& library = library_for(arguments.q);
    if (impl != Py_None && (!PyUnicode_CheckExact(impl) || PyUnicode_Compare(impl, library.name) != 0)) {
      throw NotPlain{};
    }
    arguments.k = info_of(k);
    const int64_t rank = is_packed ? 3 : 4;
    if (arguments.q.dim != rank || arguments.k.dim != rank) throw NotPlain{};
    if (!is_packed && (max_seqlen_q != Py_None || max_seqlen_kv != Py_None)) throw NotPlain{};
    arguments.max_seqlen_q = length_of(max_seqlen_q, arguments.q.sizes[rank - 3]);
    arguments.max_seqlen_kv = length_of(max_seqlen_kv, arguments.k.sizes[rank - 3]);
    arguments.scale =
        scale == Py_None ? std::pow(static_cast<double>(arguments.q.sizes[rank - 1]), -0.5) : plain_number_of(scale);

    arguments.v = info_of(v);
    arguments.sinks = optional_info_of(sinks);
    arguments.cu_seqlens_q = optional_info_of(cu_seqlens_q);
    arguments.cu_seqlens_kv = optional_info_of(cu_seqlens_kv);
    auto requires_grad = [](PyObject* tensor) {
      return tensor != Py_None && Owned(PyObject_GetAttr(tensor, name_requires_grad)).get() == Py_True;
    };
    const bool needs_gradient = (requires_grad(q) || requires_grad(k) || requires_grad(v) || requires_grad(sinks)) &&
                                !is_false(is_grad_enabled);
    Owned outputs(compute(q, arguments, returns_lse || needs_gradient));
    if (needs_gradient) {
      return Owned(PyObject_CallFunction(
                       with_gradient, "OOOO(OOLLdLLdO)OO", q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv,
                       static_cast<long long>(arguments.max_seqlen_q), static_cast<long long>(arguments.max_seqlen_kv),
                       arguments.scale, static_cast<long long>(arguments.window_left),
                       static_cast<long long>(arguments.window_right), arguments.softcap,
                       arguments.deterministic ? Py_True : Py_False, outputs.get(), values[Attend::kReturnLse]))
          .release();
    }
    if (returns_lse) return outputs.release();
    PyObject* const out = PyTuple_GetItem(outputs.get(), 0);
    Py_INCREF(out);
    return out;
  });
}

// set_up(with_gradient, ((device type, implementation, path of its library), ...)). The libraries are loaded already
// (torch.ops.load_library), and stay.
PyObject* set_up(PyObject*, PyObject* const* values, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    check_count(count, 2);
    Py_INCREF(values[0]);
    with_gradient = values[0];
    for (Py_ssize_t i = 0; i < PyTuple_Size(values[1]); ++i) {
      int device_type;
      PyObject *name, *path;
      if (!PyArg_ParseTuple(PyTuple_GetItem(values[1], i), "iUU", &device_type, &name, &path)) throw PythonError{};
      if (device_type < 0 || device_type >= kNumDeviceTypes) throw std::runtime_error("expected a device type 0 or 1");
      const Owned encoded(PyUnicode_EncodeFSDefault(path));
      void* const handle = dlopen(PyBytes_AsString(encoded.get()), RTLD_NOW | RTLD_LOCAL);
      if (handle == nullptr) throw std::runtime_error(dlerror());
      const auto abi = reinterpret_cast<DirectAbiFunction*>(dlsym(handle, "flashmla_direct_abi"));
      if (abi == nullptr || abi() != FLASHMLA_DIRECT_ABI) {
        throw std::runtime_error("it and a backend's library are of different builds: build or install them together");
      }
      Library& library = libraries[device_type];
      library.forward = reinterpret_cast<DirectForwardFunction*>(dlsym(handle, "flashmla_direct_forward"));
      library.backward = reinterpret_cast<DirectBackwardFunction*>(dlsym(handle, "flashmla_direct_backward"));
      Py_INCREF(name);
      library.name = name;
    }
    Py_RETURN_NONE;
  });
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

template <class Function>
PyCFunction as_method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"attend", as_method(attend), METH_FASTCALL, nullptr},
    {"backward", as_method(backward), METH_FASTCALL, nullptr},
    {"set_up", as_method(set_up), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "flashmla_hf._direct", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace flashmla

PyMODINIT_FUNC PyInit__direct() {
  return flashmla::guarded([] {
    flashmla::find_torch();
    return PyModule_Create(&flashmla::module);
  });
}
