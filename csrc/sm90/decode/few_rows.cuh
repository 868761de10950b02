// Decoding of up to eight query rows a tile: the tensor cores' 64 rows are keys, not queries.
//
// A token of one query a sequence has as few rows as a kv head has query heads. As the rows of a product of 64 they
// would be mostly zeros, of which the softmax takes exponentials all the same, in a chain as long as that of 64 real
// ones. As the columns, of which a product may have eight, they are few:
//
//   S^T = K Q^T   (keys x rows, K from shared memory)     O^T += V^T P^T   (columns of V x rows, V from shared memory)
//
// A thread has kBlockKV / 16 scores where it would have kBlockKV / 2. The keys of a row are spread over lanes and
// warps: its maximum is exchanged through shared memory in every step, its sum once a tile. P^T goes to shared memory,
// where the second product's columns have to be. A step's products and softmax follow each other: they are short beside
// its bytes.
//
// Steps are of 32 KiB of K and V or more. Q comes by TMA as K and V do, some tiles ahead.
//
// The schedule, shares and parts are those of decode.cuh.
#pragma once

#include <cute/arch/copy_sm90.hpp>
#include <cute/tensor.hpp>

#include "params.h"
#include "sm90/decode/decode_cta.cuh"
#include "sm90/decode/decode_rows.cuh"
#include "sm90/decode/decode_schedule.cuh"
#include "sm90/hopper/operands.cuh"
#include "sm90/hopper/softmax.cuh"
#include "sm90/tiles.h"

namespace flashmla::sm90 {

constexpr int kFewRows = 8;  // the narrowest product

// Head dims that have this kernel: those of which two CTAs share a multiprocessor. Wider ones were not measured.
template <int kHeadDimQK, int kHeadDimV>
constexpr bool has_few_rows_kernel() {
  return kHeadDimQK + kHeadDimV <= 256;
}

// The ring of the tile of 64 rows (tiles.h), in steps of 128 keys where 64 would be less than 32 KiB. A kv head has one
// tile, so what the plan takes for a tile's rows is nowhere multiplied by anything but 0.
template <int kHeadDimQK, int kHeadDimV>
struct FewRowsTiles : DecodeTiles<kHeadDimQK, kHeadDimV> {
  using ManyRows = DecodeTiles<kHeadDimQK, kHeadDimV>;
  static constexpr int kBlockKV = kHeadDimQK + kHeadDimV <= 128 ? 2 * ManyRows::kBlockKV : ManyRows::kBlockKV;
  static constexpr int kNumStages = ManyRows::kNumStages * ManyRows::kBlockKV / kBlockKV;
};

// The softmax of rows that are columns of scores: a thread has two, first_row and first_row + 1, and of each the keys
// first_key + 8 i. Lanes of the same remainder by 4 have the same rows.
template <int kScores>
struct ColumnSoftmax : Softmax<kScores, false> {
  using Base = Softmax<kScores, false>;
  using Base::Base;
  using Base::offset;
  using Base::row_max;
  using Base::row_sum;
  using Base::scale_log2;
  using Base::subtracts_first;
  using Exchange = float2[kWarpgroupThreads / kWarpThreads][kFewRows / 2];  // of warps

  template <class Combine>
  __device__ static float2 reduce_lanes(float2 x, Combine const& combine) {
    CUTE_UNROLL
    for (int lanes = 4; lanes < kWarpThreads; lanes *= 2) {
      x = {combine(x.x, __shfl_xor_sync(0xffffffff, x.x, lanes)),
           combine(x.y, __shfl_xor_sync(0xffffffff, x.y, lanes))};
    }
    return x;
  }

  // Over the four warps, in their order. A barrier of the warpgroup: what its threads have done before is done.
  template <class Combine>
  __device__ static float2 reduce(float2 x, Exchange& exchange, Combine const& combine) {
    int const warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
    x = reduce_lanes(x, combine);
    if (lane < kFewRows / 2) exchange[warp][lane] = x;
    NamedBarrier::sync(kWarpgroupThreads, kConsumerBarrier);
    x = exchange[0][lane % 4];
    CUTE_UNROLL
    for (int other = 1; other < kWarpgroupThreads / kWarpThreads; ++other) {
      float2 const y = exchange[other][lane % 4];
      x = {combine(x.x, y.x), combine(x.y, y.y)};
    }
    return x;
  }

  // As Softmax::update, of which every warp comes to the same maxima, and so to the same decisions.
  template <class Scores>
  __device__ void update(Scores& scores, float (&correction)[2], Exchange& exchange) {
    float largest[2] = {scores(0), scores(1)};
    CUTE_UNROLL
    for (int i = 2; i < kScores; ++i) largest[i % 2] = fmaxf(largest[i % 2], scores(i));
    float2 const largest_here =
        reduce({largest[0], largest[1]}, exchange, [](float a, float b) { return fmaxf(a, b); });
    CUTE_UNROLL
    for (int row = 0; row < 2; ++row) {
      float const here = row == 0 ? largest_here.x : largest_here.y;
      // -inf - -inf is NaN and grows nothing: a row that has seen no key keeps -inf.
      bool const grows = (here - row_max[row]) * scale_log2 > Base::kLogSlack;
      float const new_max = grows ? here : row_max[row];
      correction[row] = grows ? exp2f((row_max[row] - new_max) * scale_log2) : 1.0f;
      row_max[row] = new_max;
    }
    subtracts_first = this->has_large_offset();
    if (subtracts_first) {
      CUTE_UNROLL
      for (int i = 0; i < kScores; ++i) scores(i) -= row_max[i % 2] == -INFINITY ? 0.0f : row_max[i % 2];
    }
    float const against[2] = {subtracts_first ? 0.0f : offset(0), subtracts_first ? 0.0f : offset(1)};
    float sum[2] = {0.0f, 0.0f};
    CUTE_UNROLL
    for (int i = 0; i < kScores; ++i) {
      scores(i) = exp2f(scores(i) * scale_log2 - against[i % 2]);
      sum[i % 2] += scores(i);
    }
    CUTE_UNROLL
    for (int row = 0; row < 2; ++row) row_sum[row] = row_sum[row] * correction[row] + sum[row];
  }

  // The rows' sums over all keys, in row_sum.
  __device__ void add_sums(Exchange& exchange) {
    float2 const sum = reduce({row_sum[0], row_sum[1]}, exchange, [](float a, float b) { return a + b; });
    row_sum[0] = sum.x;
    row_sum[1] = sum.y;
  }
};

template <int kHeadDimQK_, int kHeadDimV_, class Element_>
struct FewRowsDecode {
  using Element = Element_;
  using Tiles = FewRowsTiles<kHeadDimQK_, kHeadDimV_>;
  static constexpr int kHeadDimQK = kHeadDimQK_, kHeadDimV = kHeadDimV_;
  static constexpr int kRows = kFewRows;
  static constexpr bool kReadsValues = true, kReadsE4m3 = false;
  static constexpr int kBlockKV = Tiles::kBlockKV;
  static constexpr int kNumStages = Tiles::kNumStages, kNumQStages = 4;
  static_assert(kHeadDimQK % kDecodeSwizzleColumns == 0 && kHeadDimV % kDecodeSwizzleColumns == 0);
  static constexpr int kScores = kBlockKV * kRows / kWarpgroupThreads;  // per thread
  static constexpr int kOutputs = kHeadDimV * kRows / kWarpgroupThreads;

  using BlockShapeS = cute::Shape<cute::Int<kWarpgroupRows>, cute::Int<kRows>, cute::Int<kHeadDimQK>>;
  using BlockShapeO = cute::Shape<cute::Int<kWarpgroupRows>, cute::Int<kRows>, cute::Int<kBlockKV>>;
  using MmaS = decltype(cute::make_tiled_mma(cute::GMMA::ss_op_selector<Element, Element, float, BlockShapeS>()));
  using MmaO = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, BlockShapeO, cute::GMMA::Major::MN, cute::GMMA::Major::K>()));
  static_assert(is_one_wgmma<kRows, MmaS, MmaO>());
  using Layouts = SharedLayouts<Element, kDecodeSwizzleColumns>;
  using LayoutQ = typename Layouts::template Rows<kRows, kHeadDimQK, kNumQStages>;
  using LayoutP = typename Layouts::template Rows<kRows, kBlockKV, 1>;
  using LayoutK = typename Layouts::template Rows<kBlockKV, kHeadDimQK, kNumStages>;
  using LayoutVt = typename Layouts::template Columns<kBlockKV, kHeadDimV, kNumStages>;
  using RowSoftmax = ColumnSoftmax<kScores>;

  struct SharedStorage {
    alignas(1024) Element q[kNumQStages][kRows * kHeadDimQK];
    alignas(1024) Element p[kRows * kBlockKV];
    alignas(1024) Element k[kNumStages][kBlockKV * kHeadDimQK];
    alignas(1024) Element v[kNumStages][kBlockKV * kHeadDimV];
    uint64_t k_full[kNumStages], k_empty[kNumStages], v_full[kNumStages], v_empty[kNumStages];
    uint64_t q_full[kNumQStages], q_empty[kNumQStages];
    typename RowSoftmax::Exchange maxima, sums[2];  // sums: of every second tile
  };
  static constexpr int kSharedBytes = sizeof(SharedStorage);
  static_assert((kSharedBytes + kSystemBytes) * Tiles::kNumCtas <= kMaxSharedBytes + kSystemBytes);

  // P^T to shared memory: rows of kBlockKV keys, in chunks of 64, swizzled (LayoutP). Matrix 2 i + r of a warp has keys
  // 64 i + 16 warp + 8 r ...
  template <class Scores>
  __device__ static void store_p(Element* p, Scores const& scores) {
    static_assert(kScores == 8 || kScores == 4, "four matrices, or two");
    int const warp = threadIdx.x / kWarpThreads, matrix = threadIdx.x % kWarpThreads / 8, row = threadIdx.x % 8;
    int const chunk = kScores == 8 ? matrix / 2 : 0;  // of two matrices, lanes above 15 give no addresses
    unsigned char* const address =
        reinterpret_cast<unsigned char*>(p) + chunk * (kRows * 128) + row * 128 + ((2 * warp + matrix % 2) ^ row) * 16;
    auto& target = *reinterpret_cast<cute::uint128_t*>(address);
    if constexpr (kScores == 8) {
      cute::SM90_U16x8_STSM_T::copy(pack<Element>(scores(0), scores(1)), pack<Element>(scores(2), scores(3)),
                                    pack<Element>(scores(4), scores(5)), pack<Element>(scores(6), scores(7)), target);
    } else {
      cute::SM90_U16x4_STSM_T::copy(pack<Element>(scores(0), scores(1)), pack<Element>(scores(2), scores(3)), target);
    }
    cutlass::arch::fence_view_async_shared();
  }

  // Rows `first_row` and first_row + 1 do not see these keys, the first of which is the thread's first.
  template <class Scores>
  __device__ static void hide(Scores& scores, RowKeys const& seen, int32_t first_key) {
    CUTE_UNROLL
    for (int row = 0; row < 2; ++row) {
      // Relative, so that each element compares with a constant.
      int32_t const begin = seen.begin[row] - first_key, end = seen.end[row] - first_key;
      CUTE_UNROLL
      for (int i = row; i < kScores; i += 2) {
        int const key = i / 4 * kWarpgroupRows + i / 2 % 2 * 8;
        if (key < begin || key >= end) scores(i) = -INFINITY;
      }
    }
  }

  // Calls f(column, i) for the thread's elements i of O^T in its row number r of two, where V has such a column.
  template <class F>
  __device__ static void for_columns(int first_column, int r, int64_t num_columns, F const& f) {
    CUTE_UNROLL
    for (int i = r; i < kOutputs; i += 2) {
      int const column = first_column + i / 4 * kWarpgroupRows + i / 2 % 2 * 8;
      if (column < num_columns) f(column, i);
    }
  }

  // A tile that this CTA has computed alone.
  template <class Outputs>
  __device__ static void write_rows(DecodeArguments const& arguments, DecodeWalk const& walk, RowSoftmax const& softmax,
                                    Outputs const& outputs, TileRow const (&rows)[2], int first_column) {
    DecodeParams const& params = arguments.params;
    Problem const& problem = params.problem;
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (!rows[r].is_valid) continue;
      TileRow const row{rows[r].query, rows[r].head + walk.tile * arguments.group, true};
      float lse;
      float factor = finish_row(softmax.row_max[r] == -INFINITY ? -INFINITY : softmax.row_max[r] * softmax.scale_log2,
                                softmax.row_sum[r], problem.sinks == nullptr ? nullptr : problem.sinks + row.head, lse);
      if (walk.keys.length == 0) factor = 0.0f;  // of no weight at all, a sink of NaN makes nothing
      if (first_column == 0 && params.lse.data != nullptr) {
        params.lse.data[walk.batch * params.lse.stride_batch + row.head * params.lse.stride_heads + row.query] = lse;
      }
      Element* const out = row_pointer<Element>(params.out, walk.batch, row);
      for_columns(first_column, r, problem.head_dim_v,
                  [&](int column, int i) { out[column] = static_cast<Element>(outputs(i) * factor); });
    }
  }

  // A part of a tile, as decode_rows.cuh's.
  template <class Outputs>
  __device__ static void store_part(RowSoftmax const& softmax, Outputs const& outputs, TileRow const (&rows)[2],
                                    int first_row, int first_column, float2* rows_sums, float* rows_out, int64_t stride,
                                    int64_t num_columns) {
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (!rows[r].is_valid) continue;
      int const row = first_row + r;
      // P was taken against a rounded product of the maximum: what that has left in all of a row's P alike goes here.
      float const factor = softmax.subtracts_first || softmax.row_max[r] == -INFINITY
                               ? 1.0f
                               : exp2f(-__fmaf_rn(softmax.row_max[r], softmax.scale_log2, -softmax.offset(r)));
      if (first_column == 0) rows_sums[row] = {softmax.row_max[r], softmax.row_sum[r] * factor};
      for_columns(first_column, r, num_columns,
                  [&](int column, int i) { rows_out[row * stride + column] = outputs(i) * factor; });
    }
  }

  // One function, as decode.cuh's.
  __device__ static void consume(DecodeArguments const& arguments, SharedStorage& shared) {
    using namespace cute;
    // A thread's two rows, its first key of each 64 and its first column of each 64 of O.
    int const first_row = 2 * (threadIdx.x % 4), first_line = row_of_thread(0, threadIdx.x);
    Problem const& problem = arguments.params.problem;
    // A kv head has one tile: its number is the kv head's, and rows are the same in all.
    TileRow const rows[2] = {row_of(arguments, 0, first_row), row_of(arguments, 0, first_row + 1)};

    MmaS mma_s;
    MmaO mma_o;
    Tensor sQ = make_tensor(make_smem_ptr(shared.q[0]), LayoutQ{});
    Tensor sP = make_tensor(make_smem_ptr(shared.p), LayoutP{});
    Tensor sK = make_tensor(make_smem_ptr(shared.k[0]), LayoutK{});
    Tensor sVt = make_tensor(make_smem_ptr(shared.v[0]), LayoutVt{});
    auto thread_s = mma_s.get_slice(threadIdx.x);
    auto thread_o = mma_o.get_slice(threadIdx.x);
    Tensor fK = thread_s.partition_fragment_A(sK);   // descriptors (_, kBlockKV/64, kHeadDimQK/16, kNumStages)
    Tensor fQ = thread_s.partition_fragment_B(sQ);   // (_, 1, kHeadDimQK/16, kNumQStages)
    Tensor fV = thread_o.partition_fragment_A(sVt);  // (_, kHeadDimV/64, kBlockKV/16, kNumStages)
    Tensor fP = thread_o.partition_fragment_B(sP);   // (_, 1, kBlockKV/16, 1)
    // fp32. Element 4 i + 2 r + c: row c of the thread's two; key, or column of O, first_line + 64 i + 8 r.
    Tensor rS = partition_fragment_C(mma_s, Shape<Int<kBlockKV>, Int<kRows>>{});
    Tensor rO = partition_fragment_C(mma_o, Shape<Int<kHeadDimV>, Int<kRows>>{});
    static_assert(decltype(size(rS))::value == kScores && decltype(size(rO))::value == kOutputs);

    bool const has_transform = problem.softcap > 0.0f || problem.scale <= 0.0f;
    RowSoftmax softmax(has_transform ? kLog2e : problem.scale * kLog2e);
    float correction[2];
    Ring<kNumStages> ring;
    Ring<kNumQStages> ring_q;
    int tile_parity = 0;
    // A product completes for the whole warpgroup at once, so one thread arrives for all.
    auto release = [&](uint64_t& barrier) {
      if (threadIdx.x == 0) ClusterBarrier::arrive(&barrier);
    };

    for (DecodeWalk walk = begin_walk(arguments); walk.find(); walk.next_tile(), ring_q.advance(), tile_parity ^= 1) {
      SequenceKeys const keys = walk.keys;
      RowKeys const seen = row_keys<1>(arguments, keys, 0, first_row);
      // Rows behind the end of a sequence that fills its cache arrive as zeros.
      bool const ends_in_zeros = arguments.params.block_table == nullptr && keys.end == arguments.params.page_size;
      softmax.reset();
      CUTE_UNROLL
      for (int i = 0; i < kOutputs; ++i) rO(i) = 0.0f;
      ClusterBarrier::wait(&shared.q_full[ring_q.stage], ring_q.phase);

      for (int32_t kv_block = walk.blocks.begin; kv_block < walk.blocks.end; ++kv_block, ring.advance()) {
        int const stage = ring.stage;
        int32_t const first_key = kv_block * kBlockKV;
        ClusterBarrier::wait(&shared.k_full[stage], ring.phase);
        multiply(mma_s, fK(_, _, _, stage), fQ(_, _, _, ring_q.stage), rS, false);
        warpgroup_wait<0>();
        warpgroup_fence_operand(rS);
        release(shared.k_empty[stage]);
        if (has_transform) transform_scores<kScores>(rS, problem.scale, problem.softcap);
        if (first_key < keys.unmasked_begin || first_key + kBlockKV > keys.unmasked_end) {
          hide(rS, seen, first_key + first_line);
        }
        softmax.update(rS, correction, shared.maxima);
        store_p(shared.p, rS);
        CUTE_UNROLL
        for (int i = 0; i < kOutputs; ++i) rO(i) *= correction[i % 2];

        ClusterBarrier::wait(&shared.v_full[stage], ring.phase);
        if (first_key < keys.begin || !ends_in_zeros) {
          clear_rows<kBlockKV, kHeadDimV, kWarpgroupThreads>(shared.v[stage], keys, kv_block, threadIdx.x);
        }
        NamedBarrier::sync(kWarpgroupThreads, kConsumerBarrier);  // P and V are as the product is to read them
        multiply(mma_o, fV(_, _, _, stage), fP(_, _, _, 0), rO, true);
        warpgroup_wait<0>();
        warpgroup_fence_operand(rO);
        release(shared.v_empty[stage]);
      }

      softmax.add_sums(shared.sums[tile_parity]);  // by now every warp has ended its products with Q
      release(shared.q_empty[ring_q.stage]);
      if (arguments.cluster_size > 1) {
        add_parts_of_cluster<FewRowsDecode>(arguments, shared, walk, arguments.num_rows, [&](auto& part) {
          store_part(softmax, rO, rows, first_row, first_line, part.sums, part.out[0], kHeadDimV + 8, kHeadDimV);
        });
      } else if (walk.is_whole()) {
        write_rows(arguments, walk, softmax, rO, rows, first_line);
      } else {
        int64_t const index = int64_t{partial_of(blockIdx.x, walk.unit == walk.tile_begin)} * arguments.partial_rows;
        store_part(softmax, rO, rows, first_row, first_line, arguments.partial_sums + index,
                   arguments.partial_out + index * problem.head_dim_v, problem.head_dim_v, problem.head_dim_v);
      }
    }
  }
};

}  // namespace flashmla::sm90
