// Hopper backward attention, head dims above 256: dQ, by two CTAs of a cluster that share a tile of 128 query rows.
//
//   S = Q K^T      P = exp(scale S - lse)      dP = dO V^T      dS = P o (dP - delta)      dQ = scale dS K
//
// As the forward (forward_pair.cuh): a CTA multiplies S and dP of its own 64 rows over all columns, and has half of the
// columns of dQ, of all 128 rows. What passes between the CTAs is dS, in 16 bits: 4 KiB a step each way.
//
//   owner     (warpgroup 0)   dQ(n) += dS(n) K(n), S(n-1), dP(n-1) issued | P | dS(n-1), to the other CTA too
//   follower  (warpgroup 1)   dS(n) of the other CTA's rows | dQ += dS(n) K(n)
//
// A CTA's columns of K stay until both have multiplied dQ; the other half of the columns is for S alone. V is for dP
// alone: each CTA loads half of it for both (multicast), in chunks of 128 columns.
//
// Barriers: `own` of this CTA's columns of K (owner and follower release them), `rest` of the other half (owner), v_*
// and ds_* as k_* and p_* of forward_pair.cuh.
#pragma once

#include "sm90/backward/backward_queries.cuh"

namespace flashmla::sm90 {

template <int kHeadDim, class Element>
struct BackwardQueriesPair {
  using Tiles = BackwardQueryTiles<kHeadDim>;
  static constexpr int kNumCtas = Tiles::kNumCtas, kNumConsumers = Tiles::kNumConsumers;
  static constexpr int kBlockQ = Tiles::kBlockQ, kBlockKV = Tiles::kBlockKV;
  static constexpr int kRows = kWarpgroupRows;  // query rows that a CTA owns
  static_assert(kNumCtas == 2 && kNumConsumers == 2 && kBlockQ == 2 * kRows && kBlockKV == 32);
  static constexpr int kSwizzleColumns = 64;
  static constexpr int kColumns = kHeadDim / kNumCtas;  // of K and dQ, of a CTA
  static constexpr int kChunkColumns = 2 * kSwizzleColumns, kChunks = kHeadDim / kChunkColumns;  // of a kv_block of V
  static constexpr int kNumVStages = kChunks + 1, kNumStages = Tiles::kNumStages, kNumDSStages = 2;
  static constexpr int kRest = kNumStages;  // where the other half of K lies, behind the ring of this CTA's columns
  static constexpr int kScores = kBlockKV / 2;  // per thread
  static constexpr int kPairs = kScores / 2;    // of dS, packed

  using MmaS = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 cute::Shape<cute::Int<kRows>, cute::Int<kBlockKV>, cute::Int<kHeadDim>>>()));
  using MmaDQ = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float,
                                 cute::Shape<cute::Int<kRows>, cute::Int<kColumns>, cute::Int<kBlockKV>>,
                                 cute::GMMA::Major::K, cute::GMMA::Major::MN>()));
  using Layouts = SharedLayouts<Element, kSwizzleColumns>;
  using LayoutQ = typename Layouts::template Rows<kRows, kColumns, kNumCtas>;
  using LayoutDO = typename Layouts::template Rows<kRows, kChunkColumns, kChunks>;
  using LayoutK = typename Layouts::template Rows<kBlockKV, kColumns, kNumStages + 1>;
  using LayoutKt = typename Layouts::template Columns<kBlockKV, kColumns, kNumStages + 1>;
  using LayoutV = typename Layouts::template Rows<kBlockKV, kChunkColumns, kNumVStages>;

  struct SharedStorage {
    alignas(1024) Element q[kRows * kHeadDim];
    alignas(1024) Element dout[kRows * kHeadDim];
    alignas(1024) Element k[kNumStages + 1][kBlockKV * kColumns];
    alignas(1024) Element v[kNumVStages][kBlockKV * kChunkColumns];
    // dS of the other CTA's rows: thread t of its owner writes what thread t of the follower reads.
    alignas(128) uint4 ds[kNumDSStages][kPairs / 4][kWarpgroupThreads];
    uint64_t q_full, q_empty;
    uint64_t own_full[kNumStages], own_empty[kNumStages], rest_full, rest_empty;
    uint64_t v_full[kNumVStages], v_empty[kNumVStages];
    uint64_t ds_full[kNumDSStages], ds_empty[kNumDSStages];
    uint64_t tile_full[kNumQueryTiles], tile_empty[kNumQueryTiles];
    WorkTile tiles[kNumQueryTiles];
  };
  static constexpr int kSharedBytes = sizeof(SharedStorage);
  static_assert(kSharedBytes <= kMaxSharedBytes);

  static constexpr int kOwnBarrier = 1;  // named, one for each warpgroup's own threads; 0 is __syncthreads

  // Row `row` of those that CTA `rank` owns.
  __device__ static QueryRow owned_row(Schedule const& schedule, WorkTile const& tile, int rank, int32_t row) {
    int32_t const packed = schedule.heads_packed, rows = schedule.rows_per_block / kNumCtas;  // queries of a CTA
    int32_t const query_here = packed == 1 ? row : row / packed, query = tile.q_begin + rank * rows + query_here;
    return {query, tile.head + row - query_here * packed,
            query_here < rows && query >= 0 && query < tile.sequence.seqlen_q};
  }

  // ---- producer -----------------------------------------------------------------------------------------------------

  __device__ static void init_barriers(SharedStorage& shared) {
    auto init = [](auto& barriers, int arrivals) {
      for (uint64_t& barrier : barriers) ClusterBarrier::init(&barrier, arrivals);
    };
    constexpr int kNumLoaders = 3, kNumWarps = kWarpgroupThreads / kWarpThreads;
    ClusterBarrier::init(&shared.q_full, 1);
    ClusterBarrier::init(&shared.q_empty, 1);
    init(shared.own_full, 1);
    init(shared.own_empty, kNumConsumers);
    ClusterBarrier::init(&shared.rest_full, 1);
    ClusterBarrier::init(&shared.rest_empty, 1);
    init(shared.v_full, 1);
    init(shared.v_empty, kNumCtas);
    init(shared.ds_full, 1);
    init(shared.ds_empty, kNumWarps);
    init(shared.tile_full, 1);
    init(shared.tile_empty, kNumLoaders + kNumWarps * kNumConsumers);
    cutlass::arch::fence_barrier_init();
  }

  __device__ static void load_queries(BackwardQueriesArguments const& arguments, SharedStorage& shared) {
    Schedule const& schedule = arguments.schedule;
    int32_t const queries = schedule.rows_per_block / kNumCtas;
    uint32_t phase = 0;
    Ring<kNumQueryTiles> slot;
    for (;; phase ^= 1, slot.advance()) {
      ClusterBarrier::wait(&shared.tile_full[slot.stage], slot.phase);
      WorkTile const& tile = shared.tiles[slot.stage];
      ClusterBarrier::wait(&shared.q_empty, phase ^ 1);
      if (tile.head < 0 || tile.kv_block_begin >= tile.kv_block_end) {
        ClusterBarrier::arrive(&shared.q_full);
        if (tile.head < 0) return;
      } else {
        int32_t const batch = schedule.num_items != nullptr ? 0 : tile.batch;
        int32_t const first = tile.sequence.offset_q + tile.q_begin + cta_rank<kNumCtas>() * queries;
        ClusterTransactionBarrier::arrive_and_expect_tx(
            &shared.q_full, 2 * sizeof(Element) * queries * schedule.heads_packed * kHeadDim);
        auto load = [&](CUtensorMap const& map, Element* buffer) {
          CUTE_NO_UNROLL
          for (int column = 0; column < kHeadDim; column += kSwizzleColumns) {
            cute::SM90_TMA_LOAD_5D::copy(&map, &shared.q_full,
                                         static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST),
                                         buffer + column * kRows, column, 0, first, tile.head / schedule.heads_packed,
                                         batch);
          }
        };
        load(arguments.q, shared.q);
        load(arguments.dout, shared.dout);
      }
      ClusterBarrier::arrive(&shared.tile_empty[slot.stage]);
    }
  }

  // Calls `load(coordinates of the keys, kv head, first key)` for each kv_block of each tile, as they are consumed.
  template <class Load>
  __device__ static void each_kv_block(BackwardQueriesArguments const& arguments, SharedStorage& shared, Load&& load) {
    Schedule const& schedule = arguments.schedule;
    int32_t const group = static_cast<int32_t>(arguments.problem.heads_q / arguments.problem.heads_kv);
    Ring<kNumQueryTiles> slot;
    for (;; slot.advance()) {
      ClusterBarrier::wait(&shared.tile_full[slot.stage], slot.phase);
      WorkTile const& tile = shared.tiles[slot.stage];
      if (tile.head < 0) return;
      RowCoordinates const rows =
          row_coordinates(schedule.num_items != nullptr, tile.sequence.offset_kv, tile.sequence.seqlen_kv, tile.batch);
      int32_t const head_kv = tile.head / group;
      for (int32_t kv_block = tile.kv_block_end - 1; kv_block >= tile.kv_block_begin; --kv_block) {
        load(rows, head_kv, rows.row + kv_block * kBlockKV);
      }
      ClusterBarrier::arrive(&shared.tile_empty[slot.stage]);
    }
  }

  __device__ static void load_k(BackwardQueriesArguments const& arguments, SharedStorage& shared) {
    int32_t const rank = cta_rank<kNumCtas>();
    Ring<kNumStages> ring;
    uint32_t rest_phase = 0;
    each_kv_block(arguments, shared, [&](RowCoordinates const& rows, int32_t head_kv, int32_t row) {
      auto load = [&](uint64_t& full, int place, int32_t first_column) {
        ClusterTransactionBarrier::arrive_and_expect_tx(&full, sizeof(shared.k[0]));
        CUTE_NO_UNROLL
        for (int column = 0; column < kColumns; column += kSwizzleColumns) {
          cute::SM90_TMA_LOAD_5D::copy(&arguments.k, &full,
                                       static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                       shared.k[place] + column * kBlockKV, first_column + column, row, rows.end,
                                       head_kv, rows.outer);
        }
      };
      ClusterBarrier::wait(&shared.rest_empty, rest_phase ^ 1);
      load(shared.rest_full, kRest, (rank ^ 1) * kColumns);
      rest_phase ^= 1;
      ClusterBarrier::wait(&shared.own_empty[ring.stage], ring.phase ^ 1);
      load(shared.own_full[ring.stage], ring.stage, rank * kColumns);
      ring.advance();
    });
  }

  // Half of each chunk, to both CTAs.
  __device__ static void load_v(BackwardQueriesArguments const& arguments, SharedStorage& shared) {
    int32_t const rank = cta_rank<kNumCtas>();
    Ring<kNumVStages> ring;
    each_kv_block(arguments, shared, [&](RowCoordinates const& rows, int32_t head_kv, int32_t row) {
      CUTE_NO_UNROLL
      for (int chunk = 0; chunk < kChunks; ++chunk, ring.advance()) {
        int const stage = ring.stage;
        ClusterBarrier::wait(&shared.v_empty[stage], ring.phase ^ 1);
        ClusterTransactionBarrier::arrive_and_expect_tx(&shared.v_full[stage], sizeof(shared.v[stage]));
        cute::SM90_TMA_LOAD_MULTICAST_5D::copy(
            &arguments.v, &shared.v_full[stage], uint16_t{3},
            static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
            shared.v[stage] + rank * (kSwizzleColumns * kBlockKV), chunk * kChunkColumns + rank * kSwizzleColumns, row,
            rows.end, head_kv, rows.outer);
      }
    });
  }

  __device__ static void produce(BackwardQueriesArguments const& arguments, SharedStorage& shared) {
    if (threadIdx.x == 0) {
      load_k(arguments, shared);
    } else if (threadIdx.x == 32) {
      publish_query_work_tiles<BackwardQueriesPair>(arguments, shared);
    } else if (threadIdx.x == 64) {
      load_v(arguments, shared);
    } else if (threadIdx.x == 96) {
      load_queries(arguments, shared);
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

  // Where lse and delta of a row lie.
  __device__ static int64_t row_index(BackwardQueriesArguments const& arguments, WorkTile const& tile,
                                      QueryRow const& row) {
    return row.head * arguments.rows.per_head +
           first_workspace_row(arguments.problem, tile.batch, tile.sequence.offset_q, arguments.block_rows) +
           place_of_row(row.query);
  }

  // dQ = scale * the fragment; 0 of a query that sees no key, whatever dO holds.
  template <class Fragment>
  __device__ static void write(BackwardQueriesArguments const& arguments, WorkTile const& tile,
                               Fragment const& fragment, int owner, int rank, int32_t first_row) {
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      QueryRow const row = owned_row(arguments.schedule, tile, owner, first_row + 8 * r);
      Element* const out = row.is_valid ? row_pointer<Element>(arguments.dq, tile, row) : nullptr;
      bool const sees_keys =
          row.is_valid && arguments.rows.lse_log2[row_index(arguments, tile, row)] != INFINITY;
      auto const gradient = [&](int i) { return sees_keys ? fragment(i) : 0.0f; };
      store_row<Element, kColumns>(out, gradient, r, arguments.problem.scale, kColumns * rank,
                                   arguments.problem.head_dim_qk, threadIdx.x % 4);
    }
  }

  template <class Mma, class DS, class Kt, class DQ>
  __device__ static void issue_dq(Mma& mma_dq, DS& rDS, Kt const& fKt, DQ& rDQ, int stage, bool is_sum) {
    cute::warpgroup_fence_operand(rDS);
    multiply(mma_dq, rDS, fKt(cute::_, cute::_, cute::_, stage), rDQ, is_sum);
  }

  __device__ static void consume_own(BackwardQueriesArguments const& arguments, SharedStorage& shared) {
    using namespace cute;
    int const thread = threadIdx.x % kWarpgroupThreads;
    int const first_row = row_of_thread(0, threadIdx.x);
    int const rank = cta_rank<kNumCtas>();
    uint32_t const other = static_cast<uint32_t>(rank) ^ 1;
    Problem const& problem = arguments.problem;
    Schedule const& schedule = arguments.schedule;

    MmaS mma_s;
    MmaDQ mma_dq;
    auto tensor = [](Element* data, auto layout) { return make_tensor(make_smem_ptr(data), layout); };
    auto thread_s = mma_s.get_slice(0);
    Tensor fQ = thread_s.partition_fragment_A(tensor(shared.q, LayoutQ{}));
    Tensor fDO = thread_s.partition_fragment_A(tensor(shared.dout, LayoutDO{}));
    Tensor fK = thread_s.partition_fragment_B(tensor(shared.k[0], LayoutK{}));
    Tensor fV = thread_s.partition_fragment_B(tensor(shared.v[0], LayoutV{}));
    Tensor fKt = mma_dq.get_slice(0).partition_fragment_B(tensor(shared.k[0], LayoutKt{}));
    Tensor rS = partition_fragment_C(mma_s, Shape<Int<kRows>, Int<kBlockKV>>{});
    Tensor rDP = partition_fragment_C(mma_s, Shape<Int<kRows>, Int<kBlockKV>>{});
    Tensor rDQ = partition_fragment_C(mma_dq, Shape<Int<kRows>, Int<kColumns>>{});
    Tensor rDS = make_tensor<Element>(partition_shape_A(mma_dq, Shape<Int<kRows>, Int<kBlockKV>>{}));
    static_assert(decltype(size(rS))::value == kScores && decltype(size(rDS))::value == kScores);
    auto* const pairs = reinterpret_cast<uint32_t*>(rDS.data());

    float const scale_log2 = problem.scale * kLog2e;
    // Hidden scores are -inf: by a scale that is not positive they must be multiplied before.
    bool const has_transform = problem.softcap > 0.0f || problem.scale <= 0.0f;
    Ring<kNumStages> own_ring;
    Ring<kNumVStages> v_ring;  // of the first chunk that has not been released
    Ring<kNumDSStages> ds_ring;
    Ring<kNumQueryTiles> slot;
    uint32_t q_phase = 0, rest_phase = 0;

    // All columns in a row, as the forward: see backward_pair.cuh.
    auto issue_s = [&] {
      warpgroup_fence_operand(rS);
      mma_s.accumulate_ = GMMA::ScaleOut::Zero;
      CUTE_NO_UNROLL
      for (int half = 0; half < kNumCtas; ++half) {
        bool const is_own = half == rank;
        ClusterBarrier::wait(is_own ? &shared.own_full[own_ring.stage] : &shared.rest_full,
                             is_own ? own_ring.phase : rest_phase);
        int const place = is_own ? own_ring.stage : kRest;
        warpgroup_arrive();
        CUTE_UNROLL
        for (int k = 0; k < kColumns / 16; ++k) {
          cute::gemm(mma_s, fQ(_, _, k, half), fK(_, _, k, place), rS);
          mma_s.accumulate_ = GMMA::ScaleOut::One;
        }
      }
      warpgroup_commit_batch();
    };
    auto issue_dp = [&] {
      warpgroup_fence_operand(rDP);
      mma_s.accumulate_ = GMMA::ScaleOut::Zero;
      Ring<kNumVStages> ring = v_ring;
      CUTE_NO_UNROLL
      for (int chunk = 0; chunk < kChunks; ++chunk, ring.advance()) {
        ClusterBarrier::wait(&shared.v_full[ring.stage], ring.phase);
        warpgroup_arrive();
        CUTE_UNROLL
        for (int k = 0; k < kChunkColumns / 16; ++k) {
          cute::gemm(mma_s, fDO(_, _, k, chunk), fV(_, _, k, ring.stage), rDP);
          mma_s.accumulate_ = GMMA::ScaleOut::One;
        }
        warpgroup_commit_batch();
      }
    };
    auto release_chunk = [&] {
      if (thread == 0) {
        ClusterBarrier::arrive(&shared.v_empty[v_ring.stage]);
        ptx::arrive_remote(ptx::address_in(other, &shared.v_empty[v_ring.stage]));
      }
      v_ring.advance();
    };
    auto sync_warpgroup = [&] { NamedBarrier::sync(kWarpgroupThreads, kOwnBarrier); };
    auto skip_kv_block = [&] {
      ClusterBarrier::wait(&shared.own_full[own_ring.stage], own_ring.phase);
      ClusterBarrier::wait(&shared.rest_full, rest_phase);
      Ring<kNumVStages> ring = v_ring;
      CUTE_NO_UNROLL
      for (int chunk = 0; chunk < kChunks; ++chunk, ring.advance()) {
        ClusterBarrier::wait(&shared.v_full[ring.stage], ring.phase);
      }
      sync_warpgroup();
      release(shared.own_empty[own_ring.stage]);
      release(shared.rest_empty);
      CUTE_NO_UNROLL
      for (int chunk = 0; chunk < kChunks; ++chunk) release_chunk();
      own_ring.advance();
      rest_phase ^= 1;
    };

    for (;; q_phase ^= 1, slot.advance()) {
      ClusterBarrier::wait(&shared.q_full, q_phase);
      WorkTile const& tile = shared.tiles[slot.stage];
      if (tile.head < 0) break;
      VisibleBlocks const& visible = tile.visible[rank];
      int32_t kv_block = tile.kv_block_end - 1;
      bool const sees_keys = visible.begin < visible.end;
      for (int32_t const last = sees_keys ? visible.end : tile.kv_block_begin; kv_block >= last; --kv_block)
        skip_kv_block();
      if (!sees_keys) {
        clear(rDQ);
        sync_warpgroup();
        release(shared.q_empty);
        write(arguments, tile, rDQ, rank, rank, first_row);
        release_tile(shared, slot.stage);
        continue;
      }

      float lse_log2[2], delta[2];
      int32_t position[2];
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        QueryRow const row = owned_row(schedule, tile, rank, first_row + 8 * r);
        int64_t const index = row_index(arguments, tile, row);
        lse_log2[r] = row.is_valid ? arguments.rows.lse_log2[index] : INFINITY;
        delta[r] = row.is_valid ? arguments.rows.delta[index] : 0.0f;
        position[r] = row.query + tile.sequence.seqlen_kv - tile.sequence.seqlen_q;
      }
      bool const is_large = __any_sync(0xffffffff, is_large_lse(lse_log2[0]) || is_large_lse(lse_log2[1]));

      // From S and dP, the last two products issued, to dS, in rDS and on its way to the other CTA.
      auto gradients = [&] {
        warpgroup_wait<kChunks>();
        warpgroup_fence_operand(rS);
        release(shared.rest_empty);
        rest_phase ^= 1;
        bool const is_masked = kv_block < visible.unmasked_begin || kv_block >= visible.unmasked_end;
        auto hide = [&] {
          if (!is_masked) return;
          mask_scores<MaskKind::kWindow, kScores>(rS, arguments.window, tile.sequence.seqlen_kv, kv_block * kBlockKV,
                                                  position);
        };
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
        static_assert(kChunks == 4);
        warpgroup_wait<3>();
        release_chunk();
        warpgroup_wait<2>();
        release_chunk();
        warpgroup_wait<1>();
        release_chunk();
        warpgroup_wait<0>();
        release_chunk();
        warpgroup_fence_operand(rDP);
        if (kv_block == visible.begin) release(shared.q_empty);
        CUTE_UNROLL
        for (int i = 0; i < kPairs; ++i) {
          pairs[i] =
              pack<Element>(rS(2 * i) * (rDP(2 * i) - delta[i % 2]), rS(2 * i + 1) * (rDP(2 * i + 1) - delta[i % 2]));
        }
        ClusterBarrier::wait(&shared.ds_empty[ds_ring.stage], ds_ring.phase ^ 1);
        uint32_t const target = ptx::address_in(other, &shared.ds[ds_ring.stage][0][thread]);
        uint32_t const barrier = ptx::address_in(other, &shared.ds_full[ds_ring.stage]);
        CUTE_UNROLL
        for (int i = 0; i < kPairs / 4; ++i) {
          ptx::store_async(target + i * (kWarpgroupThreads * 16), barrier, pairs[4 * i], pairs[4 * i + 1],
                           pairs[4 * i + 2], pairs[4 * i + 3]);
        }
        ds_ring.advance();
      };

      issue_s();
      issue_dp();
      gradients();
      bool is_sum = false;
      for (--kv_block; kv_block >= visible.begin; --kv_block) {
        int const stage = own_ring.stage;
        own_ring.advance();
        issue_dq(mma_dq, rDS, fKt, rDQ, stage, is_sum);
        issue_s();
        issue_dp();
        is_sum = true;
        warpgroup_wait<kChunks + 1>();
        warpgroup_fence_operand(rDQ);
        release(shared.own_empty[stage]);
        gradients();
      }
      issue_dq(mma_dq, rDS, fKt, rDQ, own_ring.stage, is_sum);
      warpgroup_wait<0>();
      warpgroup_fence_operand(rDQ);
      release(shared.own_empty[own_ring.stage]);
      own_ring.advance();
      write(arguments, tile, rDQ, rank, rank, first_row);
      for (; kv_block >= tile.kv_block_begin; --kv_block) skip_kv_block();
      release_tile(shared, slot.stage);
    }
  }

  // This CTA's columns of dQ of the other's rows.
  __device__ static void consume_other(BackwardQueriesArguments const& arguments, SharedStorage& shared) {
    using namespace cute;
    int const thread = threadIdx.x % kWarpgroupThreads;
    int const first_row = row_of_thread(0, threadIdx.x);
    int const rank = cta_rank<kNumCtas>();
    uint32_t const other = static_cast<uint32_t>(rank) ^ 1;

    MmaDQ mma_dq;
    Tensor fKt = mma_dq.get_slice(0).partition_fragment_B(make_tensor(make_smem_ptr(shared.k[0]), LayoutKt{}));
    Tensor rDQ = partition_fragment_C(mma_dq, Shape<Int<kRows>, Int<kColumns>>{});
    Tensor rDS = make_tensor<Element>(partition_shape_A(mma_dq, Shape<Int<kRows>, Int<kBlockKV>>{}));
    auto* const pairs = reinterpret_cast<uint32_t*>(rDS.data());
    Ring<kNumStages> own_ring;
    Ring<kNumDSStages> ds_ring;
    Ring<kNumQueryTiles> slot;

    auto skip_kv_block = [&] {
      ClusterBarrier::wait(&shared.own_full[own_ring.stage], own_ring.phase);
      NamedBarrier::sync(kWarpgroupThreads, kOwnBarrier + 1);
      release(shared.own_empty[own_ring.stage]);
      own_ring.advance();
    };
    auto wait_ds = [&] {
      uint64_t& full = shared.ds_full[ds_ring.stage];
      if (thread == 0) ClusterTransactionBarrier::arrive_and_expect_tx(&full, sizeof(shared.ds[0]));
      ClusterBarrier::wait(&full, ds_ring.phase);
    };
    auto read_ds = [&] {  // where no product is on its way that reads rDS
      CUTE_UNROLL
      for (int i = 0; i < kPairs / 4; ++i) {
        uint4 const four = shared.ds[ds_ring.stage][i][thread];
        pairs[4 * i] = four.x, pairs[4 * i + 1] = four.y, pairs[4 * i + 2] = four.z, pairs[4 * i + 3] = four.w;
      }
      __syncwarp();
      if (thread % kWarpThreads == 0) ptx::arrive_remote(ptx::address_in(other, &shared.ds_empty[ds_ring.stage]));
      ds_ring.advance();
    };
    auto finish_dq = [&] {
      warpgroup_wait<0>();
      warpgroup_fence_operand(rDQ);
      release(shared.own_empty[own_ring.stage]);
      own_ring.advance();
    };

    for (;; slot.advance()) {
      ClusterBarrier::wait(&shared.tile_full[slot.stage], slot.phase);
      WorkTile const& tile = shared.tiles[slot.stage];
      if (tile.head < 0) break;
      VisibleBlocks const& visible = tile.visible[rank ^ 1];
      int32_t kv_block = tile.kv_block_end - 1;
      bool const sees_keys = visible.begin < visible.end;
      for (int32_t const last = sees_keys ? visible.end : tile.kv_block_begin; kv_block >= last; --kv_block)
        skip_kv_block();
      if (!sees_keys) {
        clear(rDQ);
        write(arguments, tile, rDQ, rank ^ 1, rank, first_row);
        release_tile(shared, slot.stage);
        continue;
      }
      wait_ds();
      read_ds();
      ClusterBarrier::wait(&shared.own_full[own_ring.stage], own_ring.phase);
      issue_dq(mma_dq, rDS, fKt, rDQ, own_ring.stage, false);
      for (--kv_block; kv_block >= visible.begin; --kv_block) {
        wait_ds();
        finish_dq();
        read_ds();
        ClusterBarrier::wait(&shared.own_full[own_ring.stage], own_ring.phase);
        issue_dq(mma_dq, rDS, fKt, rDQ, own_ring.stage, true);
      }
      finish_dq();
      write(arguments, tile, rDQ, rank ^ 1, rank, first_row);
      for (; kv_block >= tile.kv_block_begin; --kv_block) skip_kv_block();
      release_tile(shared, slot.stage);
    }
  }

  __device__ static void run(BackwardQueriesArguments const& arguments, SharedStorage& shared) {
    int const warpgroup = cutlass::canonical_warp_group_idx();
    if (threadIdx.x == 0) {
      if (cute::cast_smem_ptr_to_uint(&shared) % 1024 != 0) __trap();
      init_barriers(shared);
    }
    sync_ctas<kNumCtas>();
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

template <int kHeadDim, class Element>
__global__ void __launch_bounds__(BackwardQueryTiles<kHeadDim>::kNumThreads, 1)
    backward_queries_pair_kernel(__grid_constant__ BackwardQueriesArguments const arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Kernel = BackwardQueriesPair<kHeadDim, Element>;
  extern __shared__ __align__(1024) unsigned char memory[];
  Kernel::run(arguments, *reinterpret_cast<typename Kernel::SharedStorage*>(memory));
#endif
}

}  // namespace flashmla::sm90
