// One block a new row: 16 bytes a thread at a time where addresses and strides allow, else 2.
#include <algorithm>

#include "sm90/decode/append.h"
#include "sm90/hopper/device.h"

namespace flashmla::sm90 {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 65536;
constexpr int64_t kElementBytes = 2;

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
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < params.batch; i += int64_t{gridDim.x} * kThreads) {
    params.lengths[i] = static_cast<int32_t>(params.cache_seqlens[i] + params.seqlen_new);
  }
  for (int64_t entry = blockIdx.x; entry < params.batch * params.seqlen_new; entry += gridDim.x) {
    int64_t const batch = entry / params.seqlen_new, row = entry - batch * params.seqlen_new;
    int64_t const key = params.cache_seqlens[batch] + row;
    if (key < 0 || key >= params.capacity) continue;
    int64_t page = batch, row_in_page = key;
    if (params.block_table != nullptr) {
      int64_t const index = key / params.page_size;
      page = params.block_table[batch * params.stride_block_table + index];
      row_in_page = key - index * params.page_size;
    }
    if (page < 0 || page >= params.num_pages) continue;
    copy_row<Vector>(params.new_k, batch, row, params.k, page, row_in_page, params.heads, params.head_dim_k);
    copy_row<Vector>(params.new_v, batch, row, params.v, page, row_in_page, params.heads, params.head_dim_v);
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
  bool const is_aligned = has_vectors(params.new_k, params.head_dim_k) && has_vectors(params.k, params.head_dim_k) &&
                          has_vectors(params.new_v, params.head_dim_v) && has_vectors(params.v, params.head_dim_v);
  auto* const kernel = is_aligned ? append_kernel<uint4> : append_kernel<uint16_t>;
  dim3 const grid(static_cast<unsigned>(std::clamp<int64_t>(params.batch * params.seqlen_new, 1, kMostBlocks)));
  return launch_kernel<AppendParams>(kernel, grid, kThreads, 0, stream, Launch::kAlone, params);
}

}  // namespace flashmla::sm90
