// Hopper forward attention.
//
//   S = scale Q K^T (softcap), masked;   P = exp(S - row_max);   O = sum_tiles P V, rescaled when row_max grows;
//   out = O / row_sum,  lse = row_max + log(row_sum)                       (csrc/params.h states the semantics)
//
// Schedule. A CTA is one producer warpgroup, of which four threads work, and kNumConsumers warpgroups of 64 query rows
// each. It is persistent: the scheduling thread publishes work tiles (schedule.h), and the loading threads stream Q
// (kNumQStages buffers) and rings of kNumStages kv_blocks of K and V by TMA, from the last visible kv_block to the
// first, so that masked ones come first. A consumer warpgroup keeps one product ahead:
//
//   issue S(n-1) = Q K(n-1)^T | issue O += P(n) V(n) | wait S | softmax S(n-1) | wait O | P(n-1) to registers, rescale
//   O
//
// The tensor cores multiply while the exponentials of the other kv_block are computed. With kPingPong the warpgroups
// take turns (named barriers), so that one multiplies while another exponentiates. Masks are per warpgroup: a warpgroup
// that sees nothing of a kv_block skips it.
//
// Source: FlashAttention-2 (arXiv 2307.08691) for the algorithm, FlashAttention-3 (arXiv 2407.08608) for the two
// overlaps.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/grid_dependency_control.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/tensor.hpp>

#include "params.h"
#include "sm90/forward/forward_output.cuh"
#include "sm90/forward/forward_pair.cuh"
#include "sm90/forward/query_tile.cuh"
#include "sm90/hopper/fragment.cuh"
#include "sm90/hopper/ptx.cuh"
#include "sm90/hopper/softmax.cuh"
#include "sm90/scheduling/scheduler.cuh"
#include "sm90/tiles.h"

namespace flashmla::sm90 {

template <int kHeadDimQK, int kHeadDimV, MaskKind kMask, class Element>
struct Forward {
  using Tiles = ForwardTiles<kHeadDimQK, kHeadDimV, kMask>;
  static constexpr int kBlockQ = Tiles::kBlockQ;
  static constexpr int kBlockKV = Tiles::kBlockKV;
  static constexpr int kNumStages = Tiles::kNumStages;
  static constexpr int kNumQStages = Tiles::kNumQStages;
  static constexpr int kNumConsumers = Tiles::kNumConsumers;
  // 96 columns are three chunks of 32.
  static constexpr int kSwizzleColumns = widest_chunk(kHeadDimV, widest_chunk(kHeadDimQK, 64));
  static constexpr int kNumCtas = Tiles::kNumCtas;
  static_assert(kNumCtas == 1);                                                          // others: forward_pair.cuh
  static constexpr int kColumnsQK = kHeadDimQK, kColumnsV = kHeadDimV, kQueryParts = 1;  // for query_tile.cuh
  static_assert(kColumnsQK % kSwizzleColumns == 0 && kColumnsV % kSwizzleColumns == 0);
  static constexpr bool kHasDOut = false;

  static constexpr int kScores = kBlockKV / 2;  // per thread
  static constexpr int kOutputs = kColumnsV / 2;
  using Output = ForwardOutput<Forward, Element>;
  using RowSoftmax = Softmax<kScores, (kNumConsumers > 2)>;

  using BlockShapeS = cute::Shape<cute::Int<kBlockQ>, cute::Int<kBlockKV>, cute::Int<kColumnsQK>>;
  using BlockShapeO = cute::Shape<cute::Int<kBlockQ>, cute::Int<kColumnsV>, cute::Int<kBlockKV>>;
  using Warpgroups = cute::Layout<cute::Shape<cute::Int<kNumConsumers>, cute::_1, cute::_1>>;
  using MmaS =
      decltype(cute::make_tiled_mma(cute::GMMA::ss_op_selector<Element, Element, float, BlockShapeS>(), Warpgroups{}));
  using MmaO = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float, BlockShapeO, cute::GMMA::Major::K, cute::GMMA::Major::MN>(),
      Warpgroups{}));
  static_assert(is_one_wgmma<kBlockKV, MmaS>() && is_one_wgmma<kColumnsV, MmaO>());

  using Layouts = SharedLayouts<Element, kSwizzleColumns>;
  using LayoutQ = typename Layouts::template Rows<kBlockQ, kColumnsQK, kNumQStages>;
  using LayoutK = typename Layouts::template Rows<kBlockKV, kColumnsQK, kNumStages>;
  using LayoutVt = typename Layouts::template Columns<kBlockKV, kColumnsV, kNumStages>;

  // A second Q buffer lets the first S of the next tile be multiplied while O of this one is written, and O leave by
  // way of its tile's Q buffer.
  static constexpr bool kLooksAhead = kNumQStages > 1;
  static_assert(!kLooksAhead || kColumnsV <= kColumnsQK, "O takes the place of Q");

  // The end of the softmax needs registers that P holds while the last product runs.
  static constexpr bool kFinishesEarly = kNumConsumers == 2 && kColumnsV <= 128;

  struct SharedStorage {
    alignas(1024) Element q[kNumQStages][kBlockQ * kColumnsQK];
    alignas(1024) Element k[kNumStages][kBlockKV * kColumnsQK];
    alignas(1024) Element v[kNumStages][kBlockKV * kColumnsV];
    uint64_t q_full[kNumQStages], q_empty[kNumQStages];
    uint64_t k_full[kNumStages], k_empty[kNumStages], v_full[kNumStages], v_empty[kNumStages];
    uint64_t tile_full[kNumQueryTiles], tile_empty[kNumQueryTiles];
    WorkTile tiles[kNumQueryTiles];
  };
  static constexpr int kSharedBytes = sizeof(SharedStorage);
  static_assert(kSharedBytes <= kMaxSharedBytes);

  // Named barriers: 0 is __syncthreads; then the turns, then one for each warpgroup's own threads.
  static constexpr int kTurnBarrier = 1, kOwnBarrier = kTurnBarrier + kNumConsumers;

  // One function, longer than others: its parts share fragments and rings, and ptxas serializes wgmma in a branch
  // (docs/log.md, 2026-11-22).
  __device__ static void consume(ForwardArguments const& arguments, SharedStorage& shared, int warpgroup) {
    using namespace cute;
    // row_of_thread, written out: called here, it gives ptxas other code (docs/log.md, 2026-11-27).
    int const first_row = warpgroup * kWarpgroupRows + threadIdx.x % kWarpgroupThreads / kWarpThreads * 16 +
                          threadIdx.x % kWarpThreads / 4;
    Problem const& problem = arguments.problem;
    Schedule const& schedule = arguments.schedule;

    MmaS mma_s;
    MmaO mma_o;
    Tensor sQ = make_tensor(make_smem_ptr(shared.q[0]), LayoutQ{});
    Tensor sK = make_tensor(make_smem_ptr(shared.k[0]), LayoutK{});
    Tensor sVt = make_tensor(make_smem_ptr(shared.v[0]), LayoutVt{});
    // wgmma descriptors are uniform per warpgroup. Slicing by warpgroup instead of thread lets ptxas keep them in
    // uniform registers; at 256 there are too few.
    int const slice = kColumnsQK <= 192 ? warpgroup * kWarpgroupThreads : threadIdx.x - kWarpgroupThreads;
    auto thread_s = mma_s.get_slice(slice);
    auto thread_o = mma_o.get_slice(slice);
    Tensor fQ = thread_s.partition_fragment_A(sQ);   // descriptors (_, 1, kColumnsQK/16, kNumQStages)
    Tensor fK = thread_s.partition_fragment_B(sK);   // (_, 1, kColumnsQK/16, kNumStages)
    Tensor fV = thread_o.partition_fragment_B(sVt);  // (_, _, kBlockKV/16, kNumStages)
    Tensor rS = partition_fragment_C(mma_s, Shape<Int<kBlockQ>, Int<kBlockKV>>{});   // fp32, kBlockKV/2 a thread
    Tensor rO = partition_fragment_C(mma_o, Shape<Int<kBlockQ>, Int<kColumnsV>>{});  // fp32, kColumnsV/2 a thread
    // 16 bits, kBlockKV/2 a thread, packed in pairs.
    Tensor rP = make_tensor<Element>(partition_shape_A(mma_o, Shape<Int<kBlockQ>, Int<kBlockKV>>{}));
    static_assert(decltype(size(rS))::value == kScores && decltype(size(rO))::value == kOutputs);

    bool const has_transform = problem.softcap > 0.0f || problem.scale <= 0.0f;
    float const scale_log2 = has_transform ? kLog2e : problem.scale * kLog2e;

    Ring<kNumStages> ring;
    Ring<kNumQStages> q_ring;
    Ring<kNumQueryTiles> slot;

    auto issue_s = [&] {
      warpgroup_fence_operand(rS);
      warpgroup_arrive();
      mma_s.accumulate_ = GMMA::ScaleOut::Zero;
      CUTE_UNROLL
      for (int k = 0; k < kColumnsQK / 16; ++k) {
        cute::gemm(mma_s, fQ(_, _, k, q_ring.stage), fK(_, _, k, ring.stage), rS);
        mma_s.accumulate_ = GMMA::ScaleOut::One;
      }
      warpgroup_commit_batch();
    };
    auto issue_o = [&](int stage, bool is_first) {
      warpgroup_fence_operand(rO);
      warpgroup_fence_operand(rP);
      warpgroup_arrive();
      mma_o.accumulate_ = is_first ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
      CUTE_UNROLL
      for (int k = 0; k < kBlockKV / 16; ++k) {
        cute::gemm(mma_o, rP(_, _, k), fV(_, _, k, stage), rO);
        mma_o.accumulate_ = GMMA::ScaleOut::One;
      }
      warpgroup_commit_batch();
    };
    // Eight consecutive score registers are one A fragment of a 16-column step, in order.
    auto convert_p = [&] {
      auto* pairs = reinterpret_cast<uint32_t*>(rP.data());
      CUTE_UNROLL
      for (int i = 0; i < kScores / 2; ++i) pairs[i] = pack<Element>(rS(2 * i), rS(2 * i + 1));
    };
    auto wait_turn = [&] {
      if constexpr (Tiles::kPingPong) NamedBarrier::sync(2 * kWarpgroupThreads, kTurnBarrier + warpgroup);
    };
    auto pass_turn = [&] {
      if constexpr (Tiles::kPingPong)
        NamedBarrier::arrive(2 * kWarpgroupThreads, kTurnBarrier + (warpgroup + 1) % kNumConsumers);
    };
    // A product completes for the whole warpgroup at once, so one thread arrives for all.
    auto release = [&](uint64_t& barrier) {
      if (threadIdx.x % kWarpgroupThreads == 0) ClusterBarrier::arrive(&barrier);
    };
    auto release_tile = [&](int place) {  // by each warp, since each reads the tile until then
      __syncwarp();
      if (threadIdx.x % kWarpThreads == 0) ClusterBarrier::arrive(&shared.tile_empty[place]);
    };
    // Without a product to wait for, the warps of a warpgroup must not run apart by more than the ring is deep.
    auto sync_warpgroup = [&] { NamedBarrier::sync(kWarpgroupThreads, kOwnBarrier + warpgroup); };
    auto skip_kv_block = [&] {
      ClusterBarrier::wait(&shared.k_full[ring.stage], ring.phase);
      wait_turn();
      pass_turn();
      ClusterBarrier::wait(&shared.v_full[ring.stage], ring.phase);
      sync_warpgroup();
      release(shared.k_empty[ring.stage]);
      release(shared.v_empty[ring.stage]);
      ring.advance();
    };

    auto skip_to_visible = [&] {
      WorkTile const& tile = shared.tiles[slot.stage];
      for (int32_t kv_block = tile.kv_block_end - 1; kv_block >= tile.visible[warpgroup].end; --kv_block)
        skip_kv_block();
    };
    // The Q buffer of the tile before goes back when O has left it.
    bool is_leaving = false;
    auto release_q = [&] {
      if (is_leaving && threadIdx.x % kWarpgroupThreads == 0) {
        cute::tma_store_wait<0>();
        ClusterBarrier::arrive(&shared.q_empty[q_ring.stage_before()]);
      }
      is_leaving = false;
    };
    // Skips work tiles in which this warpgroup sees nothing. Returns false if there is no more work.
    auto find_tile = [&] {
      for (;; q_ring.advance(), slot.advance()) {
        ClusterBarrier::wait(&shared.q_full[q_ring.stage], q_ring.phase);
        WorkTile const& tile = shared.tiles[slot.stage];
        if (tile.head < 0) return false;
        VisibleBlocks const& visible = tile.visible[warpgroup];
        if (visible.begin < visible.end) return true;
        for (int32_t kv_block = tile.kv_block_end - 1; kv_block >= tile.kv_block_begin; --kv_block) skip_kv_block();
        Output::write_masked_rows(arguments, tile, warpgroup);
        sync_warpgroup();
        release(shared.q_empty[q_ring.stage]);
        release_tile(slot.stage);
      }
    };

    if (Tiles::kPingPong && warpgroup == kNumConsumers - 1) pass_turn();  // the first turn is warpgroup 0's
    RowSoftmax softmax(scale_log2);
    float correction[2];
    OutputRows rows;
    int stage_o = 0;          // of the V of the last O += P V
    bool has_output = false;  // the last O += P V, of the tile published before `slot`, still runs
    bool is_found = false;    // `slot` holds a tile that this warpgroup sees, and `ring` is at its first kv_block
    for (;;) {
      auto finish_softmax = [&] {
        Output::finish_rows(arguments, shared.tiles[slot.stage_before()], softmax, warpgroup, first_row, rows);
      };
      auto finish_tile = [&] {
        warpgroup_fence_operand(rO);
        release(shared.v_empty[stage_o]);
        int const old_slot = slot.stage_before();
        WorkTile const& tile = shared.tiles[old_slot];
        Output::write(arguments, shared, tile, rows, rO, warpgroup, first_row, q_ring.stage_before());
        for (int32_t kv_block = tile.visible[warpgroup].begin - 1; kv_block >= tile.kv_block_begin; --kv_block)
          skip_kv_block();
        release_tile(old_slot);
        has_output = false;
        is_leaving = kLooksAhead;
      };
      if constexpr (!kLooksAhead) {
        if (kFinishesEarly && has_output) finish_softmax();
        warpgroup_wait<0>();
        if (!kFinishesEarly && has_output) finish_softmax();
        if (has_output) finish_tile();
        is_found = find_tile();
        if (!is_found) break;
      }
      // A tile's first S is issued at this place only: ptxas would serialize wgmma in a branch. If the tile is not
      // found yet, this S multiplies old data and is discarded.
      if (is_found) {
        skip_to_visible();
        ClusterBarrier::wait(&shared.k_full[ring.stage], ring.phase);
        wait_turn();
      }
      issue_s();
      if (is_found) pass_turn();
      if constexpr (kLooksAhead) {
        if (kFinishesEarly && has_output) finish_softmax();
        warpgroup_wait<1>();
        if (!kFinishesEarly && has_output) finish_softmax();
        if (has_output) finish_tile();
        if (!is_found) {
          warpgroup_wait<0>();
          release_q();  // the Q after the next may be waited for
          is_found = find_tile();
          if (!is_found) break;
          continue;
        }
      }

      WorkTile const& tile = shared.tiles[slot.stage];
      // In registers if there is room.
      std::conditional_t<(kColumnsV > 128 || kNumConsumers > 2), VisibleBlocks const&, VisibleBlocks const> visible =
          tile.visible[warpgroup];
      int32_t kv_block = visible.end - 1;
      auto finish_scores = [&](auto is_first) {
        if (has_transform) transform_scores<kScores>(rS, problem.scale, problem.softcap);
        if (kv_block < visible.unmasked_begin || kv_block >= visible.unmasked_end) {
          int32_t const shift = tile.sequence.seqlen_kv - tile.sequence.seqlen_q;
          int32_t const position[2] = {query_row(schedule, tile, first_row).query + shift,
                                       query_row(schedule, tile, first_row + 8).query + shift};
          mask_scores<kMask, kScores>(rS, arguments.window, tile.sequence.seqlen_kv, kv_block * kBlockKV, position);
        }
        return softmax.template update<is_first()>(rS, correction);
      };
      auto release_s = [&] {
        release(shared.k_empty[ring.stage]);
        if (!kLooksAhead && kv_block == visible.begin)
          release(shared.q_empty[q_ring.stage]);  // that was the last of it
      };
      softmax.reset();
      warpgroup_wait<0>();
      warpgroup_fence_operand(rS);
      release_s();
      finish_scores(std::true_type{});
      convert_p();
      release_q();
      bool is_first = true;
      for (--kv_block; kv_block >= visible.begin; --kv_block) {
        Ring<kNumStages> const ring_o = ring;
        ring.advance();
        ClusterBarrier::wait(&shared.k_full[ring.stage], ring.phase);
        wait_turn();
        issue_s();
        ClusterBarrier::wait(&shared.v_full[ring_o.stage], ring_o.phase);
        issue_o(ring_o.stage, is_first);
        is_first = false;
        pass_turn();
        warpgroup_wait<1>();
        warpgroup_fence_operand(rS);
        release_s();
        bool const has_grown = finish_scores(std::false_type{});
        ptx::keep_before(softmax.row_sum[0] + softmax.row_sum[1]);  // the exponentials, before the wait for O
        warpgroup_wait<0>();
        warpgroup_fence_operand(rO);
        release(shared.v_empty[ring_o.stage]);
        if (has_grown) softmax.settle(rS);
        convert_p();
        if (has_grown) {
          CUTE_UNROLL
          for (int i = 0; i < kOutputs; ++i) rO(i) *= correction[(i / 2) % 2];
        }
      }
      ClusterBarrier::wait(&shared.v_full[ring.stage], ring.phase);
      issue_o(ring.stage, is_first);
      stage_o = ring.stage;
      ring.advance();
      has_output = true;
      is_found = false;
      slot.advance();
      q_ring.advance();
      if constexpr (kLooksAhead) {
        // The next S is multiplied while this O is written, unless this warpgroup must skip kv_blocks first: of this
        // tile, or more of the next than the ring has stages besides the one that O's last V still occupies.
        ClusterBarrier::wait(&shared.q_full[q_ring.stage], q_ring.phase);
        WorkTile const& next = shared.tiles[slot.stage];
        if (kv_block < tile.kv_block_begin && next.head >= 0 &&
            next.visible[warpgroup].begin < next.visible[warpgroup].end) {
          is_found = next.kv_block_end - next.visible[warpgroup].end <= kNumStages - 2;
        }
      }
    }
    if constexpr (kLooksAhead) warpgroup_wait<0>();
    // Takes the last turn: a barrier left half-arrived would hang the CTA's exit.
    if (Tiles::kPingPong && warpgroup == 0) wait_turn();
  }

  __device__ static void run(ForwardArguments const& arguments, SharedStorage& shared) {
    int const warpgroup = cutlass::canonical_warp_group_idx();
    if (threadIdx.x == 0) {
      if (cute::cast_smem_ptr_to_uint(&shared) % 1024 != 0) __trap();
      init_query_barriers<Forward>(shared);
    }
    __syncthreads();
    cutlass::arch::wait_on_dependent_grids();  // schedule_kernel's list
    if (warpgroup == 0) {
      cutlass::arch::warpgroup_reg_dealloc<Tiles::kProducerRegisters>();
      produce_query_tiles<Forward>(arguments, shared);
    } else {
      cutlass::arch::warpgroup_reg_alloc<Tiles::kConsumerRegisters>();
      consume(arguments, shared, warpgroup - 1);
    }
  }
};

template <int kHeadDimQK, int kHeadDimV, MaskKind kMask, class Element>
using ForwardKernel =
    std::conditional_t<ForwardTiles<kHeadDimQK, kHeadDimV, kMask>::kNumCtas == 2,
                       ForwardPair<kHeadDimQK, kMask, Element>, Forward<kHeadDimQK, kHeadDimV, kMask, Element>>;

template <int kHeadDimQK, int kHeadDimV, MaskKind kMask, class Element>
__global__ void __launch_bounds__(ForwardTiles<kHeadDimQK, kHeadDimV, kMask>::kNumThreads, 1)
    forward_kernel(__grid_constant__ ForwardArguments const arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  // Swizzled tiles need 1,024-byte alignment; the dynamic shared memory of a kernel without any other begins so.
  extern __shared__ __align__(1024) unsigned char memory[];
  using Kernel = ForwardKernel<kHeadDimQK, kHeadDimV, kMask, Element>;
  Kernel::run(arguments, *reinterpret_cast<typename Kernel::SharedStorage*>(memory));
#endif
}

}  // namespace flashmla::sm90
