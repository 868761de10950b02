// Host side of the fp8 forward: the workspace, quantisation, TMA descriptors and the launch. One instantiation per head
// dim.
#pragma once

#include <algorithm>

#include "sm90/fp8/forward_fp8.cuh"
#include "sm90/fp8/quantize.cuh"
#include "sm90/fp8/round.cuh"
#include "sm90/hopper/device.h"
#include "sm90/hopper/tensor_map.h"
#include "sm90/launch.h"

namespace flashmla::sm90 {

constexpr const char* kTooManyRows =
    "the tensors are too large: expected fewer than 2^31 queries and keys; pass a part of the batch at a time";

// Where the operands lie in the workspace, behind the schedule.
struct Fp8Workspace {
  Fp8Operands operands;
  int64_t bytes;
};

template <int kHeadDim>
Fp8Workspace fp8_workspace_of(Problem const& problem, void* workspace) {
  unsigned char* const begin = static_cast<unsigned char*>(workspace);
  int64_t bytes = forward_schedule_bytes(problem, Fp8ForwardTiles<kHeadDim>::kBlockQ);
  auto take = [&](int64_t size) {
    bytes = (bytes + 127) / 128 * 128;
    unsigned char* const place = begin + bytes;
    bytes += size;
    return place;
  };
  int64_t const rows = problem.cu_seqlens_q != nullptr ? problem.total_q : problem.batch * problem.seqlen_q;
  Fp8Operands operands;
  operands.blocks_q = num_fp8_blocks(problem, problem.seqlen_q, problem.total_q);
  operands.blocks = num_fp8_blocks(problem, problem.seqlen_kv, problem.total_kv);
  int64_t const keys = problem.heads_kv * operands.blocks * kRowsOfScale;
  operands.q = take(rows * problem.heads_q * kHeadDim);
  operands.k = take(keys * kHeadDim);
  operands.vt = take(keys * kHeadDim);
  operands.q_scales = reinterpret_cast<float*>(take(problem.heads_q * operands.blocks_q * 4));
  operands.k_scales = reinterpret_cast<float*>(take(problem.heads_kv * operands.blocks * 4));
  operands.v_scales = reinterpret_cast<float*>(take(problem.heads_kv * operands.blocks * 4));
  return {operands, bytes};
}

template <int kHeadDim>
int64_t fp8_workspace_head_dim(Fp8ForwardParams const& params) {
  return fp8_workspace_of<kHeadDim>(params.problem, nullptr).bytes;
}

// Element: of q, k and v.
template <int kHeadDim, class Element>
const char* quantize(Fp8ForwardParams const& params, Fp8Operands const& operands, int device, cudaStream_t stream) {
  Problem const& problem = params.problem;
  if (std::max(operands.blocks, operands.blocks_q) > INT32_MAX / kRowsOfScale) {
    return kTooManyRows;
  }
  QuantizeArguments const arguments{problem,          params.q,         params.k, params.v,      params.q_descale,
                                    params.k_descale, params.v_descale, operands, params.rotates};
  int64_t const blocks = operands.blocks_q * problem.heads_q + 2 * operands.blocks * problem.heads_kv;
  if (blocks > INT32_MAX) return kTooManyRows;
  if (blocks == 0) return nullptr;
  constexpr auto* kernel = quantize_kernel<kHeadDim, Element>;
  constexpr int kSharedBytes = sizeof(QuantizeShared<kHeadDim, Element>);
  if (cudaError_t const status = allow_shared_memory<kernel>(kSharedBytes, device); status != cudaSuccess) {
    return cudaGetErrorString(status);
  }
  int64_t const ctas = std::min<int64_t>(blocks, num_sms(device) * kQuantizeCtas<kHeadDim>);
  return launch_kernel<QuantizeArguments>(kernel, dim3(static_cast<unsigned>(ctas)), kQuantizeThreads, kSharedBytes,
                                          stream, Launch::kAlone, arguments);
}

// Element: of out.
template <int kHeadDim, MaskKind kMask, class Element>
const char* launch_fp8(Fp8ForwardParams const& params, void* workspace, cudaStream_t stream) {
  using Kernel = Fp8Forward<kHeadDim, kMask, Element>;
  Problem const& problem = params.problem;
  int device = 0;
  cudaGetDevice(&device);
  Fp8Operands const operands = fp8_workspace_of<kHeadDim>(problem, workspace).operands;
  if (const char* error = params.q_descale.data != nullptr
                              ? quantize<kHeadDim, cutlass::float_e4m3_t>(params, operands, device, stream)
                              : quantize<kHeadDim, Element>(params, operands, device, stream)) {
    return error;
  }

  Fp8ForwardArguments arguments{};
  int num_ctas = 0;
  if (const char* error = make_forward_schedule(problem, Kernel::kBlockQ, num_sms(device), workspace, stream,
                                                arguments.schedule, num_ctas)) {
    return error;
  }
  Schedule const& schedule = arguments.schedule;
  bool const is_packed = problem.cu_seqlens_q != nullptr;
  int64_t const packed = schedule.heads_packed, batch = is_packed ? 1 : problem.batch;
  int64_t const rows = is_packed ? problem.total_q : problem.seqlen_q;
  int64_t const places = operands.blocks * kRowsOfScale;
  const char* error = make_tensor_map(arguments.q, operands.q, MapElement::kE4m3,
                                      {{kHeadDim, 1, Kernel::kSwizzleColumns},
                                       {packed, kHeadDim, static_cast<int>(packed)},
                                       {rows, problem.heads_q * kHeadDim, schedule.rows_per_block},
                                       {problem.heads_q / packed, kHeadDim * packed, 1},
                                       {batch, rows * problem.heads_q * kHeadDim, 1}});
  if (error == nullptr && places > 0) {
    error = make_tensor_map(arguments.k, operands.k, MapElement::kE4m3,
                            {{kHeadDim, 1, Kernel::kSwizzleColumns},
                             {places, kHeadDim, Kernel::kBlockKV},
                             {problem.heads_kv, places * kHeadDim, 1}});
  }
  if (error == nullptr && places > 0) {
    error = make_tensor_map(
        arguments.vt, operands.vt, MapElement::kE4m3,
        {{places, 1, Kernel::kBlockKV}, {kHeadDim, places, kHeadDim}, {problem.heads_kv, places * kHeadDim, 1}});
  }
  if (error != nullptr) return error;
  arguments.out = params.out;
  arguments.lse = params.lse;
  arguments.problem = problem;
  arguments.window = window_of(problem);
  arguments.q_scales = operands.q_scales;
  arguments.k_scales = operands.k_scales;
  arguments.v_scales = operands.v_scales;
  arguments.blocks_q = static_cast<int32_t>(operands.blocks_q);
  arguments.blocks = static_cast<int32_t>(operands.blocks);

  constexpr auto* kernel = fp8_forward_kernel<kHeadDim, kMask, Element>;
  if (cudaError_t const status = allow_shared_memory<kernel>(Kernel::kSharedBytes, device); status != cudaSuccess) {
    return cudaGetErrorString(status);
  }
  return launch_kernel<Fp8ForwardArguments>(kernel, dim3(static_cast<unsigned>(num_ctas)), Kernel::Tiles::kNumThreads,
                                            Kernel::kSharedBytes, stream, Launch::kDependent, arguments);
}

template <int kHeadDim, class Element>
const char* launch_fp8_masked(Fp8ForwardParams const& params, void* workspace, cudaStream_t stream) {
  Problem const& problem = params.problem;
  if (problem.window_left >= 0) return launch_fp8<kHeadDim, MaskKind::kWindow, Element>(params, workspace, stream);
  if (problem.window_right >= 0) return launch_fp8<kHeadDim, MaskKind::kCausal, Element>(params, workspace, stream);
  return launch_fp8<kHeadDim, MaskKind::kNone, Element>(params, workspace, stream);
}

template <int kHeadDim>
const char* launch_fp8_head_dim(Fp8ForwardParams const& params, void* workspace, cudaStream_t stream) {
  return params.problem.dtype == DType::kFloat16
             ? launch_fp8_masked<kHeadDim, cutlass::half_t>(params, workspace, stream)
             : launch_fp8_masked<kHeadDim, cutlass::bfloat16_t>(params, workspace, stream);
}

template <int kHeadDim, class Element>
const char* launch_fp8_rounding_element(Fp8RoundingParams const& params, cudaStream_t stream) {
  Problem const& problem = params.problem;
  int device = 0;
  cudaGetDevice(&device);
  constexpr auto* kernel = round_kernel<kHeadDim, Element>;
  constexpr int kSharedBytes = sizeof(RoundShared<kHeadDim, Element>);
  if (cudaError_t const status = allow_shared_memory<kernel>(kSharedBytes, device); status != cudaSuccess) {
    return cudaGetErrorString(status);
  }
  auto launch = [&](TensorView const& x, void* out, int64_t blocks, int64_t heads, int64_t head_dim, Side side,
                    bool rotates, bool is_key) -> const char* {
    if (blocks > INT32_MAX / kRowsOfScale) return kTooManyRows;
    if (blocks == 0) return nullptr;
    RoundingArguments const arguments{problem, x,     static_cast<cutlass::bfloat16_t*>(out), heads, head_dim, side,
                                      rotates, is_key};
    return launch_kernel<RoundingArguments>(kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(heads)),
                                            kQuantizeThreads, kSharedBytes, stream, Launch::kAlone, arguments);
  };
  int64_t const blocks_q = num_fp8_blocks(problem, problem.seqlen_q, problem.total_q);
  int64_t const blocks = num_fp8_blocks(problem, problem.seqlen_kv, problem.total_kv);
  const char* error = launch(params.q, params.rounded_q, blocks_q, problem.heads_q, problem.head_dim_qk, Side::kQueries,
                             params.rotates, false);
  if (error == nullptr) {
    error = launch(params.k, params.rounded_k, blocks, problem.heads_kv, problem.head_dim_qk, Side::kKeys,
                   params.rotates, true);
  }
  if (error == nullptr) {
    error = launch(params.v, params.rounded_v, blocks, problem.heads_kv, problem.head_dim_v, Side::kKeys, false, false);
  }
  return error;
}

template <int kHeadDim>
const char* launch_fp8_rounding_head_dim(Fp8RoundingParams const& params, cudaStream_t stream) {
  return params.problem.dtype == DType::kFloat16
             ? launch_fp8_rounding_element<kHeadDim, cutlass::half_t>(params, stream)
             : launch_fp8_rounding_element<kHeadDim, cutlass::bfloat16_t>(params, stream);
}

}  // namespace flashmla::sm90
