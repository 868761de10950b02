// The work around the products of the backward (backward.h): delta before them, dsinks and the dtype of dQ after them,
// and the sum of dQ in the order of the chunks.
#pragma once

#include <sched.h>

#include "backward_plan.h"

namespace flashmla {
namespace cpu {
namespace {

template <typename G>
struct BackwardRows : BackwardPlan<G> {
  using Base = BackwardPlan<G>;
  using Base::kBlockQ;
  using Base::kIsF32;
  using typename Base::Context;
  using typename Base::Input;
  using typename Base::Plan;
  using typename Base::Scratch;

  // Before: delta, and zeros where dQ is summed. One task is a run of query rows of one sequence, all heads.
  static constexpr int64_t kPrepareRows = 64;

  static void prepare_worker(void* context, int64_t) {
    Context& c = *static_cast<Context*>(context);
    const BackwardParams& params = *c.params;
    const Problem& p = params.problem;
    const int64_t runs = (p.seqlen_q + kPrepareRows - 1) / kPrepareRows;
    for (int64_t task; (task = c.prepare_counter.take()) < runs * p.batch;) {
      const Sequence s = sequence_of(p, task / runs);
      const int64_t begin = task % runs * kPrepareRows, end = min64(begin + kPrepareRows, s.seqlen_q);
      for (int64_t i = begin; i < end; ++i) {
        if (c.dq.data != nullptr)
          __builtin_memset(sequence_base<float>(c.dq, s.b, s.q_offset + i, 0), 0,
                           p.heads_q * p.head_dim_qk * sizeof(float));
        if (!c.plan.needs_ds) continue;
        for (int64_t h = 0; h < p.heads_q; ++h) {
          const float lse = *sequence_base(params.lse, s.b, s.q_offset + i, h);
          float delta = 0.0f;
          if (lse != -kInf) {  // a row that saw nothing: out does not depend on anything
            delta = dot(sequence_base<const Input>(params.dout, s.b, s.q_offset + i, h),
                        sequence_base<const Input>(params.out, s.b, s.q_offset + i, h), p.head_dim_v);
            if (params.dlse.data != nullptr) delta -= *sequence_base(params.dlse, s.b, s.q_offset + i, h);
          }
          *sequence_base(c.delta, s.b, s.q_offset + i, h) = delta;
        }
      }
    }
  }

  // In the order in which the fp32 product sums dP: where a query sees one key only (the first row under a causal
  // mask), O is that key's V, and dP - rowsum(dO∘O) is exactly 0, as it should be.
  static float dot(const Input* x, const Input* y, int64_t n) {
    if constexpr (!kIsF32) {
      VecF sum = {};
      for (int64_t j = 0; j < n; j += kLanes) sum = fma(load_as_f32(x + j, n - j), load_as_f32(y + j, n - j), sum);
      return horizontal_sum(sum);
    } else {
      float sum = 0.0f;
      for (int64_t j = 0; j < n; j += kLanes) {
        float a[kLanes], b[kLanes];
        store(a, load_as_f32(x + j, n - j));
        store(b, load_as_f32(y + j, n - j));
        for (int64_t l = 0; l < min64(kLanes, n - j); ++l) sum = a[l] * b[l] + sum;
      }
      return sum;
    }
  }

  static int64_t slot_of(const Problem& p, const Plan& plan, const Sequence& s, int64_t kv) {
    return keys_before(p, s) / plan.chunk + s.b + kv / plan.chunk;
  }

  // After: the sums of all tasks and the part of dlse, in double and in a fixed order.
  static void reduce_sinks(const Context& c) {
    const Problem& p = c.params->problem;
    for (int64_t h = 0; h < p.heads_q; ++h) {
      double sum = 0.0;
      for (int64_t b = 0; b < p.batch; ++b) {
        const Sequence s = sequence_of(p, b);
        for (int64_t kv = 0; kv < s.seqlen_kv; kv += c.plan.chunk)
          sum -= c.shared.sink_sums[slot_of(p, c.plan, s, kv) * p.heads_q + h];
        if (c.params->dlse.data == nullptr) continue;
        const float* lse = sequence_base(c.params->lse, s.b, s.q_offset, h);
        const float* dlse = sequence_base(c.params->dlse, s.b, s.q_offset, h);
        for (int64_t i = 0; i < s.seqlen_q; ++i)
          if (lse[i] != -kInf) sum += static_cast<double>(exp1(p.sinks[h] - lse[i])) * dlse[i];
      }
      c.params->dsinks[h] = static_cast<float>(sum);
    }
  }

  // After: dQ from fp32 to its dtype.
  static void finish_worker(void* context, int64_t) {
    Context& c = *static_cast<Context*>(context);
    const Problem& p = c.params->problem;
    const int64_t runs = (p.seqlen_q + kPrepareRows - 1) / kPrepareRows;
    for (int64_t task; (task = c.finish_counter.take()) < runs * p.batch;) {
      const Sequence s = sequence_of(p, task / runs);
      const int64_t begin = task % runs * kPrepareRows, end = min64(begin + kPrepareRows, s.seqlen_q);
      for (int64_t i = begin; i < end; ++i)
        for (int64_t h = 0; h < p.heads_q; ++h) {
          const float* src = sequence_base<const float>(c.dq, s.b, s.q_offset + i, h);
          Input* dst = sequence_base<Input>(c.params->dq, s.b, s.q_offset + i, h);
          for (int64_t j = 0; j < p.head_dim_qk; j += kLanes)
            store_from_f32(dst + j, load_as_f32(src + j, p.head_dim_qk - j), p.head_dim_qk - j);
        }
    }
  }

  // dQ += scale * (dQ^T)^T, in the order of the chunks.
  static void add_dq(Context& c, const Scratch& w, const Sequence& sequence, int64_t head_kv, int64_t kv, int64_t r,
                     int64_t num_rows) {
    const Problem& p = c.params->problem;
    const Plan& plan = c.plan;
    const int64_t first_key = keys_of_query(p, sequence, r / plan.group).begin;
    const int32_t my_turn = static_cast<int32_t>((kv - round_down(first_key, plan.chunk)) / plan.chunk);
    const int64_t tile = queries_before(p, sequence) * plan.group / kBlockQ + sequence.b + r / kBlockQ;
    int32_t* turn = c.shared.turn + head_kv * plan.num_tiles + tile;
    while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != my_turn) sched_yield();

    float* dq = sequence_base<float>(c.dq, sequence.b, sequence.q_offset, head_kv * plan.group);
    for (int64_t i = 0; i < num_rows; i += kLanes) {
      float* rows[kLanes];
      RowCursor cursor(plan.group, r + i);
      for (int l = 0; l < min64(kLanes, num_rows - i); ++l, cursor.next()) rows[l] = dq + cursor.offset(c.dq);
      for (int64_t j = 0; j < p.head_dim_qk; j += kLanes) {
        VecF x[kLanes];
        for (int l = 0; l < kLanes; ++l) x[l] = j + l < p.head_dim_qk ? load(w.dq + (j + l) * kBlockQ + i) : VecF{};
        transpose(x);
        for (int64_t l = 0; l < min64(kLanes, num_rows - i); ++l) {
          const VecF sum = fma(x[l], set1(p.scale), load_as_f32(rows[l] + j, p.head_dim_qk - j));
          store_from_f32(rows[l] + j, sum, p.head_dim_qk - j);
        }
      }
    }
    __atomic_store_n(turn, my_turn + 1, __ATOMIC_RELEASE);
  }
};

}  // namespace
}  // namespace cpu
}  // namespace flashmla
