// Hopper backward attention, head dims above 192/128: the warpgroups share a tile of 64 keys by columns.
//
//   S^T = K Q^T      P^T = exp(scale S^T - lse)      dP^T = V dO^T      dS^T = P^T o (dP^T - delta)
//   dV += P^T dO     dK += scale dS^T Q                                              (csrc/params.h, docs/design.md)
//
// dK and dV of 64 keys of 256 columns fill half of the registers of two warpgroups, so each has half of the columns of
// dK and dV, and needs all of P and dS, which pass through shared memory. The products before them are shared as well:
//
//   warpgroup 0:  S   P -> shared | barrier   dV (its columns)                        | barrier   dK (its columns)
//   warpgroup 1:  dP              | barrier   dV            dS from P and dP -> shared | barrier   dK
//
// Both run the same code on other operands: S^T and dP^T are products of the same shape. Issued before dK of the step
// before, they would hide P as well, but Q would have to stay for half a step more, and there is no room for a third.
// Tiles, steps and the producer are those of backward.cuh; dQ is backward_queries.cuh's.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "sm90/backward/backward_math.cuh"

namespace flashmla::sm90 {

template <int kHeadDim, class Element>
struct BackwardWide {
  using Tiles = BackwardTiles<kHeadDim, kHeadDim>;
  static constexpr int kBlockQ = Tiles::kBlockQ;
  static constexpr int kBlockKV = Tiles::kBlockKV;
  static constexpr int kNumStages = Tiles::kNumStages;
  static constexpr int kSwizzleColumns = Tiles::kSwizzleColumns;
  static_assert(kBlockQ == 64 && kBlockKV == 64);
  static constexpr int kNumCtas = 1, kNumLoaders = 2;
  static constexpr bool kSumsDQ = false;         // backward_queries.cuh
  static constexpr int kScores = 32;             // of S or dP, per thread of one warpgroup
  static constexpr int kColumns = kHeadDim / 2;  // of a warpgroup
  static constexpr int kFragment = kColumns / 2;

  using Alone = cute::Layout<cute::Shape<cute::_1, cute::_1, cute::_1>>;
  using ByColumns = cute::Layout<cute::Shape<cute::_1, cute::_2, cute::_1>>;
  template <int kN, int kK, cute::GMMA::Major kMajorA, cute::GMMA::Major kMajorB>
  static constexpr auto select_mma() {
    return cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<cute::_64, cute::Int<kN>, cute::Int<kK>>,
                                      kMajorA, kMajorB>();
  }
  using MmaS = decltype(cute::make_tiled_mma(
      select_mma<kBlockQ, kHeadDim, cute::GMMA::Major::K, cute::GMMA::Major::K>(), Alone{}));
  using MmaDKV = decltype(cute::make_tiled_mma(
      select_mma<kColumns, kBlockQ, cute::GMMA::Major::K, cute::GMMA::Major::MN>(), ByColumns{}));
  static_assert(is_one_wgmma<kBlockQ, MmaS>() && is_one_wgmma<kColumns, MmaDKV>());
  using Layouts = SharedLayouts<Element, kSwizzleColumns>;
  // P^T and dS^T, rows of 64 queries (128 bytes), two in a row.
  using LayoutScores = typename SharedLayouts<Element, 64>::template Rows<kBlockKV, kBlockQ, 2>;

  struct SharedStorage {
    alignas(1024) Element k[kBlockKV * kHeadDim];
    alignas(1024) Element v[kBlockKV * kHeadDim];
    alignas(1024) Element q[kNumStages][kBlockQ * kHeadDim];
    alignas(1024) Element dout[kNumStages][kBlockQ * kHeadDim];
    // Two of P: warpgroup 1 may still multiply by one when warpgroup 0 writes the next. dS is read before the next P
    // is.
    alignas(1024) Element p[2][kBlockKV * kBlockQ];
    alignas(1024) Element ds[kBlockKV * kBlockQ];
    alignas(1024) Element w[kBlockKV * kBlockQ];  // what dP - delta is multiplied by, where that is not P (softcap)
    alignas(128) float lse_log2[kNumStages][kBlockQ];
    alignas(128) float delta[kNumStages][kBlockQ];
    int32_t is_large[kNumStages];
    uint64_t kv_full, kv_empty, work_wanted, tile_full[kNumBackwardTiles], tile_empty[kNumBackwardTiles];
    uint64_t q_full[kNumStages], q_empty[kNumStages], dout_full[kNumStages], dout_empty[kNumStages];
    BlockToClear to_clear[2];  // Q, dO
    BackwardWorkTile tiles[kNumBackwardTiles];
  };
  static constexpr int kSharedBytes = sizeof(SharedStorage);
  static_assert(kSharedBytes <= kMaxSharedBytes);

  static constexpr int kPBarrier = 1, kDSBarrier = 2;  // named; 0 is __syncthreads

  __device__ static void consume(BackwardArguments const& arguments, SharedStorage& shared, int warpgroup) {
    using namespace cute;
    int const thread = ptx::read_thread_index();
    int const row_in_tile = row_of_thread(0, thread);
    int const column_in_block = thread % 4 * 2;
    Problem const& problem = arguments.problem;

    MmaS mma_s;
    MmaDKV mma_dkv;
    auto thread_s = mma_s.get_slice(0);
    auto thread_dkv = mma_dkv.get_slice(warpgroup * kWarpgroupThreads);
    auto tensor = [](Element* data, auto layout) { return make_tensor(make_smem_ptr(data), layout); };
    bool const is_first = warpgroup == 0;
    // Descriptors (_, 1, depth / 16, stages): K and Q of warpgroup 0, V and dO of warpgroup 1; t: read transposed.
    Tensor fA = thread_s.partition_fragment_A(
        tensor(is_first ? shared.k : shared.v, typename Layouts::template Rows<kBlockKV, kHeadDim, 1>{}));
    Tensor fB = thread_s.partition_fragment_B(tensor(is_first ? shared.q[0] : shared.dout[0],
                                                     typename Layouts::template Rows<kBlockQ, kHeadDim, kNumStages>{}));
    using Stages = typename Layouts::template Columns<kBlockQ, kHeadDim, kNumStages>;
    Tensor fQt = thread_dkv.partition_fragment_B(tensor(shared.q[0], Stages{}));
    Tensor fDOt = thread_dkv.partition_fragment_B(tensor(shared.dout[0], Stages{}));
    Tensor fP = thread_dkv.partition_fragment_A(tensor(shared.p[0], LayoutScores{}));
    Tensor fDSt = thread_dkv.partition_fragment_A(tensor(shared.ds, LayoutScores{}));

    Tensor rDK = partition_fragment_C(mma_dkv, Shape<Int<kBlockKV>, Int<kHeadDim>>{});  // fp32, kHeadDim/4 a thread
    Tensor rDV = partition_fragment_C(mma_dkv, Shape<Int<kBlockKV>, Int<kHeadDim>>{});  // kHeadDim/4
    Tensor rS = partition_fragment_C(mma_s, Shape<Int<kBlockKV>, Int<kBlockQ>>{});      // S^T or dP^T, 32
    static_assert(decltype(size(rS))::value == kScores && decltype(size(rDK))::value == kFragment);
    auto arrive = [&](uint64_t& barrier) {
      __syncwarp();
      if (threadIdx.x % kWarpThreads == 0) ClusterBarrier::arrive(&barrier);
    };

    static_assert(kNumStages == 2);
    Ring<kNumStages> ring;
    Ring<kNumBackwardTiles> slot;
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

      BackwardStep step(tile);
      for (int32_t i = 0; i < num_steps; ++i, step.advance(tile), ring.advance()) {
        int const stage = ring.stage;
        ClusterBarrier::wait(&shared.q_full[stage], ring.phase);
        ClusterBarrier::wait(&shared.dout_full[stage], ring.phase);
        multiply(mma_s, fA(_, _, _, 0), fB(_, _, _, stage), rS, false);
        ColumnValues<kScores, kScores / 8> values(is_first ? shared.lse_log2[stage] : shared.delta[stage],
                                                  threadIdx.x % 4);
        warpgroup_wait<0>();  // with dK of the step before
        warpgroup_fence_operand(rS);
        warpgroup_fence_operand(rDK);
        if (i > 0) arrive(shared.q_empty[ring.stage_before()]);
        bool const has_softcap = problem.softcap > 0.0f;
        if (is_first) {
          uint32_t pairs_p[kScores / 2], pairs_w[kScores / 2];
          probabilities<Element, true, kScores>(arguments, tile, step.q_block * kBlockQ, rS, pairs_p, pairs_w, values,
                                                shared.is_large[stage] != 0, 0, row_in_tile, column_in_block);
          store_scores<kBlockKV>(shared.p[stage], pairs_p, 0);
          if (has_softcap) store_scores<kBlockKV>(shared.w, pairs_w, 0);
          cutlass::arch::fence_view_async_shared();
        }
        NamedBarrier::sync(2 * kWarpgroupThreads, kPBarrier);
        multiply(mma_dkv, fP(_, _, _, stage), fDOt(_, _, _, stage), rDV, true);
        if (!is_first) {
          uint32_t pairs_w[kScores / 2], pairs_ds[kScores / 2];
          load_scores(has_softcap ? shared.w : shared.p[stage], pairs_w, 0);
          score_gradients<Element, kScores>(rS, pairs_w, pairs_ds, values);
          store_scores<kBlockKV>(shared.ds, pairs_ds, 0);
          cutlass::arch::fence_view_async_shared();
        }
        NamedBarrier::sync(2 * kWarpgroupThreads, kDSBarrier);
        multiply(mma_dkv, fDSt(_, _, _, 0), fQt(_, _, _, stage), rDK, true);
        warpgroup_wait<1>();  // dV
        warpgroup_fence_operand(rDV);
        arrive(shared.dout_empty[stage]);
      }
      warpgroup_wait<0>();
      warpgroup_fence_operand(rDK);
      if (num_steps > 0) {
        arrive(shared.q_empty[ring.stage_before()]);
        arrive(shared.kv_empty);
      }
      if (arguments.parts == nullptr) {
        write_keys<Element, kColumns>(arguments, tile, arguments.dk, rDK, problem.scale, row_in_tile,
                                      warpgroup * kColumns, problem.head_dim_qk);
        write_keys<Element, kColumns>(arguments, tile, arguments.dv, rDV, 1.0f, row_in_tile, warpgroup * kColumns,
                                      problem.head_dim_v);
      } else {
        float* const part = part_of<kBlockKV, kHeadDim, kHeadDim>(arguments, tile);
        write_part<kFragment>(part, rDK);
        write_part<kFragment>(part + kBlockKV * kHeadDim, rDV);
      }
      arrive(shared.tile_empty[slot.stage]);
    }
  }
};

}  // namespace flashmla::sm90
