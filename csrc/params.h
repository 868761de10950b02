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

struct BackwardParams {
  Problem problem;
  TensorView q, k, v, out, dout;
  RowView lse, dlse;        // dlse.data may be null
  TensorView dq, dk, dv;    // data null where the gradient is not wanted
  float* dsinks = nullptr;  // [heads_q], zero-filled by the host, or null
};

}  // namespace flashmla
