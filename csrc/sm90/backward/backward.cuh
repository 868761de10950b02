// Hopper backward attention, head dims up to 192/128: a warpgroup keeps dK and dV of 64 key rows in registers.
//
//   S^T = K Q^T      P^T = exp(scale S^T - lse)      dP^T = V dO^T      dS^T = P^T o (dP^T - delta)
//   dV += P^T dO     dK += scale dS^T Q              dQ += scale dS K                (csrc/params.h, docs/design.md)
//
// Schedule. A CTA is one producer warpgroup, of which four threads work, and two consumer warpgroups, and is
// persistent. A work tile is kBlockKV key rows of one kv head: K and V stay in shared memory while Q and dO of every
// query head of the group stream by, so dK and dV are sums in registers, written once, whatever the GQA ratio. Scores
// are held transposed (keys down, queries across): P^T and dS^T are A operands as they are, and lse and delta are
// vectors along the row. A consumer warpgroup keeps the tensor cores busy while it does arithmetic; a step i is a
// q_block of one head:
//
//   wait S(i)   issue dP   P   issue dV, dQ(i-1)   wait dP   dS -> shared   issue dK   wait dQ(i-1)   stage it
//   issue S(i+1)
//
// dQ takes dS of both warpgroups, and is multiplied a step late so that neither waits for the other: they may be most
// of a step apart, one at arithmetic while the other has the tensor cores. If registers are short (kDelaysDQ false)
// a step is
//
//   issue S   wait   P   issue dP, dV   wait   dS -> shared   barrier   issue dQ, dK   wait dQ   stage it
//
// dQ gets a part from every key tile, added to fp32 sums in a workspace that keeps the order of the fragments
// (BackwardRows): consumers stage it in shared memory, from where the copy engine adds it (reduce_dq), or, if there is
// no room for that, add it themselves.
//
// Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2; FlashAttention-3 (arXiv 2407.08608) for the roles of warps.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/grid_dependency_control.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/tensor.hpp>

#include "params.h"
#include "sm90/backward/backward_math.cuh"
#include "sm90/backward/backward_pair.cuh"
#include "sm90/backward/backward_wide.cuh"
#include "sm90/hopper/fragment.cuh"
#include "sm90/hopper/ptx.cuh"
#include "sm90/tiles.h"

namespace flashmla::sm90 {

template <int kHeadDimQK, int kHeadDimV, bool kHasSoftcap, class Element>
struct Backward {
  using Tiles = BackwardTiles<kHeadDimQK, kHeadDimV>;
  static constexpr int kBlockQ = Tiles::kBlockQ;
  static constexpr int kBlockKV = Tiles::kBlockKV;
  static constexpr int kNumStages = Tiles::kNumStages;
  static constexpr int kSwizzleColumns = Tiles::kSwizzleColumns, kSwizzleColumnsK = Tiles::kSwizzleColumnsK;
  static_assert(kBlockKV == 128, "64 key rows for each of two warpgroups");

  static constexpr int kScores = kBlockQ / 2;  // per thread
  // dK and dV leave no room for P beside dP: P goes to shared memory before dP is multiplied, and is read back.
  static constexpr bool kSpillsPToShared = kHeadDimQK + kHeadDimV > 256;
  // dQ of a step is multiplied in the next one, if there are registers for it beside dP.
  static constexpr bool kDelaysDQ = !kSpillsPToShared && !kHasSoftcap;
  static constexpr int kReadsAhead = kScores > 32 || kHasSoftcap ? 2 : kScores / 8;  // fours of lse, or delta
  static constexpr int kNumDS = kDelaysDQ ? 3 : 2;  // so that one barrier a step is enough
  // Whether the last dQ of a tile waits until dK and dV are written: the one before it may still be on its way. With
  // wider heads that keeps too many registers.
  static constexpr bool kStagesLastDQLate = kHeadDimQK <= 64;
  static constexpr int kNumCtas = 1, kNumLoaders = 2;
  static constexpr bool kSumsDQ = true;
  // A warpgroup's part of dQ passes through shared memory, if there is room for it.
  static constexpr bool kStagesDQ = !kSpillsPToShared;
  static constexpr int kPartDQ = kBlockQ * kHeadDimQK / 2;
  static constexpr int kFragmentDQ = kBlockQ * kHeadDimQK / 256;

  template <int kM, int kN, int kK>
  using BlockShape = cute::Shape<cute::Int<kM>, cute::Int<kN>, cute::Int<kK>>;
  using ByKeys = cute::Layout<cute::Shape<cute::_2, cute::_1, cute::_1>>;
  // dQ of 128 queries is split by queries, of 64 by columns.
  static constexpr bool kSplitsQueries = kBlockQ == 128;
  using ByQueries = std::conditional_t<kSplitsQueries, ByKeys, cute::Layout<cute::Shape<cute::_1, cute::_2, cute::_1>>>;
  using MmaS = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, BlockShape<kBlockKV, kBlockQ, kHeadDimQK>>(), ByKeys{}));
  // dS^T stays in registers until dK is done with it, if there are enough; else dK reads it from shared memory, where
  // dQ needs it anyway.
  template <int kN>
  using SharedMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, BlockShape<kBlockKV, kN, kBlockQ>, cute::GMMA::Major::K,
                                 cute::GMMA::Major::MN>(),
      ByKeys{}));
  template <int kN>
  using RegisterMma = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float, BlockShape<kBlockKV, kN, kBlockQ>, cute::GMMA::Major::K,
                                 cute::GMMA::Major::MN>(),
      ByKeys{}));
  using MmaDK = std::conditional_t<kDelaysDQ, RegisterMma<kHeadDimQK>, SharedMma<kHeadDimQK>>;
  using MmaDV = std::conditional_t<kSpillsPToShared, SharedMma<kHeadDimV>, RegisterMma<kHeadDimV>>;
  using MmaDQ = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 BlockShape<kBlockQ, kSplitsQueries ? kHeadDimQK : kHeadDimQK / 2, kBlockKV>,
                                 cute::GMMA::Major::MN, cute::GMMA::Major::MN>(),
      ByQueries{}));
  static_assert(is_one_wgmma<kBlockQ, MmaS>() && is_one_wgmma<kHeadDimQK, MmaDK>() && is_one_wgmma<kHeadDimV, MmaDV>());
  static_assert(is_one_wgmma<kSplitsQueries ? kHeadDimQK : kHeadDimQK / 2, MmaDQ>());

  template <int kRows, int kColumns, int kDepth>
  using LayoutRows = typename SharedLayouts<Element, kSwizzleColumns>::template Rows<kRows, kColumns, kDepth>;
  template <int kRows, int kColumns, int kDepth>
  using LayoutColumns = typename SharedLayouts<Element, kSwizzleColumns>::template Columns<kRows, kColumns, kDepth>;
  using LayoutK = typename SharedLayouts<Element, kSwizzleColumnsK>::template Rows<kBlockKV, kHeadDimQK, 1>;
  using LayoutKt = typename SharedLayouts<Element, kSwizzleColumnsK>::template Columns<kBlockKV, kHeadDimQK, 1>;
  // dS^T, rows of 64 queries (128 bytes) whatever the head dim; and read as dS.
  using LayoutDSt = typename SharedLayouts<Element, 64>::template Rows<kBlockKV, kBlockQ, kNumDS>;
  using LayoutDS = typename SharedLayouts<Element, 64>::template Columns<kBlockKV, kBlockQ, kNumDS>;
  using LayoutP = typename SharedLayouts<Element, 64>::template Rows<kBlockKV, kBlockQ, 1>;

  struct SharedStorage {
    alignas(1024) Element k[kBlockKV * kHeadDimQK];
    alignas(1024) Element v[kBlockKV * kHeadDimV];
    alignas(1024) Element q[kNumStages][kBlockQ * kHeadDimQK];
    alignas(1024) Element dout[kNumStages][kBlockQ * kHeadDimV];
    alignas(1024) Element ds[kNumDS][kBlockQ * kBlockKV];
    alignas(1024) Element p[kSpillsPToShared ? kBlockQ * kBlockKV : 8];
    alignas(128) float dq[2][kStagesDQ ? kPartDQ : 4];
    alignas(128) float lse_log2[kNumStages][kBlockQ];
    alignas(128) float delta[kNumStages][kBlockQ];
    int32_t is_large[kNumStages], q_block[kNumStages];
    uint64_t kv_full, kv_empty, work_wanted, tile_full[kNumBackwardTiles], tile_empty[kNumBackwardTiles];
    uint64_t q_full[kNumStages], q_empty[kNumStages], dout_full[kNumStages], dout_empty[kNumStages];
    BlockToClear to_clear[2];  // Q, dO
    uint64_t dq_empty[kNumStages], dq_full[kNumStages];
    BackwardWorkTile tiles[kNumBackwardTiles];
  };
  static constexpr int kSharedBytes = sizeof(SharedStorage);
  static_assert(kSharedBytes <= kMaxSharedBytes);

  // Named barriers; 0 is __syncthreads.
  static constexpr int kDSBarrier = 1, kOwnBarrier = 2;
  __device__ static int ds_barrier(int warpgroup, int stage) { return 1 + warpgroup * kNumDS + stage; }

  // One function with two schedules, longer than others: they share fragments and rings. A function (lambda) for each
  // schedule's step was tried: ptxas orders every kernel's instructions differently then (docs/log.md, 2026-11-27).
  __device__ static void consume(BackwardArguments const& arguments, SharedStorage& shared, int warpgroup) {
    using namespace cute;
    int const thread = ptx::read_thread_index();
    int const row_in_tile = row_of_thread(warpgroup * kWarpgroupRows, thread);
    int const column_in_block = thread % 4 * 2, quad_lane = thread % 4;
    Problem const& problem = arguments.problem;

    MmaS mma_s;
    MmaDK mma_dk;
    MmaDV mma_dv;
    MmaDQ mma_dq;
    // wgmma descriptors are uniform per warpgroup: sliced by warpgroup, they stay in uniform registers.
    auto thread_s = mma_s.get_slice(warpgroup * kWarpgroupThreads);
    auto thread_dk = mma_dk.get_slice(warpgroup * kWarpgroupThreads);
    auto thread_dv = mma_dv.get_slice(warpgroup * kWarpgroupThreads);
    auto thread_dq = mma_dq.get_slice(warpgroup * kWarpgroupThreads);
    auto rows = [](Element* data, auto layout) { return make_tensor(make_smem_ptr(data), layout); };
    // Descriptors (_, rows / 64 or columns, depth / 16, stages); t: read transposed.
    Tensor fK = thread_s.partition_fragment_A(rows(shared.k, LayoutK{}));
    Tensor fV = thread_s.partition_fragment_A(rows(shared.v, LayoutRows<kBlockKV, kHeadDimV, 1>{}));
    Tensor fQ = thread_s.partition_fragment_B(rows(shared.q[0], LayoutRows<kBlockQ, kHeadDimQK, kNumStages>{}));
    Tensor fDO = thread_s.partition_fragment_B(rows(shared.dout[0], LayoutRows<kBlockQ, kHeadDimV, kNumStages>{}));
    Tensor fQt = thread_dk.partition_fragment_B(rows(shared.q[0], LayoutColumns<kBlockQ, kHeadDimQK, kNumStages>{}));
    Tensor fDOt = thread_dv.partition_fragment_B(rows(shared.dout[0], LayoutColumns<kBlockQ, kHeadDimV, kNumStages>{}));
    Tensor fDS = thread_dq.partition_fragment_A(rows(shared.ds[0], LayoutDS{}));
    auto thread_scores = SharedMma<kHeadDimQK>{}.get_slice(warpgroup * kWarpgroupThreads);
    Tensor fDSt = thread_scores.partition_fragment_A(rows(shared.ds[0], LayoutDSt{}));
    Tensor fP = thread_scores.partition_fragment_A(rows(shared.p, LayoutP{}));
    Tensor fKt = thread_dq.partition_fragment_B(rows(shared.k, LayoutKt{}));

    Tensor rDK = partition_fragment_C(mma_dk, Shape<Int<kBlockKV>, Int<kHeadDimQK>>{});   // fp32, kHeadDimQK/2 a thread
    Tensor rDV = partition_fragment_C(mma_dv, Shape<Int<kBlockKV>, Int<kHeadDimV>>{});    // kHeadDimV/2
    Tensor rS = partition_fragment_C(mma_s, Shape<Int<kBlockKV>, Int<kBlockQ>>{});        // S^T, kBlockQ/2
    Tensor rDP = partition_fragment_C(mma_s, Shape<Int<kBlockKV>, Int<kBlockQ>>{});       // dP^T, kBlockQ/2
    Tensor rDQ = partition_fragment_C(mma_dq, Shape<Int<kBlockQ>, Int<kHeadDimQK>>{});    // kBlockQ * kHeadDimQK / 256
    Tensor rP = make_tensor<Element>(Shape<Shape<_2, _2, _2>, _1, Int<kBlockQ / 16>>{});  // P^T, 16 bits, an A operand
    Tensor rDS = make_tensor_like(rP);                                                    // dS^T
    static_assert(decltype(size(rS))::value == kScores && decltype(size(rDQ))::value == kFragmentDQ);
    auto& pairs_p = reinterpret_cast<uint32_t (&)[kScores / 2]>(*rP.data());
    auto& pairs_ds = reinterpret_cast<uint32_t (&)[kScores / 2]>(*rDS.data());

    uint32_t pairs_capped[kScores / 2];  // P (1 - tanh^2); without softcap never touched
    auto& pairs_w = kHasSoftcap ? pairs_capped : pairs_p;
    Ring<kNumStages> ring;
    Ring<kNumDS> ds;
    Ring<kNumBackwardTiles> slot;

    auto arrive = [&](uint64_t& barrier) {
      __syncwarp();
      if (thread % kWarpThreads == 0) ClusterBarrier::arrive(&barrier);
    };
    // Stages dQ in shared memory for the copy engine (reduce_dq), or adds it to the sums from the registers.
    auto stage_dq = [&](BackwardWorkTile const& tile, BackwardStep const& step, int stage, uint32_t phase) {
      BackwardRows const& rows = arguments.rows;
      bool const has_semaphore = kStagesDQ || rows.dq_semaphore != nullptr;
      if (has_semaphore) ClusterBarrier::wait(&shared.dq_empty[stage], phase);
      constexpr int kVectors = kFragmentDQ / 4;
      auto vector = [&](int i) { return float4{rDQ(4 * i), rDQ(4 * i + 1), rDQ(4 * i + 2), rDQ(4 * i + 3)}; };
      if constexpr (kStagesDQ) {
        float4* const target = reinterpret_cast<float4*>(shared.dq[warpgroup]) + thread % kWarpgroupThreads;
        CUTE_UNROLL
        for (int i = 0; i < kVectors; ++i) target[i * kWarpgroupThreads] = vector(i);
      } else if (rows.dq != nullptr) {
        // In floats, with the thread's own offset apart: of one sum of addresses, ptxas makes a step 7 % longer.
        int const offset = (warpgroup * kVectors * kWarpgroupThreads + threadIdx.x % kWarpgroupThreads) * 4;
        float* const target = rows.dq + workspace_block_of<kBlockQ>(rows, tile, step) * (kBlockQ * kHeadDimQK) + offset;
        CUTE_UNROLL
        for (int i = 0; i < kVectors; ++i) {
          float4 const x = vector(i);
          ptx::reduce_add(target + i * 4 * kWarpgroupThreads, x);
        }
      }
      if (has_semaphore) arrive(shared.dq_full[stage]);
    };

    auto stage_last_dq = [&](BackwardWorkTile const& tile, BackwardStep const& step) {
      stage_dq(tile, step, ring.before().stage, ring.before().phase);
    };

    static_assert(kNumStages == 2);
    for (;; slot.advance()) {
      ClusterBarrier::wait(&shared.tile_full[slot.stage], slot.phase);
      BackwardWorkTile const& tile = shared.tiles[slot.stage];
      if (tile.head_kv < 0) break;
      int32_t const num_steps = tile.num_steps();
      clear(rDK);
      clear(rDV);
      warpgroup_fence_operand(rDK);  // before S is on its way, not after
      warpgroup_fence_operand(rDV);
      if (num_steps > 0) ClusterBarrier::wait(&shared.kv_full, tile.kv_phase);
      // Without a step, and after the last, S is multiplied from old data and discarded, and so is dQ in the first
      // step: ptxas would serialize wgmma in a branch.
      auto multiply_s = [&] { multiply(mma_s, fK(_, _, _, 0), fQ(_, _, _, ring.stage), rS, false); };
      auto multiply_dp = [&](int stage) { multiply(mma_s, fV(_, _, _, 0), fDO(_, _, _, stage), rDP, false); };
      auto multiply_dq = [&](int stage) { multiply(mma_dq, fDS(_, _, _, stage), fKt(_, _, _, 0), rDQ, false); };
      auto wait_q = [&] { ClusterBarrier::wait(&shared.q_full[ring.stage], ring.phase); };
      if (num_steps > 0) wait_q();
      if constexpr (kDelaysDQ) multiply_s();

      BackwardStep step(tile);
      for (int32_t i = 0; i < num_steps; ++i, step.advance(tile, arguments.rows)) {  // needed where dQ is not staged
        int const stage = ring.stage;
        if constexpr (!kDelaysDQ) multiply_s();
        ColumnValues<kScores, kReadsAhead> lse_log2(shared.lse_log2[stage], quad_lane);
        warpgroup_wait<0>();  // S, and dK of the step before
        warpgroup_fence_operand(rS);
        warpgroup_fence_operand(rDK);
        if (i > 0) arrive(shared.q_empty[ring.stage_before()]);
        ClusterBarrier::wait(&shared.dout_full[stage], ring.phase);
        if constexpr (!kSpillsPToShared) multiply_dp(stage);
        probabilities<Element, kHasSoftcap, kScores>(arguments, tile, shared.q_block[stage] * kBlockQ, rS, pairs_p,
                                                     pairs_w, lse_log2, shared.is_large[stage] != 0,
                                                     warpgroup * kWarpgroupRows, row_in_tile, column_in_block);
        if constexpr (kSpillsPToShared) {
          store_scores<kBlockKV>(shared.p, pairs_p, warpgroup * kWarpgroupRows);
          cutlass::arch::fence_view_async_shared();
          NamedBarrier::sync(kWarpgroupThreads, kOwnBarrier + warpgroup);
          multiply_dp(stage);
          multiply(mma_dv, fP(_, _, _, 0), fDOt(_, _, _, stage), rDV, true);
        } else {
          multiply(mma_dv, rP, fDOt(_, _, _, stage), rDV, true);
        }
        if constexpr (kDelaysDQ) {
          int const last = ds.before().stage;
          if (i > 0) NamedBarrier::sync(2 * kWarpgroupThreads, ds_barrier(1 - warpgroup, last));
          multiply_dq(last);
          ColumnValues<kScores, kReadsAhead> delta(shared.delta[stage], quad_lane);
          warpgroup_wait<2>();
          warpgroup_fence_operand(rDP);
          score_gradients<Element, kScores>(rDP, pairs_w, pairs_ds, delta);
          store_scores<kBlockKV>(shared.ds[ds.stage], pairs_ds, warpgroup * kWarpgroupRows);
          cutlass::arch::fence_view_async_shared();
          NamedBarrier::arrive(2 * kWarpgroupThreads, ds_barrier(warpgroup, ds.stage));
          ds.advance();
          multiply(mma_dk, rDS, fQt(_, _, _, stage), rDK, true);
          warpgroup_wait<1>();  // dV and dQ
          warpgroup_fence_operand(rDQ);
          warpgroup_fence_operand(rDV);
          arrive(shared.dout_empty[stage]);
          if (i > 0) stage_last_dq(tile, step);
          ring.advance();
          if (i + 1 < num_steps) wait_q();
          multiply_s();
        } else {
          ColumnValues<kScores, kReadsAhead> delta(shared.delta[stage], quad_lane);
          warpgroup_wait<1>();
          warpgroup_fence_operand(rDP);
          if constexpr (kSpillsPToShared) load_scores(shared.p, pairs_p, warpgroup * kWarpgroupRows);
          score_gradients<Element, kScores>(rDP, pairs_w, pairs_ds, delta);
          store_scores<kBlockKV>(shared.ds[stage], pairs_ds, warpgroup * kWarpgroupRows);
          cutlass::arch::fence_view_async_shared();
          NamedBarrier::sync(2 * kWarpgroupThreads, kDSBarrier);
          multiply_dq(stage);
          multiply(mma_dk, fDSt(_, _, _, stage), fQt(_, _, _, stage), rDK, true);
          ring.advance();
          if (i + 1 < num_steps) wait_q();
          warpgroup_wait<1>();  // dV and dQ
          warpgroup_fence_operand(rDQ);
          warpgroup_fence_operand(rDV);
          arrive(shared.dout_empty[stage]);
          // The phase of this step: the ring is one step ahead, and its phase changed if this step was in the last of
          // two stages. (ring.before().phase is the same number from other instructions.)
          stage_dq(tile, step, stage, ring.phase ^ stage);
        }
      }
      warpgroup_wait<0>();
      warpgroup_fence_operand(rDK);
      warpgroup_fence_operand(rS);
      if (num_steps > 0) arrive(shared.q_empty[ring.stage_before()]);
      if constexpr (kDelaysDQ) {
        int const last = ds.before().stage;
        if (num_steps > 0) NamedBarrier::sync(2 * kWarpgroupThreads, ds_barrier(1 - warpgroup, last));
        multiply_dq(last);
        warpgroup_wait<0>();
        warpgroup_fence_operand(rDQ);
      }
      if (num_steps > 0) arrive(shared.kv_empty);
      if (kDelaysDQ && !kStagesLastDQLate && num_steps > 0) stage_last_dq(tile, step);
      if (arguments.parts == nullptr) {
        write_keys<Element, kHeadDimQK>(arguments, tile, arguments.dk, rDK, problem.scale, row_in_tile, 0,
                                        problem.head_dim_qk);
        write_keys<Element, kHeadDimV>(arguments, tile, arguments.dv, rDV, 1.0f, row_in_tile, 0, problem.head_dim_v);
      } else {
        float* const part = part_of<kBlockKV, kHeadDimQK, kHeadDimV>(arguments, tile);
        write_part<kHeadDimQK / 2>(part, rDK);
        write_part<kHeadDimV / 2>(part + kBlockKV * kHeadDimQK, rDV);
      }
      if (kDelaysDQ && kStagesLastDQLate && num_steps > 0) stage_last_dq(tile, step);
      arrive(shared.tile_empty[slot.stage]);
    }
  }
};

template <int kHeadDimQK, int kHeadDimV, bool kHasSoftcap, class Element>
using BackwardKernel = std::conditional_t<
    BackwardTiles<kHeadDimQK, kHeadDimV>::kNumCtas == 2, BackwardPair<kHeadDimQK, Element>,
    std::conditional_t<BackwardTiles<kHeadDimQK, kHeadDimV>::kSplitsColumns, BackwardWide<kHeadDimQK, Element>,
                       Backward<kHeadDimQK, kHeadDimV, kHasSoftcap, Element>>>;

template <int kHeadDimQK, int kHeadDimV, bool kHasSoftcap, class Element>
__global__ void __launch_bounds__(BackwardTiles<kHeadDimQK, kHeadDimV>::kNumThreads, 1)
    backward_kernel(__grid_constant__ BackwardArguments const arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Kernel = BackwardKernel<kHeadDimQK, kHeadDimV, kHasSoftcap, Element>;
  // Swizzled tiles need 1,024-byte alignment; the dynamic shared memory of a kernel without any other begins so.
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<typename Kernel::SharedStorage*>(memory);
  int const warpgroup = cutlass::canonical_warp_group_idx();
  if (threadIdx.x == 0) {
    if (cute::cast_smem_ptr_to_uint(&shared) % 1024 != 0) __trap();
    init_backward_barriers<Kernel>(shared);
  }
  sync_ctas<Kernel::kNumCtas>();
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Kernel::Tiles::kProducerRegisters>();
    produce_backward_tiles<Kernel, kHeadDimQK, kHeadDimV>(arguments, shared);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Kernel::Tiles::kConsumerRegisters>();
    cutlass::arch::wait_on_dependent_grids();  // dQ is zero now
    Kernel::consume(arguments, shared, warpgroup - 1);
  }
  if constexpr (Kernel::kNumCtas == 2) sync_ctas<Kernel::kNumCtas>();
#endif
}

}  // namespace flashmla::sm90
