// Host side of the forward kernel: TMA descriptors and the launch. One instantiation per head-dim row, dtype and mask
// kind; a file of instantiations/ holds one row.
#pragma once

#include "sm90/device.h"
#include "sm90/forward.cuh"
#include "sm90/launch.h"
#include "sm90/tensor_map.h"

namespace flashmla::sm90 {

template <int kHeadDimQK, int kHeadDimV, MaskKind kMask, class Element>
const char* launch(ForwardParams const& params, void* workspace, cudaStream_t stream) {
  using Kernel = Forward<kHeadDimQK, kHeadDimV, kMask, Element>;
  Problem const& problem = params.problem;
  bool const is_packed = problem.cu_seqlens_q != nullptr;
  int64_t const batch = is_packed ? 1 : problem.batch;
  int64_t const rows_q = is_packed ? problem.total_q : problem.seqlen_q;
  int64_t const rows_kv = is_packed ? problem.total_kv : problem.seqlen_kv;
  int device = 0;
  cudaGetDevice(&device);

  ForwardArguments arguments{};
  int num_blocks = 0;
  if (const char* error = make_forward_schedule(problem, Kernel::kBlockQ, num_sms(device), workspace, stream,
                                                arguments.schedule, num_blocks)) {
    return error;
  }
  int64_t const packed = arguments.schedule.heads_packed;
  int const columns = Kernel::kSwizzleColumns;
  const char* error = make_tensor_map(arguments.q, params.q.data, problem.dtype,
                                      {{problem.head_dim_qk, 1, columns},
                                       {packed, params.q.stride_heads, static_cast<int>(packed)},
                                       {rows_q, params.q.stride_seqlen, arguments.schedule.rows_per_block},
                                       {problem.heads_q / packed, params.q.stride_heads * packed, 1},
                                       {batch, params.q.stride_batch, 1}});
  auto make_kv = [&](CUtensorMap& map, TensorView const& view, int64_t head_dim) {
    return make_tensor_map(map, view.data, problem.dtype,
                           {{head_dim, 1, columns},
                            {rows_kv, view.stride_seqlen, Kernel::kBlockKV},
                            {problem.heads_kv, view.stride_heads, 1},
                            {batch, view.stride_batch, 1}});
  };
  // Without keys nothing is loaded.
  if (error == nullptr && rows_kv > 0) error = make_kv(arguments.k, params.k, problem.head_dim_qk);
  if (error == nullptr && rows_kv > 0) error = make_kv(arguments.v, params.v, problem.head_dim_v);
  if (error != nullptr) return error;
  arguments.out = params.out;
  arguments.lse = params.lse;
  arguments.problem = problem;
  arguments.window = window_of(problem);

  constexpr auto* kernel = forward_kernel<kHeadDimQK, kHeadDimV, kMask, Element>;
  if (cudaError_t const status = allow_shared_memory<kernel>(Kernel::kSharedBytes, device); status != cudaSuccess) {
    return cudaGetErrorString(status);
  }
  // A packed batch's kernel may set up while its list is being made.
  return launch_kernel<ForwardArguments>(kernel, dim3(static_cast<unsigned>(num_blocks)), Kernel::Tiles::kNumThreads,
                                         Kernel::kSharedBytes, stream, is_packed, arguments);
}

template <int kHeadDimQK, int kHeadDimV, class Element>
const char* launch_masked(ForwardParams const& params, void* workspace, cudaStream_t stream) {
  Problem const& problem = params.problem;
  if (problem.window_left >= 0)
    return launch<kHeadDimQK, kHeadDimV, MaskKind::kWindow, Element>(params, workspace, stream);
  if (problem.window_right >= 0)
    return launch<kHeadDimQK, kHeadDimV, MaskKind::kCausal, Element>(params, workspace, stream);
  return launch<kHeadDimQK, kHeadDimV, MaskKind::kNone, Element>(params, workspace, stream);
}

template <int kHeadDimQK, int kHeadDimV>
const char* launch_forward_row(ForwardParams const& params, void* workspace, cudaStream_t stream) {
  return params.problem.dtype == DType::kFloat16
             ? launch_masked<kHeadDimQK, kHeadDimV, cutlass::half_t>(params, workspace, stream)
             : launch_masked<kHeadDimQK, kHeadDimV, cutlass::bfloat16_t>(params, workspace, stream);
}

}  // namespace flashmla::sm90
