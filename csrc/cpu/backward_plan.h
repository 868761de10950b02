// How a backward call is cut into tasks, and what its workers share and have each (backward.h).
#pragma once

#include "decode.h"
#include "gemm_f32.h"
#include "kernel.h"
#include "rows.h"

namespace flashmla {
namespace cpu {
namespace {

template <typename G>
struct BackwardPlan {
  using Input = typename G::Input;
  using Element = typename G::Element;
  static constexpr int64_t kBlockQ = G::kBackwardBlockQ;
  static constexpr int64_t kSubKV = G::kBackwardSubKV,
                           kSubQ = G::kBackwardSubQ;  // S and dP exist in blocks of this size only
  static constexpr bool kIsF32 = sizeof(Element) == sizeof(float);
  static constexpr float kHugeLse = 1048576.0f;  // 2^20: half a unit is 1/16

  struct Plan {
    int64_t group, d_k, dv_k;   // head dims as the inner dimension of a product (rounded to kAlignK)
    int64_t d_ld, dv_ld;        // leading dimensions of dK, dV
    int64_t chunk, num_chunks;  // keys per task
    int64_t num_tiles;          // query tiles of a kv head in all sequences, at the most
    int64_t num_slots;          // chunks of a kv head in all sequences, at the most
    int64_t num_tasks;
    bool needs_ds;     // dP and dS are wanted (any gradient but dV)
    bool needs_sinks;  // rowsum(P∘dP) is
  };

  // Shared by all workers.
  struct Shared {
    float* delta;       // [batch, heads_q, seqlen_q] or [heads_q, total_q]
    float* dq;          // [total_q, heads_q, head_dim_qk]; null where dq itself is fp32
    int32_t* turn;      // [heads_kv, num_tiles] chunks that have added to a dQ tile
    double* sink_sums;  // [num_slots, heads_q] sum over rows and a chunk's keys of exp(sink - lse) P dP
    int64_t bytes;
  };

  // One worker's scratch.
  struct Scratch {
    Element *k, *v;                           // A operands [chunk, d_k], [chunk, dv_k]
    Element* k_transposed;                    // A operand [d, chunk]; the memory of k where A may be read transposed
    float *dk, *dv;                           // [chunk, d_ld], [chunk, dv_ld]
    Element *q, *dout;                        // B operands [kBlockQ, d], [kBlockQ, dv]
    Element *q_transposed, *dout_transposed;  // B operands [d, kBlockQ], [dv, kBlockQ]
    float *lse, *delta;                       // [kBlockQ]
    float* sink_weight;                       // [kBlockQ] exp(sink - lse)
    float* p_dp;                              // [kBlockQ] rowsum(P∘dP) over the chunk
    double* sink_sums;                        // [group] of the task at hand, in Shared
    float *s, *dp;           // [kSubKV, kSubQ]; fp32 operands: S and dP are written where P^T and dS^T belong
    Element *p, *ds;         // A operands P^T, dS^T [kSubKV, kBlockQ]
    Element* ds_b;           // B operand dS^T [chunk, kBlockQ]; fp32 operands: ds is a slice of it
    float* dq;               // dQ^T [head_dim_qk, kBlockQ]
    const Input** rows;      // [max(chunk, kBlockQ)]
    Input* zeros;            // [max(head_dim_qk, head_dim_v)]
    int64_t* keys_apart;     // [chunk] keys of the chunk whose K is not finite
    int64_t* queries_apart;  // [kBlockQ] rows of the tile whose Q or dO is not finite
  };

  // What pack_tile finds.
  struct Tile {
    int64_t num_apart;  // in queries_apart
    bool has_huge_lse;
    float slack;  // of a huge lse: the forward may have summed the same score in another order
  };

  // A block of S and dP, keys down and queries along, and where its P and dS go.
  struct Block {
    float *s, *dp;  // [padded_keys, width], rows `row_stride` apart
    int64_t row_stride, num_keys, padded_keys;
    int64_t lane, width;  // first query within the tile
    Element *p, *ds;      // A operands, rows kBlockQ apart (fp32: s and dp)
    Element* ds_b;        // B operand of the whole tile (fp32: unused)
    int64_t key;          // first key within the chunk
  };

  static Plan make_plan(const BackwardParams& params) {
    const Problem& p = params.problem;
    Plan plan;
    plan.group = p.heads_q / p.heads_kv;
    plan.d_k = round_up(p.head_dim_qk, G::kAlignK);
    plan.dv_k = round_up(p.head_dim_v, G::kAlignK);
    plan.d_ld = round_up(p.head_dim_qk, G::kAlignN);
    plan.dv_ld = round_up(p.head_dim_v, G::kAlignN);
    // A query tile is packed once per chunk, so chunks should be long; what a chunk keeps (K, V, dK, dV, dS) should fit
    // a 2 MiB L2 cache, and there should be some 16 tasks. A function of the shape only: see determinism above.
    plan.chunk = 512;
    while (plan.chunk > 128 && plan.chunk * (plan.d_k + plan.dv_k) > 512 * 256) plan.chunk /= 2;
    const int64_t heads = p.batch * p.heads_kv;
    while (plan.chunk > 128 && heads * ((p.seqlen_kv + plan.chunk - 1) / plan.chunk) < 16) plan.chunk /= 2;
    plan.num_chunks = (p.seqlen_kv + plan.chunk - 1) / plan.chunk;
    plan.num_tiles = p.total_q == 0 ? 0 : p.total_q * plan.group / kBlockQ + p.batch;
    plan.num_slots = p.total_kv / plan.chunk + p.batch;
    plan.num_tasks = plan.num_chunks * heads;
    plan.needs_sinks = params.dsinks != nullptr;
    plan.needs_ds = params.dq.data != nullptr || params.dk.data != nullptr || plan.needs_sinks;
    return plan;
  }

  static Shared make_shared(const BackwardParams& params, const Plan& plan, void* base) {
    const Problem& p = params.problem;
    Arena arena(base);
    Shared s;
    s.delta = arena.take<float>(plan.needs_ds ? p.total_q * p.heads_q : 0);
    s.dq = kIsF32Input() || !params.dq.data ? nullptr : arena.take<float>(p.total_q * p.heads_q * p.head_dim_qk);
    s.turn = arena.take<int32_t>(turns(params, plan));
    s.sink_sums = plan.needs_sinks ? arena.take<double>(plan.num_slots * p.heads_q) : nullptr;
    s.bytes = arena.used;
    return s;
  }
  static constexpr bool kIsF32Input() { return sizeof(Input) == sizeof(float); }

  static int64_t turns(const BackwardParams& params, const Plan& plan) {
    return params.dq.data == nullptr ? 0 : params.problem.heads_kv * plan.num_tiles;
  }

  static Scratch make_scratch(const BackwardParams& params, const Plan& plan, Arena& arena) {
    const Problem& p = params.problem;
    Scratch s;
    s.k = arena.take<Element>(plan.chunk * plan.d_k);
    s.v = arena.take<Element>(plan.chunk * plan.dv_k);
    s.k_transposed = kIsF32 ? s.k : arena.take<Element>(round_up(p.head_dim_qk, G::kAlignM) * plan.chunk);
    s.dk = arena.take<float>(plan.chunk * plan.d_ld);
    s.dv = arena.take<float>(plan.chunk * plan.dv_ld);
    s.q = arena.take<Element>(G::size_b(p.head_dim_qk, kBlockQ));
    s.dout = arena.take<Element>(G::size_b(p.head_dim_v, kBlockQ));
    s.q_transposed = arena.take<Element>(G::size_b(kBlockQ, plan.d_k));
    s.dout_transposed = arena.take<Element>(G::size_b(kBlockQ, plan.dv_k));
    s.lse = arena.take<float>(kBlockQ);
    s.delta = arena.take<float>(kBlockQ);
    s.sink_weight = arena.take<float>(kBlockQ);
    s.p_dp = arena.take<float>(kBlockQ);
    s.sink_sums = nullptr;
    s.p = arena.take<Element>(kSubKV * kBlockQ);
    s.ds_b = arena.take<Element>(plan.chunk * kBlockQ);
    s.ds = kIsF32 ? nullptr : arena.take<Element>(kSubKV * kBlockQ);
    s.s = kIsF32 ? nullptr : arena.take<float>(kSubKV * kSubQ);
    s.dp = kIsF32 ? nullptr : arena.take<float>(kSubKV * kSubQ);
    s.dq = arena.take<float>(round_up(p.head_dim_qk, G::kAlignM) * kBlockQ);
    s.rows = arena.take<const Input*>(max64(plan.chunk, kBlockQ));
    s.zeros = arena.take<Input>(max64(p.head_dim_qk, p.head_dim_v));
    s.keys_apart = arena.take<int64_t>(plan.chunk);
    s.queries_apart = arena.take<int64_t>(kBlockQ);
    return s;
  }

  static int64_t workspace(const BackwardParams& params, int64_t num_workers) {
    const Plan plan = make_plan(params);
    Arena arena(nullptr);
    make_scratch(params, plan, arena);
    return make_shared(params, plan, nullptr).bytes + arena.used * num_workers;
  }

  struct Context {
    const BackwardParams* params;
    Plan plan;
    Shared shared;
    char* scratch;
    int64_t bytes_per_worker;
    TensorView dq;  // where dQ is summed, fp32
    RowView delta;
    TaskCounter prepare_counter, counter, finish_counter;
  };
};

}  // namespace
}  // namespace cpu
}  // namespace flashmla
