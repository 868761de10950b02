// The checks of a call on caches: as those of checks.h, which they share.
//
// The values inside cache_seqlens, kv_start and block_table are not looked at: they may lie on a device.
#pragma once

#include "checks.h"

namespace flashmla {

// The tensors and numbers of a call, as flashmla_hf/decode_ops.py describes them.
struct DecodeArguments {
  TensorInfo q, k, v;
  std::optional<TensorInfo> sinks, cache_seqlens, kv_start, block_table;
  double scale;
  int64_t window_left, window_right;
  double softcap;
  bool can_split;
};

constexpr int64_t kPageSizeMultiple = 16;

inline void check_numbers_of_sequences(const char* op, const char* name, const std::optional<TensorInfo>& t,
                                       const TensorInfo& q) {
  if (!t) return;
  check_same_device(op, name, *t, q);
  check_dtype(op, name, *t, ScalarType::Int, "");
  check_shape(op, name, *t, {q.size(0)}, "batch of q");
  if (t->size(0) > 1 && t->stride(0) != 1)
    fail(op, name, "a contiguous tensor", "stride " + std::to_string(t->stride(0)));
  check_storage(op, name, *t);
}

inline void check_block_table(const char* op, const TensorInfo& table, const TensorInfo& q) {
  const char* name = "block_table";
  check_same_device(op, name, table, q);
  check_dtype(op, name, table, ScalarType::Int, "");
  if (table.dim != 2 || table.size(0) != q.size(0))
    fail(op, name, "shape [" + std::to_string(q.size(0)) + ", pages of a sequence] (batch of q)",
         "shape " + shape_name(table.shape()));
  if (table.size(1) > std::numeric_limits<int32_t>::max())
    fail(op, name, "sizes below 2^31", "shape " + shape_name(table.shape()));
  check_last_stride(op, name, table);
  check_storage(op, name, table);
}

// Everything of Problem, scalars included. seqlen_kv is the number of rows that a sequence may have.
// dtype_kv: of the caches, if it is not q's.
inline Problem check_decode_inputs(const char* op, const DecodeArguments& arguments,
                                   std::optional<ScalarType> dtype_kv = std::nullopt) {
  const TensorInfo &q = arguments.q, &k = arguments.k, &v = arguments.v;
  const bool is_paged = arguments.block_table.has_value();
  Problem p;
  check_qkv(op, arguments, 4, "4 dimensions, [batch, seqlen_q, heads, dim]",
            is_paged ? "4 dimensions, [num_pages, page_size, heads, dim], with block_table"
                     : "4 dimensions, [batch, capacity, heads, dim], without block_table",
            p, dtype_kv);
  if (is_paged) {
    check_block_table(op, *arguments.block_table, q);
    check_shape(op, "k", k, {k.size(0), k.size(1), p.heads_kv, p.head_dim_qk}, "head dimension of q");
    if (k.size(1) < 1 || k.size(1) % kPageSizeMultiple != 0)
      fail(op, "k", "a page_size (its size 1) that is a multiple of " + std::to_string(kPageSizeMultiple), k.size(1));
  } else {
    check_shape(op, "k", k, {q.size(0), k.size(1), p.heads_kv, p.head_dim_qk}, "batch and head dimension of q");
  }
  check_shape(op, "v", v, {k.size(0), k.size(1), p.heads_kv, p.head_dim_v}, "that of k but for the head dimension");
  check_groups(op, p);

  p.batch = q.size(0);
  p.seqlen_q = q.size(1);
  p.seqlen_kv = is_paged ? arguments.block_table->size(1) * k.size(1) : k.size(1);
  p.total_q = p.batch * p.seqlen_q;
  // A table may name a page often: the product may be beyond 64 bits, which check_sizes refuses.
  const double total_kv = static_cast<double>(p.batch) * static_cast<double>(p.seqlen_kv);
  p.total_kv = static_cast<int64_t>(std::min(total_kv, kLargestProduct));
  check_sizes(op, arguments, p);
  check_sinks(op, arguments.sinks, q, p);
  check_numbers_of_sequences(op, "cache_seqlens", arguments.cache_seqlens, q);
  check_numbers_of_sequences(op, "kv_start", arguments.kv_start, q);
  check_scalars(op, arguments, p);
  return p;
}

inline DecodeParams decode_params(const Problem& p, const DecodeArguments& arguments, const TensorInfo& out,
                                  const std::optional<TensorInfo>& lse) {
  auto numbers_of = [](const std::optional<TensorInfo>& t) {
    return t ? static_cast<const int32_t*>(t->data) : nullptr;
  };
  DecodeParams params;
  params.problem = p;
  params.q = view_of(arguments.q, false);
  params.k = view_of(arguments.k, false);
  params.v = view_of(arguments.v, false);
  params.out = view_of(out, false);
  if (lse) params.lse = row_view_of(*lse, false);
  params.cache_seqlens = numbers_of(arguments.cache_seqlens);
  params.kv_start = numbers_of(arguments.kv_start);
  params.block_table = numbers_of(arguments.block_table);
  if (arguments.block_table) params.stride_block_table = arguments.block_table->stride(0);
  params.num_pages = arguments.k.size(0);
  params.page_size = arguments.k.size(1);
  params.can_split = arguments.can_split;
  return params;
}

// A call on caches of e4m3: k_descale and v_descale, the factors of their rows [num_pages, page_size, heads_kv].
struct E4m3DecodeArguments : DecodeArguments {
  TensorInfo k_descale, v_descale;
};

// The factors of the rows of a cache [num_pages, page_size, heads_kv, head_dim].
inline void check_row_factors(const char* op, const char* name, const TensorInfo& t, const TensorInfo& cache) {
  check_factors(op, name, t, cache, {cache.size(0), cache.size(1), cache.size(2)},
                "that of the cache but for the last");
}

inline Problem check_decode_inputs(const char* op, const E4m3DecodeArguments& arguments) {
  const Problem p = check_decode_inputs(op, arguments, ScalarType::Float8_e4m3fn);
  check_row_factors(op, "k_descale", arguments.k_descale, arguments.k);
  check_row_factors(op, "v_descale", arguments.v_descale, arguments.k);
  return p;
}

inline E4m3DecodeParams decode_params(const Problem& p, const E4m3DecodeArguments& arguments, const TensorInfo& out,
                                      const TensorInfo& lse) {
  auto scales_of = [](const TensorInfo& t) {
    return ScaleView{static_cast<const float*>(t.data), t.stride(0), t.stride(1), t.stride(2)};
  };
  const DecodeArguments& others = arguments;
  return {decode_params(p, others, out, lse), scales_of(arguments.k_descale), scales_of(arguments.v_descale)};
}

}  // namespace flashmla
