// How O and lse leave a consumer warpgroup of the forward.
#pragma once

#include <cuda.h>

#include <cute/tensor.hpp>

#include "params.h"
#include "sm90/forward/query_tile.cuh"
#include "sm90/hopper/fragment.cuh"
#include "sm90/tiles.h"

namespace flashmla::sm90 {

// The kernel's parameters, by value: TMA reads its descriptors from parameter memory.
struct ForwardArguments {
  CUtensorMap q;       // dims (head_dim, heads_packed, seqlen or total, heads / heads_packed, batch)
  CUtensorMap k, v;    // dims (head_dim, row, end, heads, outer) of sequence_rows.h
  CUtensorMap o;       // as q, a warpgroup's rows at a time
  bool can_tma_store;  // o is set: heads_packed divides a warpgroup's rows
  TensorView out;
  RowView lse;  // data may be null
  Problem problem;
  Window window;
  Schedule schedule;
};

// What a thread needs to write its two rows of O: computed while the last product still runs.
struct OutputRows {
  float factor[2];     // 1 / row_sum
  bool can_tma_store;  // the warpgroup's rows are a box of the tensor
};

__device__ inline float* lse_row(ForwardArguments const& arguments, WorkTile const& tile, QueryRow const& row) {
  RowView const& lse = arguments.lse;
  return lse.data + tile.batch * lse.stride_batch + row.head * lse.stride_heads + tile.sequence.offset_q + row.query;
}

// A warpgroup's rows, `row_at` of each of 64, see no key: out 0, lse -inf or the sink's logit. Rows past the last
// sequence have no sink.
template <class Element, class RowAt>
__device__ void write_masked_rows(ForwardArguments const& arguments, WorkTile const& tile, RowAt const& row_at) {
  Problem const& problem = arguments.problem;
  bool const has_sink =
      problem.sinks != nullptr && !(arguments.schedule.num_items != nullptr && tile.batch == problem.batch);
  int32_t const vectors = static_cast<int32_t>(problem.head_dim_v) / 8;  // of 16 bytes
  for (int32_t i = threadIdx.x % kWarpgroupThreads; i < kWarpgroupRows * vectors; i += kWarpgroupThreads) {
    QueryRow const row = row_at(i / vectors);
    if (!row.is_valid) continue;
    float const sink = has_sink ? problem.sinks[row.head] : -INFINITY;
    // A sink of NaN or infinity makes NaN of every weight; of no weight at all the sum stays 0.
    bool const is_nan = !(sink < INFINITY) && tile.sequence.seqlen_kv > 0;
    uint32_t const pair = is_nan ? 0x7fff7fffu : 0u;  // two NaNs in both dtypes
    *reinterpret_cast<uint4*>(row_pointer<Element>(arguments.out, tile, row) + i % vectors * 8) =
        uint4{pair, pair, pair, pair};
    if (i % vectors == 0 && arguments.lse.data != nullptr) *lse_row(arguments, tile, row) = sink;
  }
}

// Ends the softmax of a thread's row r (0 or 1), which is `row`, and writes lse. Returns 1 / row_sum.
template <class RowSoftmax>
__device__ float finish_row(ForwardArguments const& arguments, WorkTile const& tile, QueryRow const& row,
                            RowSoftmax& softmax, int r) {
  Problem const& problem = arguments.problem;
  float lse;
  float const factor =
      softmax.finish(r, problem.sinks == nullptr || !row.is_valid ? nullptr : problem.sinks + row.head, lse);
  if (row.is_valid && threadIdx.x % 4 == 0 && arguments.lse.data != nullptr) *lse_row(arguments, tile, row) = lse;
  return factor;
}

template <class Kernel, class Element>
struct ForwardOutput {
  __device__ static void write_masked_rows(ForwardArguments const& arguments, WorkTile const& tile, int warpgroup) {
    sm90::write_masked_rows<Element>(arguments, tile, [&](int32_t row) {
      return query_row(arguments.schedule, tile, warpgroup * kWarpgroupRows + row);
    });
  }

  // The first query of the warpgroup's rows, within the sequence.
  __device__ static int32_t box_begin(Schedule const& schedule, WorkTile const& tile, int warpgroup) {
    return tile.q_begin + warpgroup * kWarpgroupRows / schedule.heads_packed;
  }

  // Ends the softmax and writes lse.
  __device__ static void finish_rows(ForwardArguments const& arguments, WorkTile const& tile,
                                     typename Kernel::RowSoftmax& softmax, int warpgroup, int first_row,
                                     OutputRows& rows) {
    Schedule const& schedule = arguments.schedule;
    // A box may end outside the tensor, but not begin there: that store is an illegal instruction (a load is not).
    int32_t const begin = box_begin(schedule, tile, warpgroup);
    rows.can_tma_store =
        Kernel::kLooksAhead && arguments.can_tma_store && begin >= 0 &&
        (schedule.num_items == nullptr || begin + kWarpgroupRows / schedule.heads_packed <= tile.sequence.seqlen_q);
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      rows.factor[r] = finish_row(arguments, tile, query_row(schedule, tile, first_row + 8 * r), softmax, r);
    }
  }

  // out = O / row_sum. If the warpgroup's rows are a box of the tensor, TMA stores them from where their Q was, in
  // buffer `q_stage`: threads compute no address and wait for no store. Other rows (the end of a packed sequence, head
  // dims without a second Q buffer) are stored by the threads.
  template <class Outputs>
  __device__ static void write(ForwardArguments const& arguments, typename Kernel::SharedStorage& shared,
                               WorkTile const& tile, OutputRows const& rows, Outputs const& rO, int warpgroup,
                               int first_row, int q_stage) {
    Schedule const& schedule = arguments.schedule;
    if constexpr (Kernel::kLooksAhead) {
      if (rows.can_tma_store) {
        store_matrices<Element, Kernel::kSwizzleColumns, Kernel::kBlockQ, Kernel::kColumnsV>(
            shared.q[q_stage], rO, rows.factor,
            warpgroup * kWarpgroupRows + threadIdx.x % kWarpgroupThreads / kWarpThreads * 16);
        NamedBarrier::sync(kWarpgroupThreads, Kernel::kOwnBarrier + warpgroup);
        if (threadIdx.x % kWarpgroupThreads == 0) {
          cutlass::arch::fence_view_async_shared();  // from what the warpgroup wrote to what the copy engine reads
          int32_t const batch = schedule.num_items != nullptr ? 0 : tile.batch;
          for (int column = 0; column < arguments.problem.head_dim_v; column += Kernel::kSwizzleColumns) {
            cute::SM90_TMA_STORE_5D::copy(
                &arguments.o,
                shared.q[q_stage] + column * Kernel::kBlockQ + warpgroup * kWarpgroupRows * Kernel::kSwizzleColumns,
                column, 0, tile.sequence.offset_q + box_begin(schedule, tile, warpgroup),
                tile.head / schedule.heads_packed, batch);
          }
          cute::tma_store_arrive();
        }
        return;
      }
    }
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      QueryRow const row = query_row(schedule, tile, first_row + 8 * r);
      Element* const out = row.is_valid ? row_pointer<Element>(arguments.out, tile, row) : nullptr;
      store_row<Element, Kernel::kColumnsV>(out, rO, r, rows.factor[r], 0, arguments.problem.head_dim_v,
                                            threadIdx.x % 4);
    }
  }
};

}  // namespace flashmla::sm90
