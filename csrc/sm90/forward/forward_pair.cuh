// Hopper forward attention, head dims above 256: two CTAs of a cluster share a tile of 128 query rows.
//
//   S = scale Q K^T (softcap), masked;   P = exp(S - row_max);   O = sum_tiles P V, rescaled when row_max grows
//
// 512 columns of O in fp32, of 128 rows, fill the registers of four warpgroups. Each CTA multiplies the scores of its
// own 64 rows, over all columns, and has half of the columns of O, of all 128 rows. What passes between the CTAs is P,
// in 16 bits: 8 KiB a step each way, a quarter of what partial scores in fp32 would be.
//
//   owner      (warpgroup 0)   S(n-1), O += P(n) V(n) issued | softmax S(n-1) | P(n-1) to the other CTA | rescale O
//   follower   (warpgroup 1)   P(n) of the other CTA's rows | rescale O | O += P(n) V(n)
//
// K is needed whole by both CTAs: each loads half of it for both (multicast), in chunks of 128 columns, which fall
// empty one by one while the next product runs. Of V each loads its columns.
//
// Barriers. A *stage* is a buffer of a ring; `full` and `empty` alternate phase by phase.
//   k_full[i]   1 arrival, this CTA's loading thread's, and the bytes of both CTAs' copies. The other's copy may come
//               before this CTA's thread has announced the bytes; the arrival is outstanding, so the phase stays.
//   k_empty[i]  2: the owners of both CTAs, since a copy writes to both.
//   v_full[i]   1 and bytes;   v_empty[i]  2: owner and follower.
//   p_full[i]   1, the follower's own, and bytes: the other owner's P and factors, by st.async.
//   p_empty[i]  the 4 warps of the other CTA's follower, when they have read P to registers.
// Each wait is for an earlier kv_block, or for the same one earlier in K, S, P, V, PV: no circle of waits closes.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/grid_dependency_control.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/tensor.hpp>

#include "sm90/forward/forward_output.cuh"
#include "sm90/hopper/cta_pair.cuh"
#include "sm90/hopper/fragment.cuh"
#include "sm90/hopper/ptx.cuh"
#include "sm90/hopper/softmax.cuh"

namespace flashmla::sm90 {

template <int kHeadDim, MaskKind kMask, class Element>
struct ForwardPair {
  using Tiles = ForwardTiles<kHeadDim, kHeadDim, kMask>;
  static constexpr int kNumCtas = Tiles::kNumCtas, kNumConsumers = Tiles::kNumConsumers;
  static constexpr int kBlockQ = Tiles::kBlockQ, kBlockKV = Tiles::kBlockKV;
  static constexpr int kRows = kWarpgroupRows;  // query rows that a CTA owns
  static_assert(kNumCtas == 2 && kNumConsumers == 2 && Tiles::kNumQStages == 1);
  static_assert(kBlockQ == 2 * kRows && kBlockKV == 64);
  static constexpr int kSwizzleColumns = 64;
  static constexpr int kColumnsV = kHeadDim / kNumCtas;  // of O and V, of a CTA
  // For query_tile.cuh, and the launch.
  static constexpr int kColumnsQK = kHeadDim, kNumQStages = 1, kQueryParts = kNumCtas;
  static constexpr bool kHasDOut = false, kLooksAhead = false;
  static constexpr int kChunkColumns = 2 * kSwizzleColumns, kChunks = kHeadDim / kChunkColumns;  // of a kv_block of K
  static constexpr int kNumKStages = Tiles::kNumKChunks, kNumStages = Tiles::kNumStages, kNumPStages = 2;
  static_assert(kHeadDim % kChunkColumns == 0);
  static constexpr int kScores = kBlockKV / 2, kOutputs = kColumnsV / 2;  // per thread
  static constexpr int kPairs = kScores / 2;                              // of P, packed
  using RowSoftmax = Softmax<kScores, false>;

  using MmaS = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 cute::Shape<cute::Int<kRows>, cute::Int<kBlockKV>, cute::Int<kHeadDim>>>()));
  using MmaO = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float,
                                 cute::Shape<cute::Int<kRows>, cute::Int<kColumnsV>, cute::Int<kBlockKV>>,
                                 cute::GMMA::Major::K, cute::GMMA::Major::MN>()));
  static_assert(is_one_wgmma<kBlockKV, MmaS>() && is_one_wgmma<kColumnsV, MmaO>());
  using Layouts = SharedLayouts<Element, kSwizzleColumns>;
  using LayoutQ = typename Layouts::template Rows<kRows, kChunkColumns, kChunks>;
  using LayoutK = typename Layouts::template Rows<kBlockKV, kChunkColumns, kNumKStages>;
  using LayoutVt = typename Layouts::template Columns<kBlockKV, kColumnsV, kNumStages>;

  struct SharedStorage {
    alignas(1024) Element q[kNumQStages][kRows * kHeadDim];
    alignas(1024) Element k[kNumKStages][kBlockKV * kChunkColumns];
    alignas(1024) Element v[kNumStages][kBlockKV * kColumnsV];
    // P of the other CTA's rows: thread t of its owner writes what thread t of the follower reads.
    alignas(128) uint4 p[kNumPStages][kPairs / 4][kWarpgroupThreads];
    // Of a thread's two rows, for each quad: what O is multiplied by before this P, and at the end of a tile.
    float4 factors[kNumPStages][kWarpgroupThreads / 4];
    uint64_t q_full[kNumQStages], q_empty[kNumQStages];
    uint64_t k_full[kNumKStages], k_empty[kNumKStages], v_full[kNumStages], v_empty[kNumStages];
    uint64_t p_full[kNumPStages], p_empty[kNumPStages];
    uint64_t tile_full[kNumQueryTiles], tile_empty[kNumQueryTiles];
    WorkTile tiles[kNumQueryTiles];
  };
  static constexpr int kSharedBytes = sizeof(SharedStorage);
  static_assert(kSharedBytes <= kMaxSharedBytes);
  static constexpr uint32_t kPBytes = sizeof(SharedStorage::p[0]) + sizeof(SharedStorage::factors[0]);

  static constexpr int kOwnBarrier = 1;  // named, one for each warpgroup's own threads; 0 is __syncthreads

  // Of those that CTA `rank` owns.
  __device__ static QueryRow owned_row(ForwardArguments const& arguments, WorkTile const& tile, int rank, int32_t row) {
    Schedule const& schedule = arguments.schedule;
    int32_t const owned = schedule.rows_per_block / kNumCtas * schedule.heads_packed;
    QueryRow found = query_row(schedule, tile, rank * owned + row);
    found.is_valid &= row < owned;
    return found;
  }

  // ---- producer -----------------------------------------------------------------------------------------------------

  __device__ static void produce(ForwardArguments const& arguments, SharedStorage& shared) {
    if (threadIdx.x == 0) {
      load_key_chunks<ForwardPair>(arguments, shared);
    } else if (threadIdx.x == 32) {
      publish_query_work_tiles<ForwardPair>(arguments, shared);
    } else if (threadIdx.x == 64) {
      load_keys<ForwardPair>(arguments, shared, arguments.v, kColumnsV, shared.v, shared.v_full, shared.v_empty);
    } else if (threadIdx.x == 96) {
      load_queries<ForwardPair>(arguments, shared);
    }
  }

  // ---- consumers ----------------------------------------------------------------------------------------------------

  // A product completes for the whole warpgroup at once, so one thread arrives for all.
  __device__ static void release(uint64_t& barrier) {
    if (threadIdx.x % kWarpgroupThreads == 0) ClusterBarrier::arrive(&barrier);
  }
  __device__ static void release_tile(SharedStorage& shared, int place) {  // by each warp, since each reads the tile
    __syncwarp();
    if (threadIdx.x % kWarpThreads == 0) ClusterBarrier::arrive(&shared.tile_empty[place]);
  }

  template <class Mma, class P, class V, class O>
  __device__ static void issue_o(Mma& mma_o, P& rP, V const& fV, O& rO, int stage, bool is_first) {
    cute::warpgroup_fence_operand(rP);
    cute::warpgroup_fence_operand(rO);
    cute::warpgroup_arrive();
    mma_o.accumulate_ = is_first ? cute::GMMA::ScaleOut::Zero : cute::GMMA::ScaleOut::One;
    CUTE_UNROLL
    for (int k = 0; k < kBlockKV / 16; ++k) {
      cute::gemm(mma_o, rP(cute::_, cute::_, k), fV(cute::_, cute::_, k, stage), rO);
      mma_o.accumulate_ = cute::GMMA::ScaleOut::One;
    }
    cute::warpgroup_commit_batch();
  }

  template <class O>
  __device__ static void write(ForwardArguments const& arguments, WorkTile const& tile, O const& rO, int owner,
                               int rank, int row, float const (&factor)[2]) {
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      QueryRow const query = owned_row(arguments, tile, owner, row + 8 * r);
      Element* const out = query.is_valid ? row_pointer<Element>(arguments.out, tile, query) : nullptr;
      store_row<Element, kColumnsV>(out, rO, r, factor[r], kColumnsV * rank, arguments.problem.head_dim_v,
                                    threadIdx.x % 4);
    }
  }

  // Scores and softmax of this CTA's rows, and its columns of their O.
  __device__ static void consume_own(ForwardArguments const& arguments, SharedStorage& shared) {
    using namespace cute;
    int const thread = threadIdx.x % kWarpgroupThreads;
    int const first_row = row_of_thread(0, threadIdx.x);
    int const rank = cta_rank<kNumCtas>();
    uint32_t const other = static_cast<uint32_t>(rank) ^ 1;
    Problem const& problem = arguments.problem;

    MmaS mma_s;
    MmaO mma_o;
    auto thread_s = mma_s.get_slice(0);
    auto thread_o = mma_o.get_slice(0);
    Tensor fQ = thread_s.partition_fragment_A(make_tensor(make_smem_ptr(shared.q[0]), LayoutQ{}));
    Tensor fK = thread_s.partition_fragment_B(make_tensor(make_smem_ptr(shared.k[0]), LayoutK{}));
    Tensor fV = thread_o.partition_fragment_B(make_tensor(make_smem_ptr(shared.v[0]), LayoutVt{}));
    Tensor rS = partition_fragment_C(mma_s, Shape<Int<kRows>, Int<kBlockKV>>{});
    Tensor rOther = make_fragment_like(rS);  // the other half of its columns
    Tensor rO = partition_fragment_C(mma_o, Shape<Int<kRows>, Int<kColumnsV>>{});
    Tensor rP = make_tensor<Element>(partition_shape_A(mma_o, Shape<Int<kRows>, Int<kBlockKV>>{}));
    static_assert(decltype(size(rS))::value == kScores && decltype(size(rO))::value == kOutputs);
    static_assert(decltype(size(rP))::value == 2 * kPairs);
    auto* const pairs_p = reinterpret_cast<uint32_t*>(rP.data());

    bool const has_transform = problem.softcap > 0.0f || problem.scale <= 0.0f;
    float const scale_log2 = has_transform ? kLog2e : problem.scale * kLog2e;

    Ring<kNumKStages> k_ring;  // of the first chunk that has not been released
    Ring<kNumStages> v_ring;
    Ring<kNumPStages> p_ring;
    Ring<kNumQueryTiles> slot;
    uint32_t q_phase = 0;

    // Halves of the columns apart, as both backward kernels add them, of which one has them in two CTAs: a score of 1e9
    // summed in another order differs from lse by hundreds, and its P would be 0 there.
    auto issue_s = [&] {
      Ring<kNumKStages> ring = k_ring;
      clear(rOther);  // whose old values would stay in registers until here
      warpgroup_fence_operand(rS);
      warpgroup_fence_operand(rOther);
      auto issue_half = [&](auto& rHalf, int first_chunk) {
        mma_s.accumulate_ = GMMA::ScaleOut::Zero;
        // Unrolled, it has descriptors of 512 columns of Q in registers.
        CUTE_NO_UNROLL
        for (int chunk = first_chunk; chunk < first_chunk + kChunks / 2; ++chunk, ring.advance()) {
          ClusterBarrier::wait(&shared.k_full[ring.stage], ring.phase);
          warpgroup_arrive();
          CUTE_UNROLL
          for (int k = 0; k < kChunkColumns / 16; ++k) {
            cute::gemm(mma_s, fQ(_, _, k, chunk), fK(_, _, k, ring.stage), rHalf);
            mma_s.accumulate_ = GMMA::ScaleOut::One;
          }
          warpgroup_commit_batch();
        }
      };
      issue_half(rS, 0);
      issue_half(rOther, kChunks / 2);
    };
    auto release_chunk = [&] {
      if (thread == 0) {
        ClusterBarrier::arrive(&shared.k_empty[k_ring.stage]);
        ptx::arrive_remote(ptx::address_in(other, &shared.k_empty[k_ring.stage]));
      }
      k_ring.advance();
    };
    // Waits for S, `kBehind` groups having been issued after it.
    auto wait_s = [&](auto behind) {
      constexpr int kBehind = decltype(behind)::value;
      static_assert(kChunks == 4);
      warpgroup_wait<3 + kBehind>();
      release_chunk();
      warpgroup_wait<2 + kBehind>();
      release_chunk();
      warpgroup_wait<1 + kBehind>();
      release_chunk();
      warpgroup_wait<kBehind>();
      release_chunk();
      warpgroup_fence_operand(rS);
      warpgroup_fence_operand(rOther);
      CUTE_UNROLL
      for (int i = 0; i < kScores; ++i) rS(i) += rOther(i);
    };
    // Without a product to wait for, the warps of a warpgroup must not run apart by more than the ring is deep.
    auto sync_warpgroup = [&] { NamedBarrier::sync(kWarpgroupThreads, kOwnBarrier); };
    auto skip_kv_block = [&] {
      Ring<kNumKStages> ring = k_ring;
      CUTE_NO_UNROLL
      for (int chunk = 0; chunk < kChunks; ++chunk, ring.advance()) {
        ClusterBarrier::wait(&shared.k_full[ring.stage], ring.phase);
      }
      ClusterBarrier::wait(&shared.v_full[v_ring.stage], v_ring.phase);
      sync_warpgroup();
      CUTE_NO_UNROLL
      for (int chunk = 0; chunk < kChunks; ++chunk) release_chunk();
      release(shared.v_empty[v_ring.stage]);
      v_ring.advance();
    };

    RowSoftmax softmax(scale_log2);
    for (;; q_phase ^= 1, slot.advance()) {
      ClusterBarrier::wait(&shared.q_full[0], q_phase);
      WorkTile const& tile = shared.tiles[slot.stage];
      if (tile.head < 0) break;
      VisibleBlocks const& visible = tile.visible[rank];
      int32_t kv_block = tile.kv_block_end - 1;
      if (visible.begin >= visible.end) {
        for (; kv_block >= tile.kv_block_begin; --kv_block) skip_kv_block();
        write_masked_rows<Element>(arguments, tile, [&](int32_t row) { return owned_row(arguments, tile, rank, row); });
        sync_warpgroup();
        release(shared.q_empty[0]);
        release_tile(shared, slot.stage);
        continue;
      }
      for (; kv_block >= visible.end; --kv_block) skip_kv_block();

      float correction[2], factor[2];
      // P is packed twice, for the other CTA while the last product still reads its own, and for the next product: what
      // that reads must not be defined before the last has ended, or ptxas serializes both.
      auto convert_p = [&] {
        warpgroup_fence_operand(rS);
        CUTE_UNROLL
        for (int i = 0; i < kPairs; ++i) pairs_p[i] = pack<Element>(rS(2 * i), rS(2 * i + 1));
      };
      // From S to P, in rS and on its way to the other CTA.
      auto finish_scores = [&](auto is_first) {
        if (kv_block == visible.begin) release(shared.q_empty[0]);  // that was the last of it
        if (has_transform) transform_scores<kScores>(rS, problem.scale, problem.softcap);
        if (kv_block < visible.unmasked_begin || kv_block >= visible.unmasked_end) {
          int32_t const shift = tile.sequence.seqlen_kv - tile.sequence.seqlen_q;
          int32_t const position[2] = {owned_row(arguments, tile, rank, first_row).query + shift,
                                       owned_row(arguments, tile, rank, first_row + 8).query + shift};
          mask_scores<kMask, kScores>(rS, arguments.window, tile.sequence.seqlen_kv, kv_block * kBlockKV, position);
        }
        bool const has_grown = softmax.template update<is_first()>(rS, correction);
        factor[0] = factor[1] = 1.0f;  // anew in every step, so that no register holds it meanwhile
        if (kv_block == visible.begin) {
          CUTE_UNROLL
          for (int r = 0; r < 2; ++r) {
            factor[r] = finish_row(arguments, tile, owned_row(arguments, tile, rank, first_row + 8 * r), softmax, r);
          }
        }
        ClusterBarrier::wait(&shared.p_empty[p_ring.stage], p_ring.phase ^ 1);
        uint32_t const target = ptx::address_in(other, &shared.p[p_ring.stage][0][thread]);
        uint32_t const barrier = ptx::address_in(other, &shared.p_full[p_ring.stage]);
        CUTE_UNROLL
        for (int i = 0; i < kPairs / 4; ++i) {
          ptx::store_async(target + i * (kWarpgroupThreads * 16), barrier, pack<Element>(rS(8 * i), rS(8 * i + 1)),
                           pack<Element>(rS(8 * i + 2), rS(8 * i + 3)), pack<Element>(rS(8 * i + 4), rS(8 * i + 5)),
                           pack<Element>(rS(8 * i + 6), rS(8 * i + 7)));
        }
        if (thread % 4 == 0) {
          ptx::store_async(ptx::address_in(other, &shared.factors[p_ring.stage][thread / 4]), barrier, correction[0],
                           correction[1], factor[0], factor[1]);
        }
        p_ring.advance();
        return has_grown;
      };
      softmax.reset();
      issue_s();
      wait_s(Int<0>{});
      finish_scores(std::true_type{});
      convert_p();
      bool is_first = true;
      for (--kv_block; kv_block >= visible.begin; --kv_block) {
        issue_s();
        ClusterBarrier::wait(&shared.v_full[v_ring.stage], v_ring.phase);
        issue_o(mma_o, rP, fV, rO, v_ring.stage, is_first);
        is_first = false;
        wait_s(Int<1>{});
        bool const has_grown = finish_scores(std::false_type{});
        warpgroup_wait<0>();
        warpgroup_fence_operand(rO);
        release(shared.v_empty[v_ring.stage]);
        v_ring.advance();
        convert_p();
        if (has_grown) {
          CUTE_UNROLL
          for (int i = 0; i < kOutputs; ++i) rO(i) *= correction[(i / 2) % 2];
        }
      }
      ClusterBarrier::wait(&shared.v_full[v_ring.stage], v_ring.phase);
      issue_o(mma_o, rP, fV, rO, v_ring.stage, is_first);
      warpgroup_wait<0>();
      warpgroup_fence_operand(rO);
      release(shared.v_empty[v_ring.stage]);
      v_ring.advance();
      write(arguments, tile, rO, rank, rank, first_row, factor);
      for (; kv_block >= tile.kv_block_begin; --kv_block) skip_kv_block();
      release_tile(shared, slot.stage);
    }
  }

  // This CTA's columns of O of the other's rows.
  __device__ static void consume_other(ForwardArguments const& arguments, SharedStorage& shared) {
    using namespace cute;
    int const thread = threadIdx.x % kWarpgroupThreads;
    int const first_row = row_of_thread(0, threadIdx.x);
    int const rank = cta_rank<kNumCtas>();

    MmaO mma_o;
    Tensor fV = mma_o.get_slice(0).partition_fragment_B(make_tensor(make_smem_ptr(shared.v[0]), LayoutVt{}));
    Tensor rO = partition_fragment_C(mma_o, Shape<Int<kRows>, Int<kColumnsV>>{});
    Tensor rP = make_tensor<Element>(partition_shape_A(mma_o, Shape<Int<kRows>, Int<kBlockKV>>{}));
    auto* const pairs_p = reinterpret_cast<uint32_t*>(rP.data());
    Ring<kNumStages> v_ring;
    Ring<kNumPStages> p_ring;
    Ring<kNumQueryTiles> slot;
    float4 factors;

    auto skip_kv_block = [&] {
      ClusterBarrier::wait(&shared.v_full[v_ring.stage], v_ring.phase);
      NamedBarrier::sync(kWarpgroupThreads, kOwnBarrier + 1);
      release(shared.v_empty[v_ring.stage]);
      v_ring.advance();
    };
    auto wait_p = [&] {
      uint64_t& full = shared.p_full[p_ring.stage];
      if (thread == 0) ClusterTransactionBarrier::arrive_and_expect_tx(&full, kPBytes);
      ClusterBarrier::wait(&full, p_ring.phase);
      factors = shared.factors[p_ring.stage][thread / 4];
    };
    auto read_p = [&] {  // where no product is on its way that reads rP
      uint32_t words = __float_as_uint(factors.x);
      CUTE_UNROLL
      for (int i = 0; i < kPairs / 4; ++i) {
        uint4 const four = shared.p[p_ring.stage][i][thread];
        words &= four.x;
        pairs_p[4 * i] = four.x, pairs_p[4 * i + 1] = four.y, pairs_p[4 * i + 2] = four.z, pairs_p[4 * i + 3] = four.w;
      }
      release_to_other(shared.p_empty[p_ring.stage], words);
      p_ring.advance();
    };

    for (;; slot.advance()) {
      ClusterBarrier::wait(&shared.tile_full[slot.stage], slot.phase);
      WorkTile const& tile = shared.tiles[slot.stage];
      if (tile.head < 0) break;
      VisibleBlocks const& visible = tile.visible[rank ^ 1];
      int32_t kv_block = tile.kv_block_end - 1;
      if (visible.begin >= visible.end) {
        for (; kv_block >= tile.kv_block_begin; --kv_block) skip_kv_block();
        release_tile(shared, slot.stage);
        continue;
      }
      for (; kv_block >= visible.end; --kv_block) skip_kv_block();
      wait_p();
      read_p();
      ClusterBarrier::wait(&shared.v_full[v_ring.stage], v_ring.phase);
      issue_o(mma_o, rP, fV, rO, v_ring.stage, true);
      for (--kv_block; kv_block >= visible.begin; --kv_block) {
        wait_p();
        bool const has_grown = __any_sync(0xffffffff, factors.x != 1.0f || factors.y != 1.0f);
        warpgroup_wait<0>();
        warpgroup_fence_operand(rO);
        release(shared.v_empty[v_ring.stage]);
        v_ring.advance();
        read_p();
        if (has_grown) {
          CUTE_UNROLL
          for (int i = 0; i < kOutputs; ++i) rO(i) *= i / 2 % 2 == 0 ? factors.x : factors.y;
        }
        ClusterBarrier::wait(&shared.v_full[v_ring.stage], v_ring.phase);
        issue_o(mma_o, rP, fV, rO, v_ring.stage, false);
      }
      warpgroup_wait<0>();
      warpgroup_fence_operand(rO);
      release(shared.v_empty[v_ring.stage]);
      v_ring.advance();
      float const factor[2] = {factors.z, factors.w};
      write(arguments, tile, rO, rank ^ 1, rank, first_row, factor);
      for (; kv_block >= tile.kv_block_begin; --kv_block) skip_kv_block();
      release_tile(shared, slot.stage);
    }
  }

  __device__ static void run(ForwardArguments const& arguments, SharedStorage& shared) {
    int const warpgroup = cutlass::canonical_warp_group_idx();
    if (threadIdx.x == 0) {
      if (cute::cast_smem_ptr_to_uint(&shared) % 1024 != 0) __trap();
      for (uint64_t& barrier : shared.p_full) ClusterBarrier::init(&barrier, 1);
      for (uint64_t& barrier : shared.p_empty) ClusterBarrier::init(&barrier, kWarpgroupThreads / kWarpThreads);
      init_query_barriers<ForwardPair>(shared);
    }
    sync_ctas<kNumCtas>();
    cutlass::arch::wait_on_dependent_grids();  // schedule_kernel's list
    if (warpgroup == 0) {
      cutlass::arch::warpgroup_reg_dealloc<Tiles::kProducerRegisters>();
      produce(arguments, shared);
    } else if (warpgroup == 1) {
      cutlass::arch::warpgroup_reg_alloc<Tiles::kConsumerRegisters>();
      consume_own(arguments, shared);
    } else {
      cutlass::arch::warpgroup_reg_alloc<Tiles::kConsumerRegisters>();
      consume_other(arguments, shared);
    }
    sync_ctas<kNumCtas>();
  }
};

}  // namespace flashmla::sm90
