// P and dS of a block of S and dP (backward.h).
#pragma once

#include "backward_rows.h"

namespace flashmla {
namespace cpu {
namespace {

template <typename G>
struct BackwardScores : BackwardRows<G> {
  using Base = BackwardRows<G>;
  using Base::kBlockQ;
  using Base::kHugeLse;
  using Base::kIsF32;
  using Base::kSubQ;
  using typename Base::Block;
  using typename Base::Plan;
  using typename Base::Scratch;
  using typename Base::Tile;

  // Do all `width` rows from `row` on see all `num_keys` keys from `key` on?
  static bool is_visible(const Problem& p, const Sequence& sequence, const Plan& plan, int64_t key, int64_t num_keys,
                         int64_t row, int64_t width) {
    const Interval first = keys_of_query(p, sequence, row / plan.group);
    const Interval last = keys_of_query(p, sequence, (row + width - 1) / plan.group);
    return last.begin <= key && key + num_keys <= first.end;
  }

  // P = exp(scale * S - lse), dS = P∘(dP - delta) for a block that the mask leaves alone.
  template <bool kNeedsDs, bool kNeedsSinks>
  static void probabilities(const Problem& p, const Scratch& w, const Plan& plan, const Block& block) {
    const VecF scale = set1(p.scale);
    if constexpr (kIsF32) {
      for (int64_t n = 0; n < block.width; n += kLanes) {
        const VecF lse = load(w.lse + block.lane + n), delta = load(w.delta + block.lane + n);
        VecF sum = {};
        for (int64_t j = 0; j < block.num_keys; ++j) {
          float *s = block.s + j * block.row_stride + n, *dp = block.dp + j * block.row_stride + n;
          const VecF x = exp<G::kExpDegree>(fma(load(s), scale, -lse));
          store(s, x);
          if constexpr (kNeedsDs) {
            const VecF y = load(dp);
            store(dp, x * (y - delta));
            if constexpr (kNeedsSinks) sum = fma(x, y, sum);
          }
        }
        if constexpr (kNeedsSinks) store(w.p_dp + block.lane + n, load(w.p_dp + block.lane + n) + sum);
      }
    } else {
      // Two keys and 32 queries at a time: what one row of a B operand of dS interleaves.
      static_assert(kSubQ == 2 * kLanes, "a block is two vectors wide");
      const VecF lse[2] = {load(w.lse + block.lane), load(w.lse + block.lane + kLanes)};
      const VecF delta[2] = {load(w.delta + block.lane), load(w.delta + block.lane + kLanes)};
      VecF sum[2] = {};
      for (int64_t j = 0; j < block.num_keys; j += 2) {
        VecF ds[2][2];
        for (int i = 0; i < 2; ++i) {
          VecF x[2];
          for (int v = 0; v < 2; ++v) {
            x[v] = exp<G::kExpDegree>(fma(load(block.s + (j + i) * block.row_stride + v * kLanes), scale, -lse[v]));
            if constexpr (kNeedsDs) {
              const VecF y = load(block.dp + (j + i) * block.row_stride + v * kLanes);
              ds[i][v] = x[v] * (y - delta[v]);
              if constexpr (kNeedsSinks) sum[v] = fma(x[v], y, sum[v]);
            }
          }
          G::store_pair(block.p + (j + i) * kBlockQ, x[0], x[1]);
        }
        if constexpr (kNeedsDs)
          G::store_ds(block.ds + j * kBlockQ, kBlockQ, block.ds_b, block.key + j, block.lane, plan.chunk, ds);
      }
      if constexpr (kNeedsSinks)
        for (int v = 0; v < 2; ++v) {
          float* p_dp = w.p_dp + block.lane + v * kLanes;
          store(p_dp, load(p_dp) + sum[v]);
        }
    }
  }

  // x - lse where x = a * b is a score: in one rounding, or in two where lse is huge. Not above 0 there.
  static VecF shifted_score(VecF a, VecF b, VecF lse, const Tile& tile) {
    const VecF shifted = fma(a, b, -lse);
    if (!tile.has_huge_lse) return shifted;
    const VecF magnitude = lse < VecF{} ? -lse : lse;
    const VecF slack = magnitude >= set1(16 * kHugeLse) ? magnitude * tile.slack : VecF{};
    const VecF rounded = rounded_product(a, b) - lse + slack;
    const VecI is_huge = (magnitude >= set1(kHugeLse)) & (magnitude < set1(kInf));
    return is_huge ? (rounded > VecF{} ? VecF{} : rounded) : shifted;
  }

  // The same where the mask, the end of the keys, softcap, a huge lse or keys set apart have a say; in place first,
  // then rounded.
  static void masked_probabilities(const Problem& p, const Scratch& w, const Sequence& sequence, const Plan& plan,
                                   const Block& block, int64_t key, int64_t row, const Tile& tile) {
    for (int64_t j = 0; j < block.padded_keys; ++j) {
      Interval lanes = {0, 0};
      if (j < block.num_keys) {
        const Interval queries = queries_of_key(p, sequence, key + j);
        lanes = {queries.begin * plan.group - row, queries.end * plan.group - row};
      }
      for (int64_t n = 0; n < block.width; n += kLanes) {
        float *s = block.s + j * block.row_stride + n, *dp = block.dp + j * block.row_stride + n;
        const VecF lse = load(w.lse + block.lane + n), delta = load(w.delta + block.lane + n);
        VecF derivative = set1(1.0f), shifted;
        if (p.softcap > 0.0f) {
          const VecF t = tanh(load(s) * p.scale / p.softcap);
          shifted = shifted_score(t, set1(p.softcap), lse, tile);
          derivative = 1.0f - t * t;
        } else {
          shifted = shifted_score(load(s), set1(p.scale), lse, tile);
        }
        const VecF x = keep_lanes(exp<G::kExpDegree>(shifted), lanes.begin - n, lanes.end - n, VecF{});
        if (plan.needs_ds) {
          const VecF y = load(dp);
          store(dp, keep_lanes(x * (y - delta) * derivative, lanes.begin - n, lanes.end - n, VecF{}));
          if (plan.needs_sinks) {
            const VecF sum = load(w.p_dp + block.lane + n) + keep_lanes(x * y, lanes.begin - n, lanes.end - n, VecF{});
            store(w.p_dp + block.lane + n, sum);
          }
        }
        store(s, x);
      }
    }
    if constexpr (!kIsF32) {
      for (int64_t j = 0; j < block.padded_keys; j += 2) {
        VecF ds[2][2];
        for (int i = 0; i < 2; ++i) {
          const float *s = block.s + (j + i) * block.row_stride, *dp = block.dp + (j + i) * block.row_stride;
          G::store_pair(block.p + (j + i) * kBlockQ, load(s), load(s + kLanes));
          if (plan.needs_ds)
            for (int v = 0; v < 2; ++v) ds[i][v] = load(dp + v * kLanes);
        }
        if (plan.needs_ds)
          G::store_ds(block.ds + j * kBlockQ, kBlockQ, block.ds_b, block.key + j, block.lane, plan.chunk, ds);
      }
    }
  }
};

}  // namespace
}  // namespace cpu
}  // namespace flashmla
