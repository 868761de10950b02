// The rows of a decode tile (decode_schedule.cuh): where their queries lie, which keys they see, where results go.
//
// A thread of a warpgroup has rows first_row and first_row + 8, as accumulators lie in registers (fragment.cuh).
#pragma once

#include <cute/tensor.hpp>

#include "params.h"
#include "sm90/decode/decode_schedule.cuh"
#include "sm90/hopper/fragment.cuh"
#include "sm90/hopper/softmax.cuh"
#include "sm90/tiles.h"

namespace flashmla::sm90 {

// The rows of a box, as coordinates of the cache.
struct BoxPlace {
  int32_t page, row;
};

// Box `box` of kv_block `kv_block`. A number in the table that is no page of the cache is outside the descriptor.
template <int kBlockKV>
__device__ BoxPlace box_place(DecodeArguments const& arguments, int32_t batch, int32_t kv_block, int32_t box) {
  DecodeParams const& params = arguments.params;
  int32_t const key = kv_block * kBlockKV + box * arguments.rows_per_box;
  if (params.block_table == nullptr) return {batch, key};
  int index, row;
  arguments.pages(index, row, key);
  return {params.block_table[batch * params.stride_block_table + index], row};
}

// Where the boxes of a part of a tile lie, read from the table for many kv_blocks at once: of a block's 2^n boxes lane
// l has number l % 2^n, of every block whose number in the part is l / 2^n modulo 32 / 2^n. By a warp, block by block.
template <int kBlockKV>
struct BoxPlaces {
  DecodeArguments const& arguments;
  SequenceKeys keys;
  KVBlocks blocks;
  int32_t batch, boxes_log2, first_lane;  // of the block turned to
  BoxPlace here, next;

  __device__ BoxPlaces(DecodeArguments const& arguments, DecodeWalk const& walk)
      : arguments(arguments), keys(walk.keys), blocks(walk.blocks), batch(walk.batch) {
    boxes_log2 = arguments.block_kv_log2 - (__ffs(arguments.rows_per_box) - 1);
    here = read(blocks.begin);
    next = read(blocks.begin + at_once());
  }

  // Blocks come in their order. Whether the lane's box of this one has a key of the sequence: boxes without are not
  // loaded, and the table need not have their pages.
  __device__ bool turn_to(int32_t kv_block) {
    int32_t const number = (kv_block - blocks.begin) & (at_once() - 1);
    if (number == 0 && kv_block > blocks.begin) {
      here = next;
      next = read(kv_block + at_once());
    }
    first_lane = number << boxes_log2;
    return lane() >> boxes_log2 == number && has_keys(kv_block);
  }

  // The first row of the lane's box, in its block.
  __device__ int32_t first_row() const { return (lane() - first_lane) * arguments.rows_per_box; }

 private:
  __device__ static int32_t lane() { return threadIdx.x % kWarpThreads; }
  __device__ int32_t at_once() const { return kWarpThreads >> boxes_log2; }
  __device__ int32_t box() const { return lane() & ((1 << boxes_log2) - 1); }

  __device__ bool has_keys(int32_t kv_block) const {
    int32_t const key = kv_block * kBlockKV + box() * arguments.rows_per_box;
    return key < keys.end && key + arguments.rows_per_box > keys.begin;
  }

  __device__ BoxPlace read(int32_t first_block) const {
    int32_t const kv_block = first_block + (lane() >> boxes_log2);
    if (kv_block >= blocks.end || !has_keys(kv_block)) return {0, 0};
    return box_place<kBlockKV>(arguments, batch, kv_block, box());
  }
};

// A row of the tile.
struct TileRow {
  int32_t query, head;
  bool is_valid;
};

// kTileRows: query rows of a tile, where a kv head may have several tiles (Tiles::kRows).
template <int kTileRows = kWarpgroupRows>
__device__ TileRow row_of(DecodeArguments const& arguments, int32_t tile, int32_t row_in_tile) {
  int32_t const head_kv = tile / arguments.tiles_per_head;
  int32_t const row = (tile - head_kv * arguments.tiles_per_head) * kTileRows + row_in_tile;
  int32_t const query = row / arguments.group;
  return {query, head_kv * arguments.group + row - query * arguments.group, row < arguments.num_rows};
}

template <class Element>
__device__ Element* row_pointer(TensorView const& view, int32_t batch, TileRow const& row) {
  return static_cast<Element*>(view.data) + batch * view.stride_batch + row.query * view.stride_seqlen +
         row.head * view.stride_heads;
}

// Rows of a tile that are queries.
template <int kTileRows = kWarpgroupRows>
__device__ int32_t num_rows_of(DecodeArguments const& arguments, int32_t tile) {
  int32_t const pass = arguments.tiles_per_head == 1 ? 0 : tile % arguments.tiles_per_head;
  return min(kTileRows, arguments.num_rows - pass * kTileRows);
}

// Writes the first num_rows rows of Q of a tile, zeros where there is none, to chunks of 64 columns in shared memory
// (SharedLayouts). By kThreads threads, of which `thread` is one; they synchronize afterwards.
template <int kHeadDim, int kThreads, class Element>
__device__ void read_queries(DecodeArguments const& arguments, Element* shared_q, int32_t batch, int32_t tile,
                             int thread, int32_t num_rows = kWarpgroupRows) {
  constexpr int kVectorBytes = 16, kVectorElements = 8, kVectors = kHeadDim / kVectorElements;
  constexpr int kAtOnce = 4;  // loads of a thread that are on their way before the first is stored
  unsigned char* const q = reinterpret_cast<unsigned char*>(shared_q);
  int const end = num_rows * kVectors;
#pragma unroll 1
  for (int first = thread; first < end; first += kAtOnce * kThreads) {
    uint4 x[kAtOnce];
    CUTE_UNROLL
    for (int j = 0; j < kAtOnce; ++j) {
      int const i = first + j * kThreads, vector = i % kVectors;
      x[j] = {0, 0, 0, 0};
      if (i < end) {
        TileRow const row = row_of(arguments, tile, i / kVectors);
        if (row.is_valid && vector * kVectorElements < arguments.params.problem.head_dim_qk) {
          x[j] = *reinterpret_cast<uint4 const*>(row_pointer<Element>(arguments.params.q, batch, row) +
                                                 vector * kVectorElements);
        }
      }
    }
    CUTE_UNROLL
    for (int j = 0; j < kAtOnce; ++j) {
      int const i = first + j * kThreads, row_in_tile = i / kVectors, vector = i % kVectors;
      int const chunk = vector / 8;  // 128 bytes a row
      if (i < end) {
        *reinterpret_cast<uint4*>(q + (chunk * kWarpgroupRows + row_in_tile) * 128 +
                                  ((vector % 8) ^ (row_in_tile % 8)) * kVectorBytes) = x[j];
      }
    }
  }
  cutlass::arch::fence_view_async_shared();
}

// Brings Q of a tile to L2, by a warp.
template <class Element, int kTileRows>
__device__ void prefetch_queries(DecodeArguments const& arguments, int32_t batch, int32_t tile) {
  constexpr int kLineElements = 128 / static_cast<int>(sizeof(Element));
  int32_t const num_rows = num_rows_of<kTileRows>(arguments, tile);
  for (int32_t i = threadIdx.x % kWarpThreads; i < num_rows; i += kWarpThreads) {
    Element const* const q = row_pointer<Element>(arguments.params.q, batch, row_of<kTileRows>(arguments, tile, i));
    for (int column = 0; column < arguments.params.problem.head_dim_qk; column += kLineElements) {
      ptx::prefetch_to_l2(q + column);
    }
  }
}

// Whether a kv_block has rows that are no keys of the sequence.
template <int kBlockKV>
__device__ bool has_hidden_rows(SequenceKeys const& keys, int32_t kv_block) {
  int32_t const first = kv_block * kBlockKV;
  return first < keys.begin || first + kBlockKV > keys.end;
}

// Clears the first kColumns columns of the rows of a kv_block in shared memory that are no keys of the sequence: they
// may hold anything, and 0 * NaN is NaN. True if there are such rows: then the threads are to synchronize.
template <int kBlockKV, int kColumns, int kThreads, class Element>
__device__ bool clear_rows(Element* values, SequenceKeys const& keys, int32_t kv_block, int thread) {
  if (!has_hidden_rows<kBlockKV>(keys, kv_block)) return false;
  int32_t const first = kv_block * kBlockKV;
  constexpr int kVectorElements = 8, kVectors = kColumns / kVectorElements, kChunk = 64;
  for (int i = thread; i < kBlockKV * kVectors; i += kThreads) {
    int const row = i / kVectors, vector = i % kVectors;
    if (first + row >= keys.begin && first + row < keys.end) continue;
    // All of a row, so the order of its vectors does not matter.
    *reinterpret_cast<uint4*>(values + vector / 8 * (kBlockKV * kChunk) + row * kChunk + vector % 8 * kVectorElements) =
        uint4{0, 0, 0, 0};
  }
  cutlass::arch::fence_view_async_shared();
  return true;
}

// Keys [begin, end) that a thread's two rows see, first_row and first_row + kApart.
struct RowKeys {
  int32_t begin[2], end[2];
};

template <int kApart = 8, int kTileRows = kWarpgroupRows>
__device__ RowKeys row_keys(DecodeArguments const& arguments, SequenceKeys const& keys, int32_t tile, int first_row) {
  RowKeys seen;
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) {
    TileRow const row = row_of<kTileRows>(arguments, tile, first_row + kApart * r);
    int32_t const position = keys.length - static_cast<int32_t>(arguments.params.problem.seqlen_q) + row.query;
    VisibleKeys const visible = visible_keys(arguments.window, keys.length, position, position);
    seen.begin[r] = max(visible.begin, keys.start);
    seen.end[r] = visible.end;
  }
  return seen;
}

template <int kScores, class Scores>
__device__ void hide_keys(Scores& scores, RowKeys const& seen, int32_t first_key) {
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

// A tile that this CTA has computed alone: columns first_column ... of its rows, kOutputs of them in a thread. lse is
// written with column 0.
template <int kOutputs, class Element, class Softmax, class Outputs>
__device__ void write_rows(DecodeArguments const& arguments, DecodeWalk const& walk, Softmax& softmax,
                           Outputs const& outputs, int first_row, int first_column = 0) {
  DecodeParams const& params = arguments.params;
  Problem const& problem = params.problem;
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) {
    TileRow const row = row_of(arguments, walk.tile, first_row + 8 * r);
    float lse;
    float factor =
        softmax.finish(r, problem.sinks == nullptr || !row.is_valid ? nullptr : problem.sinks + row.head, lse);
    if (walk.keys.length == 0) factor = 0.0f;  // of no weight at all, a sink of NaN makes nothing
    if (row.is_valid && threadIdx.x % 4 == 0 && first_column == 0 && params.lse.data != nullptr) {
      params.lse.data[walk.batch * params.lse.stride_batch + row.head * params.lse.stride_heads + row.query] = lse;
    }
    Element* const out = row.is_valid ? row_pointer<Element>(params.out, walk.batch, row) : nullptr;
    store_row<Element, 2 * kOutputs>(out, outputs, r, factor, first_column, problem.head_dim_v, threadIdx.x % 4);
  }
}

// A part of a tile: O and the sum of exponentials, both against the maximum as it is. Row r of it goes to row r of
// `rows_sums` and, columns first_column ... below num_columns, of `rows_out`, whose rows are `stride` apart. The sum is
// written with column 0.
template <int kOutputs, class Softmax, class Outputs>
__device__ void store_part(DecodeArguments const& arguments, int32_t tile, Softmax& softmax, Outputs const& outputs,
                           int first_row, int first_column, float2* rows_sums, float* rows_out, int64_t stride,
                           int64_t num_columns) {
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) {
    int const row = first_row + 8 * r;
    float sum = softmax.row_sum[r];
    sum += __shfl_xor_sync(0xffffffff, sum, 1);
    sum += __shfl_xor_sync(0xffffffff, sum, 2);
    if (!row_of(arguments, tile, row).is_valid) continue;
    // P was taken against a rounded product of the maximum: what that has left in all of a row's P alike goes here.
    float const factor = softmax.subtracts_first || softmax.row_max[r] == -INFINITY
                             ? 1.0f
                             : exp2f(-__fmaf_rn(softmax.row_max[r], softmax.scale_log2, -softmax.offset(r)));
    if (threadIdx.x % 4 == 0 && first_column == 0) rows_sums[row] = {softmax.row_max[r], sum * factor};
    float* const out = rows_out + row * stride + first_column + 2 * (threadIdx.x % 4);
    CUTE_UNROLL
    for (int j = 0; j < kOutputs / 4; ++j) {
      if (first_column + 8 * j >= num_columns) break;
      *reinterpret_cast<float2*>(out + 8 * j) = {outputs(j * 4 + r * 2) * factor, outputs(j * 4 + r * 2 + 1) * factor};
    }
  }
}

// The same, to the workspace.
template <int kOutputs, class Softmax, class Outputs>
__device__ void write_partial(DecodeArguments const& arguments, DecodeWalk const& walk, Softmax& softmax,
                              Outputs const& outputs, int first_row, int first_column = 0) {
  int64_t const index = int64_t{partial_of(blockIdx.x, walk.unit == walk.tile_begin)} * arguments.partial_rows;
  int64_t const head_dim_v = arguments.params.problem.head_dim_v;
  store_part<kOutputs>(arguments, walk.tile, softmax, outputs, first_row, first_column, arguments.partial_sums + index,
                       arguments.partial_out + index * head_dim_v, head_dim_v, head_dim_v);
}

}  // namespace flashmla::sm90
