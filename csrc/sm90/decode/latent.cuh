// Hopper attention of a few queries to a cache of latents: one kv head, whose values are the first columns of its keys.
//
// Schedule. A CTA is a warpgroup of which one warp loads, and two that consume; it fills a multiprocessor. 64 query
// rows of 576 columns and two kv_blocks of 64 keys are all that shared memory holds, and a block is read once for both
// products. O has 512 columns: each warpgroup keeps 256 of them, and both need every P. So blocks come in pairs, whose
// first is warpgroup 0's and whose second warpgroup 1's: the owner of a block multiplies Q K^T, takes the softmax, and
// leaves P and what becomes of the maximum for the other; both add P V to their columns. P lies in the block's last
// columns, which are keys alone and have been read by then:
//
//   warpgroup 0:  S(0) | softmax, P(0) to shared memory | O += P(0) V(0)              | wait P(1) | O += P(1) V(1)
//   warpgroup 1:       | S(1) . . . . . | wait P(0) | O += P(0) V(0) | softmax, P(1) to shared memory | O += P(1) V(1)
//
// So the tensor cores have S(1) while warpgroup 0 takes its softmax, and P(0) V(0) while warpgroup 1 takes its own. A
// stage is loaded again while the other stage's block is at its softmax and its products.
//
// Rows that are no keys of the sequence are cleared, as in decode.cuh, before they are values. What a warpgroup alone
// reads of a block (its columns of V) returns to the loading warp by a barrier of its own.
//
// Source: absorbed multi-head latent attention, DeepSeek-V2 (arXiv 2405.04434, section 2.1); warpgroups that alternate
// over halves of O, as FlashMLA describes them (its documentation of 2025-04-22).
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/grid_dependency_control.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/tensor.hpp>

#include "params.h"
#include "sm90/decode/decode_rows.cuh"
#include "sm90/decode/decode_schedule.cuh"
#include "sm90/hopper/fragment.cuh"
#include "sm90/hopper/operands.cuh"
#include "sm90/hopper/softmax.cuh"
#include "sm90/tiles.h"

namespace flashmla::sm90 {

template <int kHeadDimQK, int kHeadDimV, class Element_>
struct LatentDecode {
  using Element = Element_;
  using Tiles = DecodeTiles<kHeadDimQK, kHeadDimV>;
  static constexpr bool kReadsValues = false, kReadsE4m3 = false;
  static constexpr int kBlockKV = Tiles::kBlockKV;
  static constexpr int kNumStages = Tiles::kNumStages, kNumQStages = 0;
  static constexpr int kNumConsumers = Tiles::kNumConsumers;
  static constexpr int kSwizzleColumns = 64;
  static constexpr int kHalf = kHeadDimV / kNumConsumers;  // columns of O in a warpgroup
  static constexpr int kScores = kBlockKV / 2;             // per thread
  static constexpr int kOutputs = kHalf / 2;
  static constexpr int kConsumerThreads = kNumConsumers * kWarpgroupThreads;
  static_assert(kNumConsumers == 2 && kNumStages == 2 && Tiles::kNumCtas == 1);
  static_assert(kHeadDimQK - kHeadDimV == kBlockKV && kBlockKV == kSwizzleColumns, "P takes the place of a chunk");
  static_assert(kHalf % kSwizzleColumns == 0);

  using BlockShapeS = cute::Shape<cute::Int<kWarpgroupRows>, cute::Int<kBlockKV>, cute::Int<kHeadDimQK>>;
  using BlockShapeO = cute::Shape<cute::Int<kWarpgroupRows>, cute::Int<kHalf>, cute::Int<kBlockKV>>;
  using MmaS = decltype(cute::make_tiled_mma(cute::GMMA::ss_op_selector<Element, Element, float, BlockShapeS>()));
  using MmaOwn = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float, BlockShapeO, cute::GMMA::Major::K, cute::GMMA::Major::MN>()));
  using MmaOther = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, BlockShapeO, cute::GMMA::Major::K, cute::GMMA::Major::MN>()));
  static_assert(is_one_wgmma<kBlockKV, MmaS>() && is_one_wgmma<kHalf, MmaOwn, MmaOther>());
  using Layouts = SharedLayouts<Element, kSwizzleColumns>;
  static constexpr int kBlockElements = kBlockKV * kHeadDimQK;
  using LayoutQ = typename Layouts::template Rows<kWarpgroupRows, kHeadDimQK, 1>;
  using LayoutK = typename Layouts::template Rows<kBlockKV, kHeadDimQK, kNumStages>;
  // Parts of a block, one in each stage.
  using LayoutVt = InStages<typename Layouts::template Columns<kBlockKV, kHalf, 1>, kNumStages, kBlockElements>;
  using LayoutP = InStages<typename Layouts::template Rows<kWarpgroupRows, kBlockKV, 1>, kNumStages, kBlockElements>;
  using RowSoftmax = Softmax<kScores, false>;

  struct SharedStorage {
    alignas(1024) Element q[kWarpgroupRows * kHeadDimQK];
    alignas(1024) Element kv[kNumStages][kBlockElements];
    // Of the block that a warpgroup owned last: by row, and by warp whether some row's maximum has grown.
    float2 max_and_correction[kNumConsumers][kWarpgroupRows];
    alignas(4) uint8_t has_grown[kNumConsumers][4];
    float row_sums[kNumConsumers][kWarpgroupRows];
    // [stage][warpgroup whose columns of V these are]; the last columns of K come with those of warpgroup 1.
    uint64_t full[kNumStages][kNumConsumers], empty[kNumStages][kNumConsumers];
    uint64_t p_full[kNumConsumers];  // P and max_and_correction of a warpgroup's block
    uint64_t meeting;                // of both warpgroups
  };
  static constexpr int kSharedBytes = sizeof(SharedStorage);
  static_assert(kSharedBytes <= kMaxSharedBytes && kWarpgroupThreads == 4 * kWarpThreads);
  static constexpr int kOwnBarrier = 1;  // named barriers, of one warpgroup each

  // For the whole warp, whose writes are seen by who waits. Not a named barrier: the warpgroups' code differs, and
  // synccheck takes one that is reached at two places for divergent.
  __device__ static void arrive_warp(uint64_t& barrier) {
    __syncwarp();
    if (threadIdx.x % kWarpThreads == 0) ClusterBarrier::arrive(&barrier);
  }

  // Both warpgroups; `phase` flips from call to call.
  __device__ static void meet(SharedStorage& shared, uint32_t& phase) {
    arrive_warp(shared.meeting);
    ClusterBarrier::wait(&shared.meeting, phase);
    phase ^= 1;
  }

  // ---- loading warp -------------------------------------------------------------------------------------------------

  __device__ static void load(DecodeArguments const& arguments, SharedStorage& shared) {
    int32_t const lane = threadIdx.x % kWarpThreads;
    uint64_t const hint = static_cast<uint64_t>(arguments.tiles_per_head > 1 ? cute::TMA::CacheHintSm90::EVICT_NORMAL
                                                                             : cute::TMA::CacheHintSm90::EVICT_FIRST);
    Ring<kNumStages> ring;
    DecodeWalk walk(arguments);
    for (walk.begin(); walk.find(); walk.next_tile()) {
      int32_t const head_kv = walk.tile / arguments.tiles_per_head;
      BoxPlaces<kBlockKV> places(arguments, walk);
      for (int32_t kv_block = walk.blocks.begin; kv_block < walk.blocks.end; ++kv_block, ring.advance()) {
        bool const is_mine = places.turn_to(kv_block);
        int const num_boxes = __popc(__ballot_sync(0xffffffff, is_mine));
        // In this order: P lies in part 1, which warpgroup 1 returns, and if P is its own, warpgroup 0 has read it
        // when it returns part 0.
        CUTE_UNROLL
        for (int part = 0; part < kNumConsumers; ++part) {
          int const begin = part * kHalf, end = part == 0 ? kHalf : kHeadDimQK;
          uint64_t& full = shared.full[ring.stage][part];
          ClusterBarrier::wait(&shared.empty[ring.stage][part], ring.phase ^ 1);
          if (lane == 0) {
            ClusterTransactionBarrier::arrive_and_expect_tx(
                &full, num_boxes * arguments.rows_per_box * (end - begin) * static_cast<int32_t>(sizeof(Element)));
          }
          __syncwarp();
          if (!is_mine) continue;
          for (int column = begin; column < end; column += kSwizzleColumns) {
            cute::SM90_TMA_LOAD_4D::copy(
                &arguments.k, &full, hint,
                shared.kv[ring.stage] + column * kBlockKV + places.first_row() * kSwizzleColumns, column,
                places.here.row, head_kv, places.here.page);
          }
        }
      }
    }
  }

  // ---- consumer warpgroups ------------------------------------------------------------------------------------------

  // Warpgroup kWarpgroup's part. One function, as the forward's: ptxas serializes wgmma in a branch (docs/log.md).
  template <int kWarpgroup>
  __device__ static void consume(DecodeArguments const& arguments, SharedStorage& shared) {
    using namespace cute;
    int const thread = threadIdx.x % kWarpgroupThreads;
    int const first_row = row_of_thread(0, threadIdx.x);
    Problem const& problem = arguments.params.problem;

    MmaS mma_s;
    MmaOwn mma_own;
    MmaOther mma_other;
    Tensor sQ = make_tensor(make_smem_ptr(shared.q), LayoutQ{});
    Tensor sK = make_tensor(make_smem_ptr(shared.kv[0]), LayoutK{});
    Tensor sVt = make_tensor(make_smem_ptr(shared.kv[0] + kWarpgroup * kHalf * kBlockKV), LayoutVt{});
    Tensor sP = make_tensor(make_smem_ptr(shared.kv[0] + kHeadDimV * kBlockKV), LayoutP{});
    auto thread_s = mma_s.get_slice(thread);
    auto thread_own = mma_own.get_slice(thread);
    auto thread_other = mma_other.get_slice(thread);
    Tensor fQ = thread_s.partition_fragment_A(sQ);      // descriptors (_, 1, kHeadDimQK/16, 1)
    Tensor fK = thread_s.partition_fragment_B(sK);      // (_, 1, kHeadDimQK/16, kNumStages)
    Tensor fV = thread_own.partition_fragment_B(sVt);   // (_, 1, kBlockKV/16, kNumStages)
    Tensor fP = thread_other.partition_fragment_A(sP);  // (_, 1, kBlockKV/16, kNumStages)
    Tensor rS = partition_fragment_C(mma_s, Shape<Int<kWarpgroupRows>, Int<kBlockKV>>{});  // fp32, kBlockKV/2 a thread
    Tensor rO = partition_fragment_C(mma_own, Shape<Int<kWarpgroupRows>, Int<kHalf>>{});   // fp32, kHalf/2
    // 16 bits, kBlockKV/2 a thread, packed in pairs.
    Tensor rP = make_tensor<Element>(partition_shape_A(mma_own, Shape<Int<kWarpgroupRows>, Int<kBlockKV>>{}));
    static_assert(decltype(size(rS))::value == kScores && decltype(size(rO))::value == kOutputs);

    bool const has_transform = problem.softcap > 0.0f || problem.scale <= 0.0f;
    RowSoftmax softmax(has_transform ? kLog2e : problem.scale * kLog2e);
    float correction[2];
    Ring<kNumStages> ring;
    uint32_t meeting_phase = 0, p_phase = 0;  // of the other warpgroup's P

    DecodeWalk walk(arguments);
    for (walk.begin(); walk.find(); walk.next_tile()) {
      SequenceKeys const keys = walk.keys;
      KVBlocks const blocks = walk.blocks;
      RowKeys const seen = row_keys(arguments, keys, walk.tile, first_row);
      meet(shared, meeting_phase);  // every warp has ended its products with the old Q
      read_queries<kHeadDimQK, kConsumerThreads>(arguments, shared.q, walk.batch, walk.tile, threadIdx.x);
      meet(shared, meeting_phase);
      softmax.reset();
      CUTE_UNROLL
      for (int i = 0; i < kOutputs; ++i) rO(i) = 0.0f;

      auto rescale = [&](bool has_grown) {
        if (!has_grown) return;
        CUTE_UNROLL
        for (int i = 0; i < kOutputs; ++i) rO(i) *= correction[(i / 2) % 2];
      };
      // Part by part, as the two return to the loading warp.
      auto issue_scores = [&](int32_t kv_block) {
        auto wait_part = [&](int part) { ClusterBarrier::wait(&shared.full[ring.stage][part], ring.phase); };
        if (has_hidden_rows<kBlockKV>(keys, kv_block)) {
          wait_part(0);
          wait_part(1);
          clear_rows<kBlockKV, kHeadDimV, kWarpgroupThreads>(shared.kv[ring.stage], keys, kv_block, thread);
          NamedBarrier::sync(kWarpgroupThreads, kOwnBarrier + kWarpgroup);
        }
        CUTE_UNROLL
        for (int part = 0; part < kNumConsumers; ++part) {
          wait_part(part);
          multiply(mma_s, fQ(_, _, _, 0), fK(_, _, _, ring.stage), rS, part > 0, part * kHalf / 16,
                   (part == 0 ? kHalf : kHeadDimQK) / 16);
        }
      };
      // Scores, which have arrived, become P: in registers, and in shared memory for the other. Whether O is to be
      // rescaled.
      auto publish = [&](int32_t kv_block) {
        warpgroup_fence_operand(rS);
        if (has_transform) transform_scores<kScores>(rS, problem.scale, problem.softcap);
        int32_t const first_key = kv_block * kBlockKV;
        if (first_key < keys.unmasked_begin || first_key + kBlockKV > keys.unmasked_end) {
          hide_keys<kScores>(rS, seen, first_key);
        }
        bool const has_grown = softmax.template update<false>(rS, correction);
        constexpr float kOne[2] = {1.0f, 1.0f};
        store_matrices<Element, kSwizzleColumns, kWarpgroupRows, kBlockKV>(shared.kv[ring.stage] + kHeadDimV * kBlockKV,
                                                                           rS, kOne, row_of_warp(thread));
        if (thread % 4 == 0) {
          CUTE_UNROLL
          for (int r = 0; r < 2; ++r) {
            shared.max_and_correction[kWarpgroup][first_row + 8 * r] = {softmax.row_max[r], correction[r]};
          }
        }
        if (thread % kWarpThreads == 0) shared.has_grown[kWarpgroup][thread / kWarpThreads] = has_grown;
        cutlass::arch::fence_view_async_shared();
        arrive_warp(shared.p_full[kWarpgroup]);
        // Eight consecutive score registers are one A fragment of a 16-column step, in order.
        auto* pairs = reinterpret_cast<uint32_t*>(rP.data());
        CUTE_UNROLL
        for (int i = 0; i < kScores / 2; ++i) pairs[i] = pack<Element>(rS(2 * i), rS(2 * i + 1));
        return has_grown;
      };
      auto issue_own = [&] {
        warpgroup_fence_operand(rP);
        multiply(mma_own, rP, fV(_, _, _, ring.stage), rO, true);
      };
      // O += P V of the other's block.
      auto issue_other = [&](Ring<kNumStages> const& here) {
        ClusterBarrier::wait(&shared.p_full[1 - kWarpgroup], p_phase);
        p_phase ^= 1;
        // What TMA has written is seen by who waits. Not for the other part: its warpgroup may have returned it, and a
        // barrier that is two phases ahead looks like one that has not come as far.
        ClusterBarrier::wait(&shared.full[here.stage][kWarpgroup], here.phase);
        CUTE_UNROLL
        for (int r = 0; r < 2; ++r) {
          float2 const scale = shared.max_and_correction[1 - kWarpgroup][first_row + 8 * r];
          softmax.row_max[r] = scale.x;
          correction[r] = scale.y;
          softmax.row_sum[r] *= scale.y;
        }
        softmax.subtracts_first = softmax.has_large_offset();
        // For all warps alike: what follows is the warpgroup's.
        if (*reinterpret_cast<uint32_t const*>(shared.has_grown[1 - kWarpgroup]) != 0) {
          warpgroup_wait<0>();  // for the scores under way: ptxas touches no accumulator beside a product
          rescale(true);
        }
        multiply(mma_other, fP(_, _, _, here.stage), fV(_, _, _, here.stage), rO, true);
      };
      // A product completes for the whole warpgroup at once, so one thread arrives for all.
      auto finish_block = [&](int stage) {
        warpgroup_wait<0>();
        warpgroup_fence_operand(rO);
        if (thread == 0) ClusterBarrier::arrive(&shared.empty[stage][kWarpgroup]);
      };

      int32_t kv_block = blocks.begin;
      if constexpr (kWarpgroup == 0) {
        for (; kv_block < blocks.end; kv_block += kNumConsumers) {
          issue_scores(kv_block);
          warpgroup_wait<0>();
          rescale(publish(kv_block));
          issue_own();
          finish_block(ring.stage);
          ring.advance();
          if (kv_block + 1 == blocks.end) break;
          issue_other(ring);
          finish_block(ring.stage);
          ring.advance();
        }
      } else {
        for (; kv_block + 1 < blocks.end; kv_block += kNumConsumers) {
          Ring<kNumStages> const ring_other = ring;
          ring.advance();
          issue_scores(kv_block + 1);
          issue_other(ring_other);
          warpgroup_wait<1>();
          bool const has_grown = publish(kv_block + 1);
          finish_block(ring_other.stage);
          rescale(has_grown);
          issue_own();
          finish_block(ring.stage);
          ring.advance();
        }
        if (kv_block < blocks.end) {
          issue_other(ring);
          finish_block(ring.stage);
          ring.advance();
        }
      }
      add_sums(shared, softmax, kWarpgroup, first_row, meeting_phase);
      if (walk.is_whole()) {
        write_rows<kOutputs, Element>(arguments, walk, softmax, rO, first_row, kWarpgroup * kHalf);
      } else {
        write_partial<kOutputs>(arguments, walk, softmax, rO, first_row, kWarpgroup * kHalf);
      }
    }
  }

  // Each warpgroup has summed the exponentials of its own blocks. Afterwards lane 0 of a quad has those of both, in one
  // order, and the others none: the quad's sum is the row's.
  __device__ static void add_sums(SharedStorage& shared, RowSoftmax& softmax, int warpgroup, int first_row,
                                  uint32_t& meeting_phase) {
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      float sum = softmax.row_sum[r];
      sum += __shfl_xor_sync(0xffffffff, sum, 1);
      sum += __shfl_xor_sync(0xffffffff, sum, 2);
      if (threadIdx.x % 4 == 0) shared.row_sums[warpgroup][first_row + 8 * r] = sum;
    }
    meet(shared, meeting_phase);
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      softmax.row_sum[r] =
          threadIdx.x % 4 == 0 ? shared.row_sums[0][first_row + 8 * r] + shared.row_sums[1][first_row + 8 * r] : 0.0f;
    }
  }

  __device__ static void run(DecodeArguments const& arguments, SharedStorage& shared) {
    if (threadIdx.x == 0) {
      if (cute::cast_smem_ptr_to_uint(&shared) % 1024 != 0) __trap();
      for (int stage = 0; stage < kNumStages; ++stage) {
        for (int part = 0; part < kNumConsumers; ++part) {
          ClusterBarrier::init(&shared.full[stage][part], 1);
          ClusterBarrier::init(&shared.empty[stage][part], 1);
        }
      }
      for (uint64_t& barrier : shared.p_full) ClusterBarrier::init(&barrier, kWarpgroupThreads / kWarpThreads);
      ClusterBarrier::init(&shared.meeting, kConsumerThreads / kWarpThreads);
      cutlass::arch::fence_barrier_init();
    }
    __syncthreads();
    ptx::wait_on_dependent_grids();           // who wrote Q, K and the lengths
    cutlass::arch::launch_dependent_grids();  // combine_kernel may set up
    if (threadIdx.x >= kConsumerThreads) {
      cutlass::arch::warpgroup_reg_dealloc<Tiles::kProducerRegisters>();
      if (threadIdx.x < kConsumerThreads + kWarpThreads) load(arguments, shared);
    } else {
      cutlass::arch::warpgroup_reg_alloc<Tiles::kConsumerRegisters>();
      if (threadIdx.x < kWarpgroupThreads) {
        consume<0>(arguments, shared);
      } else {
        consume<1>(arguments, shared);
      }
    }
  }
};

}  // namespace flashmla::sm90
