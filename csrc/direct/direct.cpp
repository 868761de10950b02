// flashmla_hf._direct: a fast path from Python to a backend that skips torch's dispatcher, which takes longer than the
// launch of a short kernel. An extension module of Python's limited API: one file for every Python >= 3.10.
//
// Tensors are read through DLPack's C exchange API, which torch.Tensor has since torch 2.10; nothing is owned or kept.
// Outputs come from torch.empty_like and torch.Tensor.new_empty. The fast path takes plain calls only. If a tensor is
// of a subclass or must be copied first, if a dispatch mode, a profiler or torch.func observes the call, or if an
// argument is invalid, it computes nothing and returns None; the caller then takes the normal path, which reports
// errors.
#include <dlfcn.h>

#include "direct/objects.h"

namespace flashmla {
namespace {

// A backend's library; null if its device type has none.
struct Library {
  PyObject* name = nullptr;
  DirectForwardFunction* forward = nullptr;
  DirectBackwardFunction* backward = nullptr;
  DirectDecodeFunction* decode = nullptr;
};

Library libraries[kNumDeviceTypes];
PyObject* with_gradient;  // set by set_up

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

// Of decode_attention's arguments (flashmla_hf.decode_attention).
struct Decode {
  enum Position {
    kQ,
    kK,
    kV,
    kCacheSeqlens,
    kBlockTable,
    kKvStart,
    kScale,
    kIsCausal,
    kWindow,
    kSoftcap,
    kSinks,
    kNumSplits,
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

template <class Call>
void read_window(PyObject* window, PyObject* is_causal, Call& arguments) {
  arguments.window_left = arguments.window_right = -1;
  if (window != Py_None) {
    if (!PyTuple_CheckExact(window) || PyTuple_Size(window) != 2) throw NotPlain{};
    arguments.window_left = bound_of(PyTuple_GetItem(window, 0));
    arguments.window_right = bound_of(PyTuple_GetItem(window, 1));
  }
  if (truth_of(is_causal)) arguments.window_right = 0;
}

// The implementation that was asked for by name must be this library's.
void check_name(PyObject* impl, const Library& library) {
  if (impl != Py_None && (!PyUnicode_CheckExact(impl) || PyUnicode_Compare(impl, library.name) != 0)) throw NotPlain{};
}

double scale_of(PyObject* scale, const TensorInfo& q) {
  return scale == Py_None ? std::pow(static_cast<double>(q.sizes[q.dim - 1]), -0.5) : plain_number_of(scale);
}

bool any_requires_grad(std::initializer_list<PyObject*> tensors) {
  for (PyObject* const tensor : tensors)
    if (tensor != Py_None && Owned(PyObject_GetAttr(tensor, name_requires_grad)).get() == Py_True)
      return !is_false(is_grad_enabled);
  return false;
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
    read_window(window, values[Attend::kIsCausal], arguments);
    arguments.softcap = plain_number_of(values[Attend::kSoftcap]);
    arguments.deterministic = truth_of(values[Attend::kDeterministic]);

    arguments.q = info_of(q);
    check_name(impl, library_for(arguments.q));
    arguments.k = info_of(k);
    const int64_t rank = is_packed ? 3 : 4;
    if (arguments.q.dim != rank || arguments.k.dim != rank) throw NotPlain{};
    if (!is_packed && (max_seqlen_q != Py_None || max_seqlen_kv != Py_None)) throw NotPlain{};
    arguments.max_seqlen_q = length_of(max_seqlen_q, arguments.q.sizes[rank - 3]);
    arguments.max_seqlen_kv = length_of(max_seqlen_kv, arguments.k.sizes[rank - 3]);
    arguments.scale = scale_of(scale, arguments.q);

    arguments.v = info_of(v);
    arguments.sinks = optional_info_of(sinks);
    arguments.cu_seqlens_q = optional_info_of(cu_seqlens_q);
    arguments.cu_seqlens_kv = optional_info_of(cu_seqlens_kv);
    const bool needs_gradient = any_requires_grad({q, k, v, sinks});
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

// decode(*values in the order of Decode) -> the result of flashmla_hf.decode_attention without new keys, or None. The
// arguments are decode_attention's, unchecked; a tensor that requires a gradient is refused by the normal path.
PyObject* decode(PyObject*, PyObject* const* values, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    check_count(count, Decode::kCount);
    PyObject *const q = values[Decode::kQ], *const k = values[Decode::kK], *const v = values[Decode::kV],
                    *const sinks = values[Decode::kSinks], *const num_splits = values[Decode::kNumSplits];
    check_plain(q), check_plain(k), check_plain(v);
    for (const int i : {Decode::kCacheSeqlens, Decode::kBlockTable, Decode::kKvStart, Decode::kSinks})
      check_plain_or_none(values[i]);
    check_unobserved();
    DirectDecode call{};
    DecodeArguments& arguments = call.arguments;
    read_window(values[Decode::kWindow], values[Decode::kIsCausal], arguments);
    arguments.softcap = plain_number_of(values[Decode::kSoftcap]);
    const int64_t splits = length_of(num_splits, -1);
    if (splits != 0 && splits != 1) throw NotPlain{};
    arguments.can_split = splits == 0;
    if (any_requires_grad({q, k, v, sinks})) throw NotPlain{};

    arguments.q = info_of(q);
    const Library& library = library_for(arguments.q);
    check_name(values[Decode::kImpl], library);
    arguments.k = info_of(k);
    arguments.v = info_of(v);
    if (library.decode == nullptr || arguments.q.dim != 4 || arguments.v.dim != 4) throw NotPlain{};
    arguments.scale = scale_of(values[Decode::kScale], arguments.q);
    arguments.sinks = optional_info_of(sinks);
    arguments.cache_seqlens = optional_info_of(values[Decode::kCacheSeqlens]);
    arguments.kv_start = optional_info_of(values[Decode::kKvStart]);
    arguments.block_table = optional_info_of(values[Decode::kBlockTable]);

    const int64_t* const sizes = arguments.q.sizes;
    const int64_t width = arguments.v.sizes[3];
    const Owned out(sizes[3] == width ? call_with(empty_like, q, like_contiguous)
                                      : make_like(q, {sizes[0], sizes[1], sizes[2], width}, nullptr));
    call.out = info_of(out.get(), Origin::kFresh);
    if (!truth_of(values[Decode::kReturnLse])) {
      run(q, library.decode, call);
      Py_INCREF(out.get());
      return out.get();
    }
    const Owned lse(make_like(q, {sizes[0], sizes[2], sizes[1]}, as_float32));
    call.lse = info_of(lse.get(), Origin::kFresh);
    run(q, library.decode, call);
    return PyTuple_Pack(2, out.get(), lse.get());
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
      library.decode = reinterpret_cast<DirectDecodeFunction*>(dlsym(handle, "flashmla_direct_decode"));
      Py_INCREF(name);
      library.name = name;
    }
    Py_RETURN_NONE;
  });
}

template <class Function>
PyCFunction as_method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"attend", as_method(attend), METH_FASTCALL, nullptr},
    {"backward", as_method(backward), METH_FASTCALL, nullptr},
    {"decode", as_method(decode), METH_FASTCALL, nullptr},
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
