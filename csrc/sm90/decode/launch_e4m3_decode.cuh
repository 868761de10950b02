// Host side of the decode kernels of e4m3 caches: one instantiation per head dim.
#pragma once

#include "sm90/decode/e4m3_decode.cuh"
#include "sm90/decode/launch_decode.cuh"

namespace flashmla::sm90 {

template <int kHeadDim>
int64_t e4m3_decode_workspace_head_dim(E4m3DecodeParams const& params) {
  return decode_workspace_tiles<E4m3DecodeTiles<kHeadDim>>(params);
}

template <int kHeadDim>
const char* launch_e4m3_decode_head_dim(E4m3DecodeParams const& params, void* workspace, cudaStream_t stream) {
  return params.problem.dtype == DType::kFloat16
             ? launch_decode_kernel<E4m3Decode<kHeadDim, cutlass::half_t>>(params, workspace, stream)
             : launch_decode_kernel<E4m3Decode<kHeadDim, cutlass::bfloat16_t>>(params, workspace, stream);
}

}  // namespace flashmla::sm90
