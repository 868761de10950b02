// Hopper forward attention of e4m3 operands: half the bytes, twice the products a second.
//
//   S = q_scale k_scale scale Q K^T (softcap), masked;   P = 2^8 exp(S - row_max), rounded to e4m3;
//   O = sum_tiles v_scale P V, rescaled when row_max grows;   out = O / row_sum
//
// The schedule is that of forward.cuh, without its look ahead, for the kv_blocks n of a work tile, from the last to the
// first:
//
//   issue S(n-1) = Q K(n-1)^T | issue PV (+)= P(n) V(n) | wait S | row 0: exponentials, row 1's maximum beside them |
//   wait PV | row 1: exponentials, beside them O += PV and P(n-1) to e4m3
//
// (A thread has two rows.) With kPingPong a warpgroup waits for its turn before the products, and passes it on in the
// middle of row 0's exponentials. What differs:
//   - scales: of blocks of 128 queries, keys and values (operands.h), multiplied in where they cost nothing:
//     into the factor of the exponent, and where a tile's P V joins O;
//   - promotion: Hopper adds fp8 products with about 14 bits (DeepSeek-V3, arXiv 2412.19437, section 3.3.2), and each
//     that joins a sum costs it some. P V is a product apart from O, and joins it in fp32 after one tile, or after two
//     whose values have the same scale. Where registers have no room for it (kParksOutput), the tensor cores add
//     kBlocksOfSum tiles to O in a unit of its own (Fp8Softmax), then O is parked and they begin another sum;
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
  static constexpr int kSwizzleColumns = kHeadDim % 128 == 0 ? 128 : 64;
  static constexpr int kNumCtas = 1, kQueryParts = 1;
  static constexpr int kColumnsQK = kHeadDim, kColumnsV = kHeadDim;  // for query_tile.cuh
  static constexpr bool kHasDOut = false, kLooksAhead = false, kParksOutput = Tiles::kParksOutput;
  static constexpr int kBlocksOfSum = 512 / kBlockKV;  // O loses 0.2 % of sums of one sign
  static_assert(kHeadDim % kSwizzleColumns == 0 && kBlockKV == kRowsOfScale, "a kv_block has one scale");

  static constexpr int kScores = kBlockKV / 2, kOutputs = kHeadDim / 2;  // per thread
  using Output = ForwardOutput<Fp8Forward, OutputElement>;
  using RowSoftmax = Fp8Softmax<kScores, kParksOutput>;
  using Parked = ParkedOutput<kParksOutput ? kOutputs : 0>;

  using BlockShapeS = cute::Shape<cute::Int<kBlockQ>, cute::Int<kBlockKV>, cute::Int<kHeadDim>>;
  using BlockShapeO = cute::Shape<cute::Int<kBlockQ>, cute::Int<kHeadDim>, cute::Int<kBlockKV>>;
  using Warpgroups = cute::Layout<cute::Shape<cute::Int<kNumConsumers>, cute::_1, cute::_1>>;
  using MmaS =
      decltype(cute::make_tiled_mma(cute::GMMA::ss_op_selector<Element, Element, float, BlockShapeS>(), Warpgroups{}));
  using MmaO =
      decltype(cute::make_tiled_mma(cute::GMMA::rs_op_selector<Element, Element, float, BlockShapeO>(), Warpgroups{}));
  static_assert(is_one_wgmma<kBlockKV, MmaS>() && is_one_wgmma<kHeadDim, MmaO>());

  // Rows of one swizzle row: of head_dim columns for Q and K, of 128 keys for V.
  template <int kColumns>
  using AtomOf = std::conditional_t<kColumns % 128 == 0, cute::GMMA::Layout_K_SW128_Atom<Element>,
                                    cute::GMMA::Layout_K_SW64_Atom<Element>>;
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
    typename Parked::Storage parked[kParksOutput ? kNumConsumers : 1];
  };
  static constexpr int kSharedBytes = sizeof(SharedStorage);
  static_assert(kSharedBytes <= kMaxSharedBytes);
  // Named barriers: 0 is __syncthreads; then each warpgroup's own threads', then the turns.
  static constexpr int kOwnBarrier = 1, kTurnBarrier = kOwnBarrier + kNumConsumers;

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
      int32_t const first =
          first_fp8_block(arguments.problem, arguments.problem.seqlen_kv, tile.batch, tile.sequence.offset_kv);
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
          copy(buffers[stage], place, 0);
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
    Tensor rTile = partition_fragment_C(mma_o, Shape<Int<kBlockQ>, Int<kHeadDim>>{});  // unused with kParksOutput
    Tensor rO = partition_fragment_C(mma_o, Shape<Int<kBlockQ>, Int<kHeadDim>>{});
    auto& rPV = kParksOutput ? rO : rTile;
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
      multiply(mma_o, rP, fV(_, _, _, stage), rPV, is_sum);
    };
    // A k step of 32 columns takes four registers of four numbers: rows r = 0, 1 of its first sixteen columns, then of
    // the others. Accumulators of eight columns each are j, j + 1.
    auto convert_pairs = [&](int row, int j) {  // j and j + 1
      int const i = j / 4 * 4 + j % 4 / 2 * 2 + row, first = j * 4 + row * 2;
      reinterpret_cast<uint32_t*>(rP.data())[i] =
          ptx::pack_e4m3(rS(first), rS(first + 1), rS(first + 4), rS(first + 5));
    };
    auto wait_turn = [&] {
      if constexpr (Tiles::kPingPong) NamedBarrier::sync(2 * kWarpgroupThreads, kTurnBarrier + warpgroup);
    };
    auto pass_turn = [&] {
      if constexpr (Tiles::kPingPong)
        NamedBarrier::arrive(2 * kWarpgroupThreads, kTurnBarrier + (warpgroup + 1) % kNumConsumers);
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
      wait_turn();
      pass_turn();
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

    if (Tiles::kPingPong && warpgroup == kNumConsumers - 1) pass_turn();  // the first turn is warpgroup 0's
    RowSoftmax softmax;
    while (find_tile()) {
      WorkTile const& tile = shared.tiles[slot.stage];
      // In registers if there is room.
      std::conditional_t<kParksOutput, VisibleBlocks const&, VisibleBlocks const> visible = tile.visible[warpgroup];
      int32_t const head_kv = tile.head / static_cast<int32_t>(problem.heads_q / problem.heads_kv);
      int64_t const first_scale = int64_t{head_kv} * arguments.blocks +
                                  first_fp8_block(problem, problem.seqlen_kv, tile.batch, tile.sequence.offset_kv);
      int32_t const first_block_q = first_fp8_block(problem, problem.seqlen_q, tile.batch, tile.sequence.offset_q);
      float row_scale[2];
      int32_t position[2];
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        QueryRow const row = query_row(schedule, tile, first_row + 8 * r);
        int32_t const block = first_block_q + row.query / kRowsOfScale;
        float const scale = row.is_valid ? arguments.q_scales[int64_t{row.head} * arguments.blocks_q + block] : 1.0f;
        row_scale[r] = has_transform ? scale * problem.scale : scale * problem.scale * kLog2e;
        position[r] = row.query + tile.sequence.seqlen_kv - tile.sequence.seqlen_q;
        softmax.reset(r, has_transform ? kLog2e : row_scale[r]);
      }
      if constexpr (!kParksOutput) {
        CUTE_UNROLL
        for (int i = 0; i < kOutputs; ++i) rO(i) = 0.0f;
      }
      for (int32_t kv_block = tile.kv_block_end - 1; kv_block >= visible.end; --kv_block) skip_kv_block();

      int32_t kv_block = visible.end - 1;
      auto finish_scores = [&](float k_scale) {
        if (has_transform) {
          CUTE_UNROLL
          for (int i = 0; i < kScores; ++i) {
            float x = rS(i) * (row_scale[i / 2 % 2] * k_scale);
            if (problem.softcap > 0.0f) x = ptx::tanh_approx(x / problem.softcap) * problem.softcap;
            rS(i) = x;
          }
        }
        if (kv_block < visible.unmasked_begin || kv_block >= visible.unmasked_end) {
          mask_scores<kMask, kScores>(rS, arguments.window, tile.sequence.seqlen_kv, kv_block * kBlockKV, position);
        }
      };
      constexpr int kPairs = kScores / 4;  // of a row
      typename RowSoftmax::TileRow rows_of_tile[2];
      // Row 0's exponentials, beside them row 1's maximum. True if O is to be rescaled for some row of this warp.
      auto exponentiate_first = [&](float k_scale, float v_scale) {
        float const tile_scale = has_transform ? 1.0f : k_scale;
        float const largest_first = RowSoftmax::largest_of(rS, 0);
        bool has_grown = softmax.begin(0, largest_first, tile_scale, v_scale, rows_of_tile[0]);
        float sum[2] = {0.0f, 0.0f};
        float const largest_second = RowSoftmax::largest_of(rS, 1);
        CUTE_UNROLL
        for (int j = 0; j < kPairs / 2; ++j) RowSoftmax::exponentiate(rS, 0, j, rows_of_tile[0], sum);
        has_grown |= softmax.begin(1, largest_second, tile_scale, v_scale, rows_of_tile[1]);
        pass_turn();
        CUTE_UNROLL
        for (int j = kPairs / 2; j < kPairs; ++j) RowSoftmax::exponentiate(rS, 0, j, rows_of_tile[0], sum);
        softmax.end(0, rows_of_tile[0], sum);
        return __any_sync(0xffffffff, has_grown);
      };
      // Row 1's exponentials, beside them P of both rows as e4m3 and, with has_product, the promotion of rPV, which has
      // to be there.
      auto exponentiate_second = [&](auto has_product, float const(&scale)[2]) {
        float sum[2] = {0.0f, 0.0f};
        CUTE_UNROLL
        for (int j = 0; j < kPairs; ++j) {
          RowSoftmax::exponentiate(rS, 1, j, rows_of_tile[1], sum);
          if constexpr (has_product()) {
            CUTE_UNROLL
            for (int i = j * kOutputs / kPairs; i < (j + 1) * kOutputs / kPairs; ++i) {
              rO(i) = __fmaf_rn(rPV(i), scale[i / 2 % 2], rO(i));
            }
          }
          if (j % 2 == 1) {
            convert_pairs(0, j - 1);
            convert_pairs(1, j - 1);
          }
        }
        softmax.end(1, rows_of_tile[1], sum);
      };

      float k_scale = arguments.k_scales[first_scale + kv_block];
      float v_scale = arguments.v_scales[first_scale + kv_block];
      ClusterBarrier::wait(&shared.k_full[ring.stage], ring.phase);
      wait_turn();
      issue_s();
      warpgroup_wait<0>();
      warpgroup_fence_operand(rS);
      release(shared.k_empty[ring.stage]);
      if (kv_block == visible.begin) release(shared.q_empty[q_ring.stage]);
      finish_scores(k_scale);
      exponentiate_first(k_scale, v_scale);
      float const no_scale[2] = {};
      exponentiate_second(std::false_type{}, no_scale);
      Parked parked(shared.parked[kParksOutput ? warpgroup : 0]);
      int blocks_of_sum = 0;  // tiles whose product is in rO, with kParksOutput
      bool is_sum = false;    // rPV holds a product that has not joined O, or all of O, and the next is added to it
      for (--kv_block; kv_block >= visible.begin; --kv_block) {
        Ring<kNumStages> const ring_o = ring;
        ring.advance();
        float const v_scale_o = v_scale;
        k_scale = arguments.k_scales[first_scale + kv_block];
        v_scale = arguments.v_scales[first_scale + kv_block];
        ClusterBarrier::wait(&shared.k_full[ring.stage], ring.phase);
        wait_turn();
        issue_s();
        ClusterBarrier::wait(&shared.v_full[ring_o.stage], ring_o.phase);
        issue_o(ring_o.stage, is_sum);
        if constexpr (!kParksOutput) is_sum = !is_sum && v_scale == v_scale_o;
        warpgroup_wait<1>();
        warpgroup_fence_operand(rS);
        release(shared.k_empty[ring.stage]);
        if (kv_block == visible.begin) release(shared.q_empty[q_ring.stage]);
        finish_scores(k_scale);
        bool const has_grown = exponentiate_first(k_scale, v_scale);
        float const rescale[2] = {rows_of_tile[0].correction * rows_of_tile[0].shrinkage,
                                  rows_of_tile[1].correction * rows_of_tile[1].shrinkage};
        if (!kParksOutput && has_grown) {
          CUTE_UNROLL
          for (int i = 0; i < kOutputs; ++i) rO(i) *= rescale[i / 2 % 2];
        }
        ptx::keep_before(softmax.row_sum[0]);  // half of the exponentials, before the wait for P V
        warpgroup_wait<0>();
        warpgroup_fence_operand(rPV);
        release(shared.v_empty[ring_o.stage]);
        if (kParksOutput || is_sum) {
          if (has_grown) {
            CUTE_UNROLL
            for (int i = 0; i < kOutputs; ++i) rPV(i) *= rescale[i / 2 % 2];
          }
          exponentiate_second(std::false_type{}, no_scale);
        } else if constexpr (!kParksOutput) {
          float const scale[2] = {v_scale_o * rescale[0], v_scale_o * rescale[1]};
          exponentiate_second(std::true_type{}, scale);
        }
        if constexpr (kParksOutput) {
          is_sum = ++blocks_of_sum < kBlocksOfSum;
          if (!is_sum) {
            parked.park(rO, softmax);
            blocks_of_sum = 0;
          }
        }
      }
      ClusterBarrier::wait(&shared.v_full[ring.stage], ring.phase);
      issue_o(ring.stage, is_sum);
      warpgroup_wait<0>();
      warpgroup_fence_operand(rPV);
      release(shared.v_empty[ring.stage]);
      ring.advance();
      OutputRows rows;
      Output::finish_rows(arguments, tile, softmax, warpgroup, first_row, rows);
      if constexpr (kParksOutput) {
        parked.join(rO, softmax);
        CUTE_UNROLL
        for (int i = 0; i < kOutputs; ++i) rO(i) *= rows.factor[i / 2 % 2];  // a mean, before its unit is multiplied in
        rows.factor[0] = softmax.unit[0];
        rows.factor[1] = softmax.unit[1];
      } else {
        CUTE_UNROLL
        for (int i = 0; i < kOutputs; ++i) rO(i) = __fmaf_rn(rPV(i), v_scale, rO(i));
      }
      Output::write(arguments, shared, tile, rows, rO, warpgroup, first_row, 0);
      for (; kv_block >= tile.kv_block_begin; --kv_block) skip_kv_block();  // it is visible.begin - 1
      release_tile(slot.stage);
      slot.advance();
      q_ring.advance();
    }
    // Takes the last turn: a barrier left half-arrived would hang the CTA's exit.
    if (Tiles::kPingPong && warpgroup == 0) wait_turn();
  }

  __device__ static void run(Fp8ForwardArguments const& arguments, SharedStorage& shared) {
    int const warpgroup = cutlass::canonical_warp_group_idx();
    if (threadIdx.x == 0) {
      if (cute::cast_smem_ptr_to_uint(&shared) % 1024 != 0) __trap();
      init_query_barriers<Fp8Forward>(shared);
    }
    __syncthreads();
    ptx::wait_on_dependent_grids();  // the operands, and schedule_kernel's list
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
