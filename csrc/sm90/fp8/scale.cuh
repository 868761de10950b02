// The scales of e4m3 numbers, bit for bit those of flashmla_hf/fp8/quantization.py, which says why.
#pragma once

#include <cute/tensor.hpp>

#include "sm90/scheduling/scheduler.cuh"

namespace flashmla::sm90 {

__device__ inline float largest_of_warp(float x) {
  CUTE_UNROLL
  for (int lanes = 1; lanes < kWarpThreads; lanes *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, lanes));
  return x;
}

// A power of two and its inverse.
struct Scale {
  float scale, inverse;
};

// The smallest, at least 2^-126, that is at least largest / 448, and 448 = 1.75 * 2^8. (Below 2^-118 the exponent's
// bits, also those of denormal numbers, give 2^-126.)
__device__ inline Scale scale_of(float largest) {
  uint32_t const bits = __float_as_uint(largest);
  int const exponent = static_cast<int>(bits >> 23) - 127 - ((bits & 0x7fffff) <= 0x600000 ? 8 : 7);
  int const bounded = max(exponent, -126);
  return {__uint_as_float(static_cast<uint32_t>(127 + bounded) << 23),
          __uint_as_float(static_cast<uint32_t>(127 - bounded) << 23)};
}

}  // namespace flashmla::sm90
