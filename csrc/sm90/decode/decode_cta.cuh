// What the decode kernels' CTAs have in common: how one begins, the warp that loads, and how a cluster adds up.
//
// A kernel is a struct with Element, Tiles, kHeadDimQK, kHeadDimV, kBlockKV, kNumStages, kNumQStages (0: its consumers
// read Q), kRows (the rows of its products), SharedStorage, and consume; or, of caches of e4m3, load_block and a run of
// its own.
//
// A kernel begins while the one before it in the stream ends: barriers, descriptors and, if the lengths are known to
// the host, the walk are ready by then.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/grid_dependency_control.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/tensor.hpp>

#include "params.h"
#include "sm90/decode/decode_rows.cuh"
#include "sm90/decode/decode_schedule.cuh"
#include "sm90/decode/parts.cuh"
#include "sm90/hopper/operands.cuh"
#include "sm90/hopper/ptx.cuh"
#include "sm90/tiles.h"

namespace flashmla::sm90 {

constexpr int kConsumerBarrier = 1;        // of the consumer warpgroup's threads
constexpr int kSystemBytes = 1024;         // of shared memory, kept for each CTA
constexpr int kDecodeSwizzleColumns = 64;  // of a chunk of Q, K or V in shared memory

// What a CTA leaves for its cluster, where K has been.
template <int kRows, int kHeadDimV>
struct ClusterPart {
  float2 sums[kRows];
  float out[kRows][kHeadDimV + 8];  // 8: rows of a warp begin in different banks
};

// Brings to L2 what finding the work and the first pages reads: two of the call's few waits for memory, one behind the
// other. Nothing is known of it yet, so kernels that still write it do no harm. By the whole grid, of the table at most
// a line a thread.
__device__ inline void prefetch_lengths(DecodeArguments const& arguments) {
  DecodeParams const& params = arguments.params;
  constexpr int kLine = 128 / static_cast<int>(sizeof(int32_t));
  auto prefetch = [&](int32_t const* x, int64_t line, int64_t count) {
    if (x != nullptr && line * kLine < count) ptx::prefetch_to_l2(x + line * kLine);
  };
  prefetch(params.cache_seqlens, threadIdx.x, params.problem.batch);
  prefetch(params.kv_start, threadIdx.x, params.problem.batch);
  int const columns = arguments.pages.div(static_cast<int>(params.problem.seqlen_kv));
  prefetch(params.block_table, blockIdx.x + int64_t{gridDim.x} * threadIdx.x,
           (params.problem.batch - 1) * params.stride_block_table + columns);
}

// From here on this kernel may read what those before it have written. To find the work takes long, and needs no more
// than lengths.
__device__ inline DecodeWalk begin_walk(DecodeArguments const& arguments) {
  bool const reads_lengths = !has_equal_lengths(arguments.params);
  DecodeWalk walk(arguments);
  if (reads_lengths) {
    prefetch_lengths(arguments);
    ptx::wait_on_dependent_grids();
  }
  walk.begin();
  if (!reads_lengths) ptx::wait_on_dependent_grids();
  cutlass::arch::launch_dependent_grids();  // combine_kernel, or the next call's, may set up
  return walk;
}

// The warp that loads.
template <class Kernel>
__device__ void load_tiles(DecodeArguments const& arguments, typename Kernel::SharedStorage& shared) {
  using Element = typename Kernel::Element;
  constexpr int kBlockKV = Kernel::kBlockKV;
  int32_t const lane = threadIdx.x % kWarpThreads;
  // K and V are read once, unless several tiles share a kv head.
  uint64_t const hint = static_cast<uint64_t>(arguments.tiles_per_head > 1 ? cute::TMA::CacheHintSm90::EVICT_NORMAL
                                                                           : cute::TMA::CacheHintSm90::EVICT_FIRST);
  Ring<Kernel::kNumStages> ring;
  [[maybe_unused]] Ring<Kernel::kNumQStages> ring_q;
  [[maybe_unused]] bool is_first = true;
  for (DecodeWalk walk = begin_walk(arguments); walk.find(); walk.next_tile(), is_first = false) {
    int32_t const head_kv = walk.tile / arguments.tiles_per_head;
    BoxPlaces<kBlockKV> places(arguments, walk);
    if constexpr (Kernel::kNumQStages > 0) {
      uint64_t& full = shared.q_full[ring_q.stage];
      ClusterBarrier::wait(&shared.q_empty[ring_q.stage], ring_q.phase ^ 1);
      if (lane == 0) {
        ClusterTransactionBarrier::arrive_and_expect_tx(
            &full, arguments.num_rows * Kernel::kHeadDimQK * static_cast<int32_t>(sizeof(Element)));
        for (int column = 0; column < Kernel::kHeadDimQK; column += kDecodeSwizzleColumns) {
          cute::SM90_TMA_LOAD_4D::copy(&arguments.q, &full, hint, shared.q[ring_q.stage] + column * Kernel::kRows,
                                       column, head_kv * arguments.group, 0, walk.batch);
        }
      }
      __syncwarp();
      ring_q.advance();
    } else if (!is_first) {
      // The consumers are some tiles behind: Q will be near when they ask for it.
      prefetch_queries<Element, Kernel::Tiles::kRows>(arguments, walk.batch, walk.tile);
    }
    for (int32_t kv_block = walk.blocks.begin; kv_block < walk.blocks.end; ++kv_block, ring.advance()) {
      bool const is_mine = places.turn_to(kv_block);
      int const num_boxes = __popc(__ballot_sync(0xffffffff, is_mine));
      int const stage = ring.stage;
      if constexpr (Kernel::kReadsE4m3) {
        ClusterBarrier::wait(&shared.empty[stage], ring.phase ^ 1);
        Kernel::load_block(arguments, shared, stage, places, kv_block, head_kv, is_mine, num_boxes, hint);
      } else {
        auto copy = [&](CUtensorMap const& map, auto& buffer, uint64_t& full, uint64_t& empty, int columns) {
          ClusterBarrier::wait(&empty, ring.phase ^ 1);
          if (lane == 0) {
            ClusterTransactionBarrier::arrive_and_expect_tx(
                &full, num_boxes * arguments.rows_per_box * columns * static_cast<int32_t>(sizeof(Element)));
          }
          __syncwarp();
          if (!is_mine) return;
          for (int column = 0; column < columns; column += kDecodeSwizzleColumns) {
            cute::SM90_TMA_LOAD_4D::copy(&map, &full, hint,
                                         buffer + column * kBlockKV + places.first_row() * kDecodeSwizzleColumns,
                                         column, places.here.row, head_kv, places.here.page);
          }
        };
        copy(arguments.k, shared.k[stage], shared.k_full[stage], shared.k_empty[stage], Kernel::kHeadDimQK);
        copy(arguments.v, shared.v[stage], shared.v_full[stage], shared.v_empty[stage], Kernel::kHeadDimV);
      }
    }
  }
}

// Each CTA of the cluster leaves its part of the tile, by store(part), where K has been, and adds up some columns of
// all parts. By the consumer warpgroup.
template <class Kernel, class Store>
__device__ void add_parts_of_cluster(DecodeArguments const& arguments, typename Kernel::SharedStorage& shared,
                                     DecodeWalk const& walk, int32_t num_rows, Store const& store) {
  constexpr int kVectors = Kernel::kHeadDimV / 4;
  using Part = ClusterPart<Kernel::kRows, Kernel::kHeadDimV>;
  static_assert(sizeof(Part) <= sizeof(shared.k) && Kernel::kHeadDimV % 4 == 0);
  Part& part = reinterpret_cast<Part&>(shared.k);
  NamedBarrier::sync(kWarpgroupThreads, kConsumerBarrier);  // every warp has ended its products with K and V
  store(part);
  __syncwarp();
  ptx::sync_cluster();  // the loading warp has ended, or will without a word: it counts as arrived

  int32_t const size = arguments.cluster_size, rank = static_cast<int32_t>(cute::block_rank_in_cluster());
  int32_t const num_vectors = num_rows * kVectors, each = (num_vectors + size - 1) / size;
  int32_t const end = min(num_vectors, (rank + 1) * each);
  // Without a second turn nothing is kept over turns: the kernel of e4m3 has no register for it.
  constexpr bool kHasOneTurn = Kernel::kReadsE4m3 && Kernel::kRows * kVectors <= 2 * kWarpgroupThreads;
  for (int32_t i = rank * each + static_cast<int32_t>(threadIdx.x); i < end;
       i = kHasOneTurn ? end : i + kWarpgroupThreads) {
    int32_t const row_in_tile = i / kVectors, column = i % kVectors * 4;
    float2 sums[kMaxClusterSize];
    float4 out[kMaxClusterSize];
    float row_max = -INFINITY;
    CUTE_UNROLL
    for (int c = 0; c < kMaxClusterSize; ++c) {  // all are on their way before one is needed
      sums[c] = {-INFINITY, 0.0f};
      out[c] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (c < size) {
        sums[c] = ptx::load_remote_float2(ptx::address_in(c, &part.sums[row_in_tile]));
        out[c] = ptx::load_remote_float4(ptx::address_in(c, &part.out[row_in_tile][column]));
      }
    }
    CUTE_UNROLL
    for (int c = 0; c < kMaxClusterSize; ++c) row_max = fmaxf(row_max, sums[c].x);
    SumOfParts parts(arguments.params.problem, row_max);
    CUTE_UNROLL
    for (int c = 0; c < kMaxClusterSize; ++c) parts.add(sums[c], out[c]);
    TileRow const row = row_of<Kernel::Tiles::kRows>(arguments, walk.tile, row_in_tile);
    parts.write<typename Kernel::Element>(arguments, walk.batch, row, column, walk.keys.length > 0,
                                          column < arguments.params.problem.head_dim_v, column == 0);
  }
  // A CTA that has ended has no shared memory. What the others wait for has been read, and nothing that was written:
  // with release, the barrier would wait for the output's way to memory.
  __syncwarp();
  cute::cluster_arrive_relaxed();
  cute::cluster_wait();
}

template <class Kernel>
__device__ void run_decode(DecodeArguments const& arguments, typename Kernel::SharedStorage& shared) {
  if (threadIdx.x == 0) {
    if (cute::cast_smem_ptr_to_uint(&shared) % 1024 != 0) __trap();
    for (auto* barriers : {shared.k_full, shared.k_empty, shared.v_full, shared.v_empty}) {
      for (int stage = 0; stage < Kernel::kNumStages; ++stage) ClusterBarrier::init(&barriers[stage], 1);
    }
    if constexpr (Kernel::kNumQStages > 0) {
      for (auto* barriers : {shared.q_full, shared.q_empty}) {
        for (int stage = 0; stage < Kernel::kNumQStages; ++stage) ClusterBarrier::init(&barriers[stage], 1);
      }
    }
    cutlass::arch::fence_barrier_init();
  }
  if (threadIdx.x == kWarpgroupThreads) {
    if (Kernel::kNumQStages > 0) cute::prefetch_tma_descriptor(&arguments.q);
    if (arguments.params.num_pages > 0 && arguments.params.page_size > 0) {
      cute::prefetch_tma_descriptor(&arguments.k);
      cute::prefetch_tma_descriptor(&arguments.v);
    }
  }
  // Rows without a query are zero, and written once.
  if (threadIdx.x < kWarpgroupThreads) {
    constexpr int kVectors = sizeof(shared.q) / sizeof(uint4);
    for (int i = threadIdx.x; i < kVectors; i += kWarpgroupThreads) {
      reinterpret_cast<uint4*>(&shared.q)[i] = uint4{0, 0, 0, 0};
    }
    if constexpr (Kernel::kNumQStages > 0) cutlass::arch::fence_view_async_shared();  // TMA writes the other rows
  }
  __syncthreads();
  if (threadIdx.x >= kWarpgroupThreads) {
    load_tiles<Kernel>(arguments, shared);
  } else {
    Kernel::consume(arguments, shared);
  }
}

}  // namespace flashmla::sm90
