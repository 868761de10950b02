// New rows into caches. Into those of 16 bits one block writes a row of all heads: 16 bytes a thread at a time where
// addresses and strides allow, else 2. Into those of e4m3 one warp writes a row of a head, and its scale.
#include <algorithm>

#include "sm90/decode/append.h"
#include "sm90/fp8/scale.cuh"
#include "sm90/hopper/device.h"
#include "sm90/hopper/ptx.cuh"

namespace flashmla::sm90 {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 65536;
constexpr int64_t kElementBytes = 2;

// Where a new row goes.
struct Place {
  int64_t page, row;
  bool exists;
};

__device__ Place place_of(AppendParams const& params, int64_t batch, int64_t row) {
  int64_t const key = params.cache_seqlens[batch] + row;
  if (key < 0 || key >= params.capacity) return {0, 0, false};
  if (params.block_table == nullptr) return {batch, key, batch < params.num_pages};
  int64_t const index = key / params.page_size;
  int64_t const page = params.block_table[batch * params.stride_block_table + index];
  return {page, key - index * params.page_size, page >= 0 && page < params.num_pages};
}

__device__ void write_lengths(AppendParams const& params) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < params.batch; i += int64_t{gridDim.x} * kThreads) {
    params.lengths[i] = static_cast<int32_t>(params.cache_seqlens[i] + params.seqlen_new);
  }
}

// A row of all heads, [heads, head_dim], from one place to another.
template <class Vector>
__device__ void copy_row(TensorView const& from, int64_t batch, int64_t row, TensorView const& to, int64_t page,
                         int64_t row_in_page, int64_t heads, int64_t head_dim) {
  constexpr int64_t kElements = sizeof(Vector) / kElementBytes;
  int64_t const vectors = head_dim / kElements;
  auto const* const source =
      static_cast<uint16_t const*>(from.data) + batch * from.stride_batch + row * from.stride_seqlen;
  auto* const target = static_cast<uint16_t*>(to.data) + page * to.stride_batch + row_in_page * to.stride_seqlen;
  for (int64_t i = threadIdx.x; i < heads * vectors; i += kThreads) {
    int64_t const head = i / vectors, column = (i - head * vectors) * kElements;
    *reinterpret_cast<Vector*>(target + head * to.stride_heads + column) =
        *reinterpret_cast<Vector const*>(source + head * from.stride_heads + column);
  }
}

template <class Vector>
__global__ void __launch_bounds__(kThreads) append_kernel(__grid_constant__ AppendParams const params) {
  write_lengths(params);
  for (int64_t entry = blockIdx.x; entry < params.batch * params.seqlen_new; entry += gridDim.x) {
    int64_t const batch = entry / params.seqlen_new, row = entry - batch * params.seqlen_new;
    Place const place = place_of(params, batch, row);
    if (!place.exists) continue;
    copy_row<Vector>(params.new_k, batch, row, params.k, place.page, place.row, params.heads, params.head_dim_k);
    copy_row<Vector>(params.new_v, batch, row, params.v, place.page, place.row, params.heads, params.head_dim_v);
  }
}

// A row of a head, [head_dim], as e4m3 numbers and their scale. By a warp, whose lanes have four columns of every 128.
template <class Element>
__device__ void quantize_row(Element const* source, int64_t head_dim, unsigned char* target, float* scale) {
  constexpr int kColumns = 4;
  int64_t const first = threadIdx.x % kWarpThreads * kColumns;
  constexpr int64_t kStep = kWarpThreads * kColumns;
  float largest = 0.0f;
  for (int64_t column = first; column < head_dim; column += kStep) {
    CUTE_UNROLL
    for (int i = 0; i < kColumns; ++i) {
      float const x = column + i < head_dim ? fabsf(static_cast<float>(source[column + i])) : 0.0f;
      largest = fmaxf(largest, x < INFINITY ? x : 0.0f);
    }
  }
  Scale const chosen = scale_of(largest_of_warp(largest));
  if (threadIdx.x % kWarpThreads == 0) *scale = chosen.scale;
  for (int64_t column = first; column < head_dim; column += kStep) {
    float scaled[kColumns];
    CUTE_UNROLL
    for (int i = 0; i < kColumns; ++i) {
      float const x = column + i < head_dim ? static_cast<float>(source[column + i]) : 0.0f;
      // A denormal number times 2^126 may be one of e4m3.
      scaled[i] = fabsf(x) < INFINITY ? ptx::multiply_denormal(x, chosen.inverse) : NAN;
    }
    uint32_t const word = ptx::pack_e4m3(scaled[0], scaled[1], scaled[2], scaled[3]);
    CUTE_UNROLL
    for (int i = 0; i < kColumns; ++i) {
      if (column + i < head_dim) target[column + i] = static_cast<unsigned char>(word >> 8 * i);
    }
  }
}

// A row of a head of K or V to each warp, K's and V's in turn.
template <class Element>
__global__ void __launch_bounds__(kThreads) append_e4m3_kernel(__grid_constant__ AppendParams const params) {
  write_lengths(params);
  constexpr int64_t kWarps = kThreads / kWarpThreads;
  int64_t const rows = params.batch * params.seqlen_new * params.heads;
  for (int64_t i = blockIdx.x * kWarps + threadIdx.x / kWarpThreads; i < 2 * rows; i += gridDim.x * kWarps) {
    bool const is_key = i % 2 == 0;
    int64_t const head = i / 2 % params.heads, entry = i / 2 / params.heads;
    int64_t const batch = entry / params.seqlen_new, row = entry - batch * params.seqlen_new;
    Place const place = place_of(params, batch, row);
    if (!place.exists) continue;
    auto at = [&](TensorView const& view, int64_t first, int64_t second) {
      return first * view.stride_batch + second * view.stride_seqlen + head * view.stride_heads;
    };
    TensorView const &from = is_key ? params.new_k : params.new_v, &to = is_key ? params.k : params.v;
    TensorView const& scale = is_key ? params.k_scale : params.v_scale;
    quantize_row(static_cast<Element const*>(from.data) + at(from, batch, row),
                 is_key ? params.head_dim_k : params.head_dim_v,
                 static_cast<unsigned char*>(to.data) + at(to, place.page, place.row),
                 static_cast<float*>(scale.data) + at(scale, place.page, place.row));
  }
}

// Whether rows of the tensor, if it is there, can be read and written 16 bytes at a time.
bool has_vectors(TensorView const& view, int64_t head_dim) {
  constexpr int64_t kElements = sizeof(uint4) / kElementBytes;
  if (head_dim == 0) return true;
  bool const strides = (view.stride_batch | view.stride_seqlen | view.stride_heads | head_dim) % kElements == 0;
  return strides && reinterpret_cast<uintptr_t>(view.data) % sizeof(uint4) == 0;
}

}  // namespace

const char* launch_append(AppendParams const& params, cudaStream_t stream) {
  if (params.batch == 0) return nullptr;
  if (params.k_scale.data != nullptr) {
    auto* const quantizing =
        params.dtype == DType::kFloat16 ? append_e4m3_kernel<cutlass::half_t> : append_e4m3_kernel<cutlass::bfloat16_t>;
    int64_t const warps = 2 * params.batch * params.seqlen_new * params.heads, each = kThreads / kWarpThreads;
    dim3 const grid(static_cast<unsigned>(std::clamp<int64_t>((warps + each - 1) / each, 1, kMostBlocks)));
    return launch_kernel<AppendParams>(quantizing, grid, kThreads, 0, stream, Launch::kAlone, params);
  }
  bool const is_aligned = has_vectors(params.new_k, params.head_dim_k) && has_vectors(params.k, params.head_dim_k) &&
                          has_vectors(params.new_v, params.head_dim_v) && has_vectors(params.v, params.head_dim_v);
  auto* const kernel = is_aligned ? append_kernel<uint4> : append_kernel<uint16_t>;
  dim3 const grid(static_cast<unsigned>(std::clamp<int64_t>(params.batch * params.seqlen_new, 1, kMostBlocks)));
  return launch_kernel<AppendParams>(kernel, grid, kThreads, 0, stream, Launch::kAlone, params);
}

}  // namespace flashmla::sm90
