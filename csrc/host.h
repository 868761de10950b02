// What the host sides share: how outputs are allocated and how a checked call becomes ForwardParams or BackwardParams.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <utility>

#include "checks.h"

namespace flashmla {

inline Tensor make_tensor(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, dtype);
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

// Checks what check_inputs has not seen.
inline BackwardCall make_backward(const char* op, const Problem& p, const Tensor& dout,
                                  const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Tensor& out, const Tensor& lse, bool needs_dq, bool needs_dk, bool needs_dv,
                                  bool needs_dsinks) {
  check_saved(op, p, q, dout, dlse, out, lse);
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
