// Scores of a row to P, its maximum and its sum (forward.h).
#pragma once

#include "kernel.h"
#include "vec.h"

namespace flashmla {
namespace cpu {
namespace {

template <typename G>
struct ForwardSoftmax {
  // A positive scale is applied in front of exp; anything else (softcap, a scale that is negative or so small that the
  // -inf of a masked score would not survive it) takes a pass of its own.
  static bool needs_transform(const Problem& p) { return p.softcap > 0.0f || !(p.scale > 1e-20f); }

  static float softmax_scale(const Problem& p) { return needs_transform(p) ? 1.0f : p.scale; }

  static void transform_scores(const Problem& p, float* s, int64_t n) {
    for (int64_t j = 0; j < n; j += kLanes) {
      VecF x = load(s + j) * p.scale;
      if (p.softcap > 0.0f) x = tanh(x / p.softcap) * p.softcap;
      store(s + j, x);
    }
  }

  // Columns [column_begin, column_end) of one row, of which [begin, end) are visible: writes P, updates row_max and
  // row_sum, returns alpha.
  template <typename P>
  static float softmax_row(float* s, P* p, int64_t column_begin, int64_t column_end, int64_t begin, int64_t end,
                           float scale, float& row_max, float* row_sum) {
    const int64_t first_vector = round_down(begin, G::kVectorStep),
                  last_vector = round_up(end, G::kVectorStep);  // vectors with a visible key
    if (first_vector < begin)
      for (int64_t j = first_vector; j < begin; j += kLanes)
        store(s + j, keep_lanes(load(s + j), begin - j, kLanes, set1(-kInf)));
    if (end < last_vector)
      for (int64_t j = round_down(end, kLanes); j < last_vector; j += kLanes)
        store(s + j, keep_lanes(load(s + j), 0, end - j, set1(-kInf)));
    VecF max0 = load(s + first_vector), max1 = max0;
    int64_t j = first_vector;
    for (; j + 2 * kLanes <= last_vector; j += 2 * kLanes) {
      max0 = max(max0, load(s + j));
      max1 = max(max1, load(s + j + kLanes));
    }
    if (j < last_vector) max0 = max(max0, load(s + j));
    const float block_max = horizontal_max(max(max0, max1));

    float alpha = 1.0f;
    if (block_max > row_max) {
      alpha = exp1((row_max - block_max) * scale);  // 0 for the first block, where row_max is -inf
      row_max = block_max;
    }
    const float shift = row_max == -kInf ? 0.0f : row_max;  // every visible score is -inf: P = 0, not exp(-inf + inf)

    for (j = column_begin; j < first_vector; j += G::kVectorStep)
      __builtin_memset(p + j, 0, G::kVectorStep * sizeof(P));
    VecF sum0 = {}, sum1 = {};
    if constexpr (sizeof(P) == sizeof(float)) {
      for (j = first_vector; j < last_vector; j += kLanes) {
        const VecF x = exp<G::kExpDegree>((load(s + j) - shift) * scale);
        sum0 += x;
        store(p + j, x);
      }
    } else {
      for (j = first_vector; j < last_vector; j += 2 * kLanes) {
        const VecF x0 = exp<G::kExpDegree>((load(s + j) - shift) * scale);
        const VecF x1 = exp<G::kExpDegree>((load(s + j + kLanes) - shift) * scale);
        sum0 += x0;
        sum1 += x1;
        G::store_pair(p + j, x0, x1);
      }
    }
    for (j = last_vector; j < column_end; j += G::kVectorStep) __builtin_memset(p + j, 0, G::kVectorStep * sizeof(P));
    store(row_sum, fma(load(row_sum), set1(alpha), sum0 + sum1));
    return alpha;
  }
};

}  // namespace
}  // namespace cpu
}  // namespace flashmla
