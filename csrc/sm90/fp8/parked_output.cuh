// Sums of P V that have left the tensor cores, whose fp8 sums have about 14 bits: in shared memory, where registers
// have no room for them.
#pragma once

#include <cuda_fp16.h>

#include <cute/tensor.hpp>

#include "sm90/fp8/softmax_fp8.cuh"
#include "sm90/scheduling/scheduler.cuh"
#include "sm90/tiles.h"

namespace flashmla::sm90 {

// O of a warpgroup's rows as fp16 numbers: divided by the sum of the row's weights, so that it is a mean of e4m3
// numbers, 448 at most. A kv_block moves it by its share, and 2^-12 of itself is as a bf16 output's rounding after a
// hundred times. A thread reads and writes its own outputs; its row's numbers are written alike by the four lanes of a
// row.
template <int kOutputs>
class ParkedOutput {
  static constexpr int kVectors = kOutputs / 8;  // of 16 bytes; 0 if the kernel parks nothing

 public:
  struct Storage {
    static constexpr int kRows = kVectors > 0 ? kWarpgroupRows : 1;
    uint4 outputs[kVectors > 0 ? kVectors : 1][kVectors > 0 ? kWarpgroupThreads : 1];
    float sums[kRows], maxima[kRows], units[kRows];
  };

  __device__ explicit ParkedOutput(Storage& storage) : storage_(storage), has_parked_(false) {}

  // Adds rO, which is free then.
  template <class Outputs, class Softmax>
  __device__ void park(Outputs const& rO, Softmax const& softmax) {
    float before[2], factor[2];
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      float const sum = softmax.whole_sum(r);
      factor[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
      before[r] = weight(r, softmax) * factor[r];
      storage_.sums[row(r)] = sum;
      storage_.maxima[row(r)] = softmax.row_max[r];
      storage_.units[row(r)] = softmax.unit[r];
    }
    CUTE_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      float2 parked[4] = {};
      if (has_parked_) load(i, parked);
      uint32_t words[4];
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j) {
        int const r = j % 2, first = i * 8 + j * 2;
        float const x = rO(first) * factor[r], y = rO(first + 1) * factor[r];
        __half2 const pair =
            __floats2half2_rn(__fmaf_rn(parked[j].x, before[r], x), __fmaf_rn(parked[j].y, before[r], y));
        words[j] = reinterpret_cast<uint32_t const&>(pair);
      }
      storage_.outputs[i][thread()] = uint4{words[0], words[1], words[2], words[3]};
    }
    has_parked_ = true;
  }

  // rO += what is parked.
  template <class Outputs, class Softmax>
  __device__ void join(Outputs& rO, Softmax const& softmax) const {
    if (!has_parked_) return;
    float const factor[2] = {weight(0, softmax), weight(1, softmax)};
    CUTE_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      float2 parked[4];
      load(i, parked);
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j) {
        float& x = rO(i * 8 + j * 2);
        float& y = rO(i * 8 + j * 2 + 1);
        x = __fmaf_rn(parked[j].x, factor[j % 2], x);
        y = __fmaf_rn(parked[j].y, factor[j % 2], y);
      }
    }
  }

 private:
  __device__ static int thread() { return threadIdx.x % kWarpgroupThreads; }
  __device__ static int row(int r) { return row_of_thread(0, threadIdx.x) + 8 * r; }

  // Of a parked mean in rO's units.
  template <class Softmax>
  __device__ float weight(int r, Softmax const& softmax) const {
    if (!has_parked_) return 0.0f;
    float const sum = storage_.sums[row(r)];
    if (sum == 0.0f) return 0.0f;  // no key was seen, and there was no maximum
    int const shift = (__float_as_int(storage_.units[row(r)]) - __float_as_int(softmax.unit[r])) >> 23;
    return sum * exp2f(storage_.maxima[row(r)] - softmax.row_max[r] + static_cast<float>(shift));
  }

  __device__ void load(int i, float2 (&parked)[4]) const {
    uint4 const vector = storage_.outputs[i][thread()];
    uint32_t const words[4] = {vector.x, vector.y, vector.z, vector.w};
    CUTE_UNROLL
    for (int j = 0; j < 4; ++j) parked[j] = __half22float2(reinterpret_cast<__half2 const&>(words[j]));
  }

  Storage& storage_;
  bool has_parked_;
};

}  // namespace flashmla::sm90
