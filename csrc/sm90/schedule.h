// The order in which the blocks of a kernel walk its tiles of work.
//
// A tile is block_q query rows of one kv head's queries: rows of one query head, or (packed GQA) `heads_packed` query
// heads of each of block_q / heads_packed queries, so that a short sequence fills the tile. Tiles are walked section by
// section: as many (batch, head) pairs as keep their K and V within a part of L2, and inside a section from the
// tile that sees the most keys to the one that sees the fewest, so that the last blocks to finish are short.
//
// Dense batches need no list: the order is arithmetic. A packed batch is listed first by a kernel of one thread block:
// one item per (sequence, q block), sorted by the keys it sees, so that ragged batches balance and empty sequences cost
// nothing. Rows past the last sequence are items of sequence number `batch`: they see no key.
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

struct Schedule {
  int32_t num_pairs;  // dense: kv-side heads of a tile times batch; packed: heads
  int32_t pairs_per_section;
  int32_t num_q_blocks;       // dense
  int32_t queries_per_block;  // kBlockQ / heads_packed
  int32_t heads_packed;       // query heads sharing a tile
  int32_t max_items;          // packed: room in `items`
  int32_t rows_per_chunk;     // packed: kv rows of one head that fit in L2
  int32_t* next_tile;         // null: tiles are dealt out statically
  int32_t* num_items;         // packed, else null
  int32_t* first_item;        // [batch + 2]
  int2* items;                // [max_items] (sequence, q block)
};

// K/V tiles [begin, end) are seen by some row, [unmasked_begin, unmasked_end) by each row of a warpgroup.
struct VisibleBlocks {
  int32_t begin, end, unmasked_begin, unmasked_end;
};

// A tile as the scheduling thread announces it, in shared memory.
struct Tile {
  int32_t head;     // first query head; negative: there is no more work
  int32_t batch;    // packed: the sequence's number
  int32_t q_begin;  // first query, within the sequence
  Sequence sequence;
  int32_t block_begin, block_end;  // K/V tiles to load
  VisibleBlocks visible[3];        // by warpgroup
};

// Device memory the schedule of a call needs, in bytes.
int64_t schedule_bytes(Problem const& problem, int block_q);

Window window_of(Problem const& problem);

// Fills `schedule` and `num_blocks`, the thread blocks worth launching, and launches what prepares the list. `num_sms`
// is what the kernel's blocks will run on. Returns null or a sentence that says what went wrong.
const char* make_schedule(Problem const& problem, int block_q, int num_sms, void* workspace, cudaStream_t stream,
                          Schedule& schedule, int& num_blocks);

}  // namespace flashmla::sm90
