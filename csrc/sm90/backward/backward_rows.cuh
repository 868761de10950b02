// The small kernels around the backward kernel: what each query row needs before, and the sums afterwards.
//
//   preprocess      delta = rowsum(dO o O) - dlse, lse in base 2; sums of dQ and semaphores set to zero; a q_block's
//   part
//                   of dsinks
//   dq_postprocess  dQ = scale * sum, from fp32 fragments to rows of the tensor
//   combine_splits  dK and dV of a tile, summed over the splits of a group
//   sum_sinks       dsinks[h] = -sum_i exp(sinks[h] - lse[i]) delta[i], in a fixed order
//
// Source: delta, FlashAttention-2 (arXiv 2307.08691), algorithm 2, line 4; the dlse term follows from d lse / d S = P.
#pragma once

#include <cutlass/arch/grid_dependency_control.h>

#include "sm90/backward/backward_math.cuh"

namespace flashmla::sm90 {

constexpr int kRowThreads = 256;

struct PreprocessArguments {
  TensorView out, dout;
  RowView lse, dlse;  // dlse.data may be null
  BackwardRows rows;
  Problem problem;
  Window window;
  float* dsink_parts;  // [heads_q, blocks of a head], or null
};

struct PostprocessArguments {
  TensorView dq;
  BackwardRows rows;
  Problem problem;
};

struct SumSinksArguments {
  float const* parts;  // [heads_q, num_parts]
  int32_t num_parts;
  float* dsinks;  // [heads_q]
};

// Which queries block `block` of a head's workspace rows holds: of sequence `number`, from its query `q_begin` on. Past
// the last sequence's there may be blocks without any.
struct WorkspaceBlock {
  int32_t number, q_begin;
  Sequence sequence;
};

template <int kBlockQ>
__device__ WorkspaceBlock workspace_block(Problem const& problem, int32_t block) {
  if (problem.cu_seqlens_q == nullptr) {
    int32_t const per_sequence = (static_cast<int32_t>(problem.seqlen_q) + kBlockQ - 1) / kBlockQ;
    int32_t const number = block / per_sequence;
    return {number, (block - number * per_sequence) * kBlockQ, sequence_at(problem, number, Side::kQueries)};
  }
  auto first_block = [&](int32_t number) {
    int32_t const offset = min(max(problem.cu_seqlens_q[number], 0), static_cast<int32_t>(problem.total_q));
    return first_workspace_row(problem, number, offset, kBlockQ) / kBlockQ;
  };
  int32_t low = 0, high = static_cast<int32_t>(problem.batch);  // the last sequence that does not begin after it
  while (low < high) {
    int32_t const middle = (low + high + 1) / 2;
    if (first_block(middle) <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return {low, max(0, block - first_block(low)) * kBlockQ, sequence_at(problem, low, Side::kQueries)};
}

// What a block of threads works on, of a grid of heads_q times the blocks of rows of a head.
template <int kBlockQ>
__device__ int32_t head_of_block(BackwardRows const& rows) {
  return static_cast<int32_t>(blockIdx.x / static_cast<uint32_t>(rows.per_head / kBlockQ));
}

template <int kBlockQ>
__device__ int32_t block_in_head(BackwardRows const& rows, int32_t head) {
  return static_cast<int32_t>(blockIdx.x - head * static_cast<uint32_t>(rows.per_head / kBlockQ));
}

// One CTA for each q_block and head.
template <int kBlockQ, int kHeadDimQK, int kHeadDimV, class Element>
__global__ void __launch_bounds__(kRowThreads)
    preprocess_kernel(__grid_constant__ PreprocessArguments const arguments) {
  cutlass::arch::launch_dependent_grids();
  Problem const& problem = arguments.problem;
  BackwardRows const& rows = arguments.rows;
  int32_t const head = head_of_block<kBlockQ>(rows);
  int64_t const first_row = int64_t{blockIdx.x} * kBlockQ;  // of all heads
  WorkspaceBlock const block = workspace_block<kBlockQ>(problem, block_in_head<kBlockQ>(rows, head));
  int64_t const batch = problem.cu_seqlens_q != nullptr ? 0 : block.number;
  int32_t const vectors = static_cast<int32_t>(problem.head_dim_v) / 8;  // of 16 bytes
  int32_t lanes = 1;                                                     // that share a row
  while (lanes < vectors && lanes < kWarpThreads) lanes *= 2;
  int32_t const lane = threadIdx.x % lanes;
  bool const has_sink = problem.sinks != nullptr && !(problem.cu_seqlens_q != nullptr && block.number == problem.batch);
  __shared__ float sink_terms[kBlockQ];
  bool is_large = false;
  constexpr int kVectorsOfLane = (kHeadDimV + 8 * kWarpThreads - 1) / (8 * kWarpThreads);

  for (int32_t row = threadIdx.x / lanes; row < kBlockQ; row += kRowThreads / lanes) {
    int32_t const query = block.q_begin + row;
    bool const is_valid = query < block.sequence.seqlen_q;
    float sum = 0.0f;
    CUTE_UNROLL
    for (int part = 0; part < kVectorsOfLane; ++part) {
      int32_t const vector = part * lanes + lane;
      if (!is_valid || vector >= vectors) break;
      auto load = [&](TensorView const& view) {
        return *reinterpret_cast<uint4 const*>(
            static_cast<Element const*>(view.data) + batch * view.stride_batch + head * view.stride_heads +
            (block.sequence.offset_q + int64_t{query}) * view.stride_seqlen + vector * 8);
      };
      uint4 const out = load(arguments.out), dout = load(arguments.dout);
      uint32_t const a[4] = {out.x, out.y, out.z, out.w}, b[4] = {dout.x, dout.y, dout.z, dout.w};
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) {
        float2 const x = unpack<Element>(a[i]), y = unpack<Element>(b[i]);
        sum += x.x * y.x + x.y * y.y;
      }
    }
    for (int32_t distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffff, sum, distance);
    if (lane == 0) {
      float lse = INFINITY, delta = 0.0f, sink_term = 0.0f;
      if (is_valid) {
        auto at = [&](RowView const& view) {
          return view.data[batch * view.stride_batch + head * view.stride_heads + block.sequence.offset_q + query];
        };
        int32_t const position = query + block.sequence.seqlen_kv - block.sequence.seqlen_q;
        VisibleKeys const keys = visible_keys(arguments.window, block.sequence.seqlen_kv, position, position);
        bool const sees_key = keys.begin < keys.end;
        // A query that sees no key has out = 0, whatever dO holds, and whatever dlse holds reaches its sink alone.
        float const natural = at(arguments.lse);
        float const gradient = (sees_key ? sum : 0.0f) - (arguments.dlse.data != nullptr ? at(arguments.dlse) : 0.0f);
        if (natural != -INFINITY) {
          if (has_sink) sink_term = -exp2f((problem.sinks[head] - natural) * kLog2e) * gradient;
          if (sees_key) {
            lse = natural == INFINITY ? NAN : natural * kLog2e;  // inf is said of rows whose P is 0
            // A large lse is rounded by more than P bears. It then errs to the side on which the row's largest P, cut
            // to 1, is right, and not 0.
            if (is_large_lse(lse)) {
              lse -= fabsf(lse) * kLseRounding;
              is_large = true;
            }
            delta = gradient;
          }
        }
      }
      rows.lse_log2[first_row + place_of_row(row)] = lse;
      rows.delta[first_row + place_of_row(row)] = delta;
      sink_terms[row] = sink_term;
    }
  }
  int64_t const workspace_block = first_row / kBlockQ;
  if (rows.dq != nullptr) {
    float4* const dq = reinterpret_cast<float4*>(rows.dq + workspace_block * (kBlockQ * kHeadDimQK));
    for (int32_t i = threadIdx.x; i < kBlockQ * kHeadDimQK / 4; i += kRowThreads) dq[i] = float4{0, 0, 0, 0};
  }
  if (rows.dq_semaphore != nullptr && threadIdx.x == 0) rows.dq_semaphore[workspace_block] = 0;
  is_large = __syncthreads_or(is_large);
  if (threadIdx.x == 0) {
    rows.is_large[workspace_block] = is_large;
    if (arguments.dsink_parts != nullptr) {
      float sum = 0.0f;
      for (int row = 0; row < kBlockQ; ++row) sum += sink_terms[row];
      arguments.dsink_parts[blockIdx.x] = sum;
    }
  }
}

template <int kBlockQ, int kHeadDimQK, class Element>
__global__ void __launch_bounds__(kRowThreads)
    dq_postprocess_kernel(__grid_constant__ PostprocessArguments const arguments) {
  Problem const& problem = arguments.problem;
  int32_t const head = head_of_block<kBlockQ>(arguments.rows);
  WorkspaceBlock const block = workspace_block<kBlockQ>(problem, block_in_head<kBlockQ>(arguments.rows, head));
  constexpr bool kSplitsQueries = kBlockQ == 128;
  constexpr int kColumns = kSplitsQueries ? kHeadDimQK : kHeadDimQK / 2;  // of a warpgroup
  constexpr int kVectors = kColumns / 8;
  int const warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  cutlass::arch::wait_on_dependent_grids();
  if (block.q_begin >= block.sequence.seqlen_q) return;
  float4 const* const sums =
      reinterpret_cast<float4 const*>(arguments.rows.dq + int64_t{blockIdx.x} * (kBlockQ * kHeadDimQK)) +
      warpgroup * kVectors * 128 + threadIdx.x % 128;
  float fragment[4 * kVectors];
  CUTE_UNROLL
  for (int i = 0; i < kVectors; ++i) reinterpret_cast<float4*>(fragment)[i] = sums[i * 128];
  TensorView const& dq = arguments.dq;
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) {
    int32_t const query = block.q_begin + (kSplitsQueries ? warpgroup * 64 : 0) + warp % 4 * 16 + lane / 4 + 8 * r;
    Element* out = nullptr;
    if (query < block.sequence.seqlen_q) {
      out = static_cast<Element*>(dq.data) + (problem.cu_seqlens_q != nullptr ? 0 : block.number) * dq.stride_batch +
            head * dq.stride_heads + (block.sequence.offset_q + int64_t{query}) * dq.stride_seqlen;
    }
    store_row<Element, kColumns>(
        out, [&](int i) { return fragment[i]; }, r, problem.scale, kSplitsQueries ? 0 : warpgroup * kColumns,
        problem.head_dim_qk, threadIdx.x % 4);
  }
}

// One CTA for each work tile, in the order of `parts`: kv_blocks of kv heads of batches.
template <int kBlockKV, int kHeadDimQK, int kHeadDimV, bool kSplitsColumns, class Element>
__global__ void __launch_bounds__(kRowThreads)
    combine_splits_kernel(__grid_constant__ BackwardArguments const arguments) {
  BackwardWorkTile tile;
  int32_t const blocks = arguments.schedule.num_row_blocks, heads = static_cast<int32_t>(arguments.problem.heads_kv);
  int32_t const index = blockIdx.x, head = index / blocks;  // of all batches
  tile.head_kv = head % heads;
  tile.batch = head / heads;
  tile.kv_begin = (index - head * blocks) * kBlockKV;
  tile.sequence = sequence_at(arguments.problem, tile.batch, Side::kKeys);
  cutlass::arch::wait_on_dependent_grids();
  constexpr int kPart = kBlockKV * (kHeadDimQK + kHeadDimV);
  float const* part = arguments.parts + int64_t{index} * arguments.num_splits * kPart;
  auto sum_and_write = [&](auto columns, TensorView const& view, float factor, int64_t head_dim) {
    constexpr int kColumns = decltype(columns)::value / (kSplitsColumns ? 2 : 1), kVectors = kColumns / 8;
    float fragment[4 * kVectors] = {};
    for (int split = 0; split < arguments.num_splits; ++split) {
      float4 const* const source = reinterpret_cast<float4 const*>(part + int64_t{split} * kPart) +
                                   threadIdx.x / 32 * (kVectors * 32) + threadIdx.x % 32;
      CUTE_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        float4 const x = source[i * 32];
        fragment[4 * i] += x.x, fragment[4 * i + 1] += x.y, fragment[4 * i + 2] += x.z, fragment[4 * i + 3] += x.w;
      }
    }
    int const warp = threadIdx.x / 32;
    write_keys<Element, kColumns>(
        arguments, tile, view, [&](int i) { return fragment[i]; }, factor,
        (kSplitsColumns ? warp % 4 : warp) * 16 + threadIdx.x % 32 / 4, kSplitsColumns ? warp / 4 * kColumns : 0,
        head_dim);
  };
  sum_and_write(cute::Int<kHeadDimQK>{}, arguments.dk, arguments.problem.scale, arguments.problem.head_dim_qk);
  part += kBlockKV * kHeadDimQK;
  sum_and_write(cute::Int<kHeadDimV>{}, arguments.dv, 1.0f, arguments.problem.head_dim_v);
}

// A template so that every instantiation file may have it.
template <int kThreads = kRowThreads>
__global__ void __launch_bounds__(kThreads) sum_sinks_kernel(__grid_constant__ SumSinksArguments const arguments) {
  __shared__ float sums[kThreads];
  float sum = 0.0f;
  for (int32_t i = threadIdx.x; i < arguments.num_parts; i += kThreads) {
    sum += arguments.parts[int64_t{blockIdx.x} * arguments.num_parts + i];
  }
  sums[threadIdx.x] = sum;
  for (int count = kThreads / 2; count > 0; count /= 2) {
    __syncthreads();
    if (threadIdx.x < count) sums[threadIdx.x] += sums[threadIdx.x + count];
  }
  if (threadIdx.x == 0) arguments.dsinks[blockIdx.x] = sums[0];
}

}  // namespace flashmla::sm90
