// Attention to caches (DecodeParams): every sequence is a problem of the forward kernel by itself.
//
// Its keys are those from the first that some query may see up to its last: what lies before moves no position, since
// queries are aligned to the end. Keys of a dense cache are read where they lie. Those of a paged cache are copied
// first, a task's at a time.
//
// A task is a sequence and one of its kv heads, run by one worker, or, if there are fewer of these than workers, a
// sequence and all of its kv heads, run by all workers. A row's result depends on neither.
#pragma once

#include <cstring>

#include "kernel.h"

namespace flashmla {
namespace cpu {

// Keys [begin, end) of a sequence.
struct CacheKeys {
  int64_t begin, end;
};

inline CacheKeys keys_in_cache(const DecodeParams& params, int64_t b) {
  const Problem& p = params.problem;
  const int64_t end = params.cache_seqlens != nullptr ? params.cache_seqlens[b] : p.seqlen_kv;
  int64_t begin = params.kv_start != nullptr ? params.kv_start[b] : 0;
  if (p.window_left >= 0 && end - p.seqlen_q - p.window_left > begin) begin = end - p.seqlen_q - p.window_left;
  return {begin < end ? begin : end, end};
}

class CacheAttention {
 public:
  CacheAttention(const DecodeParams& params, const Entry& entry, int64_t num_workers)
      : params_(params), entry_(entry), num_workers_(num_workers) {
    const Problem& p = params.problem;
    is_by_head_ = p.batch * p.heads_kv >= num_workers;
    num_heads_ = is_by_head_ ? 1 : p.heads_kv;
    item_ = p.dtype == DType::kFloat32 ? 4 : 2;
    int64_t longest = 0;
    for (int64_t b = 0; params.block_table != nullptr && b < p.batch; ++b) {
      const CacheKeys keys = keys_in_cache(params, b);
      longest = keys.end - keys.begin > longest ? keys.end - keys.begin : longest;
    }
    bytes_k_ = round_up_to_lines(longest * num_heads_ * p.head_dim_qk * item_);
    bytes_v_ = round_up_to_lines(longest * num_heads_ * p.head_dim_v * item_);
    const int64_t forward = entry.forward_workspace(sequence(0, 0, {0, 0}), is_by_head_ ? 1 : num_workers);
    bytes_per_task_ = bytes_k_ + bytes_v_ + round_up_to_lines(forward);
  }

  int64_t workspace() const { return bytes_per_task_ * (is_by_head_ ? num_workers_ : 1); }

  // `workspace` begins at a multiple of 64 bytes.
  void run(void* workspace, const Parallel& parallel) {
    workspace_ = static_cast<char*>(workspace);
    next_task_ = 0;
    if (is_by_head_) {
      parallel.run(num_workers_, worker, this);
    } else {
      for (int64_t b = 0; b < params_.problem.batch; ++b) attend(b, 0, workspace_, parallel);
    }
  }

 private:
  static int64_t round_up_to_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

  static void run_in_this_thread(int64_t num_workers, void (*body)(void*, int64_t), void* context) {
    for (int64_t worker = 0; worker < num_workers; ++worker) body(context, worker);
  }

  static void worker(void* context, int64_t index) {
    CacheAttention& self = *static_cast<CacheAttention*>(context);
    const Problem& p = self.params_.problem;
    const Parallel alone = {1, run_in_this_thread};
    for (int64_t task; (task = __atomic_fetch_add(&self.next_task_, 1, __ATOMIC_RELAXED)) < p.batch * p.heads_kv;)
      self.attend(task / p.heads_kv, task % p.heads_kv, self.workspace_ + index * self.bytes_per_task_, alone);
  }

  // num_heads_ kv heads of sequence b from head_kv on, as a problem of the forward kernel.
  ForwardParams sequence(int64_t b, int64_t head_kv, CacheKeys keys) const {
    ForwardParams forward;
    Problem& p = forward.problem = params_.problem;
    const int64_t group = p.heads_q / p.heads_kv, head_q = head_kv * group;
    p.batch = 1;
    p.seqlen_kv = keys.end - keys.begin;
    p.total_q = p.seqlen_q;
    p.total_kv = p.seqlen_kv;
    p.heads_kv = num_heads_;
    p.heads_q = num_heads_ * group;
    if (p.sinks != nullptr) p.sinks += head_q;
    forward.q = moved(params_.q, b, 0, head_q);
    forward.out = moved(params_.out, b, 0, head_q);
    forward.lse = params_.lse;
    if (forward.lse.data != nullptr)
      forward.lse.data += b * params_.lse.stride_batch + head_q * params_.lse.stride_heads;
    if (params_.block_table == nullptr) {
      forward.k = moved(params_.k, b, keys.begin, head_kv);
      forward.v = moved(params_.v, b, keys.begin, head_kv);
    }
    return forward;
  }

  TensorView moved(TensorView view, int64_t b, int64_t row, int64_t head) const {
    const int64_t elements = b * view.stride_batch + row * view.stride_seqlen + head * view.stride_heads;
    if (elements != 0) view.data = static_cast<char*>(view.data) + elements * item_;
    return view;
  }

  void attend(int64_t b, int64_t head_kv, char* workspace, const Parallel& parallel) {
    const CacheKeys keys = keys_in_cache(params_, b);
    ForwardParams forward = sequence(b, head_kv, keys);
    if (params_.block_table != nullptr) {
      const Problem& p = params_.problem;
      forward.k = gathered(params_.k, p.head_dim_qk, workspace);
      forward.v = gathered(params_.v, p.head_dim_v, workspace + bytes_k_);
      Gather gather = {this, b, head_kv, keys, &forward, keys.begin / params_.page_size};
      if (keys.begin < keys.end) parallel.run(parallel.num_workers, gather_pages, &gather);
    }
    entry_.forward(forward, workspace + bytes_k_ + bytes_v_, parallel);
  }

  TensorView gathered(const TensorView& cache, int64_t head_dim, char* data) const {
    TensorView view = cache;
    view.data = data;
    view.stride_batch = 0;
    view.stride_seqlen = num_heads_ * head_dim;
    view.stride_heads = head_dim;
    return view;
  }

  struct Gather {
    const CacheAttention* self;
    int64_t b, head_kv;
    CacheKeys keys;
    const ForwardParams* forward;
    int64_t next_page;
  };

  static void gather_pages(void* context, int64_t) {
    Gather& gather = *static_cast<Gather*>(context);
    const DecodeParams& params = gather.self->params_;
    const int64_t size = params.page_size;
    for (int64_t n; (n = __atomic_fetch_add(&gather.next_page, 1, __ATOMIC_RELAXED)) * size < gather.keys.end;) {
      const int64_t page = params.block_table[gather.b * params.stride_block_table + n];
      const int64_t begin = n * size > gather.keys.begin ? n * size : gather.keys.begin;
      const int64_t end = (n + 1) * size < gather.keys.end ? (n + 1) * size : gather.keys.end;
      gather.self->copy_rows(params.k, gather.forward->k, params.problem.head_dim_qk, gather, page, begin, end);
      gather.self->copy_rows(params.v, gather.forward->v, params.problem.head_dim_v, gather, page, begin, end);
    }
  }

  // Keys [begin, end), which lie in one page.
  void copy_rows(const TensorView& cache, const TensorView& copy, int64_t head_dim, const Gather& gather, int64_t page,
                 int64_t begin, int64_t end) const {
    for (int64_t j = begin; j < end; ++j)
      for (int64_t head = 0; head < num_heads_; ++head)
        std::memcpy(moved(copy, 0, j - gather.keys.begin, head).data,
                    moved(cache, page, j % params_.page_size, gather.head_kv + head).data,
                    static_cast<size_t>(head_dim * item_));
  }

  const DecodeParams& params_;
  const Entry& entry_;
  int64_t num_workers_, num_heads_, item_, bytes_k_, bytes_v_, bytes_per_task_, next_task_ = 0;
  bool is_by_head_;
  char* workspace_ = nullptr;
};

}  // namespace cpu
}  // namespace flashmla
