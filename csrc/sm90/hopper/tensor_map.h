// TMA descriptors.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <initializer_list>

#include "params.h"
#include "sm90/hopper/sequence_rows.h"
#include "sm90/scheduling/schedule.h"

namespace flashmla::sm90 {

using TensorMapEncode = decltype(&cuTensorMapEncodeTiled);

// Found at run time instead of by linking libcuda: the library loads on machines without a driver.
inline TensorMapEncode tensor_map_encode() {
  static TensorMapEncode const function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &result);
#endif
    return result == cudaDriverEntryPointSuccess ? reinterpret_cast<TensorMapEncode>(entry) : nullptr;
  }();
  return function;
}

struct MapDimension {
  int64_t extent, stride;  // in elements
  int box;                 // of them a copy moves at once
};

enum class MapElement { kFloat16, kBFloat16, kE4m3 };

inline MapElement map_element(DType dtype) {
  return dtype == DType::kFloat16 ? MapElement::kFloat16 : MapElement::kBFloat16;
}

// `dimensions` from the contiguous one outwards, at most five; its box is one swizzle row (128, 64 or 32 bytes). What
// lies outside the tensor arrives as zeros. `promotion`: what L2 reads of memory at once. Returns null or a sentence
// that says what went wrong.
inline const char* make_tensor_map(CUtensorMap& map, void* data, MapElement element,
                                   std::initializer_list<MapDimension> dimensions,
                                   CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
  if (tensor_map_encode() == nullptr) return "the CUDA driver has no cuTensorMapEncodeTiled (12.0 or newer is needed)";
  cuuint64_t extents[5], strides[5];
  cuuint32_t boxes[5], steps[5];
  int const bytes = element == MapElement::kE4m3 ? 1 : 2;
  int rank = 0;
  for (MapDimension const& dimension : dimensions) {
    extents[rank] = static_cast<cuuint64_t>(dimension.extent);
    // A dimension of one element may have any stride in torch; the descriptor's must be a multiple of 16 bytes all the
    // same.
    strides[rank] = static_cast<cuuint64_t>(dimension.extent > 1 ? bytes * dimension.stride : 16);
    boxes[rank] = static_cast<cuuint32_t>(dimension.box);
    steps[rank] = 1;
    ++rank;
  }
  auto const type = element == MapElement::kFloat16    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                    : element == MapElement::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                       : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  auto const swizzle = bytes * boxes[0] == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                       : bytes * boxes[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                : CU_TENSOR_MAP_SWIZZLE_32B;
  CUresult const result =
      tensor_map_encode()(&map, type, rank, data, extents, strides + 1, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                          swizzle, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return nullptr;
  thread_local char message[160];  // until the thread's next refusal: the host throws it on at once
  std::snprintf(message, sizeof(message),
                "the CUDA driver refused a TMA descriptor: cuTensorMapEncodeTiled gave CUresult %d (cuda.h names it)",
                static_cast<int>(result));
  return message;
}

// Rows of K, V, Q or dO, `box_rows` of them at a time, in dims (head_dim, row, end, heads, outer) of sequence_rows.h.
inline const char* make_row_map(CUtensorMap& map, TensorView const& view, Problem const& problem, int64_t head_dim,
                                int64_t rows, int64_t heads, int columns, int box_rows) {
  if (rows == 0) return nullptr;  // nothing is loaded
  if (problem.cu_seqlens_q == nullptr) {
    return make_tensor_map(map, view.data, map_element(problem.dtype),
                           {{head_dim, 1, columns},
                            {rows, view.stride_seqlen, box_rows},
                            {1, 0, 1},
                            {heads, view.stride_heads, 1},
                            {problem.batch, view.stride_batch, 1}});
  }
  int64_t const stride = rows > 1 ? view.stride_seqlen : 8;  // in elements of 2 bytes; of one row it may be anything
  int64_t const wrap = (2 * stride / kWrapBytes + 1) * kWrapBytes / 2 - stride;
  return make_tensor_map(map, view.data, map_element(problem.dtype),
                         {{head_dim, 1, columns},
                          {kRowExtent, stride, box_rows},
                          {kAnyExtent, stride, 1},
                          {heads, view.stride_heads, 1},
                          {kAnyExtent, wrap, 1}});
}

// Descriptors of the kernels that walk tiles of queries (query_tile.cuh), once their schedule is made.
struct QueryMaps {
  Problem const& problem;
  Schedule const& schedule;
  int columns, block_kv;

  int64_t batch() const { return problem.cu_seqlens_q != nullptr ? 1 : problem.batch; }

  // `box_rows` of the tile's rows at once, of heads_packed heads each.
  const char* make_queries(CUtensorMap& map, TensorView const& view, int64_t head_dim, int box_rows) const {
    int64_t const packed = schedule.heads_packed;
    int64_t const rows = problem.cu_seqlens_q != nullptr ? problem.total_q : problem.seqlen_q;
    return make_tensor_map(map, view.data, map_element(problem.dtype),
                           {{head_dim, 1, columns},
                            {packed, view.stride_heads, static_cast<int>(packed)},
                            {rows, view.stride_seqlen, box_rows},
                            {problem.heads_q / packed, view.stride_heads * packed, 1},
                            {batch(), view.stride_batch, 1}});
  }

  const char* make_keys(CUtensorMap& map, TensorView const& view, int64_t head_dim) const {
    int64_t const rows = problem.cu_seqlens_q != nullptr ? problem.total_kv : problem.seqlen_kv;
    return make_row_map(map, view, problem, head_dim, rows, problem.heads_kv, columns, block_kv);
  }
};

}  // namespace flashmla::sm90
