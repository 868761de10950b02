// Kernel parameters. Plain data: no torch header, no CUDA header, shared by every backend.
//
// The math, per sequence and query head h (kv head h / (heads_q / heads_kv)), query i, key j, in fp32:
//   S[i,j] = scale * Q[i,:]·K[j,:]            then, if softcap > 0:  S = softcap * tanh(S / softcap)
//   key j is visible to query i  <=>  p - window_left <= j <= p + window_right,  p = i + seqlen_kv - seqlen_q
//                                      (bottom-right aligned; a negative window_* is unbounded; causal is window_right
//                                      = 0)
//   lse[i] = log( sum_{visible j} exp(S[i,j]) + [has_sinks] exp(sinks[h]) )      natural log
//   O[i,:] = sum_{visible j} exp(S[i,j] - lse[i]) V[j,:]
// A query that sees no key has O = 0 and lse = -inf (lse = sinks[h] if there is a sink).
#pragma once

#include <cstdint>

namespace flashmla {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16 };

// A tensor [batch, seqlen, heads, dim] with dim contiguous; strides in elements. The packed layout [total, heads, dim]
// has stride_batch = 0 and its sequences begin at cu_seqlens[b].
struct TensorView {
  void* data = nullptr;
  int64_t stride_batch = 0;
  int64_t stride_seqlen = 0;
  int64_t stride_heads = 0;
};

// Statistics [batch, heads_q, seqlen_q] (packed: [heads_q, total_q], stride_batch = 0), fp32, seqlen contiguous.
struct RowView {
  float* data = nullptr;
  int64_t stride_batch = 0;
  int64_t stride_heads = 0;
};

// Factors [batch, seqlen, heads] of a tensor's rows, fp32; strides in elements.
struct ScaleView {
  const float* data = nullptr;
  int64_t stride_batch = 0;
  int64_t stride_seqlen = 0;
  int64_t stride_heads = 0;
};

struct Problem {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;     // number of sequences
  int64_t seqlen_q = 0;  // dense layout; packed: an upper bound
  int64_t seqlen_kv = 0;
  int64_t total_q = 0;  // rows of q over all sequences (packed: q.shape[0])
  int64_t total_kv = 0;
  int64_t heads_q = 0;
  int64_t heads_kv = 0;
  int64_t head_dim_qk = 0;
  int64_t head_dim_v = 0;
  int64_t window_left = -1;
  int64_t window_right = -1;
  float scale = 1.0f;
  float softcap = 0.0f;                    // 0: none
  const float* sinks = nullptr;            // [heads_q] or null
  const int32_t* cu_seqlens_q = nullptr;   // [batch + 1] or null (dense layout)
  const int32_t* cu_seqlens_kv = nullptr;  // [batch + 1] or null; both or neither
  bool deterministic = false;
};

struct ForwardParams {
  Problem problem;
  TensorView q, k, v, out;
  RowView lse;  // data may be null
};

// Queries at the end of sequences whose keys lie in a cache. Sequence b has L = cache_seqlens[b] keys, its last
// included; query i stands at position p = L - seqlen_q + i, and keys before kv_start[b] are hidden besides those of
// the window. Key j of sequence b is row j % page_size of page block_table[b, j / page_size], or row j of page b
// without a table. What the device memory holds is not trusted: L is taken for at most problem.seqlen_kv, pages outside
// the cache hold 0.
struct DecodeParams {
  Problem problem;                         // seqlen_kv: the rows that a sequence may have; dense, not deterministic
  TensorView q, out;                       // [batch, seqlen_q, heads_q, head_dim]
  TensorView k, v;                         // [num_pages, page_size, heads_kv, head_dim]: stride_batch is a page's
  RowView lse;                             // [batch, heads_q, seqlen_q]; data may be null
  const int32_t* cache_seqlens = nullptr;  // [batch], or null: problem.seqlen_kv
  const int32_t* kv_start = nullptr;       // [batch], or null: 0
  const int32_t* block_table = nullptr;    // [batch, pages of a sequence], or null: page b is all of sequence b
  int64_t stride_block_table = 0;          // of its rows, in elements
  int64_t num_pages = 0;
  int64_t page_size = 0;
  bool can_split = true;  // a sequence's keys may be shared among CTAs; if not, its result depends on nothing else
};

// The same of caches of e4m3, whose rows [num_pages, page_size, heads_kv] have scales. problem.dtype is q's.
struct E4m3DecodeParams : DecodeParams {
  ScaleView k_scale, v_scale;
};

// A forward that rounds Q, K, V and the probabilities to e4m3 on its way (sm90/fp8). `rotates`: Q and K alike, before.
// Or of tensors that are e4m3: then problem.dtype is that of out, and they have factors [batch, 1, heads_kv].
struct Fp8ForwardParams : ForwardParams {
  bool rotates = false;
  ScaleView q_descale, k_descale, v_descale;  // data may be null
};

// What that forward makes of Q, K and V, as bf16 numbers, which hold an e4m3 number times a power of two: contiguous,
// the shapes of q, k and v. `out` and `lse` are empty.
struct Fp8RoundingParams : Fp8ForwardParams {
  void *rounded_q = nullptr, *rounded_k = nullptr, *rounded_v = nullptr;
};

struct BackwardParams {
  Problem problem;
  TensorView q, k, v, out, dout;
  RowView lse, dlse;        // dlse.data may be null
  TensorView dq, dk, dv;    // data null where the gradient is not wanted
  float* dsinks = nullptr;  // [heads_q], zero-filled by the host, or null
};

}  // namespace flashmla
