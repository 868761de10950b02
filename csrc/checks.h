// What every backend checks before it trusts a pointer: ranks, dtypes, shapes, strides, storage bounds, numbers.
//
// Every failure throws std::runtime_error with one sentence of the form
//   flash_attn_forward: k: expected dtype bfloat16 (that of q), got float16
// so that Python sees the operator, the argument, what was expected and what came. Nothing here depends on a device,
// nor on how the host came by a tensor; the values inside cu_seqlens are checked by check_cu_seqlens, on a host copy.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
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

// What the host reads of a tensor before it trusts it: from torch's stable ABI (host.h) or from DLPack (direct/).
struct TensorInfo {
  static constexpr int kMostSizes = 8;  // of a tensor with more dimensions, which nobody takes, the first

  void* data = nullptr;
  ScalarType dtype = ScalarType::Undefined;
  int32_t device_type = -1, device_index = -1;  // as torch numbers them
  int64_t dim = 0;
  int64_t sizes[kMostSizes] = {}, strides[kMostSizes] = {};  // in elements
  int64_t storage_bytes = 0, storage_offset = 0;             // all of it, and the elements of it before `data`

  int64_t size(int64_t i) const { return sizes[i]; }
  int64_t stride(int64_t i) const { return strides[i]; }
  std::vector<int64_t> shape() const { return {sizes, sizes + std::min<int64_t>(dim, kMostSizes)}; }
  // Of more than 2^63, which a view without elements may have along its other dimensions, 2^63 - 1.
  int64_t numel() const {
    const int64_t* const end = sizes + std::min<int64_t>(dim, kMostSizes);
    if (std::find(sizes, end, 0) != end) return 0;
    int64_t count = 1;
    for (const int64_t* size = sizes; size != end; ++size)
      if (__builtin_mul_overflow(count, *size, &count)) return std::numeric_limits<int64_t>::max();
    return count;
  }
};

// The tensors and numbers of every call, as flashmla_hf/ops.py describes them.
struct Arguments {
  TensorInfo q, k, v;
  std::optional<TensorInfo> sinks, cu_seqlens_q, cu_seqlens_kv;
  int64_t max_seqlen_q, max_seqlen_kv;
  double scale;
  int64_t window_left, window_right;
  double softcap;
  bool deterministic;
};

// What a backward call has besides, and where it writes: gradients that are not wanted are not there. dsinks is fp32.
struct BackwardTensors {
  TensorInfo dout, out, lse;
  std::optional<TensorInfo> dlse, dq, dk, dv, dsinks;
};

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
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline ScalarType scalar_type_of(DType dtype) {
  return dtype == DType::kFloat32   ? ScalarType::Float
         : dtype == DType::kFloat16 ? ScalarType::Half
                                    : ScalarType::BFloat16;
}

inline std::string shape_name(const std::vector<int64_t>& shape) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
  text << "]";
  return text.str();
}

inline int64_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Float8_e4m3fn:
      return 1;
    default:
      return 4;
  }
}

// The last element must lie inside the storage. After the dtype is known to be one of ours.
inline void check_storage(const char* op, const char* name, const TensorInfo& t) {
  if (t.numel() == 0) return;
  double last = static_cast<double>(t.storage_offset);  // in double: absurd shapes must not overflow
  for (int64_t i = 0; i < t.dim; ++i) last += static_cast<double>(t.size(i) - 1) * static_cast<double>(t.stride(i));
  const double needed = (last + 1) * static_cast<double>(element_size(t.dtype));
  if (t.data == nullptr || needed > static_cast<double>(t.storage_bytes))
    fail(op, name, "a storage that holds all of " + shape_name(t.shape()),
         "a storage of " + std::to_string(t.storage_bytes) + " bytes");
}

inline void check_same_device(const char* op, const char* name, const TensorInfo& t, const TensorInfo& q) {
  if (t.device_type != q.device_type || t.device_index != q.device_index)
    fail(op, name, "a tensor on the device of q", "one on another device");
}

inline void check_dtype(const char* op, const char* name, const TensorInfo& t, ScalarType expected, const char* why) {
  if (t.dtype != expected) fail(op, name, "dtype " + dtype_name(expected) + why, dtype_name(t.dtype));
}

inline void check_shape(const char* op, const char* name, const TensorInfo& t, std::initializer_list<int64_t> expected,
                        const char* meaning) {
  if (t.dim != static_cast<int64_t>(expected.size()) || !std::equal(expected.begin(), expected.end(), t.sizes))
    fail(op, name, "shape " + shape_name(expected) + " (" + meaning + ")", "shape " + shape_name(t.shape()));
}

// Strides say nothing of a tensor without elements, and contiguous() does not change them.
inline void check_last_stride(const char* op, const char* name, const TensorInfo& t) {
  const int64_t last = t.dim - 1;
  if (t.numel() > 0 && t.size(last) > 1 && t.stride(last) != 1)
    fail(op, name, "a contiguous last dimension (stride 1)", "stride " + std::to_string(t.stride(last)));
}

// Factors of e4m3 numbers.
inline void check_factors(const char* op, const char* name, const TensorInfo& t, const TensorInfo& like,
                          std::initializer_list<int64_t> shape, const char* meaning) {
  check_same_device(op, name, t, like);
  check_dtype(op, name, t, ScalarType::Float, "");
  check_shape(op, name, t, shape, meaning);
  check_storage(op, name, t);
}

inline void check_flag_number(const char* op, const char* name, int64_t value, int64_t least) {
  if (value < least) fail(op, name, "at least " + std::to_string(least), value);
}

// The numbers of every call: scale, windows, softcap. Windows that reach every key become -1 (unbounded), which also
// keeps later arithmetic on them far from overflow.
template <class Call>
inline void check_scalars(const char* op, const Call& arguments, Problem& p) {
  const double scale = arguments.scale, softcap = arguments.softcap;
  const int64_t window_left = arguments.window_left, window_right = arguments.window_right;
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

// Expanded tensors may be of any size. Workspaces, outputs and the numbers of tasks are products of these sums, at most
// 64 bytes a number: below this bound none overflows, and nothing within it could be allocated or computed.
constexpr double kLargestProduct = 9007199254740992.0;  // 2^53: a double is exact up to there

template <class Call>
inline void check_sizes(const char* op, const Call& arguments, const Problem& p) {
  const double rows = static_cast<double>(p.batch) + static_cast<double>(p.total_q) + static_cast<double>(p.total_kv);
  const double width = static_cast<double>(p.head_dim_qk) + static_cast<double>(p.head_dim_v);
  if (rows * static_cast<double>(p.heads_q) * width >= kLargestProduct)
    fail(op, "q, k and v", "fewer than 2^53 numbers (sequences and rows, times heads, times head dimensions)",
         "shapes " + shape_name(arguments.q.shape()) + ", " + shape_name(arguments.k.shape()) + " and " +
             shape_name(arguments.v.shape()));
}

// q, k and v: the dtype and device of q, the rank of `layouts`, and what every kernel relies on. Fills the dtype.
// dtype_kv: of k and v, if it is not q's. takes_e4m3: q may be float8_e4m3fn, whose result is bfloat16.
template <class Call>
inline void check_qkv(const char* op, const Call& arguments, int64_t rank, const char* layout_q, const char* layout_kv,
                      Problem& p, std::optional<ScalarType> dtype_kv = std::nullopt, bool takes_e4m3 = false) {
  const TensorInfo& q = arguments.q;
  switch (q.dtype) {
    case ScalarType::Float:
      p.dtype = DType::kFloat32;
      break;
    case ScalarType::Half:
      p.dtype = DType::kFloat16;
      break;
    case ScalarType::BFloat16:
      p.dtype = DType::kBFloat16;
      break;
    case ScalarType::Float8_e4m3fn:
      if (takes_e4m3) {
        p.dtype = DType::kBFloat16;
        break;
      }
      [[fallthrough]];
    default:
      fail(op, "q", "dtype float32, float16 or bfloat16", dtype_name(q.dtype));
  }
  const std::pair<const char*, const TensorInfo*> inputs[] = {{"q", &q}, {"k", &arguments.k}, {"v", &arguments.v}};
  for (const auto& [name, t] : inputs) check_same_device(op, name, *t, q);
  for (const auto& [name, t] : inputs) {
    if (t == &q || !dtype_kv)
      check_dtype(op, name, *t, q.dtype, " (that of q)");
    else
      check_dtype(op, name, *t, *dtype_kv, "");
  }
  for (const auto& [name, t] : inputs) {
    if (t->dim != rank) fail(op, name, t == &q ? layout_q : layout_kv, "shape " + shape_name(t->shape()));
    for (int64_t i = 0; i < rank; ++i)
      if (t->size(i) > std::numeric_limits<int32_t>::max())
        fail(op, name, "sizes below 2^31", "shape " + shape_name(t->shape()));
    if (t->size(rank - 1) < 1) fail(op, name, "a head dimension of at least 1", 0);
    if (t->size(rank - 2) < 1) fail(op, name, "at least 1 head", 0);
    check_last_stride(op, name, *t);
    check_storage(op, name, *t);
  }
  p.heads_q = q.size(rank - 2);
  p.heads_kv = arguments.k.size(rank - 2);
  p.head_dim_qk = q.size(rank - 1);
  p.head_dim_v = arguments.v.size(rank - 1);
}

inline void check_groups(const char* op, const Problem& p) {
  if (p.heads_q % p.heads_kv != 0)
    fail(op, "q", "a multiple of the " + std::to_string(p.heads_kv) + " kv heads",
         std::to_string(p.heads_q) + " heads");
}

inline void check_sinks(const char* op, const std::optional<TensorInfo>& sinks, const TensorInfo& q, Problem& p) {
  if (!sinks) return;
  check_same_device(op, "sinks", *sinks, q);
  check_dtype(op, "sinks", *sinks, ScalarType::Float, "");
  check_shape(op, "sinks", *sinks, {p.heads_q}, "heads of q");
  if (p.heads_q > 1 && sinks->stride(0) != 1)
    fail(op, "sinks", "a contiguous tensor", "stride " + std::to_string(sinks->stride(0)));
  check_storage(op, "sinks", *sinks);
  p.sinks = static_cast<const float*>(sinks->data);
}

// q, k, v and sinks; fills everything of Problem but the scalars, and for the packed layout the sequence lengths.
inline Problem check_inputs(const char* op, const Arguments& arguments, bool takes_e4m3 = false) {
  const TensorInfo &q = arguments.q, &k = arguments.k, &v = arguments.v;
  Problem p;
  const bool is_packed = arguments.cu_seqlens_q.has_value();
  if (is_packed != arguments.cu_seqlens_kv.has_value())
    fail(op, is_packed ? "cu_seqlens_kv" : "cu_seqlens_q", "a tensor, since the other cu_seqlens is one", "None");
  const char* layout = is_packed ? "3 dimensions, [total, heads, dim], with cu_seqlens"
                                 : "4 dimensions, [batch, seqlen, heads, dim], without cu_seqlens";
  check_qkv(op, arguments, is_packed ? 3 : 4, layout, layout, p, std::nullopt, takes_e4m3);
  const char *k_meaning = is_packed ? "head dimension of q" : "batch and head dimension of q",
             *v_meaning = "that of k but for the head dimension";
  if (is_packed) {
    check_shape(op, "k", k, {k.size(0), p.heads_kv, p.head_dim_qk}, k_meaning);
    check_shape(op, "v", v, {k.size(0), p.heads_kv, p.head_dim_v}, v_meaning);
  } else {
    check_shape(op, "k", k, {q.size(0), k.size(1), p.heads_kv, p.head_dim_qk}, k_meaning);
    check_shape(op, "v", v, {q.size(0), k.size(1), p.heads_kv, p.head_dim_v}, v_meaning);
  }
  check_groups(op, p);

  if (is_packed) {
    const TensorInfo &cu_seqlens_q = *arguments.cu_seqlens_q, &cu_seqlens_kv = *arguments.cu_seqlens_kv;
    p.total_q = q.size(0);
    p.total_kv = k.size(0);
    const std::pair<const char*, const TensorInfo*> cumulative[] = {{"cu_seqlens_q", &cu_seqlens_q},
                                                                    {"cu_seqlens_kv", &cu_seqlens_kv}};
    for (const auto& [name, t] : cumulative) {
      check_same_device(op, name, *t, q);
      check_dtype(op, name, *t, ScalarType::Int, "");
      if (t->dim != 1 || t->size(0) < 1)
        fail(op, name, "1 dimension, [num_sequences + 1]", "shape " + shape_name(t->shape()));
      if (t->size(0) > 1 && t->stride(0) != 1)
        fail(op, name, "a contiguous tensor", "stride " + std::to_string(t->stride(0)));
      check_storage(op, name, *t);
    }
    check_shape(op, "cu_seqlens_kv", cu_seqlens_kv, {cu_seqlens_q.size(0)}, "that of cu_seqlens_q");
    p.batch = cu_seqlens_q.size(0) - 1;
    p.cu_seqlens_q = static_cast<const int32_t*>(cu_seqlens_q.data);
    p.cu_seqlens_kv = static_cast<const int32_t*>(cu_seqlens_kv.data);
  } else {
    p.batch = q.size(0);
    p.seqlen_q = q.size(1);
    p.seqlen_kv = k.size(1);
    p.total_q = p.batch * p.seqlen_q;
    p.total_kv = p.batch * p.seqlen_kv;
  }
  check_sizes(op, arguments, p);
  check_sinks(op, arguments.sinks, q, p);
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

// A tensor like q, as wide as v, and statistics of its rows.
inline void check_out(const char* op, const char* name, const Problem& p, const TensorInfo& q, const TensorInfo& t) {
  check_same_device(op, name, t, q);
  check_dtype(op, name, t, q.dtype, " (that of q)");
  const char* meaning = "that of the forward's out";
  if (p.cu_seqlens_q != nullptr)
    check_shape(op, name, t, {p.total_q, p.heads_q, p.head_dim_v}, meaning);
  else
    check_shape(op, name, t, {p.batch, p.seqlen_q, p.heads_q, p.head_dim_v}, meaning);
  check_last_stride(op, name, t);
  check_storage(op, name, t);
}

// p.seqlen_q of a packed call may be a bound: its statistics have total_q columns.
inline void check_rows(const char* op, const char* name, const Problem& p, const TensorInfo& q, const TensorInfo& t) {
  check_same_device(op, name, t, q);
  check_dtype(op, name, t, ScalarType::Float, "");
  const char* meaning = "that of the forward's lse";
  if (p.cu_seqlens_q != nullptr)
    check_shape(op, name, t, {p.heads_q, p.total_q}, meaning);
  else
    check_shape(op, name, t, {p.batch, p.heads_q, p.seqlen_q}, meaning);
  check_storage(op, name, t);
}

// out, dout, lse and dlse of a backward call.
inline void check_saved(const char* op, const Problem& p, const TensorInfo& q, const BackwardTensors& tensors) {
  check_out(op, "dout", p, q, tensors.dout);
  check_out(op, "out", p, q, tensors.out);
  check_rows(op, "lse", p, q, tensors.lse);
  if (tensors.dlse) check_rows(op, "dlse", p, q, *tensors.dlse);
}

// A gradient expanded over the rows (lse.sum().backward()) is not contiguous.
inline bool has_contiguous_rows(const TensorInfo& t) {
  return t.size(t.dim - 1) <= 1 || t.stride(t.dim - 1) == 1;
}

inline TensorView view_of(const TensorInfo& t, bool is_packed) {
  TensorView view;
  view.data = t.data;
  view.stride_batch = is_packed ? 0 : t.stride(0);
  view.stride_seqlen = t.stride(is_packed ? 0 : 1);
  view.stride_heads = t.stride(is_packed ? 1 : 2);
  return view;
}

// Of contiguous rows.
inline RowView row_view_of(const TensorInfo& t, bool is_packed) {
  RowView view;
  view.data = static_cast<float*>(t.data);
  view.stride_batch = is_packed ? 0 : t.stride(0);
  view.stride_heads = t.stride(is_packed ? 0 : 1);
  return view;
}

inline ForwardParams forward_params(const Problem& p, const Arguments& arguments, const TensorInfo& out,
                                    const std::optional<TensorInfo>& lse) {
  const bool is_packed = p.cu_seqlens_q != nullptr;
  ForwardParams params;
  params.problem = p;
  params.q = view_of(arguments.q, is_packed);
  params.k = view_of(arguments.k, is_packed);
  params.v = view_of(arguments.v, is_packed);
  params.out = view_of(out, is_packed);
  if (lse) params.lse = row_view_of(*lse, is_packed);
  return params;
}

inline BackwardParams backward_params(const Problem& p, const Arguments& arguments, const BackwardTensors& tensors) {
  const bool is_packed = p.cu_seqlens_q != nullptr;
  BackwardParams params;
  params.problem = p;
  params.q = view_of(arguments.q, is_packed);
  params.k = view_of(arguments.k, is_packed);
  params.v = view_of(arguments.v, is_packed);
  params.out = view_of(tensors.out, is_packed);
  params.dout = view_of(tensors.dout, is_packed);
  params.lse = row_view_of(tensors.lse, is_packed);
  if (tensors.dlse) params.dlse = row_view_of(*tensors.dlse, is_packed);
  if (tensors.dq) params.dq = view_of(*tensors.dq, is_packed);
  if (tensors.dk) params.dk = view_of(*tensors.dk, is_packed);
  if (tensors.dv) params.dv = view_of(*tensors.dv, is_packed);
  if (tensors.dsinks) params.dsinks = static_cast<float*>(tensors.dsinks->data);
  return params;
}

}  // namespace flashmla
