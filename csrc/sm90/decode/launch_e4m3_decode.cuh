// Host side of the decode kernels of e4m3 caches: one instantiation per head dim.
#pragma once

#include "sm90/decode/e4m3_decode.cuh"
#include "sm90/decode/launch_decode.cuh"

namespace flashmla::sm90 {

template <int kHeadDim, int kRows, class Element>
struct E4m3DecodeKernel : E4m3Decode<kHeadDim, kRows, Element> {
  static constexpr bool kReadsValues = true;
};

// Tiles of as few query rows as hold a kv head's. More rows than a tile may have are several tiles.
inline bool has_few_rows(Problem const& problem) {
  return problem.heads_q / problem.heads_kv * problem.seqlen_q <= 8;
}

template <int kHeadDim>
int64_t e4m3_decode_workspace_head_dim(E4m3DecodeParams const& params) {
  return has_few_rows(params.problem)
             ? decode_workspace_tiles<E4m3DecodeTiles<kHeadDim, 8>>(params)
             : decode_workspace_tiles<E4m3DecodeTiles<kHeadDim, E4m3DecodeConfig<kHeadDim>::kMostRows>>(params);
}

template <int kHeadDim, class Element>
const char* launch_e4m3_decode_element(E4m3DecodeParams const& params, void* workspace, cudaStream_t stream) {
  constexpr int kMostRows = E4m3DecodeConfig<kHeadDim>::kMostRows;
  return has_few_rows(params.problem)
             ? launch_decode_kernel<E4m3DecodeKernel<kHeadDim, 8, Element>, Element>(params, workspace, stream)
             : launch_decode_kernel<E4m3DecodeKernel<kHeadDim, kMostRows, Element>, Element>(params, workspace, stream);
}

template <int kHeadDim>
const char* launch_e4m3_decode_head_dim(E4m3DecodeParams const& params, void* workspace, cudaStream_t stream) {
  return params.problem.dtype == DType::kFloat16
             ? launch_e4m3_decode_element<kHeadDim, cutlass::half_t>(params, workspace, stream)
             : launch_e4m3_decode_element<kHeadDim, cutlass::bfloat16_t>(params, workspace, stream);
}

}  // namespace flashmla::sm90
