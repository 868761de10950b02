// Host side of the forward kernel: TMA descriptors and the launch. One instantiation per head-dim row, dtype and mask
// kind; a file of instantiations/ holds one row.
#pragma once

#include "sm90/forward/forward.cuh"
#include "sm90/hopper/device.h"
#include "sm90/hopper/tensor_map.h"
#include "sm90/launch.h"

namespace flashmla::sm90 {

template <int kHeadDimQK, int kHeadDimV, MaskKind kMask, class Element>
const char* launch(ForwardParams const& params, void* workspace, cudaStream_t stream) {
  using Kernel = ForwardKernel<kHeadDimQK, kHeadDimV, kMask, Element>;
  Problem const& problem = params.problem;
  bool const is_packed = problem.cu_seqlens_q != nullptr;
  int device = 0;
  cudaGetDevice(&device);

  ForwardArguments arguments{};
  int num_ctas = 0;
  if (const char* error = make_forward_schedule(problem, Kernel::kBlockQ, num_sms(device) / Kernel::kNumCtas, workspace,
                                                stream, arguments.schedule, num_ctas, Kernel::kQueryParts)) {
    return error;
  }
  QueryMaps const maps{problem, arguments.schedule, Kernel::kSwizzleColumns, Kernel::kBlockKV};
  Schedule const& schedule = arguments.schedule;
  const char* error =
      maps.make_queries(arguments.q, params.q, problem.head_dim_qk, schedule.rows_per_block / Kernel::kQueryParts);
  if (error == nullptr) error = maps.make_keys(arguments.k, params.k, problem.head_dim_qk);
  if (error == nullptr) error = maps.make_keys(arguments.v, params.v, problem.head_dim_v);
  arguments.can_tma_store = Kernel::kLooksAhead && kWarpgroupRows % schedule.heads_packed == 0;
  if (error == nullptr && arguments.can_tma_store) {
    error = maps.make_queries(arguments.o, params.out, problem.head_dim_v, kWarpgroupRows / schedule.heads_packed);
  }
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
  return launch_kernel<ForwardArguments>(kernel, dim3(static_cast<unsigned>(num_ctas * Kernel::kNumCtas)),
                                         Kernel::Tiles::kNumThreads, Kernel::kSharedBytes, stream,
                                         is_packed ? Launch::kDependent : Launch::kAlone, arguments, Kernel::kNumCtas);
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
const char* launch_forward_head_dims(ForwardParams const& params, void* workspace, cudaStream_t stream) {
  return params.problem.dtype == DType::kFloat16
             ? launch_masked<kHeadDimQK, kHeadDimV, cutlass::half_t>(params, workspace, stream)
             : launch_masked<kHeadDimQK, kHeadDimV, cutlass::bfloat16_t>(params, workspace, stream);
}

}  // namespace flashmla::sm90
