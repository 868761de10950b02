// Which rows belong together: sequences, the query rows that share a kv head, and which keys each of them sees.
//
// The query heads of one kv head (its group) are handled as rows of the same tiles: row r of a kv head is query r /
// group of head h_kv * group + r % group. K and V are read once for the group, decoding (seqlen_q = 1) still fills a
// tile, and since queries stay in order, the keys seen by a range of rows, and the rows that see a range of keys, are
// intervals.
#pragma once

#include "../params.h"
#include "vec.h"

namespace flashmla {
namespace cpu {
namespace {

struct Interval {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

struct Sequence {
  int64_t b;                    // index into the batch dimension
  int64_t q_offset, kv_offset;  // first row (packed layout), 0 in the dense layout
  int64_t seqlen_q, seqlen_kv;
};

inline Sequence sequence_of(const Problem& p, int64_t b) {
  if (p.cu_seqlens_q == nullptr) return {b, 0, 0, p.seqlen_q, p.seqlen_kv};
  const int64_t q = p.cu_seqlens_q[b], kv = p.cu_seqlens_kv[b];
  return {b, q, kv, p.cu_seqlens_q[b + 1] - q, p.cu_seqlens_kv[b + 1] - kv};
}

// Rows of the batch before the sequence's first one. Where each sequence of n rows is cut into blocks of m, block i of
// a sequence is number rows_before / m + b + i of at most rows / m + batch: no two have the same, however ragged.
inline int64_t queries_before(const Problem& p, const Sequence& s) {
  return p.cu_seqlens_q == nullptr ? s.b * p.seqlen_q : s.q_offset;
}
inline int64_t keys_before(const Problem& p, const Sequence& s) {
  return p.cu_seqlens_q == nullptr ? s.b * p.seqlen_kv : s.kv_offset;
}

// Keys seen by query i: p = i + seqlen_kv - seqlen_q sees p - window_left ... p + window_right (see params.h).
inline Interval keys_of_query(const Problem& p, const Sequence& s, int64_t i) {
  const int64_t position = i + s.seqlen_kv - s.seqlen_q;
  Interval keys = {0, s.seqlen_kv};
  if (p.window_left >= 0) keys.begin = max64(0, position - p.window_left);
  if (p.window_right >= 0) keys.end = min64(s.seqlen_kv, position + p.window_right + 1);
  return keys;
}

// Queries that see key j: the same inequality solved for i.
inline Interval queries_of_key(const Problem& p, const Sequence& s, int64_t j) {
  const int64_t i = j - (s.seqlen_kv - s.seqlen_q);
  Interval queries = {0, s.seqlen_q};
  if (p.window_right >= 0) queries.begin = max64(0, i - p.window_right);
  if (p.window_left >= 0) queries.end = min64(s.seqlen_q, i + p.window_left + 1);
  return queries;
}

template <typename T>
inline T* sequence_base(const TensorView& t, int64_t b, int64_t row_offset, int64_t head) {
  return static_cast<T*>(t.data) + b * t.stride_batch + row_offset * t.stride_seqlen + head * t.stride_heads;
}
inline float* sequence_base(const RowView& t, int64_t b, int64_t row_offset, int64_t head) {
  return t.data + b * t.stride_batch + row_offset + head * t.stride_heads;
}

// Walks rows r, r + 1, ... of a kv head as (query, head within the group), without a division per row.
struct RowCursor {
  int64_t group, query, member;
  RowCursor(int64_t group_, int64_t row) : group(group_), query(row / group_), member(row % group_) {}
  void next() {
    if (++member == group) {
      member = 0;
      ++query;
    }
  }
  int64_t offset(const TensorView& t) const { return query * t.stride_seqlen + member * t.stride_heads; }
  int64_t offset(const RowView& t) const { return query + member * t.stride_heads; }
};

// Hands out the tasks 0, 1, ... of a parallel region in order.
struct TaskCounter {
  int64_t next = 0;
  int64_t take() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }
};

// Cuts a workspace into 64-byte aligned arrays; with base = 0 it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  explicit Arena(void* base_) : base(static_cast<char*>(base_)) {}
  template <typename T>
  T* take(int64_t count) {
    const int64_t at = used;
    // One line more than asked for: neighbouring arrays whose sizes are powers of two then start in different cache
    // sets.
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64) + 64;
    return base == nullptr ? nullptr : reinterpret_cast<T*>(base + at);
  }
};

}  // namespace
}  // namespace cpu
}  // namespace flashmla
