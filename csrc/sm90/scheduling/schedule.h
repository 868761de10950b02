// The order in which the CTAs of a kernel walk its work tiles.
//
// Glossary
//   CTA           thread block; num_ctas of them are launched, each walks several work tiles
//   work tile     what a CTA computes at a time (WorkTile, BackwardWorkTile)
//   row           a query or a key of a sequence, or its place in a tile
//   q_block       kBlockQ query rows, the queries of a forward work tile or of a step of the backward
//   kv_block      kBlockKV key rows, the keys of a step of the forward or of a backward work tile
//   row_block     a q_block of the forward, a kv_block of the backward: what the schedule counts
//   pair          (batch, head) whose row_blocks are walked; head alone if packed
//   section       pairs that are walked together, so that what they read again and again stays in L2
//   rank          position of a row_block within its section
//   item          packed: (sequence, row_block), one entry of the sorted list; chunk: items sorted together
//   slot          position in the ring of published work tiles; stage: position in a ring of buffers
//
// A work tile of the forward is block_q query rows of one kv head's queries: rows of one query head, or (packed GQA)
// `heads_packed` query heads of each of block_q / heads_packed queries, so that a short sequence fills the tile. A work
// tile of the backward is block_kv key rows of one kv head. Tiles are walked section by section: as many (batch, head)
// pairs as keep what they read again and again within a part of L2, and inside a section from the tile that sees the
// most to the one that sees the fewest, so that the last CTAs to finish are short. (Tiles that take turns: the other
// way round.)
//
// Dense batches need no list: the order is arithmetic. A packed batch is listed first by a kernel of one CTA: one
// item per (sequence, row_block), sorted by what it sees, so that ragged batches balance and empty sequences
// cost nothing. Rows past the last sequence are items of sequence number `batch`: they see nothing.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include <cstdint>

#include "params.h"

namespace flashmla::sm90 {

// Windows as 32-bit numbers, negative for unbounded (check_scalars has cut what reaches every key).
struct Window {
  int32_t left, right;
};

// Sequence lengths and where they begin in the packed tensors (dense: 0).
struct Sequence {
  int32_t offset_q, offset_kv, seqlen_q, seqlen_kv;
};

// The rows that a work tile is a block of.
enum class Side : int32_t { kQueries, kKeys };

struct Schedule {
  Side side;
  bool is_ordered;    // tiles of a sequence come in the order of rows, from the last to the first
  bool is_backwards;  // dense: row_blocks are walked from the last to the first
  int32_t num_heads;  // tiles side by side of one row_block: heads_q / heads_packed, or heads_kv * num_splits
  int32_t num_pairs;  // dense: heads times batch; packed: heads
  int32_t pairs_per_section;
  int32_t num_row_blocks;  // q_blocks or kv_blocks of one pair; dense
  int32_t rows_per_block;  // forward: kBlockQ / heads_packed queries
  int32_t heads_packed;    // query heads sharing a tile of the forward
  int32_t max_items;       // packed: room in `items`
  int32_t rows_per_chunk;  // packed: rows of the other side whose tiles are walked together
  int32_t* next_tile;      // null: tiles are dealt out statically
  uint64_t ticket;         // not 0: next_tile holds anything until the kernel clears it (open_counter)
  int32_t* num_items;      // packed, else null
  int32_t* first_item;     // [batch + 2]
  int2* items;             // [max_items] (sequence, row_block)
};

// K/V tiles [begin, end) are seen by some row, [unmasked_begin, unmasked_end) by each row of a warpgroup.
struct VisibleBlocks {
  int32_t begin, end, unmasked_begin, unmasked_end;
};

// A work tile as the scheduling thread publishes it, in shared memory.
struct WorkTile {
  int32_t head;     // first query head; negative: there is no more work
  int32_t batch;    // packed: the sequence's number
  int32_t q_begin;  // first query, within the sequence; negative if rows before it belong to none
  Sequence sequence;
  int32_t kv_block_begin, kv_block_end;  // K/V tiles to load
  VisibleBlocks visible[3];              // by warpgroup
};

// Device memory the schedule of a call needs, in bytes.
int64_t forward_schedule_bytes(Problem const& problem, int block_q, int num_parts = 1);
int64_t backward_schedule_bytes(Problem const& problem, int block_kv);

Window window_of(Problem const& problem);

// Whether every tile of a call sees as much as every other.
inline bool has_equal_tiles(Problem const& problem) {
  return problem.cu_seqlens_q == nullptr && problem.window_left < 0 && problem.window_right < 0;
}

// Both fill `schedule` and `num_ctas`, the CTAs worth launching, and launch the kernel that makes the list.
// `num_sms` multiprocessors will run them. They return null or a sentence that says what went wrong. `num_parts`: into
// how many parts of whole queries a forward tile's rows can be cut, each block_q / num_parts rows at the most.
const char* make_forward_schedule(Problem const& problem, int block_q, int num_sms, void* workspace,
                                  cudaStream_t stream, Schedule& schedule, int& num_ctas, int num_parts = 1);

// `num_splits` tiles share the query heads of a group. If tiles take turns, those of a head come in the order of
// falling keys, whatever they cost: each adds its part of dQ after the one before it.
const char* make_backward_schedule(Problem const& problem, int block_kv, int num_splits, bool takes_turns, int num_sms,
                                   void* workspace, cudaStream_t stream, Schedule& schedule, int& num_ctas);

}  // namespace flashmla::sm90
