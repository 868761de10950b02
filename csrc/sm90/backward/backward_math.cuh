// The arithmetic of the backward kernels by keys: probabilities and gradients of scores in registers, their way through
// shared memory, and how dK and dV leave the registers.
#pragma once

#include <cute/tensor.hpp>

#include "params.h"
#include "sm90/backward/backward_producer.cuh"
#include "sm90/hopper/fragment.cuh"
#include "sm90/hopper/ptx.cuh"
#include "sm90/hopper/softmax.cuh"
#include "sm90/tiles.h"

namespace flashmla::sm90 {

// lse or delta of the queries of a thread's scores: columns 2l, 2l + 1, 2l + 8, 2l + 9 of every 16 of a block, for lane
// l of a quad, which lie beside each other (place_of_row). kAhead of these fours are loaded at once, ahead of a product
// that is waited for, and each of the others when the one kAhead before it is read; in order.
template <int kScores, int kAhead>
struct ColumnValues {
  static constexpr int kFours = kScores / 8;
  static_assert(0 < kAhead && kAhead <= kFours);
  float4 values[kAhead];
  float4 const* shared;

  __device__ ColumnValues(float const* block, int quad_lane)
      : shared(reinterpret_cast<float4 const*>(block) + quad_lane) {
    CUTE_UNROLL
    for (int j = 0; j < kAhead; ++j) values[j] = shared[4 * j];
  }
  // Of columns 8j + 2l, 8j + 2l + 1.
  __device__ float2 at(int j) {
    float4 const four = values[j / 2 % kAhead];
    if (j % 2 == 0) return {four.x, four.y};
    if (j / 2 + kAhead < kFours) values[j / 2 % kAhead] = shared[4 * (j / 2 + kAhead)];
    return {four.z, four.w};
  }
};

// P^T of a warpgroup's 64 keys x kScores*2 queries, packed, and what dP - delta is to be multiplied by, packed as well:
// P, with softcap P (1 - tanh^2). Both in 16 bits, since fp32 P beside dP would not fit the registers: dS is rounded to
// 16 bits anyway.
template <class Element, bool kHasSoftcap, int kScores, class Scores, class Values>
__device__ void probabilities(BackwardArguments const& arguments, BackwardWorkTile const& tile, int32_t first_query,
                              Scores const& scores, uint32_t (&pairs_p)[kScores / 2], uint32_t (&pairs_w)[kScores / 2],
                              Values& lse_log2, bool is_large, int first_key, int row, int column) {
  Problem const& problem = arguments.problem;
  auto each_pair = [&](auto&& function) {
    CUTE_UNROLL
    for (int j = 0; j < kScores / 4; ++j) {
      float2 const lse = lse_log2.at(j);
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        int const i = 2 * j + r;
        function(scores(2 * i), scores(2 * i + 1), lse, pairs_p[i], pairs_w[i]);
      }
    }
  };
  if (kHasSoftcap && problem.softcap > 0.0f) {
    float const inner = problem.scale / problem.softcap, outer = problem.softcap * kLog2e;
    each_pair([&](float a, float b, float2 lse, uint32_t& pair_p, uint32_t& pair_w) {
      float const s = ptx::tanh_approx(a * inner), t = ptx::tanh_approx(b * inner);
      a = exp2f(s * outer - lse.x);
      b = exp2f(t * outer - lse.y);
      pair_p = pack<Element>(a, b);
      pair_w = pack<Element>(a * (1.0f - s * s), b * (1.0f - t * t));
    });
  } else {
    float const scale_log2 = problem.scale * kLog2e;
    each_pair([&](float a, float b, float2 lse, uint32_t& pair_p, uint32_t& pair_w) {
      pair_p = pair_w = pack<Element>(exp2f(a * scale_log2 - lse.x), exp2f(b * scale_log2 - lse.y));
    });
  }
  constexpr int kBlockQ = 2 * kScores;
  Window const window = arguments.window;
  int32_t const shift = tile.sequence.seqlen_kv - tile.sequence.seqlen_q;
  int32_t const key = tile.kv_begin + first_key;
  bool const is_masked = key + kWarpgroupRows > tile.sequence.seqlen_kv ||
                         (window.right >= 0 && key + (kWarpgroupRows - 1) > first_query + shift + window.right) ||
                         (window.left >= 0 && key < first_query + kBlockQ - 1 + shift - window.left);
  if (!is_masked && !is_large) return;
  if (is_large && problem.softcap <= 0.0f) {
    CUTE_UNROLL
    for (int i = 0; i < kScores / 2; ++i) pairs_p[i] = pairs_w[i] = ptx::at_most_one<Element>(pairs_p[i]);
  }
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) {
    // Queries [begin, end) see the key; relative to this thread's first column.
    int32_t const position = tile.kv_begin + row + 8 * r;
    int32_t begin = 0, end = 1 << 30;
    if (window.right >= 0) begin = position - shift - window.right - first_query - column;
    if (window.left >= 0) end = position - shift + window.left + 1 - first_query - column;
    if (position >= tile.sequence.seqlen_kv) end = -(1 << 30);
    CUTE_UNROLL
    for (int j = 0; j < kScores / 4; ++j) {
      uint32_t const keeps =
          (8 * j >= begin && 8 * j < end ? 0xffffu : 0u) | (8 * j + 1 >= begin && 8 * j + 1 < end ? 0xffff0000u : 0u);
      pairs_p[2 * j + r] &= keeps;
      pairs_w[2 * j + r] &= keeps;
    }
  }
}

// dS^T = W^T o (dP^T - delta), packed.
template <class Element, int kScores, class Scores, class Values>
__device__ void score_gradients(Scores const& dp, uint32_t const (&pairs_w)[kScores / 2],
                                uint32_t (&pairs_ds)[kScores / 2], Values& delta) {
  CUTE_UNROLL
  for (int j = 0; j < kScores / 4; ++j) {
    float2 const d = delta.at(j);
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      int const i = 2 * j + r;
      float2 const w = unpack<Element>(pairs_w[i]);
      pairs_ds[i] = pack<Element>(w.x * (dp(2 * i) - d.x), w.y * (dp(2 * i + 1) - d.y));
    }
  }
}

// Where this lane's row of the first of four 8 x 8 matrices lies, for keys x queries in A fragments (stmatrix,
// ldmatrix).
template <class Element>
__device__ uint32_t matrix_address(Element* scores, int first_key) {
  int const lane = threadIdx.x % 32;
  int const row = first_key + row_of_warp(threadIdx.x) + lane % 16;
  return cute::cast_smem_ptr_to_uint(scores) + row * 128 + ((lane / 16 ^ row % 8) * 16);
}

// The warpgroup's part of P^T or dS^T, 64 keys from first_key on x queries, to shared memory, 64 queries (128 bytes,
// swizzled) a row.
template <int kBlockKV, class Element, int kPairs>
__device__ void store_scores(Element* scores, uint32_t const (&pairs)[kPairs], int first_key) {
  uint32_t const base = matrix_address(scores, first_key);
  CUTE_UNROLL
  for (int k = 0; k < kPairs / 4; ++k) {  // 16 queries: 2 of the 8 16-byte columns of a swizzled row
    ptx::stmatrix_x4((base ^ (k % 4 * 32)) + k / 4 * (kBlockKV * 128), pairs[4 * k], pairs[4 * k + 1], pairs[4 * k + 2],
                     pairs[4 * k + 3]);
  }
}

// The inverse, for 64 keys x 64 queries.
template <class Element>
__device__ void load_scores(Element* scores, uint32_t (&pairs)[16], int first_key) {
  uint32_t const base = matrix_address(scores, first_key);
  CUTE_UNROLL
  for (int k = 0; k < 4; ++k) {
    ptx::ldmatrix_x4(base ^ (k * 32), pairs[4 * k], pairs[4 * k + 1], pairs[4 * k + 2], pairs[4 * k + 3]);
  }
}

// A thread's fragment of a tile's dK or dV to the tensor, or in fp32 beside those of the other splits.
template <class Element, int kColumns, class Fragment>
__device__ void write_keys(BackwardArguments const& arguments, BackwardWorkTile const& tile, TensorView const& view,
                           Fragment const& fragment, float factor, int row, int first_column, int64_t head_dim) {
  if (view.data == nullptr) return;
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) {
    int32_t const key = tile.kv_begin + row + 8 * r;
    Element* out = nullptr;
    if (key < tile.sequence.seqlen_kv) {
      out = static_cast<Element*>(view.data) + (tile.sequence.offset_kv + int64_t{key}) * view.stride_seqlen +
            tile.head_kv * view.stride_heads + tile.batch * view.stride_batch;  // packed: stride_batch is 0
    }
    store_row<Element, kColumns>(out, fragment, r, factor, first_column, head_dim, threadIdx.x % 4);
  }
}

template <int kBlockKV, int kHeadDimQK, int kHeadDimV>
__device__ float* part_of(BackwardArguments const& arguments, BackwardWorkTile const& tile) {
  int64_t const head = int64_t{tile.batch} * arguments.problem.heads_kv + tile.head_kv;
  int64_t const index = head * arguments.schedule.num_row_blocks + tile.kv_begin / kBlockKV;
  return arguments.parts + (index * arguments.num_splits + tile.split) * (kBlockKV * (kHeadDimQK + kHeadDimV));
}

// As it lies in the registers, one vector of a warp behind the other.
template <int kFragment, class Fragment>
__device__ void write_part(float* part, Fragment const& fragment) {
  float4* const target = reinterpret_cast<float4*>(part) +
                         (threadIdx.x - kWarpgroupThreads) / 32 * (kFragment / 4 * 32) + threadIdx.x % 32;
  CUTE_UNROLL
  for (int i = 0; i < kFragment / 4; ++i) {
    target[i * 32] = float4{fragment(4 * i), fragment(4 * i + 1), fragment(4 * i + 2), fragment(4 * i + 3)};
  }
}

}  // namespace flashmla::sm90
