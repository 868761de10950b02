// The online softmax of the fp8 forward, row by row, so that one row's exponentials run beside work that has no use for
// their unit.
#pragma once

#include <cute/tensor.hpp>

#include "sm90/hopper/fragment.cuh"
#include "sm90/hopper/softmax.cuh"

namespace flashmla::sm90 {

// The online softmax of scores that have scales: row_max is that of S in base 2, not of what the product gave. With
// kHasUnit O has a unit, which is the largest scale of V's blocks of which the row has seen a key, and P carries what
// the scale of a tile is smaller by. Scales are powers of two, or all the same.
template <int kScores, bool kHasUnit>
struct Fp8Softmax {
  static constexpr float kLogLargest = 8.0f;        // of P, in base 2
  static constexpr float kLeastFactor = 0x1p-126f;  // a normal number

  float row_max[2], row_sum[2], row_scale[2];  // row_scale: q_scale * scale * log2 e of the row
  float unit[2];

  __device__ void reset(int row, float scale) {
    row_max[row] = -INFINITY;
    row_sum[row] = 0.0f;
    row_scale[row] = scale;
    unit[row] = 0.0f;
  }

  // A row of one tile. The exponent of its scores is score * factor - against; what was summed before is to be
  // multiplied by `correction`, O in its former unit by `shrinkage` too, and the tile's sum of P by `inverse`.
  struct TileRow {
    float factor, against, correction, shrinkage, inverse;
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

  // Begins a tile's row, whose largest score in this thread is `largest`. True if O is to be rescaled.
  __device__ bool begin(int row, float largest, float tile_scale, float v_scale, TileRow& tile) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 2));
    // Not negative (finish_scores), and not 0 where scales of zeros underflow: -inf * 0 is NaN.
    tile.factor = fmaxf(row_scale[row] * tile_scale, kLeastFactor);
    float const new_max = fmaxf(row_max[row], largest * tile.factor);
    tile.correction = new_max == -INFINITY ? 1.0f : exp2f(row_max[row] - new_max);
    bool const has_grown = new_max > row_max[row];
    row_max[row] = new_max;

    tile.shrinkage = tile.inverse = 1.0f;
    tile.against = (new_max == -INFINITY ? 0.0f : new_max) - kLogLargest;
    if constexpr (!kHasUnit) return has_grown;
    int const bits = __float_as_int(v_scale), before = __float_as_int(unit[row]);
    int const new_unit = largest == -INFINITY ? before : max(bits, before);
    // Below 2^-32 e4m3 makes 0 of P, and the sum needs no more. If no key is seen P is 0, and the scale may be larger.
    int const log = min(max((bits - new_unit) >> 23, -32), 0);
    unit[row] = __int_as_float(new_unit);
    tile.shrinkage = power_of_two(max((before - new_unit) >> 23, -127));
    tile.inverse = power_of_two(-log);
    tile.against -= static_cast<float>(log);
    return has_grown || new_unit != before;
  }

  // Pair j of a row's scores becomes P and joins `sum`.
  template <class Scores>
  __device__ static void exponentiate(Scores& scores, int row, int j, TileRow const& tile, float (&sum)[2]) {
    CUTE_UNROLL
    for (int c = 0; c < 2; ++c) {
      float& score = scores(j * 4 + row * 2 + c);
      score = exp2f(__fmaf_rn(score, tile.factor, -tile.against));
      sum[c] += score;
    }
  }

  __device__ void end(int row, TileRow const& tile, float const (&sum)[2]) {
    row_sum[row] = row_sum[row] * tile.correction + (sum[0] + sum[1]) * tile.inverse;
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

 private:
  __device__ static float power_of_two(int exponent) { return __int_as_float((127 + exponent) << 23); }
};

}  // namespace flashmla::sm90
