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

#include "backward_scores.h"

namespace flashmla {
namespace cpu {
namespace {

template <typename G>
struct Backward : BackwardScores<G> {
  using Base = BackwardScores<G>;
  using Base::add_dq;
  using Base::finish_worker;
  using Base::is_visible;
  using Base::kBlockQ;
  using Base::kHugeLse;
  using Base::kIsF32;
  using Base::kSubKV;
  using Base::kSubQ;
  using Base::make_plan;
  using Base::make_scratch;
  using Base::make_shared;
  using Base::masked_probabilities;
  using Base::prepare_worker;
  using Base::reduce_sinks;
  using Base::slot_of;
  using Base::turns;
  using typename Base::Block;
  using typename Base::Context;
  using typename Base::Element;
  using typename Base::Input;
  using typename Base::Plan;
  using typename Base::Scratch;
  using typename Base::Tile;

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
                    int64_t row_stride, int64_t num_keys, int64_t dim, float scale) {
    if (view.data == nullptr) return;
    for (int64_t j = 0; j < num_keys; ++j) {
      Input* dst = sequence_base<Input>(view, sequence.b, sequence.kv_offset + kv + j, head_kv);
      for (int64_t i = 0; i < dim; i += kLanes)
        store_from_f32(dst + i, load(src + j * row_stride + i) * scale, dim - i);
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
      const int64_t block_keys = min64(kSubKV, num_keys - j), padded_keys = round_up(block_keys, G::kAlignM);
      // Lanes [lane_begin, lane_end) of the tile that see one of these keys, in whole blocks.
      const int64_t first = queries_of_key(p, sequence, kv + j).begin * plan.group - r;
      const int64_t last = queries_of_key(p, sequence, kv + j + block_keys - 1).end * plan.group - r;
      if (max64(first, 0) >= min64(last, num_rows)) continue;
      const int64_t lane_begin = round_down(max64(first, 0), kSubQ),
                    lane_end = min64(round_up(min64(last, num_rows), kSubQ), padded_rows);
      Element* ds = kIsF32 ? w.ds_b + j * kBlockQ : w.ds;
      for (int64_t n = lane_begin; n < lane_end; n += kSubQ) {
        const int64_t width = min64(kSubQ, lane_end - n);
        float *s = w.s, *dp = w.dp;  // [padded_keys, width], rows `row_stride` apart
        int64_t row_stride = kSubQ;
        if constexpr (kIsF32) {
          s = w.p + n;
          dp = ds + n;
          row_stride = kBlockQ;
        }
        G::gemm(padded_keys, width, plan.d_k, {w.k + j * plan.d_k, plan.d_k, 1},
                {b_qt.data + n / G::kPanel * b_qt.stride_panel, b_qt.stride_k, b_qt.stride_panel}, s, row_stride,
                false);
        if (plan.needs_ds)
          G::gemm(padded_keys, width, plan.dv_k, {w.v + j * plan.dv_k, plan.dv_k, 1},
                  {b_dot.data + n / G::kPanel * b_dot.stride_panel, b_dot.stride_k, b_dot.stride_panel}, dp, row_stride,
                  false);
        const Block block = {s, dp, row_stride, block_keys, padded_keys, n, width, w.p + n, ds + n, w.ds_b, j};
        if (p.softcap == 0.0f && block_keys == padded_keys && !tile.has_huge_lse &&
            is_visible(p, sequence, plan, kv + j, block_keys, r + n, min64(width, num_rows - n))) {
          if (!plan.needs_ds) {
            Base::template probabilities<false, false>(p, w, plan, block);
          } else if (!plan.needs_sinks) {
            Base::template probabilities<true, false>(p, w, plan, block);
          } else {
            Base::template probabilities<true, true>(p, w, plan, block);
          }
        } else {
          masked_probabilities(p, w, sequence, plan, block, kv + j, r + n, tile);
        }
        // A key that is not finite times the zeros of lanes without a query.
        for (int64_t a = 0; a < num_apart; ++a) {
          const int64_t l = w.keys_apart[a] - j;
          for (int64_t i = max64(n, num_rows); 0 <= l && l < block_keys && i < n + width; ++i) {
            w.p[l * kBlockQ + i] = Element{};
            if (plan.needs_ds) ds[l * kBlockQ + i] = Element{};
          }
        }
      }
      if (params.dv.data != nullptr)
        G::gemm(padded_keys, plan.dv_ld, lane_end - lane_begin, {w.p + lane_begin, kBlockQ, 1},
                {b_do.data + lane_begin * b_do.stride_k, b_do.stride_k, b_do.stride_panel}, w.dv + j * plan.dv_ld,
                plan.dv_ld, true);
      if (params.dk.data != nullptr)
        G::gemm(padded_keys, plan.d_ld, lane_end - lane_begin, {ds + lane_begin, kBlockQ, 1},
                {b_q.data + lane_begin * b_q.stride_k, b_q.stride_k, b_q.stride_panel}, w.dk + j * plan.d_ld, plan.d_ld,
                true);
      if (tile.num_apart > 0) add_queries_apart(c, w, sequence, head_kv, kv, j, block_keys, r, tile.num_apart, ds);
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
      const int64_t first_query = (r + n) / plan.group, last_query = (r + min64(n + width, num_rows) - 1) / plan.group;
      const int64_t first = max64(0, keys_of_query(p, sequence, first_query).begin - kv);
      const int64_t last = min64(num_keys, keys_of_query(p, sequence, last_query).end - kv);
      const int64_t key_begin = first < last ? round_down(first, kSubKV) : 0;
      const int64_t key_end = first < last ? round_up(min64(round_up(last, kSubKV), num_keys), G::kAlignM) : 0;
      const OperandA<Element> a = kIsF32 ? OperandA<Element>{w.k + key_begin * plan.d_k, 1, plan.d_k}
                                         : OperandA<Element>{w.k_transposed + key_begin, plan.chunk, 1};
      G::gemm(
          d_m, width, key_end - key_begin, a,
          {b_ds.data + n / G::kPanel * b_ds.stride_panel + key_begin * b_ds.stride_k, b_ds.stride_k, b_ds.stride_panel},
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

  // What the rows set apart add to dK and dV of the keys [j, j + block_keys) of the chunk, of those that they see.
  static void add_queries_apart(const Context& c, const Scratch& w, const Sequence& sequence, int64_t head_kv,
                                int64_t kv, int64_t j, int64_t block_keys, int64_t r, int64_t num_apart,
                                const Element* ds) {
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
      const int64_t end = min64(block_keys, keys.end - kv - j);
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
};

}  // namespace
}  // namespace cpu
}  // namespace flashmla
