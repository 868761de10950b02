// Backward: dQ, dK, dV and dsinks from dO (and dlse), recomputing P from lse (FlashAttention-2, arXiv 2307.08691,
// algorithm 2).
//
//   delta = rowsum(dO∘O) - dlse                              one number per query row
//   P  = exp(S - lse)                  dV = P^T dO
//   dP = dO V^T                        dS = P∘(dP - delta) [∘ (1 - (S / softcap)^2)]
//   dQ = scale * dS K                  dK = scale * dS^T Q
//   dsinks[h] = -sum_rows exp(sinks[h] - lse) (rowsum(P∘dP) - dlse)
// rowsum(P∘dP) equals rowsum(dO∘O); for dsinks it is summed anew, in fp32 along the way, since the rounding of a 16-bit
// O would be all that is left of a sum over many rows.
//
// Schedule: a task is one chunk of keys of one kv head. It keeps K, V (packed) and dK, dV (fp32) of the chunk close and
// walks the query tiles of the whole group once, so nothing is computed twice (five products). All tiles are
// transposed, keys down and queries along the vectors: lse and delta are vectors, P^T and dS^T come out as the left
// operands of dV and dK, and
//   dQ^T[d, q] = K^T[d, kv] dS^T[kv, q]
// is summed over the whole chunk before it is added to memory.
//
// Determinism: several chunks add to one dQ tile. A chunk adds only when all earlier chunks that see the tile have,
// counted per tile in `turn`; tasks are handed out in order, so the chunk waited for is always already running and no
// deadlock is possible. Chunks walk the query tiles from the last to the first: under causal and window masks a chunk
// then meets a tile shared with an earlier chunk only after that chunk has passed it. The cut into chunks depends on
// the shape alone, so the result is bitwise the same for every number of threads.
//
// Hidden values: P and dS are 0 where a query does not see a key, but times a Q, dO or K that is not finite 0 would be
// NaN. Such rows are set apart: zeros take their place in the products that sum over rows, and what they add to the
// rows that see them is added one by one.
//
// Huge scores: scale * S - lse in one rounding is off by half a unit of lse, which beyond 1e9 is more than exp can
// take. Rows with such an lse (kHugeLse) subtract it from the rounded score instead: the largest then has exactly 0.
//
// A gradient that is not wanted costs nothing: its product is skipped, and dP, dS and delta too where only dV is
// wanted.
#pragma once

#include <sched.h>

#include "decode.h"
#include "gemm_f32.h"
#include "kernel.h"
#include "rows.h"

namespace flashmla {
namespace cpu {
namespace {

template <typename G>
struct Backward {
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

  static void run(const BackwardParams& params, void* workspace_data, const Parallel& parallel) {
    const Problem& p = params.problem;
    Context c;
    c.params = &params;
    c.plan = make_plan(params);
    c.shared = make_shared(params, c.plan, workspace_data);
    c.scratch = static_cast<char*>(workspace_data) + c.shared.bytes;
    Arena arena(nullptr);
    make_scratch(params, c.plan, arena);
    c.bytes_per_worker = arena.used;
    c.dq = params.dq;
    if (c.shared.dq != nullptr) {
      const int64_t stride_seqlen = p.heads_q * p.head_dim_qk;
      c.dq = {c.shared.dq, p.cu_seqlens_q ? 0 : p.seqlen_q * stride_seqlen, stride_seqlen, p.head_dim_qk};
    }
    c.delta = {c.shared.delta, p.cu_seqlens_q ? 0 : p.heads_q * p.seqlen_q, p.cu_seqlens_q ? p.total_q : p.seqlen_q};
    __builtin_memset(c.shared.turn, 0, sizeof(int32_t) * turns(params, c.plan));

    parallel.run(parallel.num_workers, prepare_worker, &c);
    if (c.plan.needs_sinks) __builtin_memset(c.shared.sink_sums, 0, sizeof(double) * c.plan.num_slots * p.heads_q);
    const bool writes_keys = params.dk.data != nullptr || params.dv.data != nullptr;
    if (writes_keys || (c.plan.needs_ds && p.total_q > 0)) parallel.run(parallel.num_workers, worker, &c);
    if (c.plan.needs_sinks) reduce_sinks(c);
    if (c.shared.dq != nullptr) parallel.run(parallel.num_workers, finish_worker, &c);
  }

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

  static void worker(void* context, int64_t index) {
    Context& c = *static_cast<Context*>(context);
    const Problem& p = c.params->problem;
    Arena arena(c.scratch + index * c.bytes_per_worker);
    Scratch scratch = make_scratch(*c.params, c.plan, arena);
    __builtin_memset(scratch.zeros, 0, max64(p.head_dim_qk, p.head_dim_v) * sizeof(Input));
    G::begin();
    const int64_t heads = p.batch * p.heads_kv;
    for (int64_t task; (task = c.counter.take()) < c.plan.num_tasks;) {
      // The first chunks first: under a causal mask they are the longest, and later chunks wait for them.
      const Sequence sequence = sequence_of(p, task % heads / p.heads_kv);
      const int64_t kv = task / heads * c.plan.chunk;
      const int64_t head_kv = task % heads % p.heads_kv;
      if (kv >= sequence.seqlen_kv) continue;
      if (c.plan.needs_sinks)
        scratch.sink_sums = c.shared.sink_sums + slot_of(p, c.plan, sequence, kv) * p.heads_q + head_kv * c.plan.group;
      chunk(c, scratch, sequence, head_kv, kv, min64(c.plan.chunk, sequence.seqlen_kv - kv));
    }
    G::end();
  }

  // Everything that keys [kv, kv + num_keys) of one kv head take part in.
  static void chunk(Context& c, const Scratch& w, const Sequence& sequence, int64_t head_kv, int64_t kv,
                    int64_t num_keys) {
    const BackwardParams& params = *c.params;
    const Problem& p = params.problem;
    const Plan& plan = c.plan;
    const Input* k = sequence_base<const Input>(params.k, sequence.b, sequence.kv_offset + kv, head_kv);
    const Input* v = sequence_base<const Input>(params.v, sequence.b, sequence.kv_offset + kv, head_kv);
    const int64_t padded_keys = round_up(num_keys, G::kAlignM);
    for (int64_t j = 0; j < num_keys; ++j) {
      G::pack_row(w.k + j * plan.d_k, k + j * params.k.stride_seqlen, p.head_dim_qk, plan.d_k);
      G::pack_row(w.v + j * plan.dv_k, v + j * params.v.stride_seqlen, p.head_dim_v, plan.dv_k);
    }
    __builtin_memset(w.k + num_keys * plan.d_k, 0, (padded_keys - num_keys) * plan.d_k * sizeof(Element));
    __builtin_memset(w.v + num_keys * plan.dv_k, 0, (padded_keys - num_keys) * plan.dv_k * sizeof(Element));
    int64_t num_apart = 0;
    for (int64_t j = 0; j < num_keys; ++j)
      if (!is_finite(k + j * params.k.stride_seqlen, p.head_dim_qk)) w.keys_apart[num_apart++] = j;
    if constexpr (!kIsF32) {
      if (params.dq.data != nullptr) {
        for (int64_t j = 0; j < num_keys; ++j) w.rows[j] = k + j * params.k.stride_seqlen;
        for (int64_t a = 0; a < num_apart; ++a) w.rows[w.keys_apart[a]] = w.zeros;
        G::pack_a_transposed(w.k_transposed, w.rows, num_keys, p.head_dim_qk, plan.chunk);
      }
    }
    __builtin_memset(w.dk, 0, padded_keys * plan.d_ld * sizeof(float));
    __builtin_memset(w.dv, 0, padded_keys * plan.dv_ld * sizeof(float));

    // The queries that see the chunk, as rows of the kv head.
    const Interval queries = {queries_of_key(p, sequence, kv).begin,
                              queries_of_key(p, sequence, kv + num_keys - 1).end};
    const Interval rows = {queries.begin * plan.group, queries.end * plan.group};
    if (!rows.empty())
      for (int64_t r = round_down(rows.end - 1, kBlockQ); r > rows.begin - kBlockQ && r >= 0; r -= kBlockQ)
        tile(c, w, sequence, head_kv, kv, num_keys, num_apart, r);

    write(params.dk, sequence, kv, head_kv, w.dk, plan.d_ld, num_keys, p.head_dim_qk, p.scale);
    write(params.dv, sequence, kv, head_kv, w.dv, plan.dv_ld, num_keys, p.head_dim_v, 1.0f);
  }

  static void write(const TensorView& view, const Sequence& sequence, int64_t kv, int64_t head_kv, const float* src,
                    int64_t ld, int64_t num_keys, int64_t dim, float scale) {
    if (view.data == nullptr) return;
    for (int64_t j = 0; j < num_keys; ++j) {
      Input* dst = sequence_base<Input>(view, sequence.b, sequence.kv_offset + kv + j, head_kv);
      for (int64_t i = 0; i < dim; i += kLanes) store_from_f32(dst + i, load(src + j * ld + i) * scale, dim - i);
    }
  }

  // Query rows [r, r + kBlockQ) of the kv head against the chunk, `num_apart` of whose keys are set apart.
  static void tile(Context& c, const Scratch& w, const Sequence& sequence, int64_t head_kv, int64_t kv,
                   int64_t num_keys, int64_t num_apart, int64_t r) {
    const BackwardParams& params = *c.params;
    const Problem& p = params.problem;
    const Plan& plan = c.plan;
    const int64_t num_rows = min64(kBlockQ, sequence.seqlen_q * plan.group - r);
    const int64_t padded_rows = round_up(num_rows, G::kTrimEnd);
    const bool is_cut = !is_visible(p, sequence, plan, kv, num_keys, r, num_rows);
    const Tile tile = pack_tile(c, w, sequence, head_kv, r, num_rows, padded_rows, is_cut);

    const OperandB<Element> b_qt = G::operand_b(w.q_transposed, kBlockQ, plan.d_k);
    const OperandB<Element> b_dot = G::operand_b(w.dout_transposed, kBlockQ, plan.dv_k);
    const OperandB<Element> b_q = G::operand_b(w.q, p.head_dim_qk, padded_rows);
    const OperandB<Element> b_do = G::operand_b(w.dout, p.head_dim_v, padded_rows);
    const OperandB<Element> b_ds = G::operand_ds(w.ds_b, kBlockQ, plan.chunk);

    for (int64_t j = 0; j < num_keys; j += kSubKV) {
      const int64_t m = min64(kSubKV, num_keys - j), m_padded = round_up(m, G::kAlignM);
      // Lanes [n0, n1) of the tile that see one of these keys, in whole blocks.
      const int64_t first = queries_of_key(p, sequence, kv + j).begin * plan.group - r;
      const int64_t last = queries_of_key(p, sequence, kv + j + m - 1).end * plan.group - r;
      if (max64(first, 0) >= min64(last, num_rows)) continue;
      const int64_t n0 = round_down(max64(first, 0), kSubQ),
                    n1 = min64(round_up(min64(last, num_rows), kSubQ), padded_rows);
      Element* ds = kIsF32 ? w.ds_b + j * kBlockQ : w.ds;
      for (int64_t n = n0; n < n1; n += kSubQ) {
        const int64_t width = min64(kSubQ, n1 - n);
        float *s = w.s, *dp = w.dp;  // [m_padded, width], rows `ld` apart
        int64_t ld = kSubQ;
        if constexpr (kIsF32) {
          s = w.p + n;
          dp = ds + n;
          ld = kBlockQ;
        }
        G::gemm(m_padded, width, plan.d_k, {w.k + j * plan.d_k, plan.d_k, 1},
                {b_qt.data + n / G::kPanel * b_qt.stride_panel, b_qt.stride_k, b_qt.stride_panel}, s, ld, false);
        if (plan.needs_ds)
          G::gemm(m_padded, width, plan.dv_k, {w.v + j * plan.dv_k, plan.dv_k, 1},
                  {b_dot.data + n / G::kPanel * b_dot.stride_panel, b_dot.stride_k, b_dot.stride_panel}, dp, ld, false);
        const Block block = {s, dp, ld, m, m_padded, n, width, w.p + n, ds + n, w.ds_b, j};
        if (p.softcap == 0.0f && m == m_padded && !tile.has_huge_lse &&
            is_visible(p, sequence, plan, kv + j, m, r + n, min64(width, num_rows - n))) {
          if (!plan.needs_ds) {
            probabilities<false, false>(p, w, plan, block);
          } else if (!plan.needs_sinks) {
            probabilities<true, false>(p, w, plan, block);
          } else {
            probabilities<true, true>(p, w, plan, block);
          }
        } else {
          masked_probabilities(p, w, sequence, plan, block, kv + j, r + n, tile);
        }
        // A key that is not finite times the zeros of lanes without a query.
        for (int64_t a = 0; a < num_apart; ++a) {
          const int64_t l = w.keys_apart[a] - j;
          for (int64_t i = max64(n, num_rows); 0 <= l && l < m && i < n + width; ++i) {
            w.p[l * kBlockQ + i] = Element{};
            if (plan.needs_ds) ds[l * kBlockQ + i] = Element{};
          }
        }
      }
      if (params.dv.data != nullptr)
        G::gemm(m_padded, plan.dv_ld, n1 - n0, {w.p + n0, kBlockQ, 1},
                {b_do.data + n0 * b_do.stride_k, b_do.stride_k, b_do.stride_panel}, w.dv + j * plan.dv_ld, plan.dv_ld,
                true);
      if (params.dk.data != nullptr)
        G::gemm(m_padded, plan.d_ld, n1 - n0, {ds + n0, kBlockQ, 1},
                {b_q.data + n0 * b_q.stride_k, b_q.stride_k, b_q.stride_panel}, w.dk + j * plan.d_ld, plan.d_ld, true);
      if (tile.num_apart > 0) add_queries_apart(c, w, sequence, head_kv, kv, j, m, r, tile.num_apart, ds);
    }
    if (plan.needs_sinks) {
      RowCursor cursor(plan.group, r);
      for (int64_t i = 0; i < num_rows; ++i, cursor.next())
        w.sink_sums[cursor.member] += static_cast<double>(w.sink_weight[i]) * w.p_dp[i];
    }
    if (params.dq.data == nullptr) return;

    const int64_t d_m = round_up(p.head_dim_qk, G::kAlignM);
    const Input* k = sequence_base<const Input>(params.k, sequence.b, sequence.kv_offset + kv, head_kv);
    if constexpr (kIsF32)  // the same copy of K gave S: zeros for this product alone
      for (int64_t a = 0; a < num_apart; ++a)
        __builtin_memset(w.k + w.keys_apart[a] * plan.d_k, 0, plan.d_k * sizeof(Element));
    for (int64_t n = 0; n < padded_rows; n += kSubQ) {
      // Keys of the chunk that these lanes see, in whole blocks: exactly the blocks of dS computed above.
      const int64_t width = min64(kSubQ, padded_rows - n);
      const int64_t query0 = (r + n) / plan.group, query1 = (r + min64(n + width, num_rows) - 1) / plan.group;
      const int64_t first = max64(0, keys_of_query(p, sequence, query0).begin - kv);
      const int64_t last = min64(num_keys, keys_of_query(p, sequence, query1).end - kv);
      const int64_t j0 = first < last ? round_down(first, kSubKV) : 0;
      const int64_t j1 = first < last ? round_up(min64(round_up(last, kSubKV), num_keys), G::kAlignM) : 0;
      const OperandA<Element> a = kIsF32 ? OperandA<Element>{w.k + j0 * plan.d_k, 1, plan.d_k}
                                         : OperandA<Element>{w.k_transposed + j0, plan.chunk, 1};
      G::gemm(d_m, width, j1 - j0, a,
              {b_ds.data + n / G::kPanel * b_ds.stride_panel + j0 * b_ds.stride_k, b_ds.stride_k, b_ds.stride_panel},
              w.dq + n, kBlockQ, false);
    }
    for (int64_t a = 0; a < num_apart; ++a) {
      const int64_t j = w.keys_apart[a];
      const Input* key = k + j * params.k.stride_seqlen;
      if constexpr (kIsF32) G::pack_row(w.k + j * plan.d_k, key, p.head_dim_qk, plan.d_k);
      const Interval queries = queries_of_key(p, sequence, kv + j);
      const int64_t end = min64(queries.end * plan.group - r, num_rows);
      for (int64_t i = max64(queries.begin * plan.group - r, 0); i < end; ++i) {
        const float ds = to_f32(*G::ds_at(w.ds_b, i, j, plan.chunk));
        for (int64_t d = 0; d < p.head_dim_qk; ++d) w.dq[d * kBlockQ + i] += ds * element_as_f32(key + d);
      }
    }
    add_dq(c, w, sequence, head_kv, kv, r, num_rows);
  }

  // What the rows set apart add to dK and dV of the keys [j, j + m) of the chunk, of those that they see.
  static void add_queries_apart(const Context& c, const Scratch& w, const Sequence& sequence, int64_t head_kv,
                                int64_t kv, int64_t j, int64_t m, int64_t r, int64_t num_apart, const Element* ds) {
    const BackwardParams& params = *c.params;
    const Problem& p = params.problem;
    const Plan& plan = c.plan;
    const int64_t head_q = head_kv * plan.group;
    const Input* q = sequence_base<const Input>(params.q, sequence.b, sequence.q_offset, head_q);
    const Input* dout = sequence_base<const Input>(params.dout, sequence.b, sequence.q_offset, head_q);
    for (int64_t a = 0; a < num_apart; ++a) {
      const int64_t i = w.queries_apart[a];
      const RowCursor cursor(plan.group, r + i);
      const Interval keys = keys_of_query(p, sequence, cursor.query);
      const int64_t end = min64(m, keys.end - kv - j);
      for (int64_t l = max64(0, keys.begin - kv - j); l < end; ++l) {
        if (params.dv.data != nullptr)
          add_multiple(w.dv + (j + l) * plan.dv_ld, to_f32(w.p[l * kBlockQ + i]), dout + cursor.offset(params.dout),
                       p.head_dim_v);
        if (params.dk.data != nullptr)
          add_multiple(w.dk + (j + l) * plan.d_ld, to_f32(ds[l * kBlockQ + i]), q + cursor.offset(params.q),
                       p.head_dim_qk);
      }
    }
  }

  // `is_cut`: some of the rows do not see some of the keys.
  static Tile pack_tile(const Context& c, const Scratch& w, const Sequence& sequence, int64_t head_kv, int64_t r,
                        int64_t num_rows, int64_t padded_rows, bool is_cut) {
    const BackwardParams& params = *c.params;
    const Problem& p = params.problem;
    const int64_t head_q = head_kv * c.plan.group;
    const Input* q = sequence_base<const Input>(params.q, sequence.b, sequence.q_offset, head_q);
    const Input* dout = sequence_base<const Input>(params.dout, sequence.b, sequence.q_offset, head_q);
    const float* lse = sequence_base(params.lse, sequence.b, sequence.q_offset, head_q);
    const float* delta = sequence_base(c.delta, sequence.b, sequence.q_offset, head_q);
    RowCursor cursor(c.plan.group, r);
    const bool is_decoded = sequence.seqlen_q * c.plan.group <= Decode<Input>::kMaxRows;
    Tile tile = {0, false, is_decoded ? 0x1p-20f : 0.0f};
    for (int64_t i = 0; i < num_rows; ++i, cursor.next()) {
      w.rows[i] = q + cursor.offset(params.q);
      if (is_cut &&
          !(is_finite(w.rows[i], p.head_dim_qk) && is_finite(dout + cursor.offset(params.dout), p.head_dim_v)))
        w.queries_apart[tile.num_apart++] = i;
      const float x = lse[cursor.offset(params.lse)];
      // A row that saw nothing: P = exp(S - inf) = 0. One with an infinite sink: NaN, as its out.
      w.lse[i] = x == -kInf ? kInf : x == kInf ? __builtin_nanf("") : x;
      tile.has_huge_lse |= __builtin_fabsf(x) >= kHugeLse && __builtin_fabsf(x) < kInf;
      w.delta[i] = c.plan.needs_ds ? delta[cursor.offset(c.delta)] : 0.0f;
    }
    for (int64_t i = num_rows; i < padded_rows; ++i) {  // rows that do not exist: P = 0
      w.lse[i] = kInf;
      w.delta[i] = 0.0f;
    }
    if (c.plan.needs_sinks) {
      cursor = RowCursor(c.plan.group, r);
      for (int64_t i = 0; i < padded_rows; ++i, cursor.next()) {
        w.p_dp[i] = 0.0f;
        w.sink_weight[i] = p.sinks[head_q + cursor.member] - w.lse[i];
      }
      for (int64_t i = 0; i < padded_rows; i += kLanes)
        store(w.sink_weight + i, exp<G::kExpDegree>(load(w.sink_weight + i)));
    }
    G::pack_b_transposed(w.q_transposed, w.rows, num_rows, padded_rows, p.head_dim_qk, c.plan.d_k);
    auto set_apart = [&] {
      for (int64_t a = 0; a < tile.num_apart; ++a) w.rows[w.queries_apart[a]] = w.zeros;
    };
    set_apart();
    if (params.dk.data != nullptr) G::pack_b(w.q, w.rows, num_rows, padded_rows, p.head_dim_qk);
    cursor = RowCursor(c.plan.group, r);
    for (int64_t i = 0; i < num_rows; ++i, cursor.next()) w.rows[i] = dout + cursor.offset(params.dout);
    if (c.plan.needs_ds)
      G::pack_b_transposed(w.dout_transposed, w.rows, num_rows, padded_rows, p.head_dim_v, c.plan.dv_k);
    set_apart();
    if (params.dv.data != nullptr) G::pack_b(w.dout, w.rows, num_rows, padded_rows, p.head_dim_v);
    return tile;
  }

  // A block of S and dP, keys down and queries along, and where its P and dS go.
  struct Block {
    float *s, *dp;  // [m_padded, width], rows `ld` apart
    int64_t ld, m, m_padded;
    int64_t lane, width;  // first query within the tile
    Element *p, *ds;      // A operands, rows kBlockQ apart (fp32: s and dp)
    Element* ds_b;        // B operand of the whole tile (fp32: unused)
    int64_t key;          // first key within the chunk
  };

  // Do all `width` rows from `row` on see all `m` keys from `key` on?
  static bool is_visible(const Problem& p, const Sequence& sequence, const Plan& plan, int64_t key, int64_t m,
                         int64_t row, int64_t width) {
    const Interval first = keys_of_query(p, sequence, row / plan.group);
    const Interval last = keys_of_query(p, sequence, (row + width - 1) / plan.group);
    return last.begin <= key && key + m <= first.end;
  }

  // P = exp(scale * S - lse), dS = P∘(dP - delta) for a block that the mask leaves alone.
  template <bool kNeedsDs, bool kNeedsSinks>
  static void probabilities(const Problem& p, const Scratch& w, const Plan& plan, const Block& block) {
    const VecF scale = set1(p.scale);
    if constexpr (kIsF32) {
      for (int64_t n = 0; n < block.width; n += kLanes) {
        const VecF lse = load(w.lse + block.lane + n), delta = load(w.delta + block.lane + n);
        VecF sum = {};
        for (int64_t j = 0; j < block.m; ++j) {
          float *s = block.s + j * block.ld + n, *dp = block.dp + j * block.ld + n;
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
      for (int64_t j = 0; j < block.m; j += 2) {
        VecF ds[2][2];
        for (int i = 0; i < 2; ++i) {
          VecF x[2];
          for (int v = 0; v < 2; ++v) {
            x[v] = exp<G::kExpDegree>(fma(load(block.s + (j + i) * block.ld + v * kLanes), scale, -lse[v]));
            if constexpr (kNeedsDs) {
              const VecF y = load(block.dp + (j + i) * block.ld + v * kLanes);
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
    for (int64_t j = 0; j < block.m_padded; ++j) {
      Interval lanes = {0, 0};
      if (j < block.m) {
        const Interval queries = queries_of_key(p, sequence, key + j);
        lanes = {queries.begin * plan.group - row, queries.end * plan.group - row};
      }
      for (int64_t n = 0; n < block.width; n += kLanes) {
        float *s = block.s + j * block.ld + n, *dp = block.dp + j * block.ld + n;
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
      for (int64_t j = 0; j < block.m_padded; j += 2) {
        VecF ds[2][2];
        for (int i = 0; i < 2; ++i) {
          const float *s = block.s + (j + i) * block.ld, *dp = block.dp + (j + i) * block.ld;
          G::store_pair(block.p + (j + i) * kBlockQ, load(s), load(s + kLanes));
          if (plan.needs_ds)
            for (int v = 0; v < 2; ++v) ds[i][v] = load(dp + v * kLanes);
        }
        if (plan.needs_ds)
          G::store_ds(block.ds + j * kBlockQ, kBlockQ, block.ds_b, block.key + j, block.lane, plan.chunk, ds);
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
