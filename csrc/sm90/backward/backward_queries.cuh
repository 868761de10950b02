// Hopper backward attention, head dims above 192/128: dQ.
//
//   S = Q K^T      P = exp(scale S - lse)      dP = dO V^T      dS = P o (dP - delta)      dQ = scale dS K
//
// If dK and dV leave room for tiles of 64 keys only (backward_wide.cuh), summing their parts of dQ in memory takes
// longer than the products do. dQ then has a kernel of its own, which multiplies S and dP again: seven products in all
// instead of five, but dQ is a sum in registers. It needs no workspace, and is the same bits every time.
//
// Schedule. Tiles, producer and the order of work are the forward's (query_tile.cuh): a q_block of 128 queries stays in
// shared memory with its dO, K and V stream by, and each of the two consumer warpgroups has 64 of them:
//
//   issue dQ(n) += dS(n) K(n), S(n-1), dP(n-1)   wait S   P   wait dP   dS(n-1) -> registers
//
// One multiplies while the other exponentiates, as it comes: taking turns would leave less of a step for the next K to
// arrive in the place of the last, and there is no room for a third.
//
// Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2, split by output.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/grid_dependency_control.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/tensor.hpp>

#include "params.h"
#include "sm90/backward/backward_math.cuh"
#include "sm90/forward/query_tile.cuh"
#include "sm90/hopper/fragment.cuh"
#include "sm90/hopper/softmax.cuh"
#include "sm90/tiles.h"

namespace flashmla::sm90 {

struct BackwardQueriesArguments {
  CUtensorMap q, dout;  // dims (head_dim, heads_packed, seqlen or total, heads / heads_packed, batch)
  CUtensorMap k, v;     // dims (head_dim, row, end, heads, outer) of sequence_rows.h
  TensorView dq;
  BackwardRows rows;
  int32_t block_rows;  // of the workspace
  Problem problem;
  Window window;
  Schedule schedule;
};

template <int kHeadDim, class Element>
struct BackwardQueries {
  using Tiles = BackwardQueryTiles<kHeadDim>;
  static constexpr int kBlockQ = Tiles::kBlockQ;
  static constexpr int kBlockKV = Tiles::kBlockKV;
  static constexpr int kNumStages = Tiles::kNumStages;
  static constexpr int kNumQStages = 1;
  static constexpr int kNumConsumers = Tiles::kNumConsumers;
  static constexpr int kSwizzleColumns = 64;
  static constexpr int kNumCtas = Tiles::kNumCtas;
  static constexpr int kColumns = kHeadDim / kNumCtas;                                // of a CTA
  static constexpr int kColumnsQK = kColumns, kColumnsV = kColumns, kQueryParts = 1;  // for query_tile.cuh
  static constexpr bool kHasDOut = true;

  static constexpr int kScores = kBlockKV / 2;  // per thread

  using Warpgroups = cute::Layout<cute::Shape<cute::_2, cute::_1, cute::_1>>;
  template <int kN, int kK>
  using BlockShape = cute::Shape<cute::Int<kBlockQ>, cute::Int<kN>, cute::Int<kK>>;
  using MmaS = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, BlockShape<kBlockKV, kColumns>>(), Warpgroups{}));
  using MmaDQ =
      decltype(cute::make_tiled_mma(cute::GMMA::rs_op_selector<Element, Element, float, BlockShape<kColumns, kBlockKV>,
                                                               cute::GMMA::Major::K, cute::GMMA::Major::MN>(),
                                    Warpgroups{}));
  static_assert(is_one_wgmma<kBlockKV, MmaS>() && is_one_wgmma<kColumns, MmaDQ>());
  using Layouts = SharedLayouts<Element, kSwizzleColumns>;
  using LayoutQ = typename Layouts::template Rows<kBlockQ, kColumns, kNumQStages>;
  using LayoutK = typename Layouts::template Rows<kBlockKV, kColumns, kNumStages>;
  using LayoutKt = typename Layouts::template Columns<kBlockKV, kColumns, kNumStages>;

  // Of two CTAs each multiplies its columns of Q and K, and of dO and V: its parts of S and dP.
  struct None {};
  using Parts = std::conditional_t<kNumCtas == 2, PairBuffers<kScores / 4, kNumConsumers>, None>;

  struct SharedStorage {
    alignas(1024) Element q[kNumQStages][kBlockQ * kColumns];
    alignas(1024) Element dout[kNumQStages][kBlockQ * kColumns];
    alignas(1024) Element k[kNumStages][kBlockKV * kColumns];
    alignas(1024) Element v[kNumStages][kBlockKV * kColumns];
    uint64_t q_full[kNumQStages], q_empty[kNumQStages];
    uint64_t k_full[kNumStages], k_empty[kNumStages], v_full[kNumStages], v_empty[kNumStages];
    uint64_t tile_full[kNumQueryTiles], tile_empty[kNumQueryTiles];
    WorkTile tiles[kNumQueryTiles];
    Parts s_parts, dp_parts;
  };
  static constexpr int kSharedBytes = sizeof(SharedStorage);
  static_assert(kSharedBytes <= kMaxSharedBytes);

  static constexpr int kOwnBarrier = 1;  // named, one for each warpgroup's own threads; 0 is __syncthreads

  // dQ = factor * the fragment, or zeros.
  template <class Fragment>
  __device__ static void write(BackwardQueriesArguments const& arguments, WorkTile const& tile,
                               Fragment const& fragment, float factor, int32_t first_row) {
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      QueryRow const row = query_row(arguments.schedule, tile, first_row + 8 * r);
      Element* const out = row.is_valid ? row_pointer<Element>(arguments.dq, tile, row) : nullptr;
      store_row<Element, kColumns>(out, fragment, r, factor, kColumns * cta_rank<kNumCtas>(),
                                   arguments.problem.head_dim_qk, threadIdx.x % 4);
    }
  }

  __device__ static void consume(BackwardQueriesArguments const& arguments, SharedStorage& shared, int warpgroup) {
    using namespace cute;
    int const thread = threadIdx.x - kWarpgroupThreads;  // among consumers
    int const first_row = row_of_thread(warpgroup * kWarpgroupRows, threadIdx.x);
    Problem const& problem = arguments.problem;
    Schedule const& schedule = arguments.schedule;

    MmaS mma_s;
    MmaDQ mma_dq;
    auto tensor = [](Element* data, auto layout) { return make_tensor(make_smem_ptr(data), layout); };
    auto thread_s = mma_s.get_slice(thread);
    auto thread_dq = mma_dq.get_slice(thread);
    // Descriptors (_, 1, depth / 16, stages); t: read transposed.
    Tensor fQ = thread_s.partition_fragment_A(tensor(shared.q[0], LayoutQ{}));
    Tensor fDO = thread_s.partition_fragment_A(tensor(shared.dout[0], LayoutQ{}));
    Tensor fK = thread_s.partition_fragment_B(tensor(shared.k[0], LayoutK{}));
    Tensor fV = thread_s.partition_fragment_B(tensor(shared.v[0], LayoutK{}));
    Tensor fKt = thread_dq.partition_fragment_B(tensor(shared.k[0], LayoutKt{}));
    Tensor rS = partition_fragment_C(mma_s, Shape<Int<kBlockQ>, Int<kBlockKV>>{});    // fp32, kBlockKV/2 a thread
    Tensor rDP = partition_fragment_C(mma_s, Shape<Int<kBlockQ>, Int<kBlockKV>>{});   // kBlockKV/2
    Tensor rDQ = partition_fragment_C(mma_dq, Shape<Int<kBlockQ>, Int<kColumns>>{});  // kColumns/2
    Tensor rDS = make_tensor<Element>(partition_shape_A(mma_dq, Shape<Int<kBlockQ>, Int<kBlockKV>>{}));
    static_assert(decltype(size(rS))::value == kScores && decltype(size(rDS))::value == kScores);

    float const scale_log2 = problem.scale * kLog2e;
    // Hidden scores are -inf: by a scale that is not positive they must be multiplied before.
    bool const has_transform = problem.softcap > 0.0f || problem.scale <= 0.0f;
    Ring<kNumStages> ring;
    Ring<kNumQStages> q_ring;
    Ring<kNumQueryTiles> slot;
    [[maybe_unused]] uint32_t s_phase = 0, dp_phase = 0;

    // A product completes for the whole warpgroup at once, so one thread arrives for all.
    auto release = [&](uint64_t& barrier) {
      if (threadIdx.x % kWarpgroupThreads == 0) ClusterBarrier::arrive(&barrier);
    };
    // Without a product to wait for, the warps of a warpgroup must not run apart by more than the ring is deep.
    auto sync_warpgroup = [&] { NamedBarrier::sync(kWarpgroupThreads, kOwnBarrier + warpgroup); };
    auto skip_kv_block = [&] {
      ClusterBarrier::wait(&shared.k_full[ring.stage], ring.phase);
      ClusterBarrier::wait(&shared.v_full[ring.stage], ring.phase);
      sync_warpgroup();
      release(shared.k_empty[ring.stage]);
      release(shared.v_empty[ring.stage]);
      ring.advance();
    };
    auto issue_s = [&] {
      ClusterBarrier::wait(&shared.k_full[ring.stage], ring.phase);
      multiply(mma_s, fQ(_, _, _, 0), fK(_, _, _, ring.stage), rS, false);
    };
    auto issue_dp = [&] {
      ClusterBarrier::wait(&shared.v_full[ring.stage], ring.phase);
      multiply(mma_s, fDO(_, _, _, 0), fV(_, _, _, ring.stage), rDP, false);
    };
    auto issue_dq = [&](int stage, bool is_sum) {
      warpgroup_fence_operand(rDS);
      multiply(mma_dq, rDS, fKt(_, _, _, stage), rDQ, is_sum);
    };

    for (;; slot.advance(), q_ring.advance()) {
      ClusterBarrier::wait(&shared.q_full[q_ring.stage], q_ring.phase);
      WorkTile const& tile = shared.tiles[slot.stage];
      if (tile.head < 0) break;
      VisibleBlocks const& visible = tile.visible[warpgroup];
      bool const sees_keys = visible.begin < visible.end;
      int32_t kv_block = tile.kv_block_end - 1;
      for (int32_t const last = sees_keys ? visible.end : tile.kv_block_begin; kv_block >= last; --kv_block)
        skip_kv_block();
      if (!sees_keys) {
        clear(rDQ);
        sync_warpgroup();
        release(shared.q_empty[q_ring.stage]);
        write(arguments, tile, rDQ, 0.0f, first_row);
        __syncwarp();
        if (threadIdx.x % kWarpThreads == 0) ClusterBarrier::arrive(&shared.tile_empty[slot.stage]);
        continue;
      }

      float lse_log2[2], delta[2];
      int32_t position[2];
      int32_t const first_workspace =
          first_workspace_row(problem, tile.batch, tile.sequence.offset_q, arguments.block_rows);
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        QueryRow const row = query_row(schedule, tile, first_row + 8 * r);
        int64_t const index = row.head * arguments.rows.per_head + first_workspace + place_of_row(row.query);
        lse_log2[r] = row.is_valid ? arguments.rows.lse_log2[index] : INFINITY;
        delta[r] = row.is_valid ? arguments.rows.delta[index] : 0.0f;
        position[r] = row.query + tile.sequence.seqlen_kv - tile.sequence.seqlen_q;
      }

      bool const is_large = __any_sync(0xffffffff, is_large_lse(lse_log2[0]) || is_large_lse(lse_log2[1]));

      // Of the products in `ring`; to be called where S, and nothing issued before it, may still be on its way.
      auto gradients = [&] {
        warpgroup_fence_operand(rS);
        if constexpr (kNumCtas == 2) add_other_part(rS, shared.s_parts, warpgroup, s_phase);
        bool const is_masked = kv_block < visible.unmasked_begin || kv_block >= visible.unmasked_end;
        auto hide = [&] {
          if (!is_masked) return;
          mask_scores<MaskKind::kWindow, kScores>(rS, arguments.window, tile.sequence.seqlen_kv, kv_block * kBlockKV,
                                                  position);
        };
        uint32_t* const pairs = reinterpret_cast<uint32_t*>(rDS.data());
        if (has_transform) {
          transform_scores<kScores>(rS, problem.scale, problem.softcap);
          hide();
          float const slope = problem.softcap > 0.0f ? 1.0f / problem.softcap : 0.0f;
          CUTE_UNROLL
          for (int i = 0; i < kScores; ++i) {
            float const capped = rS(i), p = exp2f(capped * kLog2e - lse_log2[i / 2 % 2]), t = capped * slope;
            rS(i) = p == 0.0f ? 0.0f : p * (1.0f - t * t);
          }
        } else {
          hide();
          CUTE_UNROLL
          for (int i = 0; i < kScores; ++i) rS(i) = exp2f(rS(i) * scale_log2 - lse_log2[i / 2 % 2]);
          if (is_large) {  // as in backward_math.cuh
            CUTE_UNROLL
            for (int i = 0; i < kScores; ++i) rS(i) = ptx::at_most_one(rS(i));
          }
        }
        warpgroup_wait<0>();
        warpgroup_fence_operand(rDP);
        release(shared.v_empty[ring.stage]);
        if (kv_block == visible.begin) release(shared.q_empty[q_ring.stage]);
        if constexpr (kNumCtas == 2) add_other_part(rDP, shared.dp_parts, warpgroup, dp_phase);
        CUTE_UNROLL
        for (int i = 0; i < kScores / 2; ++i) {
          pairs[i] =
              pack<Element>(rS(2 * i) * (rDP(2 * i) - delta[i % 2]), rS(2 * i + 1) * (rDP(2 * i + 1) - delta[i % 2]));
        }
      };

      issue_s();
      issue_dp();
      warpgroup_wait<1>();
      gradients();
      bool is_sum = false;
      for (--kv_block; kv_block >= visible.begin; --kv_block) {
        int const stage = ring.stage;
        ring.advance();
        issue_dq(stage, is_sum);
        issue_s();
        issue_dp();
        is_sum = true;
        warpgroup_wait<1>();
        warpgroup_fence_operand(rDQ);
        release(shared.k_empty[stage]);
        gradients();
      }
      issue_dq(ring.stage, is_sum);
      warpgroup_wait<0>();
      warpgroup_fence_operand(rDQ);
      release(shared.k_empty[ring.stage]);
      ring.advance();
      for (; kv_block >= tile.kv_block_begin; --kv_block) skip_kv_block();
      // A query that sees no key has no gradient, whatever dO holds.
      auto const gradient = [&](int i) { return lse_log2[i / 2 % 2] == INFINITY ? 0.0f : rDQ(i); };
      write(arguments, tile, gradient, problem.scale, first_row);
      __syncwarp();
      if (threadIdx.x % kWarpThreads == 0) ClusterBarrier::arrive(&shared.tile_empty[slot.stage]);
    }
  }
};

template <int kHeadDim, class Element>
__global__ void __launch_bounds__(BackwardQueryTiles<kHeadDim>::kNumThreads, 1)
    backward_queries_kernel(__grid_constant__ BackwardQueriesArguments const arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Kernel = BackwardQueries<kHeadDim, Element>;
  // Swizzled tiles need 1,024-byte alignment; the dynamic shared memory of a kernel without any other begins so.
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<typename Kernel::SharedStorage*>(memory);
  int const warpgroup = cutlass::canonical_warp_group_idx();
  if (threadIdx.x == 0) {
    if (cute::cast_smem_ptr_to_uint(&shared) % 1024 != 0) __trap();
    if constexpr (Kernel::kNumCtas == 2) {
      shared.s_parts.init();
      shared.dp_parts.init();
    }
    init_query_barriers<Kernel>(shared);
  }
  sync_ctas<Kernel::kNumCtas>();
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Kernel::Tiles::kProducerRegisters>();
    produce_query_tiles<Kernel>(arguments, shared);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Kernel::Tiles::kConsumerRegisters>();
    Kernel::consume(arguments, shared, warpgroup - 1);
  }
  if constexpr (Kernel::kNumCtas == 2) sync_ctas<Kernel::kNumCtas>();
#endif
}

}  // namespace flashmla::sm90
