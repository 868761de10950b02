// Hopper attention of a few queries to a long cache: read K and V once, as fast as memory gives them.
//
// Schedule. A CTA is a warp that loads and one consumer warpgroup; kNumCtas of them fill a multiprocessor, and each
// has the same number of kv_blocks to read (decode_schedule.cuh). The loading warp streams K and V into two rings by
// TMA: of a paged cache each lane brings the rows of one page, whose number it has read a step before. The consumer
// warpgroup multiplies 64 rows, the query heads of a kv head for every query, and mostly fewer are real: the tensor
// cores have time. It keeps one product ahead, as the forward does:
//
//   issue S(n+1) = Q K(n+1)^T | issue O += P(n) V(n) | wait S | softmax S(n+1) | wait O | P(n+1) to registers, rescale
//   O
//
// Rows of V that are no keys of the sequence (its last page, before its first key) may hold anything, and 0 * NaN is
// NaN: they are cleared in shared memory.
//
// Source: Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023) for the split over keys; Stream-K (arXiv 2301.03598) for
// equal shares of units that cross tiles.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/grid_dependency_control.h>

#include <cute/tensor.hpp>

#include "params.h"
#include "sm90/decode/decode_schedule.cuh"
#include "sm90/hopper/fragment.cuh"
#include "sm90/hopper/operands.cuh"
#include "sm90/hopper/softmax.cuh"
#include "sm90/tiles.h"

namespace flashmla::sm90 {

template <int kHeadDimQK, int kHeadDimV, class Element>
struct Decode {
  using Tiles = DecodeTiles<kHeadDimQK, kHeadDimV>;
  static constexpr int kBlockKV = Tiles::kBlockKV;
  static constexpr int kNumStages = Tiles::kNumStages;
  static constexpr int kSwizzleColumns = 64;
  static_assert(kHeadDimQK % kSwizzleColumns == 0 && kHeadDimV % kSwizzleColumns == 0);
  static_assert(kNumStages > 1, "S(n+1) reads one buffer of K, and the next is loaded");
  static constexpr int kScores = kBlockKV / 2;  // per thread
  static constexpr int kOutputs = kHeadDimV / 2;
  static constexpr int kVectorBytes = 16, kVectorElements = 8;

  using BlockShapeS = cute::Shape<cute::Int<kWarpgroupRows>, cute::Int<kBlockKV>, cute::Int<kHeadDimQK>>;
  using BlockShapeO = cute::Shape<cute::Int<kWarpgroupRows>, cute::Int<kHeadDimV>, cute::Int<kBlockKV>>;
  using MmaS = decltype(cute::make_tiled_mma(cute::GMMA::ss_op_selector<Element, Element, float, BlockShapeS>()));
  using MmaO = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float, BlockShapeO, cute::GMMA::Major::K, cute::GMMA::Major::MN>()));
  using Layouts = SharedLayouts<Element, kSwizzleColumns>;
  using LayoutQ = typename Layouts::template Rows<kWarpgroupRows, kHeadDimQK, 1>;
  using LayoutK = typename Layouts::template Rows<kBlockKV, kHeadDimQK, kNumStages>;
  using LayoutVt = typename Layouts::template Columns<kBlockKV, kHeadDimV, kNumStages>;
  using RowSoftmax = Softmax<kScores, false>;

  struct SharedStorage {
    alignas(1024) Element q[kWarpgroupRows * kHeadDimQK];
    alignas(1024) Element k[kNumStages][kBlockKV * kHeadDimQK];
    alignas(1024) Element v[kNumStages][kBlockKV * kHeadDimV];
    uint64_t k_full[kNumStages], k_empty[kNumStages], v_full[kNumStages], v_empty[kNumStages];
  };
  static constexpr int kSharedBytes = sizeof(SharedStorage);
  static constexpr int kSystemBytes = 1024;  // of shared memory, kept for each CTA
  static_assert((kSharedBytes + kSystemBytes) * Tiles::kNumCtas <= kMaxSharedBytes + kSystemBytes);
  static constexpr int kConsumerBarrier = 1;

  // ---- loading warp -------------------------------------------------------------------------------------------------

  // The rows of a box, as coordinates of the cache.
  struct BoxPlace {
    int32_t page, row;
  };

  // Box `box` of kv_block `kv_block`. A number in the table that is no page of the cache is outside the descriptor.
  __device__ static BoxPlace box_place(DecodeArguments const& arguments, int32_t batch, int32_t kv_block, int32_t box) {
    DecodeParams const& params = arguments.params;
    int32_t const key = kv_block * kBlockKV + box * arguments.rows_per_box;
    if (params.block_table == nullptr) return {batch, key};
    int32_t const page_size = static_cast<int32_t>(params.page_size);
    int32_t const index = key / page_size;
    return {params.block_table[batch * params.stride_block_table + index], key - index * page_size};
  }

  __device__ static void load(DecodeArguments const& arguments, SharedStorage& shared) {
    int32_t const lane = threadIdx.x % kWarpThreads;
    int32_t const rows = arguments.rows_per_box;
    // K and V are read once, unless several tiles share a kv head.
    uint64_t const hint = static_cast<uint64_t>(arguments.tiles_per_head > 1 ? cute::TMA::CacheHintSm90::EVICT_NORMAL
                                                                             : cute::TMA::CacheHintSm90::EVICT_FIRST);
    Ring<kNumStages> ring;
    for (DecodeWalk walk(arguments); walk.find(); walk.next_tile()) {
      int32_t const head_kv = walk.tile / arguments.tiles_per_head;
      SequenceKeys const keys = walk.keys;
      // Boxes without a key of the sequence are not loaded: the table need not have their pages.
      auto has_keys = [&](int32_t kv_block, int32_t box) {
        int32_t const key = kv_block * kBlockKV + box * rows;
        return box < kBlockKV / rows && key < keys.end && key + rows > keys.begin;
      };
      BoxPlace place{0, 0};
      if (walk.blocks.begin < walk.blocks.end && has_keys(walk.blocks.begin, lane)) {
        place = box_place(arguments, walk.batch, walk.blocks.begin, lane);
      }
      for (int32_t kv_block = walk.blocks.begin; kv_block < walk.blocks.end; ++kv_block, ring.advance()) {
        bool const is_mine = has_keys(kv_block, lane);
        int const num_boxes = __popc(__ballot_sync(0xffffffff, is_mine));
        BoxPlace const here = place;
        if (kv_block + 1 < walk.blocks.end && has_keys(kv_block + 1, lane)) {
          place = box_place(arguments, walk.batch, kv_block + 1, lane);  // read while the buffer is waited for
        }
        auto copy = [&](CUtensorMap const& map, auto& buffer, uint64_t& full, uint64_t& empty, int columns) {
          ClusterBarrier::wait(&empty, ring.phase ^ 1);
          if (lane == 0) {
            ClusterTransactionBarrier::arrive_and_expect_tx(&full, num_boxes * rows * columns * sizeof(Element));
          }
          __syncwarp();
          if (!is_mine) return;
          for (int column = 0; column < columns; column += kSwizzleColumns) {
            cute::SM90_TMA_LOAD_4D::copy(&map, &full, hint, buffer + column * kBlockKV + lane * rows * kSwizzleColumns,
                                         column, here.row, head_kv, here.page);
          }
        };
        int const stage = ring.stage;
        copy(arguments.k, shared.k[stage], shared.k_full[stage], shared.k_empty[stage], kHeadDimQK);
        copy(arguments.v, shared.v[stage], shared.v_full[stage], shared.v_empty[stage], kHeadDimV);
      }
    }
  }

  // ---- consumer warpgroup -------------------------------------------------------------------------------------------

  // A row of the tile.
  struct Row {
    int32_t query, head;
    bool is_valid;
  };

  __device__ static Row row_of(DecodeArguments const& arguments, int32_t tile, int32_t row_in_tile) {
    int32_t const head_kv = tile / arguments.tiles_per_head;
    int32_t const row = (tile - head_kv * arguments.tiles_per_head) * kWarpgroupRows + row_in_tile;
    int32_t const query = row / arguments.group;
    return {query, head_kv * arguments.group + row - query * arguments.group, row < arguments.num_rows};
  }

  __device__ static Element* row_pointer(TensorView const& view, int32_t batch, Row const& row) {
    return static_cast<Element*>(view.data) + batch * view.stride_batch + row.query * view.stride_seqlen +
           row.head * view.stride_heads;
  }

  // Q of a tile, zeros where there is none.
  __device__ static void read_queries(DecodeArguments const& arguments, SharedStorage& shared, int32_t batch,
                                      int32_t tile) {
    constexpr int kVectors = kHeadDimQK / kVectorElements;
    unsigned char* const q = reinterpret_cast<unsigned char*>(shared.q);
    CUTE_UNROLL
    for (int i = threadIdx.x; i < kWarpgroupRows * kVectors; i += kWarpgroupThreads) {
      int const row_in_tile = i / kVectors, vector = i % kVectors;
      Row const row = row_of(arguments, tile, row_in_tile);
      uint4 x{0, 0, 0, 0};
      if (row.is_valid && vector * kVectorElements < arguments.params.problem.head_dim_qk) {
        x = *reinterpret_cast<uint4 const*>(row_pointer(arguments.params.q, batch, row) + vector * kVectorElements);
      }
      int const chunk = vector / 8;  // of kSwizzleColumns columns, 128 bytes a row
      *reinterpret_cast<uint4*>(q + (chunk * kWarpgroupRows + row_in_tile) * 128 +
                                ((vector % 8) ^ (row_in_tile % 8)) * kVectorBytes) = x;
    }
    cutlass::arch::fence_view_async_shared();
    NamedBarrier::sync(kWarpgroupThreads, kConsumerBarrier);
  }

  // Clears the rows of V that are no keys of the sequence, in a kv_block that has some.
  __device__ static void clear_values(Element* v, SequenceKeys const& keys, int32_t kv_block) {
    int32_t const first = kv_block * kBlockKV;
    if (first >= keys.begin && first + kBlockKV <= keys.end) return;
    constexpr int kVectors = kHeadDimV / kVectorElements;
    for (int i = threadIdx.x; i < kBlockKV * kVectors; i += kWarpgroupThreads) {
      int const row = i / kVectors, vector = i % kVectors;
      if (first + row >= keys.begin && first + row < keys.end) continue;
      // All of a row, so the order of its vectors does not matter.
      *reinterpret_cast<uint4*>(v + vector / 8 * (kBlockKV * kSwizzleColumns) + row * kSwizzleColumns +
                                vector % 8 * kVectorElements) = uint4{0, 0, 0, 0};
    }
    cutlass::arch::fence_view_async_shared();
    NamedBarrier::sync(kWarpgroupThreads, kConsumerBarrier);
  }

  // Keys [begin, end) that a thread's two rows see.
  struct RowKeys {
    int32_t begin[2], end[2];
  };

  __device__ static RowKeys row_keys(DecodeArguments const& arguments, SequenceKeys const& keys, int32_t tile,
                                     int first_row) {
    RowKeys seen;
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      Row const row = row_of(arguments, tile, first_row + 8 * r);
      int32_t const position = keys.length - static_cast<int32_t>(arguments.params.problem.seqlen_q) + row.query;
      VisibleKeys const visible = visible_keys(arguments.window, keys.length, position, position);
      seen.begin[r] = max(visible.begin, keys.start);
      seen.end[r] = visible.end;
    }
    return seen;
  }

  template <class Scores>
  __device__ static void hide_keys(Scores& scores, RowKeys const& seen, int32_t first_key) {
    int32_t const first_column = first_key + 2 * (threadIdx.x % 4);
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      // Relative, so that each element compares with a constant.
      int32_t const begin = seen.begin[r] - first_column, end = seen.end[r] - first_column;
      CUTE_UNROLL
      for (int j = 0; j < kScores / 4; ++j) {
        CUTE_UNROLL
        for (int c = 0; c < 2; ++c) {
          if (8 * j + c < begin || 8 * j + c >= end) scores(j * 4 + r * 2 + c) = -INFINITY;
        }
      }
    }
  }

  // A tile that this CTA has computed alone.
  template <class Outputs>
  __device__ static void write_rows(DecodeArguments const& arguments, DecodeWalk const& walk, RowSoftmax& softmax,
                                    Outputs const& rO, int first_row) {
    DecodeParams const& params = arguments.params;
    Problem const& problem = params.problem;
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      Row const row = row_of(arguments, walk.tile, first_row + 8 * r);
      float lse;
      float factor =
          softmax.finish(r, problem.sinks == nullptr || !row.is_valid ? nullptr : problem.sinks + row.head, lse);
      if (walk.keys.length == 0) factor = 0.0f;  // of no weight at all, a sink of NaN makes nothing
      if (row.is_valid && threadIdx.x % 4 == 0 && params.lse.data != nullptr) {
        params.lse.data[walk.batch * params.lse.stride_batch + row.head * params.lse.stride_heads + row.query] = lse;
      }
      Element* const out = row.is_valid ? row_pointer(params.out, walk.batch, row) : nullptr;
      store_row<Element, kHeadDimV>(out, rO, r, factor, 0, problem.head_dim_v, threadIdx.x % 4);
    }
  }

  // A part of a tile: O and the sum of exponentials, both against the maximum as it is.
  template <class Outputs>
  __device__ static void write_partial(DecodeArguments const& arguments, DecodeWalk const& walk, RowSoftmax& softmax,
                                       Outputs const& rO, int first_row) {
    int32_t const part = partial_of(blockIdx.x, walk.unit == walk.tile_begin);
    int64_t const head_dim_v = arguments.params.problem.head_dim_v;
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      int const row = first_row + 8 * r;
      float sum = softmax.row_sum[r];
      sum += __shfl_xor_sync(0xffffffff, sum, 1);
      sum += __shfl_xor_sync(0xffffffff, sum, 2);
      if (!row_of(arguments, walk.tile, row).is_valid) continue;
      // P was taken against a rounded product of the maximum: what that has left in all of a row's P alike goes here.
      float const factor = softmax.subtracts_first || softmax.row_max[r] == -INFINITY
                               ? 1.0f
                               : exp2f(-__fmaf_rn(softmax.row_max[r], softmax.scale_log2, -softmax.offset(r)));
      int64_t const index = int64_t{part} * arguments.partial_rows + row;
      if (threadIdx.x % 4 == 0) arguments.partial_sums[index] = {softmax.row_max[r], sum * factor};
      float* const out = arguments.partial_out + index * head_dim_v + 2 * (threadIdx.x % 4);
      CUTE_UNROLL
      for (int j = 0; j < kOutputs / 4; ++j) {
        if (8 * j >= head_dim_v) break;
        *reinterpret_cast<float2*>(out + 8 * j) = {rO(j * 4 + r * 2) * factor, rO(j * 4 + r * 2 + 1) * factor};
      }
    }
  }

  // One function, as the forward's: ptxas serializes wgmma in a branch (docs/log.md, 2026-11-22).
  __device__ static void consume(DecodeArguments const& arguments, SharedStorage& shared) {
    using namespace cute;
    int const first_row = row_of_thread(0, threadIdx.x);
    Problem const& problem = arguments.params.problem;

    MmaS mma_s;
    MmaO mma_o;
    Tensor sQ = make_tensor(make_smem_ptr(shared.q), LayoutQ{});
    Tensor sK = make_tensor(make_smem_ptr(shared.k[0]), LayoutK{});
    Tensor sVt = make_tensor(make_smem_ptr(shared.v[0]), LayoutVt{});
    auto thread_s = mma_s.get_slice(threadIdx.x);
    auto thread_o = mma_o.get_slice(threadIdx.x);
    Tensor fQ = thread_s.partition_fragment_A(sQ);   // descriptors (_, 1, kHeadDimQK/16, 1)
    Tensor fK = thread_s.partition_fragment_B(sK);   // (_, 1, kHeadDimQK/16, kNumStages)
    Tensor fV = thread_o.partition_fragment_B(sVt);  // (_, _, kBlockKV/16, kNumStages)
    Tensor rS = partition_fragment_C(mma_s, Shape<Int<kWarpgroupRows>, Int<kBlockKV>>{});   // fp32, kBlockKV/2 a thread
    Tensor rO = partition_fragment_C(mma_o, Shape<Int<kWarpgroupRows>, Int<kHeadDimV>>{});  // fp32, kHeadDimV/2
    // 16 bits, kBlockKV/2 a thread, packed in pairs.
    Tensor rP = make_tensor<Element>(partition_shape_A(mma_o, Shape<Int<kWarpgroupRows>, Int<kBlockKV>>{}));
    static_assert(decltype(size(rS))::value == kScores && decltype(size(rO))::value == kOutputs);

    bool const has_transform = problem.softcap > 0.0f || problem.scale <= 0.0f;
    RowSoftmax softmax(has_transform ? kLog2e : problem.scale * kLog2e);
    float correction[2];
    Ring<kNumStages> ring;

    auto issue_s = [&] { multiply(mma_s, fQ(_, _, _, 0), fK(_, _, _, ring.stage), rS, false); };
    auto issue_o = [&](int stage) {
      warpgroup_fence_operand(rP);
      multiply(mma_o, rP, fV(_, _, _, stage), rO, true);
    };
    // Eight consecutive score registers are one A fragment of a 16-column step, in order.
    auto convert_p = [&] {
      auto* pairs = reinterpret_cast<uint32_t*>(rP.data());
      CUTE_UNROLL
      for (int i = 0; i < kScores / 2; ++i) pairs[i] = pack<Element>(rS(2 * i), rS(2 * i + 1));
    };
    // A product completes for the whole warpgroup at once, so one thread arrives for all.
    auto release = [&](uint64_t& barrier) {
      if (threadIdx.x == 0) ClusterBarrier::arrive(&barrier);
    };

    for (DecodeWalk walk(arguments); walk.find(); walk.next_tile()) {
      SequenceKeys const keys = walk.keys;
      KVBlocks const blocks = walk.blocks;
      RowKeys const seen = row_keys(arguments, keys, walk.tile, first_row);
      NamedBarrier::sync(kWarpgroupThreads, kConsumerBarrier);  // every warp has ended its products with the old Q
      read_queries(arguments, shared, walk.batch, walk.tile);
      softmax.reset();
      CUTE_UNROLL
      for (int i = 0; i < kOutputs; ++i) rO(i) = 0.0f;

      int32_t kv_block = blocks.begin;
      auto finish_scores = [&](auto is_first) {
        if (has_transform) transform_scores<kScores>(rS, problem.scale, problem.softcap);
        int32_t const first_key = kv_block * kBlockKV;
        if (first_key < keys.unmasked_begin || first_key + kBlockKV > keys.unmasked_end) {
          hide_keys(rS, seen, first_key);
        }
        return softmax.template update<is_first()>(rS, correction);
      };
      if (blocks.begin < blocks.end) {
        ClusterBarrier::wait(&shared.k_full[ring.stage], ring.phase);
        issue_s();
        warpgroup_wait<0>();
        warpgroup_fence_operand(rS);
        release(shared.k_empty[ring.stage]);
        finish_scores(std::true_type{});
        convert_p();
      }
      for (++kv_block; kv_block < blocks.end; ++kv_block) {
        Ring<kNumStages> const ring_o = ring;
        ring.advance();
        ClusterBarrier::wait(&shared.v_full[ring_o.stage], ring_o.phase);
        clear_values(shared.v[ring_o.stage], keys, kv_block - 1);
        ClusterBarrier::wait(&shared.k_full[ring.stage], ring.phase);
        issue_s();
        issue_o(ring_o.stage);
        warpgroup_wait<1>();
        warpgroup_fence_operand(rS);
        release(shared.k_empty[ring.stage]);
        bool const has_grown = finish_scores(std::false_type{});
        ptx::keep_before(softmax.row_sum[0] + softmax.row_sum[1]);  // the exponentials, before the wait for O
        warpgroup_wait<0>();
        warpgroup_fence_operand(rO);
        release(shared.v_empty[ring_o.stage]);
        convert_p();
        if (has_grown) {
          CUTE_UNROLL
          for (int i = 0; i < kOutputs; ++i) rO(i) *= correction[(i / 2) % 2];
        }
      }
      if (blocks.begin < blocks.end) {
        ClusterBarrier::wait(&shared.v_full[ring.stage], ring.phase);
        clear_values(shared.v[ring.stage], keys, blocks.end - 1);
        issue_o(ring.stage);
        warpgroup_wait<0>();
        warpgroup_fence_operand(rO);
        release(shared.v_empty[ring.stage]);
        ring.advance();
      }
      if (walk.is_whole()) {
        write_rows(arguments, walk, softmax, rO, first_row);
      } else {
        write_partial(arguments, walk, softmax, rO, first_row);
      }
    }
  }

  __device__ static void run(DecodeArguments const& arguments, SharedStorage& shared) {
    if (threadIdx.x == 0) {
      if (cute::cast_smem_ptr_to_uint(&shared) % 1024 != 0) __trap();
      for (auto* barriers : {shared.k_full, shared.k_empty, shared.v_full, shared.v_empty}) {
        for (int stage = 0; stage < kNumStages; ++stage) ClusterBarrier::init(&barriers[stage], 1);
      }
      cutlass::arch::fence_barrier_init();
    }
    __syncthreads();
    ptx::wait_on_dependent_grids();           // who wrote Q, K, V and the lengths
    cutlass::arch::launch_dependent_grids();  // combine_kernel may set up
    if (threadIdx.x >= kWarpgroupThreads) {
      load(arguments, shared);
    } else {
      consume(arguments, shared);
    }
  }
};

template <int kHeadDimQK, int kHeadDimV, class Element>
__global__ void __launch_bounds__(DecodeTiles<kHeadDimQK, kHeadDimV>::kNumThreads,
                                  DecodeTiles<kHeadDimQK, kHeadDimV>::kNumCtas)
    decode_kernel(__grid_constant__ DecodeArguments const arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  // Swizzled tiles need 1,024-byte alignment; the dynamic shared memory of a kernel without any other begins so.
  extern __shared__ __align__(1024) unsigned char memory[];
  using Kernel = Decode<kHeadDimQK, kHeadDimV, Element>;
  Kernel::run(arguments, *reinterpret_cast<typename Kernel::SharedStorage*>(memory));
#endif
}

}  // namespace flashmla::sm90
