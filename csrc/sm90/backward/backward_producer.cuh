// What the backward kernels by keys load, and in which order: tiles of keys, the steps over their queries, the
// barriers, and the threads of the producer warpgroup, one of which adds dQ to its sums in memory.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/grid_dependency_control.h>

#include <cute/tensor.hpp>

#include "params.h"
#include "sm90/hopper/operands.cuh"
#include "sm90/hopper/ptx.cuh"
#include "sm90/hopper/sequence_rows.h"
#include "sm90/scheduling/scheduler.cuh"
#include "sm90/tiles.h"

namespace flashmla::sm90 {

// Query rows in the workspace: of each head, the sequences behind each other, each from a multiple of block_q on.
struct BackwardRows {
  int64_t per_head;       // a multiple of block_q
  float* lse_log2;        // [heads_q, per_head]; +inf where a row sees no key, so that P is 0
  float* delta;           // [heads_q, per_head]
  float* dq;              // [heads_q, per_head / block_q, fragments of block_q x head_dim_qk], fp32; null: not wanted
  int32_t* dq_semaphore;  // [heads_q, per_head / block_q], how many tiles have added their part of dQ; null: any order
  int32_t* is_large;      // [heads_q, per_head / block_q], whether some lse is so large that P has to be cut to 1
};

// From here on neighbouring numbers are 2 apart in base 2; four of them cover the roundings on the way from a row's
// maximum to what the backward reads.
constexpr float kLargeLse = 16777216.0f;        // 2^24
constexpr float kLseRounding = 4.76837158e-7f;  // 2^-21

__device__ inline bool is_large_lse(float lse_log2) {
  return fabsf(lse_log2) >= kLargeLse && fabsf(lse_log2) < INFINITY;
}

// Where lse and delta of a row lie among those of 16: as the threads of a quad hold columns of scores, four beside each
// other for each of them.
__device__ inline int32_t place_of_row(int32_t row) {
  return row / 16 * 16 + row % 8 / 2 * 4 + row % 16 / 8 * 2 + row % 2;
}

// First workspace row of sequence `number`, before the head's offset.
__device__ inline int32_t first_workspace_row(Problem const& problem, int32_t number, int32_t offset_q, int block_q) {
  if (problem.cu_seqlens_q != nullptr) return (offset_q / block_q + number) * block_q;
  return number * ((static_cast<int32_t>(problem.seqlen_q) + block_q - 1) / block_q * block_q);
}

struct BackwardArguments {
  CUtensorMap q, dout;  // dims (head_dim, row, end, heads_q, outer) of sequence_rows.h
  CUtensorMap k, v;     // dims (head_dim, row, end, heads_kv, outer)
  TensorView dk, dv;    // data null: not wanted
  BackwardRows rows;
  Problem problem;
  Window window;
  Schedule schedule;
  int32_t num_splits;  // work tiles that share a group's query heads; their dK and dV are summed afterwards
  float* parts;        // [tile, num_splits, fragments of dK and dV of a tile], or null if num_splits is 1
};

// Key rows [kv_begin, ...) of one kv head, and the queries that see some of them.
struct BackwardWorkTile {
  int32_t head_kv;  // negative: there is no more work
  int32_t batch;    // packed: the sequence's number
  int32_t split;
  int32_t kv_begin;  // first key, within the sequence
  Sequence sequence;
  RowCoordinates queries, keys;   // of the sequence's first ones
  int32_t first_visible_query;    // queries before it see no key of the sequence
  int32_t first_head, num_heads;  // query heads of this split
  int32_t q_block_begin, q_block_end;
  int32_t first_row;  // of the sequence in the workspace
  uint32_t kv_phase;  // of the barriers of K and V

  __device__ int32_t num_steps() const { return (q_block_end - q_block_begin) * num_heads; }
};

// One block of queries of one head. Head follows head, so that tiles of one kv head meet in what they read. But if
// tiles add to dQ in turns, those of later keys first, the heads of a block follow each other: then each meets a block
// in the order in which they begin (docs/kernels.md, Deterministic), and what they read is spread wider.
struct BackwardStep {
  int32_t head, q_block;
  __device__ explicit BackwardStep(BackwardWorkTile const& tile) : head(tile.first_head), q_block(tile.q_block_begin) {}
  __device__ void advance(BackwardWorkTile const& tile) {
    if (++q_block == tile.q_block_end) q_block = tile.q_block_begin, ++head;
  }
  __device__ void advance(BackwardWorkTile const& tile, BackwardRows const& rows) {
    if (rows.dq_semaphore == nullptr) {
      advance(tile);
    } else if (++head == tile.first_head + tile.num_heads) {
      head = tile.first_head, ++q_block;
    }
  }
};

// A q_block of Q or dO whose first rows a loading thread clears before the consumers see it; used by that thread alone.
struct BlockToClear {
  uint64_t arrived;
  uint32_t phase;  // in shared memory, since the thread has no register for it
};

constexpr int kNumBackwardTiles = 2;  // announced at a time, so that the next is loaded while dK and dV are written

// Writes `tile`, which no one may be reading.
__device__ inline void write_backward_work_tile(BackwardWorkTile& tile, BackwardArguments const& arguments,
                                                TilePlace place, int block_q, int block_kv, uint32_t kv_phase) {
  Problem const& problem = arguments.problem;
  tile.head_kv = place.head < 0 ? -1 : place.head / arguments.num_splits;
  if (place.head < 0) return;
  tile.split = place.head % arguments.num_splits;
  tile.batch = place.batch;
  tile.kv_begin = place.row_block * block_kv;
  Sequence const sequence = sequence_at(problem, place.batch, Side::kKeys);
  tile.sequence = sequence;
  tile.num_heads = static_cast<int32_t>(problem.heads_q / problem.heads_kv) / arguments.num_splits;
  tile.first_head = place.head * tile.num_heads;
  tile.first_row = first_workspace_row(problem, place.batch, sequence.offset_q, block_q);
  VisibleQueries const queries =
      visible_queries(arguments.window, sequence, tile.kv_begin, min(tile.kv_begin + block_kv, sequence.seqlen_kv) - 1);
  bool const is_packed = problem.cu_seqlens_q != nullptr;
  tile.queries = row_coordinates(is_packed, sequence.offset_q, sequence.seqlen_q, place.batch);
  tile.keys = row_coordinates(is_packed, sequence.offset_kv, sequence.seqlen_kv, place.batch);
  tile.first_visible_query =
      arguments.window.right >= 0 ? sequence.seqlen_q - sequence.seqlen_kv - arguments.window.right : 0;
  tile.q_block_begin = queries.begin / block_q;
  tile.q_block_end = queries.begin < queries.end ? (queries.end + block_q - 1) / block_q : tile.q_block_begin;
  tile.kv_phase = kv_phase;
}

// Sets how many arrivals each barrier of the backward kernels by keys counts, besides the bytes that TMA writes.
template <class Kernel>
__device__ void init_backward_barriers(typename Kernel::SharedStorage& shared) {
  // Consumers arrive by warps, each when it has done its own reading.
  constexpr int kNumWarps = 2 * kWarpgroupThreads / kWarpThreads, kNumLoaders = Kernel::kNumLoaders,
                kNumReducers = Kernel::kSumsDQ ? 1 : 0;
  auto init = [](auto& barriers, int arrivals) {
    for (uint64_t& barrier : barriers) ClusterBarrier::init(&barrier, arrivals);
  };
  ClusterBarrier::init(&shared.kv_full, kNumLoaders);
  ClusterBarrier::init(&shared.kv_empty, kNumWarps);
  init(shared.tile_full, 1);
  init(shared.tile_empty, kNumLoaders + kNumReducers + kNumWarps);
  init(shared.q_full, 1);
  init(shared.q_empty, kNumWarps);
  if constexpr (Kernel::kNumCtas == 1) {
    init(shared.dout_full, 1);
    init(shared.dout_empty, kNumWarps);
  } else {
    init(shared.scores_full, 1);
    init(shared.scores_empty, kNumWarps);
  }
  ClusterBarrier::init(&shared.work_wanted, kNumLoaders);
  for (BlockToClear& block : shared.to_clear) {
    ClusterBarrier::init(&block.arrived, 1);
    block.phase = 0;
  }
  if constexpr (Kernel::kSumsDQ) {
    init(shared.dq_empty, 1);
    init(shared.dq_full, kNumWarps);
  }
  cutlass::arch::fence_barrier_init();
}

// The scheduling thread.
template <class Kernel>
__device__ void publish_key_work_tiles(BackwardArguments const& arguments, typename Kernel::SharedStorage& shared) {
  Ring<kNumBackwardTiles> slot;
  uint32_t kv_phase = 0;
  open_counter(arguments.schedule);
  for (int32_t round = 0;; ++round, slot.advance()) {
    // Takes the next tile late: a CTA that took its next long tile early would be the last to finish.
    ClusterBarrier::wait(&shared.work_wanted, (round + 1) % 2);
    TilePlace const place = place_of(arguments.schedule, next_index<Kernel::kNumCtas>(arguments.schedule, round));
    ClusterBarrier::wait(&shared.tile_empty[slot.stage], slot.phase ^ 1);
    BackwardWorkTile& tile = shared.tiles[slot.stage];
    write_backward_work_tile(tile, arguments, place, Kernel::kBlockQ, Kernel::kBlockKV, kv_phase);
    ClusterBarrier::arrive(&shared.tile_full[slot.stage]);
    if (place.head < 0) return;
    if (tile.num_steps() > 0) kv_phase ^= 1;
  }
}

// A loading thread: one of K and V of every tile, and of every step one of Q with lse and dO with delta. Two threads
// share that, because one has few registers.
template <class Kernel, int kHeadDim, int kColumnsKV, class Element, int kSizeKV, int kSizeQ>
__device__ void load_backward_tiles(BackwardArguments const& arguments, typename Kernel::SharedStorage& shared,
                                    CUtensorMap const& map_kv, CUtensorMap const& map_q, float const* statistics,
                                    Element (&kv)[kSizeKV], Element (&q)[Kernel::kNumStages][kSizeQ],
                                    float (&shared_statistics)[Kernel::kNumStages][Kernel::kBlockQ],
                                    uint64_t (&full)[Kernel::kNumStages], uint64_t (&empty)[Kernel::kNumStages],
                                    BlockToClear& to_clear, int32_t const* is_large) {
  constexpr int kBlockQ = Kernel::kBlockQ, kColumns = Kernel::kSwizzleColumns;
  Ring<Kernel::kNumStages> ring;
  Ring<kNumBackwardTiles> slot;
  auto load = [](CUtensorMap const& map, uint64_t& barrier, Element* target, int columns, int rows,
                 RowCoordinates const& from, int32_t row, int32_t head) {
    CUTE_NO_UNROLL
    for (int column = 0; column < kHeadDim; column += columns) {
      cute::SM90_TMA_LOAD_5D::copy(&map, &barrier, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                   target + column * rows, column, from.row + row, from.end, head, from.outer);
    }
  };
  bool is_first = true;
  for (;; slot.advance()) {
    ClusterBarrier::wait(&shared.tile_full[slot.stage], slot.phase);
    BackwardWorkTile const& tile = shared.tiles[slot.stage];
    if (tile.head_kv < 0) return;
    int32_t steps = tile.num_steps();
    if (steps > 0) {
      ClusterBarrier::wait(&shared.kv_empty, tile.kv_phase ^ 1);
      ClusterTransactionBarrier::arrive_and_expect_tx(&shared.kv_full, sizeof(kv));
      load(map_kv, shared.kv_full, kv, kColumnsKV, Kernel::kBlockKV, tile.keys, tile.kv_begin, tile.head_kv);
      if (is_first) cutlass::arch::wait_on_dependent_grids();  // the statistics are the preparing kernel's
      is_first = false;
    }
    BackwardStep step(tile);
    CUTE_NO_UNROLL
    for (; steps > 0; --steps, step.advance(tile, arguments.rows), ring.advance()) {
      int const stage = ring.stage;
      ClusterBarrier::wait(&empty[stage], ring.phase ^ 1);
      int32_t const first_query = step.q_block * kBlockQ;
      int64_t const row = step.head * arguments.rows.per_head + tile.first_row + first_query;
      if (is_large != nullptr) {
        shared.is_large[stage] = is_large[row / kBlockQ];
        if constexpr (Kernel::kSumsDQ) shared.q_block[stage] = step.q_block;
      }
      if (first_query >= tile.first_visible_query) {
        ClusterTransactionBarrier::arrive_and_expect_tx(&full[stage], sizeof(q[0]) + sizeof(shared_statistics[0]));
        load(map_q, full[stage], q[stage], kColumns, kBlockQ, tile.queries, first_query, step.head);
      } else {
        // Rows that see no key stand before some that do: their P is 0, but not 0 times what they hold, if that is NaN.
        ClusterTransactionBarrier::arrive_and_expect_tx(&to_clear.arrived, sizeof(q[0]));
        load(map_q, to_clear.arrived, q[stage], kColumns, kBlockQ, tile.queries, first_query, step.head);
        ClusterBarrier::wait(&to_clear.arrived, to_clear.phase);
        to_clear.phase ^= 1;
        int32_t const vectors = (tile.first_visible_query - first_query) * (kColumns / 8);
        CUTE_NO_UNROLL
        for (int column = 0; column < kHeadDim; column += kColumns) {
          CUTE_NO_UNROLL
          for (int32_t i = 0; i < vectors; ++i) {
            reinterpret_cast<uint4*>(q[stage] + column * kBlockQ)[i] = uint4{0, 0, 0, 0};
          }
        }
        cutlass::arch::fence_view_async_shared();
        ClusterTransactionBarrier::arrive_and_expect_tx(&full[stage], sizeof(shared_statistics[0]));
      }
      cute::SM90_BULK_COPY_G2S::copy(statistics + row, &full[stage], shared_statistics[stage],
                                     sizeof(shared_statistics[0]));
    }
    ClusterBarrier::arrive(&shared.work_wanted);
    ClusterBarrier::arrive(&shared.tile_empty[slot.stage]);
  }
}

// How many tiles add their part of dQ of a block of queries before this one: those of later keys that some of them see.
template <int kBlockQ>
__device__ int32_t dq_parts_before(BackwardArguments const& arguments, BackwardWorkTile const& tile, int32_t q_block) {
  int32_t const block_kv = arguments.schedule.rows_per_block;
  int32_t last = tile.sequence.seqlen_kv - 1;
  if (arguments.window.right >= 0) {
    int32_t const shift = tile.sequence.seqlen_kv - tile.sequence.seqlen_q;
    last = min(last, min((q_block + 1) * kBlockQ, tile.sequence.seqlen_q) - 1 + shift + arguments.window.right);
  }
  return last / block_kv - tile.kv_begin / block_kv;
}

// Which block of the workspace a step's queries are.
template <int kBlockQ>
__device__ int64_t workspace_block_of(BackwardRows const& rows, BackwardWorkTile const& tile,
                                      BackwardStep const& step) {
  return (step.head * rows.per_head + tile.first_row) / kBlockQ + step.q_block;
}

// The thread that has the copy engine add the parts of dQ that consumers have staged in shared memory to the sums
// (kStagesDQ). If dQ must be the same bits every time, it also keeps the order: a semaphore for each q_block admits the
// parts in the order of falling keys. That is the order of the schedule, in which each CTA takes its tiles, and all
// CTAs run: the first tile that is not done waits for none. Waiting for other CTAs, and the way of a part to memory
// before the next may go on, take this thread's time and not the consumers'.
template <class Kernel>
__device__ void reduce_dq(BackwardArguments const& arguments, typename Kernel::SharedStorage& shared) {
  BackwardRows const& rows = arguments.rows;
  bool const has_turns = rows.dq_semaphore != nullptr;
  Ring<Kernel::kNumStages> ring;
  Ring<kNumBackwardTiles> slot;
  cutlass::arch::wait_on_dependent_grids();  // sums and turns are zero now
  static_assert(Kernel::kNumStages == 2);
  if constexpr (Kernel::kStagesDQ) ClusterBarrier::arrive(&shared.dq_empty[ring.stage]);
  for (;; slot.advance()) {
    ClusterBarrier::wait(&shared.tile_full[slot.stage], slot.phase);
    BackwardWorkTile const& tile = shared.tiles[slot.stage];
    if (tile.head_kv < 0) return;
    BackwardStep step(tile);
    CUTE_NO_UNROLL
    for (int32_t steps = Kernel::kStagesDQ || has_turns ? tile.num_steps() : 0; steps > 0;
         --steps, step.advance(tile, rows), ring.advance()) {
      int64_t const block = workspace_block_of<Kernel::kBlockQ>(rows, tile, step);
      auto wait_for_turn = [&] {
        int32_t const expected = dq_parts_before<Kernel::kBlockQ>(arguments, tile, step.q_block);
        while (ptx::load_acquire(rows.dq_semaphore + block) < expected) {
        }
      };
      if constexpr (Kernel::kStagesDQ) {
        constexpr int kPart = Kernel::kPartDQ;
        ClusterBarrier::wait(&shared.dq_full[ring.stage], ring.phase);
        cutlass::arch::fence_view_async_shared();  // from what consumers wrote to what the copy engine reads
        if (has_turns) wait_for_turn();
        CUTE_NO_UNROLL
        for (int warpgroup = 0; warpgroup < 2 && rows.dq != nullptr; ++warpgroup) {
          ptx::bulk_reduce_add(rows.dq + (2 * block + warpgroup) * kPart, shared.dq[warpgroup], kPart * sizeof(float));
        }
        ptx::bulk_commit();
        ptx::bulk_wait_read();
        // The next part may be written there, while this one is on its way to memory.
        ClusterBarrier::arrive(&shared.dq_empty[ring.stage ^ 1]);
        if (has_turns) ptx::bulk_wait();
      } else {  // consumers add from registers
        wait_for_turn();
        ClusterBarrier::arrive(&shared.dq_empty[ring.stage]);
        ClusterBarrier::wait(&shared.dq_full[ring.stage], ring.phase);
      }
      if (has_turns) ptx::reduce_release_increment(rows.dq_semaphore + block);
    }
    if constexpr (Kernel::kStagesDQ) ptx::bulk_wait();
    ClusterBarrier::arrive(&shared.tile_empty[slot.stage]);
  }
}

// The producer warpgroup: one thread of each warp works.
template <class Kernel, int kHeadDimQK, int kHeadDimV>
__device__ void produce_backward_tiles(BackwardArguments const& arguments, typename Kernel::SharedStorage& shared) {
  if constexpr (Kernel::kNumCtas == 2) {
    Kernel::produce(arguments, shared);
  } else if (threadIdx.x == 0) {
    load_backward_tiles<Kernel, kHeadDimQK, Kernel::Tiles::kSwizzleColumnsK>(
        arguments, shared, arguments.k, arguments.q, arguments.rows.lse_log2, shared.k, shared.q, shared.lse_log2,
        shared.q_full, shared.q_empty, shared.to_clear[0], arguments.rows.is_large);
  } else if (threadIdx.x == 32) {
    publish_key_work_tiles<Kernel>(arguments, shared);
  } else if (threadIdx.x == 64) {
    load_backward_tiles<Kernel, kHeadDimV, Kernel::kSwizzleColumns>(
        arguments, shared, arguments.v, arguments.dout, arguments.rows.delta, shared.v, shared.dout, shared.delta,
        shared.dout_full, shared.dout_empty, shared.to_clear[1], nullptr);
  } else if (threadIdx.x == 96) {
    if constexpr (Kernel::kSumsDQ) reduce_dq<Kernel>(arguments, shared);
  }
}

}  // namespace flashmla::sm90
