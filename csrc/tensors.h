// Tensors by torch's C interface: what the host reads of one, new ones, and torch's own error if there is no memory.
//
// The C interface gives a code for every failure: the exception's type is gone, and before torch 2.13 its message too.
// Users catch torch.OutOfMemoryError, so the allocation that failed is asked for once more in a way that throws.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "checks.h"

namespace flashmla {

using torch::stable::Tensor;

// Of torch's C functions. Torch's own macro for this has another name in 2.10 to 2.12 than from 2.13 on.
inline void expect_success(AOTITorchError error, const char* function) {
  if (error != TORCH_SUCCESS) throw std::runtime_error(std::string("torch's ") + function + " failed");
}

inline TensorInfo info_of(const Tensor& t) {
  TensorInfo info;
  info.data = const_cast<void*>(t.const_data_ptr());
  info.dtype = t.scalar_type();
  expect_success(aoti_torch_get_device_type(t.get(), &info.device_type), "aoti_torch_get_device_type");
  info.device_index = t.get_device_index();
  info.dim = t.dim();
  for (int64_t i = 0; i < std::min<int64_t>(info.dim, TensorInfo::kMostSizes); ++i) {
    info.sizes[i] = t.size(i);
    info.strides[i] = t.stride(i);
  }
  expect_success(aoti_torch_get_storage_size(t.get(), &info.storage_bytes), "aoti_torch_get_storage_size");
  expect_success(aoti_torch_get_storage_offset(t.get(), &info.storage_offset), "aoti_torch_get_storage_offset");
  return info;
}

inline std::optional<TensorInfo> info_of(const std::optional<Tensor>& t) {
  if (!t.has_value()) return std::nullopt;
  return info_of(*t);
}

// Thrown by make_tensor to direct/direct.cpp, which has Python raise torch's error.
struct AllocationFailure : std::runtime_error {
  int64_t bytes;
  explicit AllocationFailure(int64_t bytes_)
      : std::runtime_error("out of memory: torch could not allocate " + std::to_string(bytes_) + " bytes"),
        bytes(bytes_) {}
};

// Whether make_tensor throws torch's own error in this thread: in an operator's body (with_torch_errors).
inline thread_local bool throws_torch_errors = false;

inline int32_t dtype_code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    default:
      return aoti_torch_dtype_float32();
  }
}

// Throws what torch throws for an allocation of so many bytes on the device of `like`: a c10::OutOfMemoryError on a
// GPU, a c10::Error on a CPU, which Python sees as torch.OutOfMemoryError and RuntimeError. Returns if memory has
// become free meanwhile, or if this torch does not have the function. It is called while everything that was allocated
// before is still there.
//
// at::repeat is called, whose C++ name and arguments have been the same since torch 2.0 and name no type that moves
// between headers; at::Tensor is one pointer, c10::ArrayRef<c10::SymInt> a pointer and a length. That is no part of the
// stable ABI: the symbol is looked up, and only after an allocation has failed. What is repeated is the first element
// of `like`: there may not be memory for even one of its own.
inline void throw_torch_error(int64_t bytes, const TensorInfo& like) {
  struct Object {
    void* implementation = nullptr;
    ~Object() {}  // torch frees it; not trivial, as at::Tensor, so that it is returned in memory
  };
  struct Sizes {
    const int64_t* data;
    size_t size;
  };
  using Repeat = Object(const Object&, Sizes);
  void* const symbol = dlsym(RTLD_DEFAULT, "_ZN2at4_ops6repeat4callERKNS_6TensorEN3c108ArrayRefINS5_6SymIntEEE");
  if (symbol == nullptr || like.numel() == 0) return;
  const int64_t one = 1;
  AtenTensorHandle handle = nullptr;
  expect_success(aoti_torch_create_tensor_from_blob(like.data, 1, &one, &one, 0, dtype_code(like.dtype),
                                                    like.device_type, like.device_index, &handle),
                 "aoti_torch_create_tensor_from_blob");
  const Tensor element(handle);
  const int64_t count = (bytes + element_size(like.dtype) - 1) / element_size(like.dtype);
  const auto repeat = reinterpret_cast<Repeat*>(symbol);
  Object* const repeated = new Object(repeat(*reinterpret_cast<const Object*>(element.get()), {&count, 1}));
  Tensor(reinterpret_cast<AtenTensorHandle>(repeated));  // owned, and given back
}

// A contiguous tensor on the device of `like`, uninitialised; Half, BFloat16, Float, Int or Byte.
// torch::stable::new_empty goes by way of the dispatcher, boxed, and takes several times as long: on a GPU longer than
// the launch.
inline Tensor make_tensor(const TensorInfo& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1, count = 1;  // check_sizes keeps both far from overflow
  for (size_t i = shape.size(); i-- > 0; stride *= std::max<int64_t>(1, shape[i])) strides[i] = stride;
  for (const int64_t size : shape) count *= size;
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype_code(dtype),
                               like.device_type, like.device_index, &handle) != TORCH_SUCCESS) {
    const int64_t bytes = count * (dtype == ScalarType::Byte ? 1 : element_size(dtype));
    if (throws_torch_errors) throw_torch_error(bytes, like);
    throw AllocationFailure(bytes);
  }
  return Tensor(handle);
}

// A copy without holes, as torch's contiguous() makes one, but for the error where memory is short.
inline Tensor make_copy(const TensorInfo& info, const Tensor& t) {
  Tensor copy = make_tensor(info, info.shape(), info.dtype);
  torch::stable::copy_(copy, t);
  return copy;
}

// What an operator's body gives; torch's own error if memory is short.
template <class Body>
auto with_torch_errors(const Body& body) {
  struct Scope {
    Scope() { throws_torch_errors = true; }
    ~Scope() { throws_torch_errors = false; }
  } const scope;
  return body();
}

}  // namespace flashmla
