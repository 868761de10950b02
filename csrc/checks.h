// What every backend checks before it trusts a pointer: ranks, dtypes, shapes, strides, storage bounds, numbers.
//
// Every failure throws std::runtime_error with one sentence of the form
//   flash_attn_forward: k: expected dtype bfloat16 (that of q), got float16
// so that Python sees the operator, the argument, what was expected and what came. Nothing here depends on a device;
// the values inside cu_seqlens are checked by check_cu_seqlens, on a host copy.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "params.h"

namespace flashmla {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// "flash_attn_forward: k: expected <expected>, got <got>"
template <typename Expected, typename Got>
[[noreturn]] inline void fail(const char* op, const char* argument, const Expected& expected, const Got& got) {
  std::ostringstream message;
  message << op << ": " << argument << ": expected " << expected << ", got " << got;
  throw std::runtime_error(message.str());
}

inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline std::string shape_name(const std::vector<int64_t>& shape) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
  text << "]";
  return text.str();
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape(static_cast<size_t>(t.dim()));
  for (size_t i = 0; i < shape.size(); ++i) shape[i] = t.size(static_cast<int64_t>(i));
  return shape;
}

// Reads what it needs of a tensor without trusting it: the last element must lie inside the storage.
inline void check_storage(const char* op, const char* name, const Tensor& t) {
  if (t.numel() == 0) return;
  int64_t storage_bytes = 0, offset = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &storage_bytes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &offset));
  double last = static_cast<double>(offset);  // in double: absurd shapes must not overflow
  for (int64_t i = 0; i < t.dim(); ++i) last += static_cast<double>(t.size(i) - 1) * static_cast<double>(t.stride(i));
  const double needed = (last + 1) * static_cast<double>(t.element_size());
  if (t.const_data_ptr() == nullptr || needed > static_cast<double>(storage_bytes))
    fail(op, name, "a storage that holds all of " + shape_name(shape_of(t)),
         "a storage of " + std::to_string(storage_bytes) + " bytes");
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& q) {
  int32_t type = 0, expected_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(q.get(), &expected_type));
  if (type != expected_type || t.get_device_index() != q.get_device_index())
    fail(op, name, "a tensor on the device of q", "one on another device");
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType expected, const char* why) {
  if (t.scalar_type() != expected) fail(op, name, "dtype " + dtype_name(expected) + why, dtype_name(t.scalar_type()));
}

inline void check_shape(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& expected,
                        const char* meaning) {
  const std::vector<int64_t> shape = shape_of(t);
  if (shape != expected)
    fail(op, name, "shape " + shape_name(expected) + " (" + meaning + ")", "shape " + shape_name(shape));
}

inline void check_last_stride(const char* op, const char* name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.size(last) > 1 && t.stride(last) != 1)
    fail(op, name, "a contiguous last dimension (stride 1)", "stride " + std::to_string(t.stride(last)));
}

inline void check_flag_number(const char* op, const char* name, int64_t value, int64_t least) {
  if (value < least) fail(op, name, "at least " + std::to_string(least), value);
}

// The numbers of every call: scale, windows, softcap. Windows that reach every key become -1 (unbounded), which also
// keeps later arithmetic on them far from overflow.
inline void check_scalars(const char* op, double scale, int64_t window_left, int64_t window_right, double softcap,
                          Problem& p) {
  if (!std::isfinite(scale) || !std::isfinite(static_cast<float>(scale))) fail(op, "scale", "a finite number", scale);
  check_flag_number(op, "window_left", window_left, -1);
  check_flag_number(op, "window_right", window_right, -1);
  const float softcap_f32 = static_cast<float>(softcap);
  if (!std::isfinite(softcap_f32) || softcap < 0.0 ||
      (softcap > 0.0 && softcap_f32 < std::numeric_limits<float>::min()))
    fail(op, "softcap", "0 (none) or a finite positive number", softcap);
  p.scale = static_cast<float>(scale);
  p.softcap = softcap_f32;
  const int64_t reach = p.seqlen_q + p.seqlen_kv;
  p.window_left = window_left >= reach ? -1 : window_left;
  p.window_right = window_right >= reach ? -1 : window_right;
}

// q, k, v and sinks; fills everything of Problem but the scalars, and for the packed layout the sequence lengths.
inline Problem check_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                            const std::optional<Tensor>& sinks, const std::optional<Tensor>& cu_seqlens_q,
                            const std::optional<Tensor>& cu_seqlens_kv) {
  Problem p;
  switch (q.scalar_type()) {
    case ScalarType::Float:
      p.dtype = DType::kFloat32;
      break;
    case ScalarType::Half:
      p.dtype = DType::kFloat16;
      break;
    case ScalarType::BFloat16:
      p.dtype = DType::kBFloat16;
      break;
    default:
      fail(op, "q", "dtype float32, float16 or bfloat16", dtype_name(q.scalar_type()));
  }
  check_same_device(op, "k", k, q);
  check_same_device(op, "v", v, q);
  check_dtype(op, "k", k, q.scalar_type(), " (that of q)");
  check_dtype(op, "v", v, q.scalar_type(), " (that of q)");

  if (cu_seqlens_q.has_value() != cu_seqlens_kv.has_value())
    fail(op, cu_seqlens_q.has_value() ? "cu_seqlens_kv" : "cu_seqlens_q", "a tensor, since the other cu_seqlens is one",
         "None");
  const bool is_packed = cu_seqlens_q.has_value();
  const int64_t rank = is_packed ? 3 : 4;
  const char* layout = is_packed ? "3 dimensions, [total, heads, dim], with cu_seqlens"
                                 : "4 dimensions, [batch, seqlen, heads, dim], without cu_seqlens";
  const std::pair<const char*, const Tensor*> inputs[] = {{"q", &q}, {"k", &k}, {"v", &v}};
  for (const auto& [name, t] : inputs) {
    if (t->dim() != rank) fail(op, name, layout, "shape " + shape_name(shape_of(*t)));
    for (const int64_t size : shape_of(*t))
      if (size > std::numeric_limits<int32_t>::max())
        fail(op, name, "sizes below 2^31", "shape " + shape_name(shape_of(*t)));
    if (t->size(rank - 1) < 1) fail(op, name, "a head dimension of at least 1", 0);
    if (t->size(rank - 2) < 1) fail(op, name, "at least 1 head", 0);
    check_last_stride(op, name, *t);
    check_storage(op, name, *t);
  }

  p.heads_q = q.size(rank - 2);
  p.heads_kv = k.size(rank - 2);
  p.head_dim_qk = q.size(rank - 1);
  p.head_dim_v = v.size(rank - 1);
  std::vector<int64_t> k_shape = shape_of(k);
  k_shape[rank - 1] = p.head_dim_qk;
  if (!is_packed) k_shape[0] = q.size(0);
  check_shape(op, "k", k, k_shape, is_packed ? "head dimension of q" : "batch and head dimension of q");
  std::vector<int64_t> v_shape = k_shape;
  v_shape[rank - 1] = p.head_dim_v;
  check_shape(op, "v", v, v_shape, "that of k but for the head dimension");
  if (p.heads_q % p.heads_kv != 0)
    fail(op, "q", "a multiple of the " + std::to_string(p.heads_kv) + " kv heads",
         std::to_string(p.heads_q) + " heads");

  if (is_packed) {
    p.total_q = q.size(0);
    p.total_kv = k.size(0);
    const std::pair<const char*, const Tensor*> cumulative[] = {{"cu_seqlens_q", &*cu_seqlens_q},
                                                                {"cu_seqlens_kv", &*cu_seqlens_kv}};
    for (const auto& [name, t] : cumulative) {
      check_same_device(op, name, *t, q);
      check_dtype(op, name, *t, ScalarType::Int, "");
      if (t->dim() != 1 || t->size(0) < 1)
        fail(op, name, "1 dimension, [num_sequences + 1]", "shape " + shape_name(shape_of(*t)));
      if (t->size(0) > 1 && t->stride(0) != 1)
        fail(op, name, "a contiguous tensor", "stride " + std::to_string(t->stride(0)));
      check_storage(op, name, *t);
    }
    check_shape(op, "cu_seqlens_kv", *cu_seqlens_kv, shape_of(*cu_seqlens_q), "that of cu_seqlens_q");
    p.batch = cu_seqlens_q->size(0) - 1;
    p.cu_seqlens_q = static_cast<const int32_t*>(cu_seqlens_q->const_data_ptr());
    p.cu_seqlens_kv = static_cast<const int32_t*>(cu_seqlens_kv->const_data_ptr());
  } else {
    p.batch = q.size(0);
    p.seqlen_q = q.size(1);
    p.seqlen_kv = k.size(1);
    p.total_q = p.batch * p.seqlen_q;
    p.total_kv = p.batch * p.seqlen_kv;
  }
  if (sinks.has_value()) {
    check_same_device(op, "sinks", *sinks, q);
    check_dtype(op, "sinks", *sinks, ScalarType::Float, "");
    check_shape(op, "sinks", *sinks, {p.heads_q}, "heads of q");
    if (p.heads_q > 1 && sinks->stride(0) != 1)
      fail(op, "sinks", "a contiguous tensor", "stride " + std::to_string(sinks->stride(0)));
    check_storage(op, "sinks", *sinks);
    p.sinks = static_cast<const float*>(sinks->const_data_ptr());
  }
  return p;
}

// The values of one cu_seqlens (`values` is host memory): returns the longest sequence.
inline int64_t check_cu_seqlens(const char* op, const char* name, const char* max_name, const int32_t* values,
                                int64_t batch, int64_t total, int64_t max_seqlen) {
  if (values[0] != 0) fail(op, name, "to start at 0", values[0]);
  int64_t longest = 0;
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t length = static_cast<int64_t>(values[i + 1]) - values[i];
    if (length < 0)
      fail(op, name, "non-decreasing values",
           std::to_string(values[i]) + " then " + std::to_string(values[i + 1]) + " at " + std::to_string(i + 1));
    longest = length > longest ? length : longest;
  }
  if (values[batch] > total)
    fail(op, name, "to end within the " + std::to_string(total) + " packed rows", values[batch]);
  if (max_seqlen < longest) fail(op, max_name, "at least the longest sequence, " + std::to_string(longest), max_seqlen);
  return longest;
}

// out, dout, lse and dlse of a backward call.
inline void check_saved(const char* op, const Problem& p, const Tensor& q, const Tensor& dout,
                        const std::optional<Tensor>& dlse, const Tensor& out, const Tensor& lse) {
  std::vector<int64_t> out_shape = shape_of(q);
  out_shape.back() = p.head_dim_v;
  const std::vector<int64_t> lse_shape = p.cu_seqlens_q ? std::vector<int64_t>{p.heads_q, p.total_q}
                                                        : std::vector<int64_t>{p.batch, p.heads_q, p.seqlen_q};
  const std::pair<const char*, const Tensor*> outs[] = {{"dout", &dout}, {"out", &out}};
  for (const auto& [name, t] : outs) {
    check_same_device(op, name, *t, q);
    check_dtype(op, name, *t, q.scalar_type(), " (that of q)");
    check_shape(op, name, *t, out_shape, "that of the forward's out");
    check_last_stride(op, name, *t);
    check_storage(op, name, *t);
  }
  const std::pair<const char*, const Tensor*> statistics[] = {{"lse", &lse},
                                                              {"dlse", dlse.has_value() ? &*dlse : nullptr}};
  for (const auto& [name, t] : statistics) {
    if (t == nullptr) continue;
    check_same_device(op, name, *t, q);
    check_dtype(op, name, *t, ScalarType::Float, "");
    check_shape(op, name, *t, lse_shape, "that of the forward's lse");
    check_storage(op, name, *t);
  }
}

inline TensorView view_of(const Tensor& t, bool is_packed) {
  TensorView view;
  view.data = const_cast<void*>(t.const_data_ptr());
  view.stride_batch = is_packed ? 0 : t.stride(0);
  view.stride_seqlen = t.stride(is_packed ? 0 : 1);
  view.stride_heads = t.stride(is_packed ? 1 : 2);
  return view;
}

// The last stride must be 1 (see rows_contiguous in the callers).
inline RowView row_view_of(const Tensor& t, bool is_packed) {
  RowView view;
  view.data = static_cast<float*>(const_cast<void*>(t.const_data_ptr()));
  view.stride_batch = is_packed ? 0 : t.stride(0);
  view.stride_heads = t.stride(is_packed ? 0 : 1);
  return view;
}

}  // namespace flashmla
