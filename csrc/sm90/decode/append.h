// New keys and values written into caches, in one launch: the boundary between the host code and append.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "params.h"

namespace flashmla::sm90 {

// New row i of sequence b becomes key cache_seqlens[b] + i, which lies where DecodeParams says. A key beyond the rows
// that a sequence may have, or of a page outside the cache, is not written. Elements have 16 bits, unless the caches
// are of e4m3: then new rows are quantised, each with a scale of its own.
struct AppendParams {
  int64_t batch = 0, seqlen_new = 0, heads = 0;
  int64_t head_dim_k = 0, head_dim_v = 0;  // head_dim_v: 0 if the values are columns of k
  int64_t capacity = 0;                    // rows that a sequence may have
  TensorView new_k, new_v;                 // [batch, seqlen_new, heads, head_dim]
  TensorView k, v;                         // [num_pages, page_size, heads, head_dim]: stride_batch is a page's
  const int32_t* cache_seqlens = nullptr;  // [batch]
  const int32_t* block_table = nullptr;    // [batch, pages of a sequence], or null: page b is all of sequence b
  int64_t stride_block_table = 0;          // of its rows, in elements
  int64_t num_pages = 0;
  int64_t page_size = 0;
  TensorView k_scale, v_scale;     // fp32 [num_pages, page_size, heads], of caches of e4m3; else data is null
  DType dtype = DType::kBFloat16;  // of new_k and new_v
  int32_t* lengths = nullptr;      // [batch], written: cache_seqlens + seqlen_new
};

// Returns null, or a sentence that says what went wrong.
const char* launch_append(AppendParams const& params, cudaStream_t stream);

}  // namespace flashmla::sm90
