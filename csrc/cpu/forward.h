// Forward: O = softmax(S) V and lse, one pass over K and V.
//
// For a tile of query rows and the keys in blocks of kForwardBlockKV (online normaliser, arXiv 1805.02867, as tiled by
// FlashAttention-2, arXiv 2307.08691, algorithm 1):
//   S = Q K^T                                    fp32
//   m' = max(m, rowmax(S))                       row_max
//   P = exp(scale * (S - m')),                   P in the operand dtype
//   a = exp(scale * (m - m'))
//   l' = a l + rowsum(P)                         row_sum, of P before it is rounded
//   O' = a O + P V                               fp32
// and at the end O / l and lse = scale * m + log l. A sink is one more key with score sinks[h] and no value. The
// maximum is that of the scores as they come: S - m' is exactly 0 for the largest, so l is at least 1 however large the
// scores are. (scale * S - m'' with a rounded m'' is off by half a unit of m'': beyond 1e9 by more than exp can take.)
//
// Schedule: a task is a kv head and up to `rows_per_task` of its query rows (see rows.h). It packs Q once, then walks
// the key blocks; each block of K and V is packed once and used by every tile of the task. Only the columns of a block
// that some row of the tile sees are computed; only vectors that the mask cuts are masked. Where products have a unit
// of their own (AMX), S of the next tile is computed between the rows of this tile's softmax. Up to four rows
// (decoding) go another way, without packing: decode.h.
//
// A row's result depends on neither the task it falls into nor the number of threads: key blocks start at fixed
// positions and columns outside the mask add 0. Times a value that is not finite 0 would be NaN: where some row of a
// task does not see such a value, zeros take its place in the product, and the rows that see it add it by themselves.
#pragma once

#include "decode.h"
#include "forward_softmax.h"
#include "gemm_f32.h"
#include "kernel.h"
#include "rows.h"

namespace flashmla {
namespace cpu {
namespace {

template <typename G>
struct Forward : ForwardSoftmax<G> {
  using Base = ForwardSoftmax<G>;
  using Base::needs_transform;
  using Base::softmax_row;
  using Base::softmax_scale;
  using Base::transform_scores;
  using Input = typename G::Input;
  using Element = typename G::Element;
  static constexpr int64_t kBlockQ = G::kForwardBlockQ, kBlockKV = G::kForwardBlockKV;

  struct Plan {
    int64_t group, d_ld, dv_ld;  // leading dimensions of packed Q and of O
    int64_t rows_per_task, tasks_per_head, num_tasks;
  };

  // One worker's scratch.
  struct Scratch {
    Element* q;          // [rows_per_task, d_ld]
    Element* k;          // B operand [d, kBlockKV]
    Element* v;          // B operand [kBlockKV, dv]
    float* s;            // [kBlockQ, kBlockKV], twice where products and softmax overlap
    Element* p;          // [kBlockQ, kBlockKV]; the memory of s where the operands are fp32
    float* o;            // [rows_per_task, dv_ld]
    float* q_f32;        // [Decode::kMaxRows, head_dim_qk rounded to vectors]
    float* row_max;      // [rows_per_task]
    float* row_sum;      // [rows_per_task, kLanes], added up at the end
    Interval* keys;      // [rows_per_task]
    const Input** rows;  // [kBlockKV] row pointers for packing
    Input* zeros;        // [head_dim_v]
    int64_t* apart;      // [kBlockKV] columns of a block whose values are not finite
  };

  static Plan make_plan(const ForwardParams& params, int64_t num_workers) {
    const Problem& p = params.problem;
    Plan plan;
    plan.group = p.heads_q / p.heads_kv;
    plan.d_ld = round_up(p.head_dim_qk, G::kAlignK);
    plan.dv_ld = round_up(p.head_dim_v, G::kAlignN);
    // Long tasks reuse a packed block of K and V more often; O and Q of a task should stay within half of an L2 cache
    // of 2 MiB, and 8 tasks per worker balance the triangle of a causal mask.
    const int64_t row_bytes = plan.dv_ld * 4 + plan.d_ld * static_cast<int64_t>(sizeof(Element));
    const int64_t fitting = (int64_t{1} << 20) / row_bytes;
    const int64_t balanced = p.total_q * p.heads_q / (8 * num_workers);
    const int64_t longest = p.seqlen_q * plan.group;
    plan.rows_per_task = min64(min64(fitting, balanced), longest);
    plan.rows_per_task = max64(kBlockQ, round_up(plan.rows_per_task, kBlockQ));
    plan.tasks_per_head = (longest + plan.rows_per_task - 1) / plan.rows_per_task;
    plan.num_tasks = plan.tasks_per_head * p.batch * p.heads_kv;
    return plan;
  }

  static Scratch make_scratch(const ForwardParams& params, const Plan& plan, Arena& arena) {
    const Problem& p = params.problem;
    const int64_t rows = plan.rows_per_task;
    Scratch s;
    s.q = arena.take<Element>(rows * plan.d_ld);
    s.k = arena.take<Element>(G::size_b(kBlockKV, plan.d_ld));
    s.v = arena.take<Element>(G::size_b(p.head_dim_v, kBlockKV));
    s.s = arena.take<float>((G::kOverlap ? 2 : 1) * kBlockQ * kBlockKV);
    if constexpr (sizeof(Element) == sizeof(float)) {
      s.p = s.s;
    } else {
      s.p = arena.take<Element>(kBlockQ * kBlockKV);
    }
    s.o = arena.take<float>(rows * plan.dv_ld);
    s.q_f32 = arena.take<float>(Decode<Input>::kMaxRows * round_up(p.head_dim_qk, kLanes));
    s.row_max = arena.take<float>(rows);
    s.row_sum = arena.take<float>(rows * kLanes);
    s.keys = arena.take<Interval>(rows);
    s.rows = arena.take<const Input*>(kBlockKV);
    s.zeros = arena.take<Input>(p.head_dim_v);
    s.apart = arena.take<int64_t>(kBlockKV);
    return s;
  }

  static int64_t workspace(const ForwardParams& params, int64_t num_workers) {
    Arena arena(nullptr);
    make_scratch(params, make_plan(params, num_workers), arena);
    return arena.used * num_workers;
  }

  struct Context {
    const ForwardParams* params;
    Plan plan;
    char* workspace;
    int64_t bytes_per_worker;
    TaskCounter counter;
  };

  static void run(const ForwardParams& params, void* workspace_data, const Parallel& parallel) {
    Context context;
    context.params = &params;
    context.plan = make_plan(params, parallel.num_workers);
    context.workspace = static_cast<char*>(workspace_data);
    context.bytes_per_worker = workspace(params, parallel.num_workers) / parallel.num_workers;
    parallel.run(parallel.num_workers, worker, &context);
  }

  static void worker(void* context_, int64_t index) {
    Context& context = *static_cast<Context*>(context_);
    const ForwardParams& params = *context.params;
    const Problem& p = params.problem;
    const Plan& plan = context.plan;
    Arena arena(context.workspace + index * context.bytes_per_worker);
    const Scratch scratch = make_scratch(params, plan, arena);
    __builtin_memset(scratch.zeros, 0, p.head_dim_v * sizeof(Input));
    G::begin();
    for (int64_t task; (task = context.counter.take()) < plan.num_tasks;) {
      // The last rows first: under a causal mask they are the longest tasks.
      const int64_t heads = p.batch * p.heads_kv;
      const int64_t row = (plan.tasks_per_head - 1 - task / heads) * plan.rows_per_task;
      const Sequence sequence = sequence_of(p, task % heads / p.heads_kv);
      const int64_t num_rows = sequence.seqlen_q * plan.group;
      if (row < num_rows)
        attend(params, plan, scratch, sequence, task % heads % p.heads_kv, row,
               min64(plan.rows_per_task, num_rows - row));
    }
    G::end();
  }

  static void attend(const ForwardParams& params, const Plan& plan, const Scratch& w, const Sequence& sequence,
                     int64_t head_kv, int64_t first_row, int64_t num_rows) {
    const Problem& p = params.problem;
    const int64_t head_q = head_kv * plan.group;
    const Input* q = sequence_base<const Input>(params.q, sequence.b, sequence.q_offset, head_q);
    const Input* k = sequence_base<const Input>(params.k, sequence.b, sequence.kv_offset, head_kv);
    const Input* v = sequence_base<const Input>(params.v, sequence.b, sequence.kv_offset, head_kv);

    RowCursor cursor(plan.group, first_row);
    for (int64_t r = 0; r < num_rows; ++r, cursor.next()) {
      G::pack_row(w.q + r * plan.d_ld, q + cursor.offset(params.q), p.head_dim_qk, plan.d_ld);
      w.keys[r] = keys_of_query(p, sequence, cursor.query);
      w.row_max[r] = -kInf;
      store(w.row_sum + r * kLanes, VecF{});
    }
    for (int64_t r = num_rows; r < round_up(num_rows, G::kAlignM); ++r)
      __builtin_memset(w.q + r * plan.d_ld, 0, plan.d_ld * sizeof(Element));
    __builtin_memset(w.o, 0, round_up(num_rows, G::kAlignM) * plan.dv_ld * sizeof(float));

    // Intervals of consecutive rows only move right, so the first row has the least begin and the last the greatest
    // end.
    const int64_t kv_begin = w.keys[0].begin, kv_end = w.keys[num_rows - 1].end;
    // A property of the sequence, not of the task: how rows fall into tasks depends on the number of threads.
    if (sequence.seqlen_q * plan.group <= Decode<Input>::kMaxRows) {
      attend_directly(params, plan, w, q, k, v, num_rows, {kv_begin, kv_end});
      write(params, plan, w, sequence, head_q, first_row, num_rows);
      return;
    }
    for (int64_t kv = round_down(kv_begin, kBlockKV); kv < kv_end; kv += kBlockKV) {
      const int64_t num_keys = min64(kBlockKV, kv_end - kv);
      const int64_t padded = round_up(num_keys, G::kTrimEnd);
      for (int64_t j = 0; j < num_keys; ++j) w.rows[j] = k + (kv + j) * params.k.stride_seqlen;
      G::pack_b_transposed(w.k, w.rows, num_keys, padded, p.head_dim_qk, plan.d_ld);
      const int64_t num_apart = set_apart(params, w, v, kv, num_keys, num_rows);
      for (int64_t j = 0; j < num_keys; ++j) w.rows[j] = v + (kv + j) * params.v.stride_seqlen;
      for (int64_t a = 0; a < num_apart; ++a) w.rows[w.apart[a]] = w.zeros;
      G::pack_b(w.v, w.rows, num_keys, padded, p.head_dim_v);
      const KeyBlock block = {kv,
                              num_keys,
                              G::operand_b(w.k, padded, plan.d_ld),
                              G::operand_b(w.v, p.head_dim_v, padded),
                              v + kv * params.v.stride_seqlen,
                              num_apart};
      Tile next = make_tile(w, block, 0, num_rows);
      scores(plan, w, block, next, next.column_begin, next.column_end);
      for (int64_t r = 0; r < num_rows; r += kBlockQ) {
        const Tile tile = next;
        next = make_tile(w, block, r + kBlockQ, num_rows);
        attend_tile(params, plan, w, block, tile, next);
      }
    }
    write(params, plan, w, sequence, head_q, first_row, num_rows);
  }

  // Of the keys [kv, kv + num_keys) those that some of the rows do not see and whose values are not finite.
  static int64_t set_apart(const ForwardParams& params, const Scratch& w, const Input* v, int64_t kv, int64_t num_keys,
                           int64_t num_rows) {
    if (w.keys[0].end >= kv + num_keys && w.keys[num_rows - 1].begin <= kv) return 0;  // every row sees every key
    int64_t count = 0;
    for (int64_t j = 0; j < num_keys; ++j)
      if (!is_finite(v + (kv + j) * params.v.stride_seqlen, params.problem.head_dim_v)) w.apart[count++] = j;
    return count;
  }

  // The values set apart of the keys from `first` on, for one row whose P begins there too.
  template <typename P>
  static void add_apart(const ForwardParams& params, const Scratch& w, const Input* v, int64_t num_apart,
                        Interval columns, const P* p_row, float* o) {
    for (int64_t a = 0; a < num_apart; ++a) {
      const int64_t j = w.apart[a];
      if (columns.begin <= j && j < columns.end)
        add_multiple(o, to_f32(p_row[j]), v + j * params.v.stride_seqlen, params.problem.head_dim_v);
    }
  }

  // The same for a handful of rows, without packing K and V (see decode.h).
  static void attend_directly(const ForwardParams& params, const Plan& plan, const Scratch& w, const Input* q,
                              const Input* k, const Input* v, int64_t num_rows, Interval keys) {
    const Problem& p = params.problem;
    const int64_t q_stride = round_up(p.head_dim_qk, kLanes);
    RowCursor cursor(plan.group, 0);
    for (int64_t r = 0; r < num_rows; ++r, cursor.next())
      for (int64_t c = 0; c < p.head_dim_qk; c += kLanes)
        store(w.q_f32 + r * q_stride + c, load_as_f32(q + cursor.offset(params.q) + c, p.head_dim_qk - c));
    for (int64_t kv = round_down(keys.begin, kBlockKV); kv < keys.end; kv += kBlockKV) {
      const int64_t first = max64(kv, round_down(keys.begin, G::kTrimBegin));  // a window leaves out part of a block
      const int64_t num_keys = min64(kv + kBlockKV, keys.end) - first, column_end = round_up(num_keys, G::kVectorStep);
      Decode<Input>::scores(num_rows, num_keys, p.head_dim_qk, w.q_f32, q_stride, k + first * params.k.stride_seqlen,
                            params.k.stride_seqlen, w.s, kBlockKV);
      for (int64_t r = 0; r < num_rows; ++r) {
        float* s = w.s + r * kBlockKV;
        if (needs_transform(p)) transform_scores(p, s, num_keys);
        const int64_t begin = max64(0, w.keys[r].begin - first), end = min64(num_keys, w.keys[r].end - first);
        if (begin >= end) {
          __builtin_memset(s, 0, column_end * sizeof(float));
          continue;
        }
        const float alpha =
            softmax_row(s, s, 0, column_end, begin, end, softmax_scale(p), w.row_max[r], w.row_sum + r * kLanes);
        float* o = w.o + r * plan.dv_ld;
        if (alpha != 1.0f)
          for (int64_t c = 0; c < plan.dv_ld; c += kLanes) store(o + c, load(o + c) * alpha);
      }
      const Input* values = v + first * params.v.stride_seqlen;
      const int64_t num_apart = set_apart(params, w, v, first, num_keys, num_rows);
      auto accumulate = [&](int64_t begin, int64_t end) {
        Decode<Input>::accumulate(num_rows, end - begin, p.head_dim_v, w.s + begin, kBlockKV,
                                  values + begin * params.v.stride_seqlen, params.v.stride_seqlen, w.o, plan.dv_ld);
      };
      int64_t begin = 0;
      for (int64_t a = 0; a < num_apart; begin = w.apart[a++] + 1) accumulate(begin, w.apart[a]);
      accumulate(begin, num_keys);
      for (int64_t r = 0; num_apart > 0 && r < num_rows; ++r)
        add_apart(params, w, values, num_apart, {w.keys[r].begin - first, w.keys[r].end - first}, w.s + r * kBlockKV,
                  w.o + r * plan.dv_ld);
    }
  }

  // Keys [kv, kv + num_keys), packed.
  struct KeyBlock {
    int64_t kv, num_keys;
    OperandB<Element> k, v;
    const Input* values;  // of the first key
    int64_t num_apart;    // of them whose values are zeros in v
  };

  // Rows [r, r + num_rows) of the task and the columns [column_begin, column_end) of a key block that some of them see.
  struct Tile {
    int64_t r, num_rows, column_begin, column_end;
    float* s;  // [kBlockQ, kBlockKV]
  };

  static Tile make_tile(const Scratch& w, const KeyBlock& block, int64_t r, int64_t num_rows) {
    // Two tiles are in flight where products and softmax overlap.
    Tile tile = {r, min64(kBlockQ, num_rows - r), 0, 0, w.s + (G::kOverlap ? r / kBlockQ % 2 : 0) * kBlockQ * kBlockKV};
    if (tile.num_rows <= 0) return tile;
    const int64_t first = max64(0, w.keys[r].begin - block.kv);
    const int64_t last = min64(block.num_keys, w.keys[r + tile.num_rows - 1].end - block.kv);
    if (first < last) {
      tile.column_begin = round_down(first, G::kTrimBegin);
      tile.column_end = round_up(last, G::kTrimEnd);
    }
    return tile;
  }

  // Columns [begin, end) of S = Q K^T.
  static void scores(const Plan& plan, const Scratch& w, const KeyBlock& block, const Tile& tile, int64_t begin,
                     int64_t end) {
    if (begin >= end) return;
    G::gemm(round_up(tile.num_rows, G::kAlignM), end - begin, plan.d_ld, {w.q + tile.r * plan.d_ld, plan.d_ld, 1},
            {block.k.data + begin / G::kPanel * block.k.stride_panel, block.k.stride_k, block.k.stride_panel},
            tile.s + begin, kBlockKV, false);
  }

  // One tile whose S is there; computes the S of the next.
  static void attend_tile(const ForwardParams& params, const Plan& plan, const Scratch& w, const KeyBlock& block,
                          const Tile& tile, const Tile& next) {
    const Problem& p = params.problem;
    const int64_t column_begin = tile.column_begin, column_end = tile.column_end,
                  padded_rows = round_up(tile.num_rows, G::kAlignM);
    int64_t next_column = next.column_begin;
    if (column_begin < column_end) {
      const float scale = softmax_scale(p);
      if (needs_transform(p))
        for (int64_t i = 0; i < tile.num_rows; ++i)
          transform_scores(p, tile.s + i * kBlockKV + column_begin, column_end - column_begin);
      for (int64_t i = 0; i < tile.num_rows; ++i) {
        const int64_t row = tile.r + i;
        Element* p_row = w.p + i * kBlockKV;
        const int64_t begin = max64(0, w.keys[row].begin - block.kv);
        const int64_t end = min64(block.num_keys, w.keys[row].end - block.kv);
        float alpha = 1.0f;
        if (begin < end) {
          alpha = softmax_row(tile.s + i * kBlockKV, p_row, column_begin, column_end, begin, end, scale, w.row_max[row],
                              w.row_sum + row * kLanes);
        } else {
          __builtin_memset(p_row + column_begin, 0, (column_end - column_begin) * sizeof(Element));
        }
        if (alpha != 1.0f) {
          float* o = w.o + row * plan.dv_ld;
          for (int64_t j = 0; j < plan.dv_ld; j += kLanes) store(o + j, load(o + j) * alpha);
        }
        // The matrix unit works on the next tile while the vector units work on this one: close enough in the
        // instruction stream for the core to run them side by side.
        if (G::kOverlap && i % 4 == 3 && next_column < next.column_end) {
          scores(plan, w, block, next, next_column, min64(next_column + 32, next.column_end));
          next_column += 32;
        }
      }
      for (int64_t i = tile.num_rows; i < padded_rows; ++i)
        __builtin_memset(w.p + i * kBlockKV + column_begin, 0, (column_end - column_begin) * sizeof(Element));
      G::gemm(padded_rows, plan.dv_ld, column_end - column_begin, {w.p + column_begin, kBlockKV, 1},
              {block.v.data + column_begin * block.v.stride_k, block.v.stride_k, block.v.stride_panel},
              w.o + tile.r * plan.dv_ld, plan.dv_ld, true);
      for (int64_t i = 0; block.num_apart > 0 && i < tile.num_rows; ++i) {
        const Interval keys = w.keys[tile.r + i];
        add_apart(params, w, block.values, block.num_apart, {keys.begin - block.kv, keys.end - block.kv},
                  w.p + i * kBlockKV, w.o + (tile.r + i) * plan.dv_ld);
      }
    }
    scores(plan, w, block, next, next_column, next.column_end);
  }

  static void write(const ForwardParams& params, const Plan& plan, const Scratch& w, const Sequence& sequence,
                    int64_t head_q, int64_t first_row, int64_t num_rows) {
    const Problem& p = params.problem;
    Input* out = sequence_base<Input>(params.out, sequence.b, sequence.q_offset, head_q);
    float* lse =
        params.lse.data == nullptr ? nullptr : sequence_base(params.lse, sequence.b, sequence.q_offset, head_q);
    RowCursor cursor(plan.group, first_row);
    for (int64_t r = 0; r < num_rows; ++r, cursor.next()) {
      // In double: one logarithm per row, and a sink far above or below the scores must neither overflow nor vanish.
      double m = static_cast<double>(w.row_max[r]) * softmax_scale(p);
      double l = horizontal_sum(load(w.row_sum + r * kLanes)), o_scale = 1.0;
      if (p.sinks != nullptr) {
        const double sink = p.sinks[head_q + cursor.member];
        if (!(sink < __builtin_inf())) {
          // NaN or infinity: softmax is NaN, of no keys at all the sum of nothing. lse is the sink (or NaN already).
          o_scale = sequence.seqlen_kv > 0 ? __builtin_nan("") : 0.0;
          l = l == l ? 1.0 : l;
          m = sink;
        } else if (sink > m || m > -__builtin_inf()) {
          const double shifted = sink > m ? sink : m;
          o_scale = __builtin_exp(m - shifted);
          l = l * o_scale + __builtin_exp(sink - shifted);
          m = shifted;
        }
      }
      const bool is_dead = l == 0.0;  // sees no key and there is no sink
      const float inverse = is_dead ? 0.0f : static_cast<float>(o_scale / l);
      if (lse != nullptr) lse[cursor.offset(params.lse)] = is_dead ? -kInf : static_cast<float>(m + __builtin_log(l));
      const float* o = w.o + r * plan.dv_ld;
      Input* row = out + cursor.offset(params.out);
      for (int64_t j = 0; j < p.head_dim_v; j += kLanes)
        store_from_f32(row + j, load(o + j) * inverse, p.head_dim_v - j);
    }
  }
};

}  // namespace
}  // namespace cpu
}  // namespace flashmla
