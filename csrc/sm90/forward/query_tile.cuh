// What the kernels share that walk tiles of queries past the keys these see, the forward and the backward's dQ of wide
// heads: the producer, and where a tile's rows lie.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>

#include <cute/tensor.hpp>

#include "params.h"
#include "sm90/hopper/cta_pair.cuh"
#include "sm90/hopper/operands.cuh"
#include "sm90/hopper/sequence_rows.h"
#include "sm90/scheduling/scheduler.cuh"

namespace flashmla::sm90 {

constexpr int kNumQueryTiles = 2;  // announced at a time, so that the next is loaded while this one is computed

// ---- producer -------------------------------------------------------------------------------------------------------

// What the barriers count, beside the bytes TMA writes.
template <class Kernel>
__device__ void init_query_barriers(typename Kernel::SharedStorage& shared) {
  auto init = [](auto& barriers, int arrivals) {
    for (uint64_t& barrier : barriers) ClusterBarrier::init(&barrier, arrivals);
  };
  constexpr int kNumLoaders = 3;  // threads, of Q, K and V; of the consumers each warp arrives
  init(shared.q_full, 1);
  init(shared.q_empty, Kernel::kNumConsumers / Kernel::kQueryParts);
  init(shared.tile_full, 1);
  init(shared.tile_empty, kNumLoaders + kWarpgroupThreads / kWarpThreads * Kernel::kNumConsumers);
  init(shared.k_full, 1);
  init(shared.v_full, 1);
  init(shared.k_empty, Kernel::kNumConsumers);
  init(shared.v_empty, Kernel::kNumConsumers);
  cutlass::arch::fence_barrier_init();
}

// The scheduling thread.
template <class Kernel, class Arguments>
__device__ void publish_query_work_tiles(Arguments const& arguments, typename Kernel::SharedStorage& shared) {
  Schedule const& schedule = arguments.schedule;
  Ring<kNumQueryTiles> slot;
  open_counter(schedule);
  for (int32_t round = 0;; ++round, slot.advance()) {
    ClusterBarrier::wait(&shared.tile_empty[slot.stage], slot.phase ^ 1);
    TilePlace const place = place_of(schedule, next_index<Kernel::kNumCtas>(schedule, round));
    write_work_tile<Kernel::kBlockKV, Kernel::kNumConsumers>(shared.tiles[slot.stage], schedule, arguments.problem,
                                                             arguments.window, place);
    ClusterBarrier::arrive(&shared.tile_full[slot.stage]);
    if (place.head < 0) return;
  }
}

// Loads a tile's Q (with it, where the kernel has it, dO) as soon as a buffer is free: K and V of the tile before may
// still be on their way. Two CTAs have a part of the tile's queries each (kQueryParts), or all of them and a part of
// the columns.
template <class Kernel, class Arguments>
__device__ void load_queries(Arguments const& arguments, typename Kernel::SharedStorage& shared) {
  Schedule const& schedule = arguments.schedule;
  constexpr int kParts = Kernel::kQueryParts;
  int32_t const queries = schedule.rows_per_block / kParts, rows = queries * schedule.heads_packed;
  int32_t const rank = cta_rank<Kernel::kNumCtas>();
  Ring<Kernel::kNumQStages> q_ring;
  Ring<kNumQueryTiles> slot;
  for (;; q_ring.advance(), slot.advance()) {
    ClusterBarrier::wait(&shared.tile_full[slot.stage], slot.phase);
    WorkTile const& tile = shared.tiles[slot.stage];
    ClusterBarrier::wait(&shared.q_empty[q_ring.stage], q_ring.phase ^ 1);
    uint64_t& q_full = shared.q_full[q_ring.stage];
    if (tile.head < 0 || tile.kv_block_begin >= tile.kv_block_end) {
      ClusterBarrier::arrive(&q_full);
      if (tile.head < 0) return;
    } else {
      int32_t const batch = schedule.num_items != nullptr ? 0 : tile.batch;
      ClusterTransactionBarrier::arrive_and_expect_tx(
          &q_full, sizeof(shared.q[0][0]) * rows * (Kernel::kColumnsQK + (Kernel::kHasDOut ? Kernel::kColumnsV : 0)));
      auto load = [&](CUtensorMap const& map, auto& buffer, int head_dim) {
        for (int column = 0; column < head_dim; column += Kernel::kSwizzleColumns) {
          cute::SM90_TMA_LOAD_5D::copy(&map, &q_full, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST),
                                       buffer + column * (Kernel::kBlockQ / kParts),
                                       (kParts == 1 ? rank * head_dim : 0) + column, 0,
                                       tile.sequence.offset_q + tile.q_begin + (kParts == 1 ? 0 : rank * queries),
                                       tile.head / schedule.heads_packed, batch);
        }
      };
      load(arguments.q, shared.q[q_ring.stage], Kernel::kColumnsQK);
      if constexpr (Kernel::kHasDOut) load(arguments.dout, shared.dout[q_ring.stage], Kernel::kColumnsV);
    }
    ClusterBarrier::arrive(&shared.tile_empty[slot.stage]);
  }
}

// Loads K, or V, of the keys that a tile sees, from the last to the first. K is needed a step before V, and released
// one before: a thread for both would hold K back.
template <class Kernel, class Arguments, class Element, int kSize>
__device__ void load_keys(Arguments const& arguments, typename Kernel::SharedStorage& shared, CUtensorMap const& map,
                          int head_dim, Element (&buffers)[Kernel::kNumStages][kSize],
                          uint64_t (&full)[Kernel::kNumStages], uint64_t (&empty)[Kernel::kNumStages]) {
  Schedule const& schedule = arguments.schedule;
  int32_t const group = static_cast<int32_t>(arguments.problem.heads_q / arguments.problem.heads_kv);
  int32_t const first_column = cta_rank<Kernel::kNumCtas>() * head_dim;
  Ring<Kernel::kNumStages> ring;
  Ring<kNumQueryTiles> slot;
  for (;; slot.advance()) {
    ClusterBarrier::wait(&shared.tile_full[slot.stage], slot.phase);
    WorkTile const& tile = shared.tiles[slot.stage];
    if (tile.head < 0) return;
    RowCoordinates const rows =
        row_coordinates(schedule.num_items != nullptr, tile.sequence.offset_kv, tile.sequence.seqlen_kv, tile.batch);
    int32_t const head_kv = tile.head / group;
    for (int32_t kv_block = tile.kv_block_end - 1; kv_block >= tile.kv_block_begin; --kv_block, ring.advance()) {
      int const stage = ring.stage;
      ClusterBarrier::wait(&empty[stage], ring.phase ^ 1);
      ClusterTransactionBarrier::arrive_and_expect_tx(&full[stage], sizeof(buffers[stage]));
      for (int column = 0; column < head_dim; column += Kernel::kSwizzleColumns) {
        cute::SM90_TMA_LOAD_5D::copy(&map, &full[stage], static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                     buffers[stage] + column * Kernel::kBlockKV, first_column + column,
                                     rows.row + kv_block * Kernel::kBlockKV, rows.end, head_kv, rows.outer);
      }
    }
    ClusterBarrier::arrive(&shared.tile_empty[slot.stage]);
  }
}

// Loads K for two CTAs of which each needs all of it: in chunks of columns, of each a half to both CTAs (multicast).
template <class Kernel, class Arguments>
__device__ void load_key_chunks(Arguments const& arguments, typename Kernel::SharedStorage& shared) {
  Schedule const& schedule = arguments.schedule;
  int32_t const group = static_cast<int32_t>(arguments.problem.heads_q / arguments.problem.heads_kv);
  int32_t const rank = cta_rank<Kernel::kNumCtas>();
  Ring<Kernel::kNumKStages> ring;
  Ring<kNumQueryTiles> slot;
  for (;; slot.advance()) {
    ClusterBarrier::wait(&shared.tile_full[slot.stage], slot.phase);
    WorkTile const& tile = shared.tiles[slot.stage];
    if (tile.head < 0) return;
    RowCoordinates const rows =
        row_coordinates(schedule.num_items != nullptr, tile.sequence.offset_kv, tile.sequence.seqlen_kv, tile.batch);
    int32_t const head_kv = tile.head / group;
    for (int32_t kv_block = tile.kv_block_end - 1; kv_block >= tile.kv_block_begin; --kv_block) {
      CUTE_NO_UNROLL
      for (int chunk = 0; chunk < Kernel::kChunks; ++chunk, ring.advance()) {
        int const stage = ring.stage;
        ClusterBarrier::wait(&shared.k_empty[stage], ring.phase ^ 1);
        ClusterTransactionBarrier::arrive_and_expect_tx(&shared.k_full[stage], sizeof(shared.k[stage]));
        cute::SM90_TMA_LOAD_MULTICAST_5D::copy(&arguments.k, &shared.k_full[stage], uint16_t{3},
                                               static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                               shared.k[stage] + rank * (Kernel::kSwizzleColumns * Kernel::kBlockKV),
                                               chunk * Kernel::kChunkColumns + rank * Kernel::kSwizzleColumns,
                                               rows.row + kv_block * Kernel::kBlockKV, rows.end, head_kv, rows.outer);
      }
    }
    ClusterBarrier::arrive(&shared.tile_empty[slot.stage]);
  }
}

// The producer warpgroup: one thread of each warp works.
template <class Kernel, class Arguments>
__device__ void produce_query_tiles(Arguments const& arguments, typename Kernel::SharedStorage& shared) {
  if (threadIdx.x == 0) {
    load_keys<Kernel>(arguments, shared, arguments.k, Kernel::kColumnsQK, shared.k, shared.k_full, shared.k_empty);
  } else if (threadIdx.x == 32) {
    publish_query_work_tiles<Kernel>(arguments, shared);
  } else if (threadIdx.x == 64) {
    load_keys<Kernel>(arguments, shared, arguments.v, Kernel::kColumnsV, shared.v, shared.v_full, shared.v_empty);
  } else if (threadIdx.x == 96) {
    load_queries<Kernel>(arguments, shared);
  }
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// A row of the tile as (query, head): packed, `heads_packed` rows share a query.
struct QueryRow {
  int32_t query, head;
  bool is_valid;
};

__device__ inline QueryRow query_row(Schedule const& schedule, WorkTile const& tile, int32_t row) {
  int32_t const packed = schedule.heads_packed;
  int32_t const query = packed == 1 ? row : row / packed;
  return {
      tile.q_begin + query, tile.head + row - query * packed,
      query < schedule.rows_per_block && tile.q_begin + query >= 0 && tile.q_begin + query < tile.sequence.seqlen_q};
}

template <class Element>
__device__ Element* row_pointer(TensorView const& view, WorkTile const& tile, QueryRow const& row) {
  return static_cast<Element*>(view.data) + tile.batch * view.stride_batch + row.head * view.stride_heads +
         (tile.sequence.offset_q + int64_t{row.query}) * view.stride_seqlen;
}

}  // namespace flashmla::sm90
