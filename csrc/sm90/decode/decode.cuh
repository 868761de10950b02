// Hopper attention of a few queries to a long cache: read K and V once, as fast as memory gives them.
//
// Schedule. A CTA is a warp that loads and one consumer warpgroup; kNumCtas of them fill a multiprocessor, and each
// has the same number of kv_blocks to read (decode_schedule.cuh). The loading warp streams K and V into two rings by
// TMA: of a paged cache each lane brings the rows of one page, whose number it has read a step before. The consumer
// warpgroup multiplies 64 rows, the query heads of a kv head for every query, and mostly fewer are real: the tensor
// cores have time. It keeps one product ahead, as the forward does:
//
//   issue S(n+1) = Q K(n+1)^T | issue O += P(n) V(n) | wait S | softmax S(n+1) | wait O | P(n+1) to registers, rescale
//   O
//
// Rows of V that are no keys of the sequence (its last page, before its first key) may hold anything, and 0 * NaN is
// NaN: they are cleared in shared memory.
//
// A kernel begins while the one before it in the stream ends: barriers, descriptors and, if the lengths are known to
// the host, the walk are ready by then.
//
// Source: Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023) for the split over keys; Stream-K (arXiv 2301.03598) for
// equal shares of units that cross tiles.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/grid_dependency_control.h>

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/tensor.hpp>

#include "params.h"
#include "sm90/decode/decode_rows.cuh"
#include "sm90/decode/decode_schedule.cuh"
#include "sm90/decode/parts.cuh"
#include "sm90/hopper/operands.cuh"
#include "sm90/hopper/softmax.cuh"
#include "sm90/tiles.h"

namespace flashmla::sm90 {

template <int kHeadDimQK, int kHeadDimV, class Element>
struct Decode {
  using Tiles = DecodeTiles<kHeadDimQK, kHeadDimV>;
  static constexpr int kBlockKV = Tiles::kBlockKV;
  static constexpr int kNumStages = Tiles::kNumStages;
  static constexpr int kSwizzleColumns = 64;
  static_assert(kHeadDimQK % kSwizzleColumns == 0 && kHeadDimV % kSwizzleColumns == 0);
  static_assert(kNumStages > 1, "S(n+1) reads one buffer of K, and the next is loaded");
  static constexpr int kScores = kBlockKV / 2;  // per thread
  static constexpr int kOutputs = kHeadDimV / 2;

  using BlockShapeS = cute::Shape<cute::Int<kWarpgroupRows>, cute::Int<kBlockKV>, cute::Int<kHeadDimQK>>;
  using BlockShapeO = cute::Shape<cute::Int<kWarpgroupRows>, cute::Int<kHeadDimV>, cute::Int<kBlockKV>>;
  using MmaS = decltype(cute::make_tiled_mma(cute::GMMA::ss_op_selector<Element, Element, float, BlockShapeS>()));
  using MmaO = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float, BlockShapeO, cute::GMMA::Major::K, cute::GMMA::Major::MN>()));
  static_assert(is_one_wgmma<kBlockKV, MmaS>() && is_one_wgmma<kHeadDimV, MmaO>());
  using Layouts = SharedLayouts<Element, kSwizzleColumns>;
  using LayoutQ = typename Layouts::template Rows<kWarpgroupRows, kHeadDimQK, 1>;
  using LayoutK = typename Layouts::template Rows<kBlockKV, kHeadDimQK, kNumStages>;
  using LayoutVt = typename Layouts::template Columns<kBlockKV, kHeadDimV, kNumStages>;
  using RowSoftmax = Softmax<kScores, false>;

  struct SharedStorage {
    alignas(1024) Element q[kWarpgroupRows * kHeadDimQK];
    alignas(1024) Element k[kNumStages][kBlockKV * kHeadDimQK];
    alignas(1024) Element v[kNumStages][kBlockKV * kHeadDimV];
    uint64_t k_full[kNumStages], k_empty[kNumStages], v_full[kNumStages], v_empty[kNumStages];
  };
  static constexpr int kSharedBytes = sizeof(SharedStorage);
  static constexpr int kSystemBytes = 1024;  // of shared memory, kept for each CTA
  static_assert((kSharedBytes + kSystemBytes) * Tiles::kNumCtas <= kMaxSharedBytes + kSystemBytes);
  static constexpr int kConsumerBarrier = 1;

  // What a CTA leaves for its cluster, where K has been.
  struct Part {
    float2 sums[kWarpgroupRows];
    float out[kWarpgroupRows][kHeadDimV + 8];  // 8: rows of a warp begin in different banks
  };
  static_assert(sizeof(Part) <= sizeof(SharedStorage::k) && kHeadDimV % 4 == 0);

  // From here on this kernel may read what those before it have written. To find the work takes long, and needs no more
  // than lengths.
  __device__ static DecodeWalk begin(DecodeArguments const& arguments) {
    bool const reads_lengths = !has_equal_lengths(arguments.params);
    if (reads_lengths) ptx::wait_on_dependent_grids();
    DecodeWalk const walk(arguments);
    if (!reads_lengths) ptx::wait_on_dependent_grids();
    cutlass::arch::launch_dependent_grids();  // combine_kernel, or the next call's, may set up
    return walk;
  }

  // ---- loading warp -------------------------------------------------------------------------------------------------

  __device__ static void load(DecodeArguments const& arguments, SharedStorage& shared) {
    int32_t const lane = threadIdx.x % kWarpThreads;
    int32_t const rows = arguments.rows_per_box;
    // K and V are read once, unless several tiles share a kv head.
    uint64_t const hint = static_cast<uint64_t>(arguments.tiles_per_head > 1 ? cute::TMA::CacheHintSm90::EVICT_NORMAL
                                                                             : cute::TMA::CacheHintSm90::EVICT_FIRST);
    Ring<kNumStages> ring;
    bool is_first = true;
    for (DecodeWalk walk = begin(arguments); walk.find(); walk.next_tile(), is_first = false) {
      // The consumers are some tiles behind: Q will be near when they ask for it.
      if (!is_first) prefetch_queries<Element>(arguments, walk.batch, walk.tile);
      int32_t const head_kv = walk.tile / arguments.tiles_per_head;
      SequenceKeys const keys = walk.keys;
      // Boxes without a key of the sequence are not loaded: the table need not have their pages.
      auto has_keys = [&](int32_t kv_block, int32_t box) {
        int32_t const key = kv_block * kBlockKV + box * rows;
        return box < kBlockKV / rows && key < keys.end && key + rows > keys.begin;
      };
      BoxPlace place{0, 0};
      if (walk.blocks.begin < walk.blocks.end && has_keys(walk.blocks.begin, lane)) {
        place = box_place<kBlockKV>(arguments, walk.batch, walk.blocks.begin, lane);
      }
      for (int32_t kv_block = walk.blocks.begin; kv_block < walk.blocks.end; ++kv_block, ring.advance()) {
        bool const is_mine = has_keys(kv_block, lane);
        int const num_boxes = __popc(__ballot_sync(0xffffffff, is_mine));
        BoxPlace const here = place;
        if (kv_block + 1 < walk.blocks.end && has_keys(kv_block + 1, lane)) {
          place =
              box_place<kBlockKV>(arguments, walk.batch, kv_block + 1, lane);  // read while the buffer is waited for
        }
        auto copy = [&](CUtensorMap const& map, auto& buffer, uint64_t& full, uint64_t& empty, int columns) {
          ClusterBarrier::wait(&empty, ring.phase ^ 1);
          if (lane == 0) {
            ClusterTransactionBarrier::arrive_and_expect_tx(&full, num_boxes * rows * columns * sizeof(Element));
          }
          __syncwarp();
          if (!is_mine) return;
          for (int column = 0; column < columns; column += kSwizzleColumns) {
            cute::SM90_TMA_LOAD_4D::copy(&map, &full, hint, buffer + column * kBlockKV + lane * rows * kSwizzleColumns,
                                         column, here.row, head_kv, here.page);
          }
        };
        int const stage = ring.stage;
        copy(arguments.k, shared.k[stage], shared.k_full[stage], shared.k_empty[stage], kHeadDimQK);
        copy(arguments.v, shared.v[stage], shared.v_full[stage], shared.v_empty[stage], kHeadDimV);
      }
    }
  }

  // ---- consumer warpgroup -------------------------------------------------------------------------------------------

  // Clears the rows of V that are no keys of the sequence, in a kv_block that has some.
  __device__ static void clear_values(Element* v, SequenceKeys const& keys, int32_t kv_block) {
    if (clear_rows<kBlockKV, kHeadDimV, kWarpgroupThreads>(v, keys, kv_block, threadIdx.x)) {
      NamedBarrier::sync(kWarpgroupThreads, kConsumerBarrier);
    }
  }

  // One function, as the forward's: ptxas serializes wgmma in a branch (docs/log.md, 2026-11-22).
  __device__ static void consume(DecodeArguments const& arguments, SharedStorage& shared) {
    using namespace cute;
    int const first_row = row_of_thread(0, threadIdx.x);
    Problem const& problem = arguments.params.problem;

    MmaS mma_s;
    MmaO mma_o;
    Tensor sQ = make_tensor(make_smem_ptr(shared.q), LayoutQ{});
    Tensor sK = make_tensor(make_smem_ptr(shared.k[0]), LayoutK{});
    Tensor sVt = make_tensor(make_smem_ptr(shared.v[0]), LayoutVt{});
    auto thread_s = mma_s.get_slice(threadIdx.x);
    auto thread_o = mma_o.get_slice(threadIdx.x);
    Tensor fQ = thread_s.partition_fragment_A(sQ);   // descriptors (_, 1, kHeadDimQK/16, 1)
    Tensor fK = thread_s.partition_fragment_B(sK);   // (_, 1, kHeadDimQK/16, kNumStages)
    Tensor fV = thread_o.partition_fragment_B(sVt);  // (_, _, kBlockKV/16, kNumStages)
    Tensor rS = partition_fragment_C(mma_s, Shape<Int<kWarpgroupRows>, Int<kBlockKV>>{});   // fp32, kBlockKV/2 a thread
    Tensor rO = partition_fragment_C(mma_o, Shape<Int<kWarpgroupRows>, Int<kHeadDimV>>{});  // fp32, kHeadDimV/2
    // 16 bits, kBlockKV/2 a thread, packed in pairs.
    Tensor rP = make_tensor<Element>(partition_shape_A(mma_o, Shape<Int<kWarpgroupRows>, Int<kBlockKV>>{}));
    static_assert(decltype(size(rS))::value == kScores && decltype(size(rO))::value == kOutputs);

    bool const has_transform = problem.softcap > 0.0f || problem.scale <= 0.0f;
    RowSoftmax softmax(has_transform ? kLog2e : problem.scale * kLog2e);
    float correction[2];
    Ring<kNumStages> ring;

    auto issue_s = [&] { multiply(mma_s, fQ(_, _, _, 0), fK(_, _, _, ring.stage), rS, false); };
    auto issue_o = [&](int stage) {
      warpgroup_fence_operand(rP);
      multiply(mma_o, rP, fV(_, _, _, stage), rO, true);
    };
    // Eight consecutive score registers are one A fragment of a 16-column step, in order.
    auto convert_p = [&] {
      auto* pairs = reinterpret_cast<uint32_t*>(rP.data());
      CUTE_UNROLL
      for (int i = 0; i < kScores / 2; ++i) pairs[i] = pack<Element>(rS(2 * i), rS(2 * i + 1));
    };
    // A product completes for the whole warpgroup at once, so one thread arrives for all.
    auto release = [&](uint64_t& barrier) {
      if (threadIdx.x == 0) ClusterBarrier::arrive(&barrier);
    };

    // Rows without a query are zero, and written once.
    for (int i = threadIdx.x; i < kWarpgroupRows * kHeadDimQK / 8; i += kWarpgroupThreads) {
      reinterpret_cast<uint4*>(shared.q)[i] = uint4{0, 0, 0, 0};
    }
    int32_t rows_of_q = 0;  // those in shared memory that may not be zero
    for (DecodeWalk walk = begin(arguments); walk.find(); walk.next_tile()) {
      SequenceKeys const keys = walk.keys;
      KVBlocks const blocks = walk.blocks;
      int32_t const num_rows = num_rows_of(arguments, walk.tile);
      RowKeys const seen = row_keys(arguments, keys, walk.tile, first_row);
      NamedBarrier::sync(kWarpgroupThreads, kConsumerBarrier);  // every warp has ended its products with the old Q
      read_queries<kHeadDimQK, kWarpgroupThreads>(arguments, shared.q, walk.batch, walk.tile, threadIdx.x,
                                                  max(num_rows, rows_of_q));
      rows_of_q = num_rows;
      NamedBarrier::sync(kWarpgroupThreads, kConsumerBarrier);
      softmax.reset();
      CUTE_UNROLL
      for (int i = 0; i < kOutputs; ++i) rO(i) = 0.0f;

      int32_t kv_block = blocks.begin;
      auto finish_scores = [&](auto is_first) {
        if (has_transform) transform_scores<kScores>(rS, problem.scale, problem.softcap);
        int32_t const first_key = kv_block * kBlockKV;
        if (first_key < keys.unmasked_begin || first_key + kBlockKV > keys.unmasked_end) {
          hide_keys<kScores>(rS, seen, first_key);
        }
        return softmax.template update<is_first()>(rS, correction);
      };
      if (blocks.begin < blocks.end) {
        ClusterBarrier::wait(&shared.k_full[ring.stage], ring.phase);
        issue_s();
        warpgroup_wait<0>();
        warpgroup_fence_operand(rS);
        release(shared.k_empty[ring.stage]);
        finish_scores(std::true_type{});
        convert_p();
      }
      for (++kv_block; kv_block < blocks.end; ++kv_block) {
        Ring<kNumStages> const ring_o = ring;
        ring.advance();
        ClusterBarrier::wait(&shared.v_full[ring_o.stage], ring_o.phase);
        clear_values(shared.v[ring_o.stage], keys, kv_block - 1);
        ClusterBarrier::wait(&shared.k_full[ring.stage], ring.phase);
        issue_s();
        issue_o(ring_o.stage);
        warpgroup_wait<1>();
        warpgroup_fence_operand(rS);
        release(shared.k_empty[ring.stage]);
        bool const has_grown = finish_scores(std::false_type{});
        ptx::keep_before(softmax.row_sum[0] + softmax.row_sum[1]);  // the exponentials, before the wait for O
        warpgroup_wait<0>();
        warpgroup_fence_operand(rO);
        release(shared.v_empty[ring_o.stage]);
        convert_p();
        if (has_grown) {
          CUTE_UNROLL
          for (int i = 0; i < kOutputs; ++i) rO(i) *= correction[(i / 2) % 2];
        }
      }
      if (blocks.begin < blocks.end) {
        ClusterBarrier::wait(&shared.v_full[ring.stage], ring.phase);
        clear_values(shared.v[ring.stage], keys, blocks.end - 1);
        issue_o(ring.stage);
        warpgroup_wait<0>();
        warpgroup_fence_operand(rO);
        release(shared.v_empty[ring.stage]);
        ring.advance();
      }
      if (arguments.cluster_size > 1) {
        add_parts_of_cluster(arguments, shared, walk, softmax, rO, first_row, num_rows);
      } else if (walk.is_whole()) {
        write_rows<kOutputs, Element>(arguments, walk, softmax, rO, first_row);
      } else {
        write_partial<kOutputs>(arguments, walk, softmax, rO, first_row);
      }
    }
  }

  // Each CTA of the cluster has left its part of the tile where K has been, and adds up some columns of all parts.
  template <class Outputs>
  __device__ static void add_parts_of_cluster(DecodeArguments const& arguments, SharedStorage& shared,
                                              DecodeWalk const& walk, RowSoftmax& softmax, Outputs const& outputs,
                                              int first_row, int32_t num_rows) {
    constexpr int kVectors = kHeadDimV / 4;
    Part& part = reinterpret_cast<Part&>(shared.k);
    NamedBarrier::sync(kWarpgroupThreads, kConsumerBarrier);  // every warp has ended its products with K and V
    store_part<kOutputs>(arguments, walk.tile, softmax, outputs, first_row, 0, part.sums, part.out[0], kHeadDimV + 8,
                         kHeadDimV);
    __syncwarp();
    ptx::sync_cluster();  // the loading warp has ended, or will without a word: it counts as arrived

    int32_t const size = arguments.cluster_size, rank = static_cast<int32_t>(cute::block_rank_in_cluster());
    int32_t const num_vectors = num_rows * kVectors, each = (num_vectors + size - 1) / size;
    int32_t const end = min(num_vectors, (rank + 1) * each);
    for (int32_t i = rank * each + static_cast<int32_t>(threadIdx.x); i < end; i += kWarpgroupThreads) {
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
      parts.write<Element>(arguments, walk.batch, row_of(arguments, walk.tile, row_in_tile), column,
                           walk.keys.length > 0, column < arguments.params.problem.head_dim_v, column == 0);
    }
    __syncwarp();
    ptx::sync_cluster();  // a CTA that has ended has no shared memory
  }

  __device__ static void run(DecodeArguments const& arguments, SharedStorage& shared) {
    if (threadIdx.x == 0) {
      if (cute::cast_smem_ptr_to_uint(&shared) % 1024 != 0) __trap();
      for (auto* barriers : {shared.k_full, shared.k_empty, shared.v_full, shared.v_empty}) {
        for (int stage = 0; stage < kNumStages; ++stage) ClusterBarrier::init(&barriers[stage], 1);
      }
      cutlass::arch::fence_barrier_init();
    }
    if (threadIdx.x == kWarpgroupThreads && arguments.params.num_pages > 0 && arguments.params.page_size > 0) {
      cute::prefetch_tma_descriptor(&arguments.k);
      cute::prefetch_tma_descriptor(&arguments.v);
    }
    __syncthreads();
    if (threadIdx.x >= kWarpgroupThreads) {
      load(arguments, shared);
    } else {
      consume(arguments, shared);
    }
  }
};

}  // namespace flashmla::sm90
