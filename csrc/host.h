// What the host sides share: how outputs are allocated and how a checked call becomes ForwardParams or BackwardParams.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <utility>

#include "checks.h"

namespace flashmla {

inline int32_t dtype_code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    default:
      return aoti_torch_dtype_float32();
  }
}

// A contiguous tensor on the device of `like`; Half, BFloat16, Float or Byte. torch::stable::new_empty goes by way of
// the dispatcher, boxed, and takes several times as long: on a GPU longer than the launch.
inline Tensor make_tensor(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= std::max<int64_t>(1, shape[i])) strides[i] = stride;
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                         strides.data(), dtype_code(dtype), device_type,
                                                         like.get_device_index(), &handle));
  return Tensor(handle);
}

inline TensorView output_view(const Tensor& t, bool is_packed) {
  (void)t.mutable_data_ptr();
  return view_of(t, is_packed);
}

// A gradient expanded over the rows (lse.sum().backward()) is not contiguous.
inline Tensor rows_contiguous(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) > 1 && t.stride(last) != 1 ? torch::stable::contiguous(t) : t;
}

// out [.., seqlen_q, heads_q, head_dim_v] in q's dtype and lse [.., heads_q, seqlen_q] fp32, uninitialised.
struct ForwardCall {
  ForwardParams params;
  Tensor out, lse;
};

inline ForwardCall make_forward(const Problem& p, const Tensor& q, const Tensor& k, const Tensor& v) {
  const bool is_packed = p.cu_seqlens_q != nullptr;
  std::vector<int64_t> out_shape = shape_of(q);
  out_shape.back() = p.head_dim_v;
  ForwardCall call{{},
                   make_tensor(q, out_shape, q.scalar_type()),
                   make_tensor(q,
                               is_packed ? std::vector<int64_t>{p.heads_q, p.total_q}
                                         : std::vector<int64_t>{p.batch, p.heads_q, p.seqlen_q},
                               ScalarType::Float)};
  call.params.problem = p;
  call.params.q = view_of(q, is_packed);
  call.params.k = view_of(k, is_packed);
  call.params.v = view_of(v, is_packed);
  call.params.out = output_view(call.out, is_packed);
  call.params.lse = row_view_of(call.lse, is_packed);
  return call;
}

// Gradients as their inputs (empty where not needed), dsinks fp32; uninitialised. params reads lse and dlse by way of
// the rows kept here.
struct BackwardCall {
  BackwardParams params;
  Tensor dq, dk, dv, dsinks;
  Tensor lse_rows, dlse_rows;
};

// After check_inputs and check_saved.
inline BackwardCall make_backward(const char* op, const Problem& p, const Tensor& dout,
                                  const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Tensor& out, const Tensor& lse, bool needs_dq, bool needs_dk, bool needs_dv,
                                  bool needs_dsinks) {
  if (needs_dsinks && p.sinks == nullptr) fail(op, "needs_dsinks", "False, since sinks is None", "True");
  const bool is_packed = p.cu_seqlens_q != nullptr;
  const std::vector<int64_t> none = {0};
  BackwardCall call{{},
                    make_tensor(q, needs_dq ? shape_of(q) : none, q.scalar_type()),
                    make_tensor(k, needs_dk ? shape_of(k) : none, q.scalar_type()),
                    make_tensor(v, needs_dv ? shape_of(v) : none, q.scalar_type()),
                    make_tensor(q, needs_dsinks ? std::vector<int64_t>{p.heads_q} : none, ScalarType::Float),
                    rows_contiguous(lse),
                    rows_contiguous(dlse.value_or(lse))};
  BackwardParams& params = call.params;
  params.problem = p;
  params.q = view_of(q, is_packed);
  params.k = view_of(k, is_packed);
  params.v = view_of(v, is_packed);
  params.out = view_of(out, is_packed);
  params.dout = view_of(dout, is_packed);
  params.lse = row_view_of(call.lse_rows, is_packed);
  if (dlse.has_value()) params.dlse = row_view_of(call.dlse_rows, is_packed);
  if (needs_dq) params.dq = output_view(call.dq, is_packed);
  if (needs_dk) params.dk = output_view(call.dk, is_packed);
  if (needs_dv) params.dv = output_view(call.dv, is_packed);
  if (needs_dsinks) params.dsinks = static_cast<float*>(call.dsinks.mutable_data_ptr());
  return call;
}

}  // namespace flashmla
