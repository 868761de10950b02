// Q, K and V as e4m3 numbers and scales (operands.h), in one pass over each.
//
// A scale is the largest magnitude of its numbers over 448, e4m3's largest; of nothing but zeros it is 1. NaN stays NaN,
// and infinity makes NaN of itself and zeros of the others. With `rotates`, rows of Q and K are multiplied by one
// orthogonal matrix, random signs and then a Hadamard matrix, which leaves Q K^T as it is and spreads what stands out.
//
// Source: FlashAttention-3 (arXiv 2407.08608, section 3.3: blocks and "incoherent processing").
#pragma once

#include <cutlass/arch/grid_dependency_control.h>

#include <cute/tensor.hpp>

#include "params.h"
#include "sm90/fp8/operands.h"
#include "sm90/hopper/fragment.cuh"
#include "sm90/hopper/ptx.cuh"
#include "sm90/scheduling/scheduler.cuh"

namespace flashmla::sm90 {

constexpr float kLargestE4m3 = 448.0f;
constexpr int kQuantizeWarps = 8, kQuantizeThreads = kQuantizeWarps * kWarpThreads;

struct QuantizeArguments {
  Problem problem;
  TensorView q, k, v;
  Fp8Operands operands;
  bool rotates;
};

// A row of kHeadDim numbers in a warp: lane l has the kValues from column kValues * l on.
template <int kHeadDim, class Element>
struct RowInWarp {
  static constexpr int kValues = kHeadDim / kWarpThreads;
  static_assert(kValues == 2 || kValues == 4, "pairs are read as one word");
  float x[kValues];

  __device__ void clear() {
    CUTE_UNROLL
    for (float& value : x) value = 0.0f;
  }

  __device__ void read(Element const* row, int64_t head_dim) {
    clear();
    int const lane = threadIdx.x % kWarpThreads;
    CUTE_UNROLL
    for (int i = 0; i < kValues; i += 2) {
      if (lane * kValues + i >= head_dim) break;
      float2 const pair = unpack<Element>(*reinterpret_cast<uint32_t const*>(row + lane * kValues + i));
      x[i] = pair.x;
      x[i + 1] = pair.y;
    }
  }

  // One of 2^-16 as likely signs: a hash of the column, the same for Q and K.
  __device__ static bool is_negative(uint32_t column) {
    uint32_t h = (column + 1) * 0x9e3779b9u;
    h = (h ^ (h >> 15)) * 0x85ebca6bu;
    return (h ^ (h >> 13)) & 1;
  }

  __device__ void rotate() {
    int const lane = threadIdx.x % kWarpThreads;
    CUTE_UNROLL
    for (int i = 0; i < kValues; ++i) {
      if (is_negative(lane * kValues + i)) x[i] = -x[i];
    }
    CUTE_UNROLL
    for (int distance = 1; distance < kValues; distance *= 2) {
      CUTE_UNROLL
      for (int i = 0; i < kValues; ++i) {
        if (i & distance) continue;
        float const a = x[i], b = x[i + distance];
        x[i] = a + b;
        x[i + distance] = a - b;
      }
    }
    CUTE_UNROLL
    for (int distance = 1; distance < kWarpThreads; distance *= 2) {
      CUTE_UNROLL
      for (int i = 0; i < kValues; ++i) {
        float const other = __shfl_xor_sync(0xffffffff, x[i], distance);
        x[i] = lane & distance ? other - x[i] : x[i] + other;
      }
    }
    CUTE_UNROLL
    for (float& value : x) value *= kHeadDim == 128 ? 0.08838834764831845f : 0.125f;  // 1 / sqrt(kHeadDim)
  }

  __device__ float largest() const {  // of this lane
    float most = 0.0f;
    CUTE_UNROLL
    for (float const value : x) most = fmaxf(most, fabsf(value));
    return most;
  }

  // kValues bytes, the first in the lowest.
  __device__ uint32_t quantized(float inverse) const {
    if constexpr (kValues == 4) {
      return ptx::pack_e4m3(x[0] * inverse, x[1] * inverse, x[2] * inverse, x[3] * inverse);
    } else {
      return ptx::pack_e4m3(x[0] * inverse, x[1] * inverse, 0.0f, 0.0f);
    }
  }

  __device__ void write(uint8_t* row, float inverse) const {
    int const lane = threadIdx.x % kWarpThreads;
    uint32_t const word = quantized(inverse);
    if constexpr (kValues == 4) {
      *reinterpret_cast<uint32_t*>(row + lane * kValues) = word;
    } else {
      *reinterpret_cast<uint16_t*>(row + lane * kValues) = static_cast<uint16_t>(word);
    }
  }
};

__device__ inline float largest_of_warp(float x) {
  CUTE_UNROLL
  for (int lanes = 1; lanes < kWarpThreads; lanes *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, lanes));
  return x;
}

__device__ inline float scale_of(float largest) { return largest == 0.0f ? 1.0f : largest / kLargestE4m3; }

// A warp for each query and head.
template <int kHeadDim, class Element>
__global__ void __launch_bounds__(kQuantizeThreads) quantize_queries_kernel(QuantizeArguments const arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  ptx::wait_on_dependent_grids();
  cutlass::arch::launch_dependent_grids();
  Problem const& problem = arguments.problem;
  int64_t const index = int64_t{blockIdx.x} * kQuantizeWarps + threadIdx.x / kWarpThreads;
  bool const is_packed = problem.cu_seqlens_q != nullptr;
  int64_t const rows = is_packed ? problem.total_q : problem.batch * problem.seqlen_q;
  if (index >= rows * problem.heads_q) return;
  int64_t const row = index / problem.heads_q, head = index - row * problem.heads_q;
  int64_t const batch = is_packed ? 0 : row / problem.seqlen_q, query = row - batch * problem.seqlen_q;
  RowInWarp<kHeadDim, Element> x;
  x.read(static_cast<Element const*>(arguments.q.data) + batch * arguments.q.stride_batch +
             query * arguments.q.stride_seqlen + head * arguments.q.stride_heads,
         problem.head_dim_qk);
  if (arguments.rotates) x.rotate();
  float const scale = scale_of(largest_of_warp(x.largest()));
  x.write(static_cast<uint8_t*>(arguments.operands.q) + index * kHeadDim, 1.0f / scale);
  if (threadIdx.x % kWarpThreads == 0) arguments.operands.q_scales[index] = scale;
#endif
}

// A CTA for each block of keys and kv head.
template <int kHeadDim, class Element>
__global__ void __launch_bounds__(kQuantizeThreads) quantize_keys_kernel(QuantizeArguments const arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kKeys = kKeysOfScale / kQuantizeWarps;  // of a warp
  constexpr int kValues = RowInWarp<kHeadDim, Element>::kValues;
  constexpr int kPitch = kKeysOfScale + 4;  // bytes of a column in shared memory
  __shared__ float largest_k[kQuantizeWarps], largest_v[kQuantizeWarps];
  __shared__ alignas(16) uint8_t columns[kHeadDim * kPitch];

  ptx::wait_on_dependent_grids();
  cutlass::arch::launch_dependent_grids();
  Problem const& problem = arguments.problem;
  Fp8Operands const& operands = arguments.operands;
  int32_t const block = blockIdx.x, head = blockIdx.y;
  int const warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;

  // The last sequence whose blocks begin here or before: an empty one has none, but a number all the same.
  int32_t low = 0, high = static_cast<int32_t>(problem.batch) - 1;
  auto offset_of = [&](int32_t number) { return sequence_at(problem, number, Side::kKeys).offset_kv; };
  while (low < high) {
    int32_t const middle = (low + high + 1) / 2;
    if (first_fp8_block(problem, middle, offset_of(middle)) <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  Sequence const sequence = sequence_at(problem, low, Side::kKeys);
  int32_t const first_key = (block - first_fp8_block(problem, low, sequence.offset_kv)) * kKeysOfScale;
  if (first_key >= sequence.seqlen_kv) return;  // no tile reads it
  int64_t const batch = problem.cu_seqlens_q != nullptr ? 0 : low;
  auto row_of = [&](TensorView const& view, int key) {
    return static_cast<Element const*>(view.data) + batch * view.stride_batch + head * view.stride_heads +
           (sequence.offset_kv + int64_t{first_key} + key) * view.stride_seqlen;
  };

  RowInWarp<kHeadDim, Element> k[kKeys], v[kKeys];
  float most_k = 0.0f, most_v = 0.0f;
  CUTE_UNROLL
  for (int i = 0; i < kKeys; ++i) {
    int const key = warp * kKeys + i;
    if (first_key + key < sequence.seqlen_kv) {
      k[i].read(row_of(arguments.k, key), problem.head_dim_qk);
      v[i].read(row_of(arguments.v, key), problem.head_dim_v);
    } else {
      k[i].clear();
      v[i].clear();
    }
    if (arguments.rotates) k[i].rotate();
    most_k = fmaxf(most_k, k[i].largest());
    most_v = fmaxf(most_v, v[i].largest());
  }
  most_k = largest_of_warp(most_k);
  most_v = largest_of_warp(most_v);
  if (lane == 0) {
    largest_k[warp] = most_k;
    largest_v[warp] = most_v;
  }
  __syncthreads();
  CUTE_UNROLL
  for (int i = 0; i < kQuantizeWarps; ++i) {
    most_k = fmaxf(most_k, largest_k[i]);
    most_v = fmaxf(most_v, largest_v[i]);
  }
  float const k_scale = scale_of(most_k), v_scale = scale_of(most_v);
  int64_t const place = int64_t{block} * kKeysOfScale, places = operands.blocks * kKeysOfScale;
  CUTE_UNROLL
  for (int i = 0; i < kKeys; ++i) {
    int const key = warp * kKeys + i;
    k[i].write(static_cast<uint8_t*>(operands.k) + (head * places + place + key) * kHeadDim, 1.0f / k_scale);
    uint32_t const word = v[i].quantized(1.0f / v_scale);
    CUTE_UNROLL
    for (int c = 0; c < kValues; ++c) {
      columns[(lane * kValues + c) * kPitch + place_of_key(key)] = static_cast<uint8_t>(word >> 8 * c);
    }
  }
  if (threadIdx.x == 0) {
    operands.k_scales[head * operands.blocks + block] = k_scale;
    operands.v_scales[head * operands.blocks + block] = v_scale;
  }
  __syncthreads();
  constexpr int kWords = kKeysOfScale / 4;  // of a column
  uint8_t* const vt = static_cast<uint8_t*>(operands.vt) + int64_t{head} * kHeadDim * places + place;
  for (int i = threadIdx.x; i < kHeadDim * kWords; i += kQuantizeThreads) {
    int const column = i / kWords, word = i % kWords;
    *reinterpret_cast<uint32_t*>(vt + column * places + word * 4) =
        *reinterpret_cast<uint32_t const*>(columns + column * kPitch + word * 4);
  }
#endif
}

}  // namespace flashmla::sm90
