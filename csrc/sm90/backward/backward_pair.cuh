// Hopper backward attention, head dims above 256: two CTAs of a cluster share a tile of 64 keys by operands.
//
//   S^T = K Q^T      P^T = exp(scale S^T - lse)      dP^T = V dO^T      dS^T = P^T o (dP^T - delta)
//   dV += P^T dO     dK += scale dS^T Q                                              (csrc/params.h, docs/design.md)
//
// 512 columns of dK, in fp32, of 64 keys fill the registers of two warpgroups. One CTA has K, Q and dK, the other V, dO
// and dV; each has all columns of what it multiplies, so that nothing is multiplied twice and no sum is split. They
// give each other P^T and dS^T, 8 KiB of 16-bit elements a step, from registers to the other's shared memory:
//
//   CTA of K:  S(i)   P(i) -> V           wait dS(i)   dK(i)
//   CTA of V:  dP(i)  wait P(i)   dS(i) -> K           dV(i)
//
// The two warpgroups of a CTA share S (or dP) by queries, and dK (or dV) by columns. Tiles, steps and the loading
// thread are those of backward_producer.cuh; dQ is backward_queries.cuh's.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "sm90/backward/backward_math.cuh"
#include "sm90/hopper/cta_pair.cuh"

namespace flashmla::sm90 {

template <int kHeadDim, class Element>
struct BackwardPair {
  using Tiles = BackwardTiles<kHeadDim, kHeadDim>;
  static constexpr int kNumCtas = Tiles::kNumCtas;
  static constexpr int kBlockQ = Tiles::kBlockQ;
  static constexpr int kBlockKV = Tiles::kBlockKV;
  static constexpr int kNumStages = Tiles::kNumStages;
  static constexpr int kSwizzleColumns = Tiles::kSwizzleColumns;
  static_assert(kNumCtas == 2 && kBlockQ == 64 && kBlockKV == 64 && kNumStages == 2);
  static constexpr bool kSumsDQ = false;  // backward_queries.cuh
  static constexpr int kNumLoaders = 1;
  static constexpr int kQueries = kBlockQ / 2;   // of S or dP, of a warpgroup
  static constexpr int kScores = kQueries / 2;   // per thread
  static constexpr int kColumns = kHeadDim / 2;  // of dK or dV, of a warpgroup
  static constexpr int kFragment = kColumns / 2;

  using ByColumns = cute::Layout<cute::Shape<cute::_1, cute::_2, cute::_1>>;
  template <int kN, int kK, cute::GMMA::Major kMajorB>
  static constexpr auto select_mma() {
    return cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<cute::_64, cute::Int<kN>, cute::Int<kK>>,
                                      cute::GMMA::Major::K, kMajorB>();
  }
  using MmaS = decltype(cute::make_tiled_mma(select_mma<kQueries, kHeadDim, cute::GMMA::Major::K>(), ByColumns{}));
  using MmaSum = decltype(cute::make_tiled_mma(select_mma<kColumns, kBlockQ, cute::GMMA::Major::MN>(), ByColumns{}));
  static_assert(is_one_wgmma<kQueries, MmaS>() && is_one_wgmma<kColumns, MmaSum>());
  using Layouts = SharedLayouts<Element, kSwizzleColumns>;
  // P^T or dS^T, rows of 64 queries (128 bytes).
  using LayoutScores = typename SharedLayouts<Element, 64>::template Rows<kBlockKV, kBlockQ, kNumStages>;

  struct SharedStorage {
    alignas(1024) Element kv[kBlockKV * kHeadDim];                 // K, or V
    alignas(1024) Element q[kNumStages][kBlockQ * kHeadDim];       // Q, or dO
    alignas(1024) Element scores[kNumStages][kBlockKV * kBlockQ];  // what the other CTA gives: dS^T, or P^T
    alignas(
        1024) Element w[kNumStages][kBlockKV * kBlockQ];  // of V: what dP - delta is multiplied by, if not P (softcap)
    alignas(128) float statistics[kNumStages][kBlockQ];   // lse_log2, or delta
    int32_t is_large[kNumStages];
    uint64_t kv_full, kv_empty, work_wanted, tile_full[kNumBackwardTiles], tile_empty[kNumBackwardTiles];
    uint64_t q_full[kNumStages], q_empty[kNumStages];
    uint64_t scores_full[kNumStages], scores_empty[kNumStages];  // here; of the other CTA
    BlockToClear to_clear[1];
    BackwardWorkTile tiles[kNumBackwardTiles];
  };
  static constexpr int kSharedBytes = sizeof(SharedStorage);
  static_assert(kSharedBytes <= kMaxSharedBytes);

  // A warpgroup's 64 keys x 32 queries, packed, to the other CTA's `target`: a row of a quad is 64 bytes.
  __device__ static void send(Element* target, uint64_t& full, uint32_t other, uint32_t (&pairs)[kScores / 2],
                              int warpgroup, int row) {
    uint32_t const barrier = ptx::address_in(other, &full);
    int const quad_lane = threadIdx.x % 4;
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      uint32_t columns[4] = {pairs[r], pairs[2 + r], pairs[4 + r], pairs[6 + r]};
      transpose_quad(columns, quad_lane);
      int const key = row + 8 * r;
      uint32_t const address = ptx::address_in(other, target) + key * 128 + (warpgroup * 4 + quad_lane ^ key % 8) * 16;
      ptx::store_async(address, barrier, columns[0], columns[1], columns[2], columns[3]);
    }
  }

  __device__ static void consume(BackwardArguments const& arguments, SharedStorage& shared, int warpgroup) {
    using namespace cute;
    int const thread = ptx::read_thread_index();
    int const row_in_tile = row_of_thread(0, thread);
    int const column_in_block = thread % 4 * 2;
    Problem const& problem = arguments.problem;
    int const rank = cta_rank<kNumCtas>();
    uint32_t const other = static_cast<uint32_t>(rank) ^ 1;
    bool const has_keys = rank == 0, has_softcap = problem.softcap > 0.0f;

    MmaS mma_s;
    MmaSum mma_sum;
    auto thread_s = mma_s.get_slice(warpgroup * kWarpgroupThreads);
    auto thread_sum = mma_sum.get_slice(warpgroup * kWarpgroupThreads);
    auto tensor = [](Element* data, auto layout) { return make_tensor(make_smem_ptr(data), layout); };
    // Descriptors (_, 1, depth / 16, stages); t: read transposed.
    Tensor fKV =
        thread_s.partition_fragment_A(tensor(shared.kv, typename Layouts::template Rows<kBlockKV, kHeadDim, 1>{}));
    Tensor fQ = thread_s.partition_fragment_B(
        tensor(shared.q[0], typename Layouts::template Rows<kBlockQ, kHeadDim, kNumStages>{}));
    Tensor fQt = thread_sum.partition_fragment_B(
        tensor(shared.q[0], typename Layouts::template Columns<kBlockQ, kHeadDim, kNumStages>{}));
    Tensor fScores = thread_sum.partition_fragment_A(tensor(shared.scores[0], LayoutScores{}));
    Tensor rSum = partition_fragment_C(mma_sum, Shape<Int<kBlockKV>, Int<kHeadDim>>{});  // dK or dV, fp32, kHeadDim/4
    Tensor rS = partition_fragment_C(mma_s, Shape<Int<kBlockKV>, Int<kBlockQ>>{});       // S^T or dP^T, 16
    Tensor rOther = make_fragment_like(rS);
    static_assert(decltype(size(rS))::value == kScores && decltype(size(rSum))::value == kFragment);
    auto arrive = [&](uint64_t& barrier) {
      __syncwarp();
      if (threadIdx.x % kWarpThreads == 0) ClusterBarrier::arrive(&barrier);
    };
    Ring<kNumStages> ring;
    Ring<kNumBackwardTiles> slot;
    // What the other CTA gave for the step in `stage` has been multiplied.
    auto release = [&](int stage) {
      arrive(shared.q_empty[stage]);
      if (threadIdx.x % kWarpThreads == 0) ptx::arrive_remote(ptx::address_in(other, &shared.scores_empty[stage]));
    };
    constexpr uint32_t kScoresBytes = sizeof(shared.scores[0]);
    auto expect_scores = [&] {
      uint32_t const bytes = !has_keys && has_softcap ? 2 * kScoresBytes : kScoresBytes;
      if (threadIdx.x == kWarpgroupThreads)
        ClusterTransactionBarrier::arrive_and_expect_tx(&shared.scores_full[ring.stage], bytes);
    };
    auto wait_scores = [&] {
      ClusterBarrier::wait(&shared.scores_full[ring.stage], ring.phase);
      cutlass::arch::fence_view_async_shared();  // from what the other CTA wrote to what wgmma reads
    };

    for (;; slot.advance()) {
      ClusterBarrier::wait(&shared.tile_full[slot.stage], slot.phase);
      BackwardWorkTile const& tile = shared.tiles[slot.stage];
      if (tile.head_kv < 0) break;
      int32_t const num_steps = tile.num_steps();
      clear(rSum);
      warpgroup_fence_operand(rSum);  // before S is on its way, not after
      if (num_steps > 0) ClusterBarrier::wait(&shared.kv_full, tile.kv_phase);

      BackwardStep step(tile);
      for (int32_t i = 0; i < num_steps; ++i, step.advance(tile), ring.advance()) {
        int const stage = ring.stage;
        expect_scores();
        ClusterBarrier::wait(&shared.q_full[stage], ring.phase);
        // Halves of the columns apart, as the forward and the kernel by queries add them, of which the last has them in
        // two CTAs: a score of 1e9 summed in another order differs from lse by hundreds, and its P would be 0.
        constexpr int kSteps = kHeadDim / 16;
        multiply(mma_s, fKV(_, _, _, 0), fQ(_, _, _, stage), rS, false, 0, kSteps / 2);
        multiply(mma_s, fKV(_, _, _, 0), fQ(_, _, _, stage), rOther, false, kSteps / 2, kSteps);
        ColumnValues<kScores, kScores / 8> values(shared.statistics[stage] + warpgroup * kQueries, threadIdx.x % 4);
        warpgroup_wait<0>();  // with the sum of the step before
        warpgroup_fence_operand(rS);
        warpgroup_fence_operand(rOther);
        warpgroup_fence_operand(rSum);
        CUTE_UNROLL
        for (int n = 0; n < kScores; ++n) rS(n) += rOther(n);
        if (i > 0) release(ring.stage_before());
        // The other CTA has multiplied what lay there two steps ago.
        auto wait_empty = [&] { ClusterBarrier::wait(&shared.scores_empty[stage], ring.phase ^ 1); };
        uint32_t pairs[kScores / 2], pairs_w[kScores / 2];
        if (has_keys) {
          probabilities<Element, true, kScores>(arguments, tile, step.q_block * kBlockQ + warpgroup * kQueries, rS,
                                                pairs, pairs_w, values, shared.is_large[stage] != 0, 0, row_in_tile,
                                                column_in_block);
          wait_empty();
          send(shared.scores[stage], shared.scores_full[stage], other, pairs, warpgroup, row_in_tile);
          if (has_softcap) send(shared.w[stage], shared.scores_full[stage], other, pairs_w, warpgroup, row_in_tile);
          wait_scores();
        } else {
          wait_scores();
          uint32_t const base = matrix_address(has_softcap ? shared.w[stage] : shared.scores[stage], 0);
          CUTE_UNROLL
          for (int k = 0; k < 2; ++k) {
            ptx::ldmatrix_x4(base ^ ((2 * warpgroup + k) * 32), pairs_w[4 * k], pairs_w[4 * k + 1], pairs_w[4 * k + 2],
                             pairs_w[4 * k + 3]);
          }
          score_gradients<Element, kScores>(rS, pairs_w, pairs, values);
          wait_empty();
          send(shared.scores[stage], shared.scores_full[stage], other, pairs, warpgroup, row_in_tile);
        }
        multiply(mma_sum, fScores(_, _, _, stage), fQt(_, _, _, stage), rSum, true);
      }
      warpgroup_wait<0>();
      warpgroup_fence_operand(rSum);
      if (num_steps > 0) {
        release(ring.stage_before());
        arrive(shared.kv_empty);
      }
      TensorView const& view = has_keys ? arguments.dk : arguments.dv;
      if (arguments.parts == nullptr) {
        write_keys<Element, kColumns>(arguments, tile, view, rSum, has_keys ? problem.scale : 1.0f, row_in_tile,
                                      warpgroup * kColumns, has_keys ? problem.head_dim_qk : problem.head_dim_v);
      } else {
        float* const part = part_of<kBlockKV, kHeadDim, kHeadDim>(arguments, tile);
        write_part<kFragment>(part + rank * kBlockKV * kHeadDim, rSum);
      }
      arrive(shared.tile_empty[slot.stage]);
    }
  }

  // The producer warpgroup: one thread of each of two warps works.
  __device__ static void produce(BackwardArguments const& arguments, SharedStorage& shared) {
    // Two calls of constants: a choice of each argument would take registers that the thread does not have.
    if (threadIdx.x == 0 && cta_rank<kNumCtas>() == 0) {
      load_backward_tiles<BackwardPair, kHeadDim, kSwizzleColumns>(
          arguments, shared, arguments.k, arguments.q, arguments.rows.lse_log2, shared.kv, shared.q, shared.statistics,
          shared.q_full, shared.q_empty, shared.to_clear[0], arguments.rows.is_large);
    } else if (threadIdx.x == 0) {
      load_backward_tiles<BackwardPair, kHeadDim, kSwizzleColumns>(
          arguments, shared, arguments.v, arguments.dout, arguments.rows.delta, shared.kv, shared.q, shared.statistics,
          shared.q_full, shared.q_empty, shared.to_clear[0], nullptr);
    } else if (threadIdx.x == 32) {
      publish_key_work_tiles<BackwardPair>(arguments, shared);
    }
  }
};

}  // namespace flashmla::sm90
