// Hopper forward attention of e4m3 operands: half the bytes, twice the products a second.
//
//   S = q_scale k_scale scale Q K^T (softcap), masked;   P = 2^8 exp(S - row_max) v_scale / v_ref, rounded to e4m3;
//   O = sum P V, rescaled when row_max or v_ref grows;   out = v_ref O / row_sum
//
// The schedule is that of forward.cuh, without its look ahead, for the kv_blocks n of a work tile, from the last to the
// first:
//
//   issue S(n-1) = Q K(n-1)^T | issue O += P(n) V(n) | wait S | row 0: exponentials, row 1's maximum beside them |
//   wait O | row 1: exponentials, beside them P(n-1) to e4m3
//
// (A thread has two rows.) What differs:
//   - scales: of blocks of queries, keys and values (operands.h), multiplied in where they cost nothing, into the
//     exponent. v_ref is the largest of V's so far, so P carries what a tile's values are smaller by. That is a power
//     of two (or 1), which rounds nothing but what is below 2^-14 of the largest weight;
//   - promotion: Hopper adds fp8 products with about 14 bits (DeepSeek-V3, arXiv 2412.19437, section 3.3.2), and loses
//   a
//     part of a sum with each product that joins it. After kBlocksOfSum kv_blocks O is parked (ParkedOutput), and the
//     tensor cores begin another sum;
//   - P lies between 0 and 2^8, where e4m3 has its range, and is never above: every new maximum counts;
//   - V arrives transposed, its keys in the order of P's registers (operands.h).
//
// The sum of exponentials takes P before it is rounded, as FlashAttention-3 (arXiv 2407.08608, section 3.3).
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/grid_dependency_control.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/tensor.hpp>

#include "params.h"
#include "sm90/forward/forward_output.cuh"
#include "sm90/forward/query_tile.cuh"
#include "sm90/fp8/operands.h"
#include "sm90/fp8/parked_output.cuh"
#include "sm90/fp8/softmax_fp8.cuh"
#include "sm90/hopper/fragment.cuh"
#include "sm90/hopper/ptx.cuh"
#include "sm90/scheduling/scheduler.cuh"
#include "sm90/tiles.h"

namespace flashmla::sm90 {

struct Fp8ForwardArguments : ForwardArguments {
  CUtensorMap vt;  // dims (place, column of V, head); `k` has dims (head_dim, place, head) here
  float const *q_scales, *k_scales, *v_scales;
  int32_t blocks_q, blocks;
};

// kHeadDim: of queries, keys and values. Output: fp16 or bf16.
template <int kHeadDim, MaskKind kMask, class OutputElement>
struct Fp8Forward {
  using Element = cutlass::float_e4m3_t;
  using Tiles = Fp8ForwardTiles<kHeadDim>;
  static constexpr int kBlockQ = Tiles::kBlockQ, kBlockKV = Tiles::kBlockKV;
  static constexpr int kNumStages = Tiles::kNumStages, kNumQStages = Tiles::kNumQStages;
  static constexpr int kNumConsumers = Tiles::kNumConsumers;
  static constexpr int kSwizzleColumns = widest_chunk(kHeadDim, 128);
  static constexpr int kSwizzleKeys = widest_chunk(kBlockKV, 128);  // of V transposed
  static constexpr int kNumCtas = 1, kQueryParts = 1;
  static constexpr int kColumnsQK = kHeadDim, kColumnsV = kHeadDim;  // for query_tile.cuh
  static constexpr bool kHasDOut = false, kLooksAhead = false;
  static constexpr int kRowsOfScale = Tiles::kRowsOfScale;
  static_assert(kRowsOfScale == kBlockKV, "a kv_block has one scale");

  static constexpr int kScores = kBlockKV / 2, kOutputs = kHeadDim / 2;  // per thread
  using Output = ForwardOutput<Fp8Forward, OutputElement>;
  using RowSoftmax = Fp8Softmax<kScores>;
  using Parked = ParkedOutput<kOutputs>;
  static constexpr int kBlocksOfSum = 1024 / kBlockKV;  // 0.1 % of a sum is what 32 products of 32 keys lose of it

  using BlockShapeS = cute::Shape<cute::Int<kBlockQ>, cute::Int<kBlockKV>, cute::Int<kHeadDim>>;
  using BlockShapeO = cute::Shape<cute::Int<kBlockQ>, cute::Int<kHeadDim>, cute::Int<kBlockKV>>;
  using Warpgroups = cute::Layout<cute::Shape<cute::Int<kNumConsumers>, cute::_1, cute::_1>>;
  using MmaS =
      decltype(cute::make_tiled_mma(cute::GMMA::ss_op_selector<Element, Element, float, BlockShapeS>(), Warpgroups{}));
  using MmaO =
      decltype(cute::make_tiled_mma(cute::GMMA::rs_op_selector<Element, Element, float, BlockShapeO>(), Warpgroups{}));
  static_assert(is_one_wgmma<kBlockKV, MmaS>() && is_one_wgmma<kHeadDim, MmaO>());

  // Swizzle rows of columns for Q and K, of keys for V.
  template <int kColumns>
  using AtomOf = std::conditional_t<kColumns % 128 == 0, cute::GMMA::Layout_K_SW128_Atom<Element>,
                                    std::conditional_t<kColumns % 64 == 0, cute::GMMA::Layout_K_SW64_Atom<Element>,
                                                       cute::GMMA::Layout_K_SW32_Atom<Element>>>;
  template <int kRows, int kColumns, int kDepth>
  using Rows = decltype(cute::tile_to_shape(AtomOf<kColumns>{},
                                            cute::Shape<cute::Int<kRows>, cute::Int<kColumns>, cute::Int<kDepth>>{}));
  using LayoutQ = Rows<kBlockQ, kHeadDim, kNumQStages>;
  using LayoutK = Rows<kBlockKV, kHeadDim, kNumStages>;
  using LayoutVt = Rows<kHeadDim, kBlockKV, kNumStages>;

  struct SharedStorage {
    alignas(1024) Element q[kNumQStages][kBlockQ * kHeadDim];
    alignas(1024) Element k[kNumStages][kBlockKV * kHeadDim];
    alignas(1024) Element v[kNumStages][kHeadDim * kBlockKV];
    uint64_t q_full[kNumQStages], q_empty[kNumQStages];
    uint64_t k_full[kNumStages], k_empty[kNumStages], v_full[kNumStages], v_empty[kNumStages];
    uint64_t tile_full[kNumQueryTiles], tile_empty[kNumQueryTiles];
    WorkTile tiles[kNumQueryTiles];
    typename Parked::Storage parked[kNumConsumers];
  };
  static constexpr int kSharedBytes = sizeof(SharedStorage);
  static_assert(kSharedBytes <= kMaxSharedBytes);
  static constexpr int kOwnBarrier =
      1;  // of the named barriers: 0 is __syncthreads, then each warpgroup's own threads'

  // ---- producer -----------------------------------------------------------------------------------------------------

  // Loads K, or V transposed, of the keys that a tile sees, from the last to the first.
  template <int kSize>
  __device__ static void load_blocks(Fp8ForwardArguments const& arguments, SharedStorage& shared,
                                     CUtensorMap const& map, bool is_transposed, Element (&buffers)[kNumStages][kSize],
                                     uint64_t (&full)[kNumStages], uint64_t (&empty)[kNumStages]) {
    int32_t const group = static_cast<int32_t>(arguments.problem.heads_q / arguments.problem.heads_kv);
    Ring<kNumStages> ring;
    Ring<kNumQueryTiles> slot;
    for (;; slot.advance()) {
      ClusterBarrier::wait(&shared.tile_full[slot.stage], slot.phase);
      WorkTile const& tile = shared.tiles[slot.stage];
      if (tile.head < 0) return;
      int32_t const head_kv = tile.head / group;
      int32_t const first = first_fp8_block<kRowsOfScale>(arguments.problem, arguments.problem.seqlen_kv, tile.batch,
                                                          tile.sequence.offset_kv);
      for (int32_t kv_block = tile.kv_block_end - 1; kv_block >= tile.kv_block_begin; --kv_block, ring.advance()) {
        int const stage = ring.stage;
        int32_t const place = (first + kv_block) * kBlockKV;
        ClusterBarrier::wait(&empty[stage], ring.phase ^ 1);
        ClusterTransactionBarrier::arrive_and_expect_tx(&full[stage], sizeof(buffers[stage]));
        auto copy = [&](Element* target, int32_t column, int32_t row) {
          cute::SM90_TMA_LOAD_3D::copy(&map, &full[stage],
                                       static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL), target, column,
                                       row, head_kv);
        };
        if (is_transposed) {
          for (int key = 0; key < kBlockKV; key += kSwizzleKeys) {
            copy(buffers[stage] + key * kHeadDim, place + key, 0);
          }
        } else {
          for (int column = 0; column < kHeadDim; column += kSwizzleColumns) {
            copy(buffers[stage] + column * kBlockKV, column, place);
          }
        }
      }
      ClusterBarrier::arrive(&shared.tile_empty[slot.stage]);
    }
  }

  __device__ static void produce(Fp8ForwardArguments const& arguments, SharedStorage& shared) {
    if (threadIdx.x == 0) {
      load_blocks(arguments, shared, arguments.k, false, shared.k, shared.k_full, shared.k_empty);
    } else if (threadIdx.x == 32) {
      publish_query_work_tiles<Fp8Forward>(arguments, shared);
    } else if (threadIdx.x == 64) {
      load_blocks(arguments, shared, arguments.vt, true, shared.v, shared.v_full, shared.v_empty);
    } else if (threadIdx.x == 96) {
      load_queries<Fp8Forward>(arguments, shared);
    }
  }

  // ---- consumer warpgroups ------------------------------------------------------------------------------------------

  __device__ static void consume(Fp8ForwardArguments const& arguments, SharedStorage& shared, int warpgroup) {
    using namespace cute;
    int const first_row = row_of_thread(warpgroup * kWarpgroupRows, threadIdx.x);
    Problem const& problem = arguments.problem;
    Schedule const& schedule = arguments.schedule;

    MmaS mma_s;
    MmaO mma_o;
    Tensor sQ = make_tensor(make_smem_ptr(shared.q[0]), LayoutQ{});
    Tensor sK = make_tensor(make_smem_ptr(shared.k[0]), LayoutK{});
    Tensor sVt = make_tensor(make_smem_ptr(shared.v[0]), LayoutVt{});
    auto thread_s = mma_s.get_slice(warpgroup * kWarpgroupThreads);  // uniform: see forward.cuh
    auto thread_o = mma_o.get_slice(warpgroup * kWarpgroupThreads);
    Tensor fQ = thread_s.partition_fragment_A(sQ);   // descriptors (_, 1, kHeadDim/32, kNumQStages)
    Tensor fK = thread_s.partition_fragment_B(sK);   // (_, 1, kHeadDim/32, kNumStages)
    Tensor fV = thread_o.partition_fragment_B(sVt);  // (_, _, kBlockKV/32, kNumStages)
    Tensor rS = partition_fragment_C(mma_s, Shape<Int<kBlockQ>, Int<kBlockKV>>{});
    Tensor rO = partition_fragment_C(mma_o, Shape<Int<kBlockQ>, Int<kHeadDim>>{});
    Tensor rP = make_tensor<Element>(partition_shape_A(mma_o, Shape<Int<kBlockQ>, Int<kBlockKV>>{}));
    static_assert(decltype(size(rS))::value == kScores && decltype(size(rO))::value == kOutputs &&
                  decltype(size(rP))::value == kScores);

    // With softcap, or a scale that is not positive, scores are transformed one by one, and the softmax has no factor.
    bool const has_transform = problem.softcap > 0.0f || problem.scale <= 0.0f;
    Ring<kNumStages> ring;
    Ring<kNumQStages> q_ring;
    Ring<kNumQueryTiles> slot;

    auto issue_s = [&] { multiply(mma_s, fQ(_, _, _, q_ring.stage), fK(_, _, _, ring.stage), rS, false); };
    auto issue_o = [&](int stage, bool is_sum) {
      warpgroup_fence_operand(rP);
      multiply(mma_o, rP, fV(_, _, _, stage), rO, is_sum);
    };
    // A k step of 32 columns takes four registers of four numbers: rows r = 0, 1 of its first sixteen columns, then of
    // the others. Accumulators of eight columns each are j, j + 1.
    auto convert_pairs = [&](int row, int j) {  // j and j + 1
      int const i = j / 4 * 4 + j % 4 / 2 * 2 + row, first = j * 4 + row * 2;
      reinterpret_cast<uint32_t*>(rP.data())[i] =
          ptx::pack_e4m3(rS(first), rS(first + 1), rS(first + 4), rS(first + 5));
    };
    auto release = [&](uint64_t& barrier) {
      if (threadIdx.x % kWarpgroupThreads == 0) ClusterBarrier::arrive(&barrier);
    };
    auto release_tile = [&](int place) {
      __syncwarp();
      if (threadIdx.x % kWarpThreads == 0) ClusterBarrier::arrive(&shared.tile_empty[place]);
    };
    auto sync_warpgroup = [&] { NamedBarrier::sync(kWarpgroupThreads, kOwnBarrier + warpgroup); };
    auto skip_kv_block = [&] {
      ClusterBarrier::wait(&shared.k_full[ring.stage], ring.phase);
      ClusterBarrier::wait(&shared.v_full[ring.stage], ring.phase);
      sync_warpgroup();
      release(shared.k_empty[ring.stage]);
      release(shared.v_empty[ring.stage]);
      ring.advance();
    };
    auto find_tile = [&] {  // skips work tiles in which this warpgroup sees nothing; false if there is no more work
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

    RowSoftmax softmax;
    while (find_tile()) {
      WorkTile const& tile = shared.tiles[slot.stage];
      // In registers if there is room.
      std::conditional_t<(kHeadDim > 128), VisibleBlocks const&, VisibleBlocks const> visible = tile.visible[warpgroup];
      int32_t const head_kv = tile.head / static_cast<int32_t>(problem.heads_q / problem.heads_kv);
      int64_t const first_scale =
          int64_t{head_kv} * arguments.blocks +
          first_fp8_block<kRowsOfScale>(problem, problem.seqlen_kv, tile.batch, tile.sequence.offset_kv);
      int32_t const first_block_q =
          first_fp8_block<kRowsOfScale>(problem, problem.seqlen_q, tile.batch, tile.sequence.offset_q);
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        QueryRow const row = query_row(schedule, tile, first_row + 8 * r);
        int32_t const block = first_block_q + row.query / kRowsOfScale;
        float const scale = row.is_valid ? arguments.q_scales[int64_t{row.head} * arguments.blocks_q + block] : 1.0f;
        softmax.reset(r, has_transform ? scale * problem.scale : scale * problem.scale * kLog2e);
      }
      for (int32_t kv_block = tile.kv_block_end - 1; kv_block >= visible.end; --kv_block) skip_kv_block();

      int32_t kv_block = visible.end - 1;
      auto finish_scores = [&](float k_scale) {
        if (has_transform) {
          CUTE_UNROLL
          for (int i = 0; i < kScores; ++i) {
            float x = rS(i) * (softmax.row_scale[i / 2 % 2] * k_scale);
            if (problem.softcap > 0.0f) x = ptx::tanh_approx(x / problem.softcap) * problem.softcap;
            rS(i) = x;
          }
        }
        if (kv_block < visible.unmasked_begin || kv_block >= visible.unmasked_end) {
          int32_t const shift = tile.sequence.seqlen_kv - tile.sequence.seqlen_q;
          int32_t const position[2] = {query_row(schedule, tile, first_row).query + shift,
                                       query_row(schedule, tile, first_row + 8).query + shift};
          mask_scores<kMask, kScores>(rS, arguments.window, tile.sequence.seqlen_kv, kv_block * kBlockKV, position);
        }
      };
      constexpr int kPairs = kScores / 4;  // of a row
      typename RowSoftmax::Exponent exponent[2];
      float correction[2];
      // Row 0's exponentials, beside them row 1's maximum. True if O is to be rescaled for some row of this warp.
      auto exponentiate_first = [&](float k_scale, ValueScale const& value_scale) {
        auto factor = [&](int row) { return has_transform ? kLog2e : softmax.row_scale[row] * k_scale; };
        float const largest_first = RowSoftmax::largest_of(rS, 0);
        bool has_grown = softmax.begin(0, largest_first, factor(0), value_scale, exponent[0], correction[0]);
        float sum[2] = {0.0f, 0.0f};
        float const largest_second = RowSoftmax::largest_of(rS, 1);
        CUTE_UNROLL
        for (int j = 0; j < kPairs / 2; ++j) RowSoftmax::exponentiate(rS, 0, j, exponent[0], sum);
        has_grown |= softmax.begin(1, largest_second, factor(1), value_scale, exponent[1], correction[1]);
        CUTE_UNROLL
        for (int j = kPairs / 2; j < kPairs; ++j) RowSoftmax::exponentiate(rS, 0, j, exponent[0], sum);
        softmax.end(0, correction[0], value_scale, sum);
        return __any_sync(0xffffffff, has_grown);
      };
      // Row 1's exponentials, beside them P of both rows as e4m3.
      auto exponentiate_second = [&](ValueScale const& value_scale) {
        float sum[2] = {0.0f, 0.0f};
        CUTE_UNROLL
        for (int j = 0; j < kPairs; ++j) {
          RowSoftmax::exponentiate(rS, 1, j, exponent[1], sum);
          if (j % 2 == 1) {
            convert_pairs(0, j - 1);
            convert_pairs(1, j - 1);
          }
        }
        softmax.end(1, correction[1], value_scale, sum);
      };

      float k_scale = arguments.k_scales[first_scale + kv_block];
      ValueScale value_scale(arguments.v_scales[first_scale + kv_block]);
      Parked parked(shared.parked[warpgroup]);
      ClusterBarrier::wait(&shared.k_full[ring.stage], ring.phase);
      issue_s();
      warpgroup_wait<0>();
      warpgroup_fence_operand(rS);
      release(shared.k_empty[ring.stage]);
      if (kv_block == visible.begin) release(shared.q_empty[q_ring.stage]);
      finish_scores(k_scale);
      exponentiate_first(k_scale, value_scale);
      exponentiate_second(value_scale);
      int blocks_of_sum = 0;  // whose products rO holds
      for (--kv_block; kv_block >= visible.begin; --kv_block) {
        Ring<kNumStages> const ring_o = ring;
        ring.advance();
        k_scale = arguments.k_scales[first_scale + kv_block];
        float const v_scale = arguments.v_scales[first_scale + kv_block];
        ClusterBarrier::wait(&shared.k_full[ring.stage], ring.phase);
        issue_s();
        ClusterBarrier::wait(&shared.v_full[ring_o.stage], ring_o.phase);
        issue_o(ring_o.stage, blocks_of_sum > 0);
        warpgroup_wait<1>();
        warpgroup_fence_operand(rS);
        release(shared.k_empty[ring.stage]);
        if (kv_block == visible.begin) release(shared.q_empty[q_ring.stage]);
        finish_scores(k_scale);
        value_scale.advance(v_scale);
        bool const has_grown = exponentiate_first(k_scale, value_scale) || value_scale.shrinkage != 1.0f;
        ptx::keep_before(softmax.row_sum[0]);  // half of the exponentials, before the wait for O
        warpgroup_wait<0>();
        warpgroup_fence_operand(rO);
        release(shared.v_empty[ring_o.stage]);
        if (has_grown) {
          float const factor[2] = {correction[0] * value_scale.shrinkage, correction[1] * value_scale.shrinkage};
          CUTE_UNROLL
          for (int i = 0; i < kOutputs; ++i) rO(i) *= factor[i / 2 % 2];
        }
        exponentiate_second(value_scale);
        if (++blocks_of_sum == kBlocksOfSum) {
          parked.park(rO, softmax, value_scale);
          blocks_of_sum = 0;
        }
      }
      ClusterBarrier::wait(&shared.v_full[ring.stage], ring.phase);
      issue_o(ring.stage, blocks_of_sum > 0);
      warpgroup_wait<0>();
      warpgroup_fence_operand(rO);
      release(shared.v_empty[ring.stage]);
      ring.advance();
      parked.join(rO, softmax, value_scale);

      OutputRows rows;
      Output::finish_rows(arguments, tile, softmax, warpgroup, first_row, rows);
      CUTE_UNROLL
      for (int i = 0; i < kOutputs; ++i) rO(i) *= rows.factor[i / 2 % 2];  // a mean, before its units may overflow
      rows.factor[0] = rows.factor[1] = value_scale.reference;
      Output::write(arguments, shared, tile, rows, rO, warpgroup, first_row, 0);
      for (; kv_block >= tile.kv_block_begin; --kv_block) skip_kv_block();  // it is visible.begin - 1
      release_tile(slot.stage);
      slot.advance();
      q_ring.advance();
    }
  }

  __device__ static void run(Fp8ForwardArguments const& arguments, SharedStorage& shared) {
    int const warpgroup = cutlass::canonical_warp_group_idx();
    if (threadIdx.x == 0) {
      if (cute::cast_smem_ptr_to_uint(&shared) % 1024 != 0) __trap();
      init_query_barriers<Fp8Forward>(shared);
    }
    __syncthreads();
    cutlass::arch::wait_on_dependent_grids();  // the operands, and schedule_kernel's list
    if (warpgroup == 0) {
      cutlass::arch::warpgroup_reg_dealloc<Tiles::kProducerRegisters>();
      produce(arguments, shared);
    } else {
      cutlass::arch::warpgroup_reg_alloc<Tiles::kConsumerRegisters>();
      consume(arguments, shared, warpgroup - 1);
    }
  }
};

template <int kHeadDim, MaskKind kMask, class OutputElement>
__global__ void __launch_bounds__(Fp8ForwardTiles<kHeadDim>::kNumThreads, 1)
    fp8_forward_kernel(__grid_constant__ Fp8ForwardArguments const arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char memory[];  // as in forward.cuh
  using Kernel = Fp8Forward<kHeadDim, kMask, OutputElement>;
  Kernel::run(arguments, *reinterpret_cast<typename Kernel::SharedStorage*>(memory));
#endif
}

}  // namespace flashmla::sm90
