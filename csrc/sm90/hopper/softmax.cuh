// The online softmax of one warpgroup's 64 rows, and what happens to scores before it.
//
// Scores are accumulators (fragment.cuh): a thread has two rows of them.
//
// Source: online softmax, arXiv 1805.02867, as in FlashAttention-2 (arXiv 2307.08691); leaving the maximum behind while
// it grows by less than a factor, FlashAttention-4 (arXiv 2603.05451, section on rescaling).
#pragma once

#include <cute/tensor.hpp>

#include "params.h"
#include "sm90/hopper/ptx.cuh"
#include "sm90/scheduling/scheduler.cuh"
#include "sm90/tiles.h"

namespace flashmla::sm90 {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// The end of a row's softmax: `sum` of exponentials against max_log2, and a sink (or null) joins as one more key.
// Returns the factor on O; lse is natural.
__device__ inline float finish_row(float max_log2, float sum, float const* sink, float& lse) {
  float shrink = 1.0f;
  if (sink != nullptr) {
    if (!(*sink < INFINITY)) {  // NaN, or inf - inf in the softmax
      lse = sum != sum ? NAN : *sink;
      return NAN;
    }
    float const sink_log2 = *sink * kLog2e;
    float const joint = fmaxf(max_log2, sink_log2);
    shrink = joint == -INFINITY ? 0.0f : exp2f(max_log2 - joint);
    sum = joint == -INFINITY ? 0.0f : sum * shrink + exp2f(sink_log2 - joint);
    max_log2 = joint;
  }
  bool const is_nan = sum != sum;
  lse = sum > 0.0f || is_nan ? (max_log2 + log2f(sum)) * kLn2 : -INFINITY;
  return sum > 0.0f || is_nan ? shrink / sum : 0.0f;
}

// kScores: scores a thread holds of its two rows together. kAsksOnce: whether scores are large is asked of a row's
// first tile alone, which saves 5 % of the time where three warpgroups share the exponentials.
template <int kScores, bool kAsksOnce>
struct Softmax {
  // P may grow to 2^8 before O is rescaled: exact in fp32 sums, and within fp16's range with room to spare.
  static constexpr float kLogSlack = 8.0f;
  // Up to here, rounding row_max * scale_log2 changes P by less than half of a 16-bit number's last place.
  static constexpr float kLargestOffset = 8192.0f;

  float row_max[2], row_sum[2];  // of the scores as they come; row_sum is this thread's part until the end
  float scale_log2;
  bool subtracts_first;  // this warp's scores are large

  __device__ explicit Softmax(float scale_log2) : scale_log2(scale_log2) { reset(); }

  __device__ void reset() {
    row_max[0] = row_max[1] = -INFINITY;
    row_sum[0] = row_sum[1] = 0.0f;
    subtracts_first = false;
  }

  // What P is taken against, in base 2: 0 if nothing is seen yet, so that exp2(-inf) = 0 and not NaN.
  __device__ float offset(int row) const { return row_max[row] == -INFINITY ? 0.0f : row_max[row] * scale_log2; }

  __device__ bool has_large_offset() const {
    float const largest = fmaxf(fabsf(offset(0)), fabsf(offset(1)));
    return __any_sync(0xffffffff, largest > kLargestOffset);
  }

  // Scores become P = exp2(scale_log2 * (S - row_max)). True where some row of this warp has a new maximum: then
  // everything summed before is to be multiplied by `correction`, and P may have to be settled.
  //
  // The multiply-add that takes P's exponent subtracts a rounded product from an exact one. Of large scores they are
  // far apart, and the largest P would be anything but 1: there the scores are subtracted first.
  template <bool kIsFirst, class Scores>
  __device__ bool update(Scores& scores, float (&correction)[2]) {
    bool has_grown = false;
    CUTE_UNROLL
    for (int row = 0; row < 2; ++row) {
      // Two chains: the warp has little else to do while one comparison waits for the last.
      float largest[2] = {scores(row * 2), scores(row * 2 + 1)};
      CUTE_UNROLL
      for (int j = 1; j < kScores / 4; ++j) {
        CUTE_UNROLL
        for (int c = 0; c < 2; ++c) largest[c] = fmaxf(largest[c], scores(j * 4 + row * 2 + c));
      }
      float largest_here = fmaxf(largest[0], largest[1]);
      largest_here = fmaxf(largest_here, __shfl_xor_sync(0xffffffff, largest_here, 1));
      largest_here = fmaxf(largest_here, __shfl_xor_sync(0xffffffff, largest_here, 2));
      // -inf - -inf is NaN and grows nothing: a row that has seen no key keeps -inf.
      bool const grows = (largest_here - row_max[row]) * scale_log2 > kLogSlack;
      float const new_max = grows ? largest_here : row_max[row];
      correction[row] = grows ? exp2f((row_max[row] - new_max) * scale_log2) : 1.0f;
      row_max[row] = new_max;
      has_grown |= grows;
    }
    if (kIsFirst || !kAsksOnce) subtracts_first = has_large_offset();
    if (subtracts_first) {
      CUTE_UNROLL
      for (int row = 0; row < 2; ++row) {
        float const subtrahend = row_max[row] == -INFINITY ? 0.0f : row_max[row];
        CUTE_UNROLL
        for (int j = 0; j < kScores / 4; ++j) {
          scores(j * 4 + row * 2) -= subtrahend;
          scores(j * 4 + row * 2 + 1) -= subtrahend;
        }
      }
    }
    CUTE_UNROLL
    for (int row = 0; row < 2; ++row) {
      float const against = subtracts_first ? 0.0f : offset(row);
      float sum[2] = {0.0f, 0.0f};
      CUTE_UNROLL
      for (int j = 0; j < kScores / 4; ++j) {
        CUTE_UNROLL
        for (int c = 0; c < 2; ++c) {
          float const p = exp2f(scores(j * 4 + row * 2 + c) * scale_log2 - against);
          scores(j * 4 + row * 2 + c) = p;
          sum[c] += p;
        }
      }
      row_sum[row] = row_sum[row] * correction[row] + (sum[0] + sum[1]);
    }
    return __any_sync(0xffffffff, has_grown);
  }

  // To be called if update has returned true, if scores became large after the tile that was asked: divides out
  // what the rounded product has left in all of a row's P alike. Sums before it are 0 beside a maximum that has grown
  // so much. Beyond offsets of 2^30 nothing would be left to divide; such scores come with a first tile below 2^13 from
  // keys of 10^5 times its keys' size alone.
  template <class Scores>
  __device__ void settle(Scores& scores) {
    if (!kAsksOnce || subtracts_first || !has_large_offset()) return;
    subtracts_first = true;
    CUTE_UNROLL
    for (int row = 0; row < 2; ++row) {
      if (row_max[row] == -INFINITY) continue;
      float const factor = exp2f(-__fmaf_rn(row_max[row], scale_log2, -offset(row)));
      row_sum[row] *= factor;
      CUTE_UNROLL
      for (int j = 0; j < kScores / 4; ++j) {
        scores(j * 4 + row * 2) *= factor;
        scores(j * 4 + row * 2 + 1) *= factor;
      }
    }
  }

  // The four lanes of a row add their parts. Returns the factor on O; lse is natural.
  __device__ float finish(int row, float const* sink, float& lse) {
    float sum = row_sum[row];
    sum += __shfl_xor_sync(0xffffffff, sum, 1);
    sum += __shfl_xor_sync(0xffffffff, sum, 2);
    return finish_row(row_max[row] == -INFINITY ? -INFINITY : row_max[row] * scale_log2, sum, sink, lse);
  }
};

// Scores whose maximum is not that of Q·K: softcap, and a scale that is not positive. The softmax then runs at scale 1.
template <int kScores, class Scores>
__device__ void transform_scores(Scores& scores, float scale, float softcap) {
  float const inner = softcap > 0.0f ? scale / softcap : scale;
  CUTE_UNROLL
  for (int i = 0; i < kScores; ++i) {
    float x = scores(i) * inner;
    if (softcap > 0.0f) x = ptx::tanh_approx(x) * softcap;
    scores(i) = x;
  }
}

// Hides what rows at key positions `position` do not see of the K/V tile that begins at key `first_key`.
template <MaskKind kMask, int kScores, class Scores>
__device__ void mask_scores(Scores& scores, Window window, int32_t seqlen_kv, int32_t first_key,
                            int32_t const (&position)[2]) {
  int32_t const first_column = first_key + 2 * (threadIdx.x % 4);
  CUTE_UNROLL
  for (int row = 0; row < 2; ++row) {
    int32_t end = seqlen_kv, begin = 0;
    if (kMask != MaskKind::kNone && window.right >= 0) end = min(end, position[row] + window.right + 1);
    if (kMask == MaskKind::kWindow && window.left >= 0) begin = position[row] - window.left;
    // Relative, so that each element compares with a constant.
    int32_t const end_here = end - first_column, begin_here = begin - first_column;
    CUTE_UNROLL
    for (int j = 0; j < kScores / 4; ++j) {
      CUTE_UNROLL
      for (int c = 0; c < 2; ++c) {
        bool is_hidden = 8 * j + c >= end_here;
        if constexpr (kMask == MaskKind::kWindow) is_hidden |= 8 * j + c < begin_here;
        if (is_hidden) scores(j * 4 + row * 2 + c) = -INFINITY;
      }
    }
  }
}

}  // namespace flashmla::sm90
