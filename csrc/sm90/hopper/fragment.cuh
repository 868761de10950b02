// What a thread holds of a 64 x N product of one warpgroup, and how it leaves the registers.
//
// Element j*4 + r*2 + c of an accumulator is column 8j + 2*(lane%4) + c of row lane/4 + 8r of the warp's 16 rows. Eight
// consecutive ones, packed in pairs, are one A operand of 16 columns for the next product.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cutlass/numeric_types.h>

#include <cstdint>
#include <cute/tensor.hpp>

#include "sm90/hopper/ptx.cuh"
#include "sm90/tiles.h"

namespace flashmla::sm90 {

// Where the 16 rows of the warp of thread `thread` (of a CTA) begin among the 64 of its warpgroup.
template <class Index>
__device__ Index row_of_warp(Index thread) {
  return thread % kWarpgroupThreads / kWarpThreads * 16;
}

// The first of a thread's two rows; the other is 8 further on. The warpgroup's rows begin at `first_row`. (A template,
// and summed in this order: with a signed threadIdx.x, or the thread's part summed first, ptxas finds other code.)
template <class Index>
__device__ Index row_of_thread(int first_row, Index thread) {
  return first_row + thread % kWarpgroupThreads / kWarpThreads * 16 + thread % kWarpThreads / 4;
}

// Two floats as two 16-bit elements in one register, the first in the low half.
template <class Element>
__device__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<Element, cutlass::half_t>) {
    __half2 const pair = __floats2half2_rn(low, high);
    return reinterpret_cast<uint32_t const&>(pair);
  } else {
    __nv_bfloat162 const pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<uint32_t const&>(pair);
  }
}

template <class Element>
__device__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<Element, cutlass::half_t>) {
    return __half22float2(reinterpret_cast<__half2 const&>(pair));
  } else {
    return __bfloat1622float2(reinterpret_cast<__nv_bfloat162 const&>(pair));
  }
}

// Lane l of a quad holds pair l of columns 8m ... 8m + 7 of every 32, m being the index; afterwards it holds columns
// 8l ... 8l + 7.
__device__ inline void transpose_quad(uint32_t (&pairs)[4], int quad_lane) {
  bool const is_high = quad_lane & 2, is_odd = quad_lane & 1;
  uint32_t const a = __shfl_xor_sync(0xffffffff, is_high ? pairs[0] : pairs[2], 2);
  uint32_t const b = __shfl_xor_sync(0xffffffff, is_high ? pairs[1] : pairs[3], 2);
  (is_high ? pairs[0] : pairs[2]) = a;
  (is_high ? pairs[1] : pairs[3]) = b;
  uint32_t const c = __shfl_xor_sync(0xffffffff, is_odd ? pairs[0] : pairs[1], 1);
  uint32_t const d = __shfl_xor_sync(0xffffffff, is_odd ? pairs[2] : pairs[3], 1);
  (is_odd ? pairs[0] : pairs[1]) = c;
  (is_odd ? pairs[2] : pairs[3]) = d;
}

// Writes factor * row `r` (0 or 1) of the fragment to `out`, columns first_column ... below num_columns; nothing where
// out is null. All lanes of a quad take part; quad_lane is threadIdx.x % 4, which callers have at hand. Transposed over
// the quad, each lane stores 16 bytes beside its neighbours'.
template <class Element, int kColumns, class Fragment>
__device__ void store_row(Element* out, Fragment const& fragment, int r, float factor, int first_column,
                          int64_t num_columns, int quad_lane) {
  CUTE_UNROLL
  for (int group = 0; group < kColumns / 32; ++group) {
    uint32_t pairs[4];
    CUTE_UNROLL
    for (int m = 0; m < 4; ++m) {
      int const element = (4 * group + m) * 4 + r * 2;
      pairs[m] = pack<Element>(fragment(element) * factor, fragment(element + 1) * factor);
    }
    transpose_quad(pairs, quad_lane);
    int const column = first_column + 32 * group + 8 * quad_lane;
    if (out != nullptr && column < num_columns) {
      *reinterpret_cast<uint4*>(out + column) = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
    }
  }
  static_assert(kColumns % 32 == 0 || kColumns % 32 == 16);
  if constexpr (kColumns % 32 != 0) {  // pairs as they are, each beside its neighbours'
    CUTE_UNROLL
    for (int m = 4 * (kColumns / 32); m < kColumns / 8; ++m) {
      int const element = m * 4 + r * 2, column = first_column + 8 * m + 2 * quad_lane;
      if (out != nullptr && column < num_columns) {
        *reinterpret_cast<uint32_t*>(out + column) =
            pack<Element>(fragment(element) * factor, fragment(element + 1) * factor);
      }
    }
  }
}

// Writes a warp's 16 rows of the fragment, row r of a quad times factor[r], to rows first_row ... of a tile in shared
// memory: chunks of kSwizzleColumns columns, kRows high and swizzled (SharedLayouts), as a TMA store reads them.
template <class Element, int kSwizzleColumns, int kRows, int kColumns, class Fragment>
__device__ void store_matrices(Element* tile, Fragment const& fragment, float const (&factor)[2], int first_row) {
  // stmatrix takes from lane l where row l % 16 of 8 columns begins, of the second 8 for the upper 16 lanes.
  int const lane = threadIdx.x % 32, row = first_row + lane % 16;
  int const swizzle = kSwizzleColumns == 64 ? row % 8 : row / 2 % 4;
  uint32_t const base = cute::cast_smem_ptr_to_uint(tile) + row * (2 * kSwizzleColumns) + (lane / 16 ^ swizzle) * 16;
  constexpr int kSteps = kSwizzleColumns / 16;  // of 16 columns, in a chunk
  CUTE_UNROLL
  for (int k = 0; k < kColumns / 16; ++k) {
    uint32_t pairs[4];
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      pairs[i] = pack<Element>(fragment(8 * k + 2 * i) * factor[i % 2], fragment(8 * k + 2 * i + 1) * factor[i % 2]);
    }
    ptx::stmatrix_x4((base ^ (k % kSteps * 32)) + k / kSteps * (kRows * 2 * kSwizzleColumns), pairs[0], pairs[1],
                     pairs[2], pairs[3]);
  }
}

}  // namespace flashmla::sm90
