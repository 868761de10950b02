// What the kernels share that walk tiles of queries past the keys these see, the forward and the backward's dQ of wide
// heads: the producer, and where a tile's rows lie.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>

#include <cute/tensor.hpp>

#include "params.h"
#include "sm90/operands.cuh"
#include "sm90/scheduler.cuh"

namespace flashmla::sm90 {

constexpr int kNumQueryTiles = 2;  // announced at a time, so that K of the next is loaded before its Q has room

// ---- producer -------------------------------------------------------------------------------------------------------

// What the barriers count, beside the bytes TMA writes.
template <class Kernel>
__device__ void init_query_barriers(typename Kernel::SharedStorage& shared) {
  auto init = [](auto& barriers, int arrivals) {
    for (uint64_t& barrier : barriers) ClusterBarrier::init(&barrier, arrivals);
  };
  init(shared.q_full, 1);
  init(shared.q_empty, Kernel::kNumConsumers);
  init(shared.tile_full, 1);
  init(shared.tile_empty, 1 + 4 * Kernel::kNumConsumers);  // the loading thread and each consumer warp
  init(shared.k_full, 1);
  init(shared.v_full, 1);
  init(shared.k_empty, Kernel::kNumConsumers);
  init(shared.v_empty, Kernel::kNumConsumers);
  cutlass::arch::fence_barrier_init();
}

// The scheduling thread.
template <class Kernel, class Arguments>
__device__ void announce_query_tiles(Arguments const& arguments, typename Kernel::SharedStorage& shared) {
  Schedule const& schedule = arguments.schedule;
  Ring<kNumQueryTiles> slot;
  for (int32_t round = 0;; ++round, slot.advance()) {
    ClusterBarrier::wait(&shared.tile_empty[slot.stage], slot.phase ^ 1);
    TilePlace const place = place_of(schedule, next_index(schedule, round));
    write_tile<Kernel::kBlockKV, Kernel::kNumConsumers>(shared.tiles[slot.stage], schedule, arguments.problem,
                                                        arguments.window, place);
    ClusterBarrier::arrive(&shared.tile_full[slot.stage]);
    if (place.head < 0) return;
  }
}

// The loading thread: a tile's Q (with it, where the kernel has it, dO) once, K and V of the keys it sees from the last
// to the first.
template <class Kernel, class Arguments>
__device__ void load_query_tiles(Arguments const& arguments, typename Kernel::SharedStorage& shared) {
  constexpr int kColumns = Kernel::kSwizzleColumns;
  Schedule const& schedule = arguments.schedule;
  int32_t const group = static_cast<int32_t>(arguments.problem.heads_q / arguments.problem.heads_kv);
  Ring<Kernel::kNumStages> ring;
  Ring<Kernel::kNumQStages> q_ring;
  Ring<kNumQueryTiles> slot;
  for (;; q_ring.advance(), slot.advance()) {
    ClusterBarrier::wait(&shared.tile_full[slot.stage], slot.phase);
    Tile const& tile = shared.tiles[slot.stage];
    int32_t const batch = schedule.num_items != nullptr ? 0 : tile.batch;
    int32_t const head_kv = tile.head / group;
    int32_t block = tile.head < 0 ? 0 : tile.block_end - 1;
    int32_t const block_begin = tile.head < 0 ? 1 : tile.block_begin;
    auto load_keys = [&](CUtensorMap const& map, auto& buffers, uint64_t& full, uint64_t& empty, int head_dim) {
      auto& buffer = buffers[ring.stage];
      ClusterBarrier::wait(&empty, ring.phase ^ 1);
      ClusterTransactionBarrier::arrive_and_expect_tx(&full, sizeof(buffer));
      for (int column = 0; column < head_dim; column += kColumns) {
        cute::SM90_TMA_LOAD_4D::copy(&map, &full, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                     buffer + column * Kernel::kBlockKV, column,
                                     tile.sequence.offset_kv + block * Kernel::kBlockKV, head_kv, batch);
      }
    };
    auto load_k = [&] {
      load_keys(arguments.k, shared.k, shared.k_full[ring.stage], shared.k_empty[ring.stage], Kernel::kColumnsQK);
    };
    // K first: there may be room for it before there is for Q.
    if (block >= block_begin) load_k();
    ClusterBarrier::wait(&shared.q_empty[q_ring.stage], q_ring.phase ^ 1);
    uint64_t& q_full = shared.q_full[q_ring.stage];
    if (block < block_begin) {
      ClusterBarrier::arrive(&q_full);
      if (tile.head < 0) return;
      ClusterBarrier::arrive(&shared.tile_empty[slot.stage]);
      continue;
    }
    int32_t const rows = schedule.rows_per_block * schedule.heads_packed;
    ClusterTransactionBarrier::arrive_and_expect_tx(
        &q_full, sizeof(shared.q[0][0]) * rows * (Kernel::kColumnsQK + (Kernel::kHasDOut ? Kernel::kColumnsV : 0)));
    auto load_queries = [&](CUtensorMap const& map, auto& buffer, int head_dim) {
      for (int column = 0; column < head_dim; column += kColumns) {
        cute::SM90_TMA_LOAD_5D::copy(&map, &q_full, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST),
                                     buffer + column * Kernel::kBlockQ, column, 0,
                                     tile.sequence.offset_q + tile.q_begin, tile.head / schedule.heads_packed, batch);
      }
    };
    load_queries(arguments.q, shared.q[q_ring.stage], Kernel::kColumnsQK);
    if constexpr (Kernel::kHasDOut) load_queries(arguments.dout, shared.dout[q_ring.stage], Kernel::kColumnsV);
    for (bool is_first = true; block >= block_begin; --block, is_first = false) {
      if (!is_first) load_k();
      load_keys(arguments.v, shared.v, shared.v_full[ring.stage], shared.v_empty[ring.stage], Kernel::kColumnsV);
      ring.advance();
    }
    ClusterBarrier::arrive(&shared.tile_empty[slot.stage]);
  }
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// A row of the tile as (query, head): packed, `heads_packed` rows share a query.
struct QueryRow {
  int32_t query, head;
  bool is_valid;
};

__device__ inline QueryRow query_row(Schedule const& schedule, Tile const& tile, int32_t row) {
  int32_t const packed = schedule.heads_packed;
  int32_t const query = packed == 1 ? row : row / packed;
  return {
      tile.q_begin + query, tile.head + row - query * packed,
      query < schedule.rows_per_block && tile.q_begin + query >= 0 && tile.q_begin + query < tile.sequence.seqlen_q};
}

template <class Element>
__device__ Element* row_of(TensorView const& view, Tile const& tile, QueryRow const& row) {
  return static_cast<Element*>(view.data) + tile.batch * view.stride_batch + row.head * view.stride_heads +
         (tile.sequence.offset_q + int64_t{row.query}) * view.stride_seqlen;
}

}  // namespace flashmla::sm90
