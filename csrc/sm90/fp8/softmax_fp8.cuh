// The online softmax of the fp8 forward, row by row, so that one row's exponentials run beside work that has no use for
// their unit.
#pragma once

#include <cute/tensor.hpp>

#include "sm90/hopper/fragment.cuh"
#include "sm90/hopper/softmax.cuh"

namespace flashmla::sm90 {

// The scales of V's blocks, of which O has one: the largest so far. They are powers of two, or all the same.
struct ValueScale {
  float reference;  // O is in units of it
  float shrinkage;  // what O of before is to be multiplied by, now that `reference` may have grown
  float log_ratio;  // of the block's scale to `reference`, in base 2: 0 or negative
  float inverse;    // of that ratio

  __device__ explicit ValueScale(float scale) : reference(scale), shrinkage(1.0f), log_ratio(0.0f), inverse(1.0f) {}

  // P of the next block carries what its scale is smaller by. Below 2^-32 e4m3 makes 0 of it, and the row's sum needs
  // no more.
  __device__ void advance(float scale) {
    int const bits = __float_as_int(scale), before = __float_as_int(reference), largest = max(bits, before);
    int const log = max((bits - largest) >> 23, -32);
    reference = __int_as_float(largest);
    shrinkage = power_of_two(max((before - largest) >> 23, -127));
    log_ratio = static_cast<float>(log);
    inverse = power_of_two(-log);
  }

 private:
  __device__ static float power_of_two(int exponent) { return __int_as_float((127 + exponent) << 23); }
};

// The online softmax of scores that have scales: row_max is that of S in base 2, not of what the product gave.
template <int kScores>
struct Fp8Softmax {
  static constexpr float kLogLargest = 8.0f;        // of P, in base 2
  static constexpr float kLeastFactor = 0x1p-126f;  // a normal number

  float row_max[2], row_sum[2], row_scale[2];  // row_scale: what makes S of a product of the row, but for k_scale

  __device__ void reset(int row, float scale) {
    row_max[row] = -INFINITY;
    row_sum[row] = 0.0f;
    row_scale[row] = scale;
  }

  // What the exponent of a row's scores is: score * factor - against, of scores of one tile.
  struct Exponent {
    float factor, against;
  };

  // The largest score of a row in this thread. The bits of positive floats are ordered as the floats are, and above
  // those of negative ones: as integers, three are compared by one instruction. Where a lane of the warp has only
  // negative scores, they are compared as floats. NaN is the largest or passed over; the row's sum is NaN anyway.
  template <class Scores>
  __device__ static float largest_of(Scores const& scores, int row) {
    auto score = [&](int i) { return scores(i / 2 * 4 + row * 2 + i % 2); };
    auto bits = [&](int i) { return __float_as_int(score(i)); };
    constexpr int kOfRow = kScores / 2;
    int largest[2] = {bits(0), bits(1)};
    CUTE_UNROLL
    for (int i = 2; i + 1 < kOfRow; i += 2) {
      largest[i / 2 % 2] = __vimax3_s32(largest[i / 2 % 2], bits(i), bits(i + 1));
    }
    static_assert(kOfRow % 2 == 0);
    float most = __int_as_float(max(largest[0], largest[1]));
    if (__any_sync(0xffffffff, __float_as_int(most) < 0)) {
      most = score(0);
      CUTE_UNROLL
      for (int i = 1; i < kOfRow; ++i) most = fmaxf(most, score(i));
    }
    return most;
  }

  // Begins a tile's row, whose largest score in this thread is `largest`. What was summed before is to be multiplied by
  // `correction`. True if the row has a new maximum.
  __device__ bool begin(int row, float largest, float factor, ValueScale const& value_scale, Exponent& exponent,
                        float& correction) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 2));
    // Not negative (finish_scores), and not 0 where scales of zeros underflow: -inf * 0 is NaN.
    exponent.factor = fmaxf(factor, kLeastFactor);
    float const new_max = fmaxf(row_max[row], largest * exponent.factor);
    exponent.against = (new_max == -INFINITY ? 0.0f : new_max) - (kLogLargest + value_scale.log_ratio);
    correction = new_max == -INFINITY ? 1.0f : exp2f(row_max[row] - new_max);
    bool const grows = new_max > row_max[row];
    row_max[row] = new_max;
    return grows;
  }

  // Pair j of a row's scores becomes P and joins `sum`.
  template <class Scores>
  __device__ static void exponentiate(Scores& scores, int row, int j, Exponent const& exponent, float (&sum)[2]) {
    CUTE_UNROLL
    for (int c = 0; c < 2; ++c) {
      float& score = scores(j * 4 + row * 2 + c);
      score = exp2f(__fmaf_rn(score, exponent.factor, -exponent.against));
      sum[c] += score;
    }
  }

  __device__ void end(int row, float correction, ValueScale const& value_scale, float const (&sum)[2]) {
    row_sum[row] = __fmaf_rn(row_sum[row], correction, (sum[0] + sum[1]) * value_scale.inverse);
  }

  // Of the four lanes of a row, so far.
  __device__ float whole_sum(int row) const {
    float sum = row_sum[row];
    sum += __shfl_xor_sync(0xffffffff, sum, 1);
    return sum + __shfl_xor_sync(0xffffffff, sum, 2);
  }

  // The four lanes of a row add their parts. Returns the factor on O; lse is natural.
  __device__ float finish(int row, float const* sink, float& lse) {
    float const sum = whole_sum(row);
    return finish_row(row_max[row] == -INFINITY ? -INFINITY : row_max[row] - kLogLargest, sum, sink, lse);
  }
};

}  // namespace flashmla::sm90
