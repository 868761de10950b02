// Who computes what of a decode call.
//
// A decode tile is up to Tiles::kRows query rows of one kv head of one sequence, and the kv_blocks these see. Row r
// of a sequence's kv head is query r / group of query head r % group of that kv head's. Tiles lie behind each other in
// units of a kv_block (a tile that sees nothing is one unit), and CTA c of n takes the units from total * c / n on: all
// have the same to read, whatever the lengths, which are read on the device. So a CTA has the end of one tile, some
// whole ones, and the beginning of another. Parts of tiles leave for the workspace, and combine.cuh adds them up, in
// order. Without can_split a CTA computes the tiles that begin in its share, each of them alone.
//
// If all tiles turn out to have the same units, a tile's CTAs follow from shapes, and each finds its part from its own
// sequence's length; the others' are read beside it.
//
// Short calls cannot wait for a second kernel. If there are about as many CTAs in clusters, one cluster a tile, as
// there are multiprocessors, CTA r of c has the r-th part of the tile's units, and the cluster adds its parts up
// through distributed shared memory (add_parts_of_cluster in decode_cta.cuh). Each CTA has one part, perhaps an empty
// one.
//
// Tiles of the same keys are to be computed at the same time, so that one of them reads the keys from memory and the
// others from L2. So the line of units is one pass over all sequences and kv heads after the other: pass t has tile t
// of every kv head. CTAs c, c + n / passes, ... are at the same place of their passes (n is a multiple of the passes).
#pragma once

#include <cuda.h>
#include <cutlass/fast_math.h>

#include <cstdint>

#include "params.h"
#include "sm90/scheduling/scheduler.cuh"
#include "sm90/tiles.h"

namespace flashmla::sm90 {

constexpr int kMaxClusterSize = 16;  // of CTAs that share a tile

// The kernels' parameters, by value: TMA reads its descriptors from parameter memory.
struct DecodeArguments {
  CUtensorMap k, v;  // dims (head_dim, row of a page, heads, page)
  DecodeParams params;
  Window window;
  int32_t block_kv;      // keys of a unit
  int32_t rows_per_box;  // rows that one copy brings: a power of two that divides page_size, unless a page is all
  int32_t num_rows;      // query rows of a kv head: group * seqlen_q
  int32_t group;         // query heads of a kv head
  int32_t heads_kv;
  int32_t tiles_per_head;  // tiles of a kv head of a sequence: the number of passes
  int32_t num_ctas;        // of decode_kernel; fewer have work if there are fewer units
  int32_t partial_rows;    // rows of a part in the workspace: min(num_rows, Tiles::kRows)
  float* partial_out;      // [2 * num_ctas, partial_rows, head_dim_v]: not divided by the sum
  float2* partial_sums;    // [2 * num_ctas, partial_rows]: (maximum of the scores, sum of exponentials)
  int32_t cluster_size;    // CTAs of a cluster that share a tile; 1: CTAs have shares of the line of units
  int32_t ctas_per_tile;   // whose shares are parts of one tile, if all tiles have as many units; 0: Shares decides
  CUtensorMap q;           // dims (head_dim, heads, rows, sequence); of few rows (few_rows.cuh)
  int32_t block_kv_log2;
  cutlass::FastDivmod pages;   // divides by page_size
  ScaleView k_scale, v_scale;  // of caches of e4m3 (e4m3_decode.cuh)
};

// The keys of a sequence: [begin, end) are seen by some query, [unmasked_begin, unmasked_end) by each of them.
struct SequenceKeys {
  int32_t length, start;  // keys before `start` are hidden
  int32_t begin, end, unmasked_begin, unmasked_end;
};

__host__ __device__ inline SequenceKeys keys_of(DecodeArguments const& arguments, int32_t batch) {
  DecodeParams const& params = arguments.params;
  int32_t const capacity = static_cast<int32_t>(params.problem.seqlen_kv);
  SequenceKeys keys;
  keys.length = params.cache_seqlens == nullptr ? capacity : min(max(params.cache_seqlens[batch], 0), capacity);
  keys.start = params.kv_start == nullptr ? 0 : min(max(params.kv_start[batch], 0), keys.length);
  int32_t const first = keys.length - static_cast<int32_t>(params.problem.seqlen_q);
  VisibleKeys const visible = visible_keys(arguments.window, keys.length, first, keys.length - 1);
  keys.begin = max(visible.begin, keys.start);
  keys.end = visible.end;
  keys.unmasked_begin = max(visible.unmasked_begin, keys.start);
  keys.unmasked_end = visible.unmasked_end;
  return keys;
}

// kv_blocks [begin, end) of a sequence's tiles.
struct KVBlocks {
  int32_t begin, end;
};

__host__ __device__ inline KVBlocks blocks_of(DecodeArguments const& arguments, SequenceKeys const& keys) {
  if (keys.begin >= keys.end) return {0, 0};
  // A division by what is not known to the compiler is a chain of 20 instructions, for every tile and warp.
  return {keys.begin >> arguments.block_kv_log2, (keys.end + arguments.block_kv - 1) >> arguments.block_kv_log2};
}

__host__ __device__ inline int32_t units_of(DecodeArguments const& arguments, int32_t batch) {
  KVBlocks const blocks = blocks_of(arguments, keys_of(arguments, batch));
  return max(1, blocks.end - blocks.begin);
}

__host__ __device__ inline bool has_equal_lengths(DecodeParams const& params) {
  return params.cache_seqlens == nullptr && params.kv_start == nullptr;
}

// Units of a pass, and of the sequences before `batch` in it; `each` is the units of a tile if all have the same, else
// 0. By a warp, which has the sums in every lane.
struct UnitSums {
  int32_t pass, before, each;
};

__device__ inline UnitSums sum_units(DecodeArguments const& arguments, int32_t batch) {
  int32_t const num_sequences = static_cast<int32_t>(arguments.params.problem.batch);
  if (has_equal_lengths(arguments.params)) {
    int32_t const units = units_of(arguments, 0), size = arguments.heads_kv * units;
    return {num_sequences * size, batch * size, units};
  }
  int32_t total = 0, before = 0, least = INT32_MAX, most = 0;
  for (int32_t i = threadIdx.x % kWarpThreads; i < num_sequences; i += kWarpThreads) {
    int32_t const units = units_of(arguments, i);
    total += units;
    if (i < batch) before += units;
    least = min(least, units);
    most = max(most, units);
  }
  total = __reduce_add_sync(0xffffffff, total);
  before = __reduce_add_sync(0xffffffff, before);
  least = __reduce_min_sync(0xffffffff, least);
  most = __reduce_max_sync(0xffffffff, most);
  return {total * arguments.heads_kv, before * arguments.heads_kv, least == most ? most : 0};
}

// `total` units in shares of at most one unit's difference, none of them empty: periods of `count` shares and
// `period` units. If all tiles have `each` units (0: they have not), a share is a part of a tile or some whole tiles,
// unless that leaves more than a tenth of the CTAs without work.
struct Shares {
  uint32_t total, period, count, size, num_larger;

  __host__ __device__ Shares(uint32_t num_ctas, uint32_t total, uint32_t each)
      : total(total), period(total), count(num_ctas < total ? num_ctas : total) {
    if (each > 0) {
      uint32_t const tiles = total / each, parts = count / tiles;
      uint32_t const tiles_per_share = parts > 0 ? 0 : (tiles + count - 1) / count;
      uint32_t const busy = parts > 0 ? parts * tiles : (tiles + tiles_per_share - 1) / tiles_per_share;
      if (busy * 10 >= count * 9) {
        count = parts > 0 ? parts : 1;
        period = parts > 0 ? each : tiles_per_share * each;
      }
    }
    size = period / count;
    num_larger = period - size * count;
  }

  // Whether no tile is split, each tile having `each` units.
  __host__ __device__ bool has_whole_tiles(uint32_t each) const { return count == 1 && period % each == 0; }

  __host__ __device__ uint32_t begin(uint32_t share) const {
    uint32_t const periods = share / count, within = share - periods * count;
    uint64_t const unit = uint64_t{periods} * period + within * size + (within < num_larger ? within : num_larger);
    return unit < total ? static_cast<uint32_t>(unit) : total;
  }

  // The share that a unit belongs to.
  __host__ __device__ uint32_t of(uint32_t unit) const {
    uint32_t const periods = unit / period, within = unit - periods * period, in_larger = num_larger * (size + 1);
    return periods * count + (within < in_larger ? within / (size + 1) : num_larger + (within - in_larger) / size);
  }
};

// Where a part of a tile lies in the workspace: a share has at most one tile that began in an earlier one, and one that
// begins in it and ends in a later one.
__device__ inline int32_t partial_of(int32_t share, bool has_tile_begin) {
  return 2 * share + (has_tile_begin ? 1 : 0);
}

// Walks the parts of tiles in this CTA's share. Every warp walks for itself.
struct DecodeWalk {
  DecodeArguments const& arguments;
  int32_t unit, end;            // of the share
  int32_t tile_begin;           // first unit of the tile
  int32_t batch, tile, units;   // the tile within its sequence (head_kv * tiles_per_head + pass), and its units
  int32_t rank = 0;             // among the CTAs that share the tile
  bool has_tile = false;        // there are CTAs that have none
  bool has_empty_part = false;  // a cluster waits for this CTA, which has no unit of its tile
  SequenceKeys keys;
  KVBlocks blocks;  // of this part

  // The tile of one unit.
  __device__ DecodeWalk(DecodeArguments const& arguments, UnitSums const& sums, int32_t unit)
      : arguments(arguments), unit(unit), end(unit) {
    find_tile(sums);
  }

  // What follows from shapes: the tile, if CTAs have parts of one.
  __device__ explicit DecodeWalk(DecodeArguments const& arguments) : arguments(arguments), unit(0), end(0) {
    int32_t const size = arguments.cluster_size > 1 ? arguments.cluster_size : arguments.ctas_per_tile;
    if (size == 0) return;
    int32_t const heads = static_cast<int32_t>(arguments.params.problem.batch) * arguments.heads_kv;
    int32_t const number = blockIdx.x / size;
    rank = blockIdx.x - number * size;
    has_tile = number < heads * arguments.tiles_per_head;
    int32_t const pass = arguments.tiles_per_head == 1 ? 0 : number / heads, place = number - pass * heads;
    batch = has_tile ? place / arguments.heads_kv : 0;
    tile = (place - batch * arguments.heads_kv) * arguments.tiles_per_head + pass;
  }

  // Reads lengths. By every warp.
  __device__ void begin() {
    if (arguments.cluster_size > 1) {
      read_sequence();
      take_part(arguments.cluster_size);
      has_empty_part = unit == end;
      return;
    }
    if (arguments.ctas_per_tile > 0) {
      read_sequence();
      if (units >= arguments.ctas_per_tile && have_all(units)) {
        if (has_tile) take_part(arguments.ctas_per_tile);
        return;
      }
    }
    UnitSums const sums = sum_units(arguments, 0);
    Shares const shares(arguments.num_ctas, sums.pass * arguments.tiles_per_head, sums.each);
    unit = static_cast<int32_t>(shares.begin(blockIdx.x));
    end = static_cast<int32_t>(shares.begin(blockIdx.x + 1));
    if (unit >= end) return;
    find_tile(sums);
    if (!arguments.params.can_split && unit > tile_begin) next_tile();
  }

  // False if there is no more work; then nothing else may be read. Else `blocks` is set.
  __device__ bool find() {
    if (unit >= end && !has_empty_part) return false;
    has_empty_part = false;
    KVBlocks const all = blocks_of(arguments, keys);
    blocks = {all.begin + unit - tile_begin, all.end};
    if (arguments.params.can_split) blocks.end = min(all.end, all.begin + end - tile_begin);
    return true;
  }

  __device__ bool is_whole() const {
    return unit == tile_begin && (!arguments.params.can_split || tile_begin + units <= end);
  }

  __device__ void next_tile() {
    if (arguments.cluster_size > 1) {
      unit = end;
      return;
    }
    int32_t const tiles_per_sequence = arguments.heads_kv * arguments.tiles_per_head;
    tile_begin += units;
    unit = tile_begin;
    tile += arguments.tiles_per_head;
    if (tile < tiles_per_sequence) return;
    tile -= tiles_per_sequence;
    if (++batch == arguments.params.problem.batch) {
      batch = 0;
      ++tile;  // the next pass
    }
    if (tile < arguments.tiles_per_head) {
      read_sequence();
    } else {
      unit = end;
    }
  }

  __device__ void read_sequence() {
    keys = keys_of(arguments, batch);
    KVBlocks const all = blocks_of(arguments, keys);
    units = max(1, all.end - all.begin);
  }

  // Whether the tiles of all sequences have as many units.
  __device__ bool have_all(int32_t expected) const {
    int32_t const num_sequences = static_cast<int32_t>(arguments.params.problem.batch);
    if (has_equal_lengths(arguments.params) || num_sequences == 1) return true;
    bool is_equal = true;
    for (int32_t i = threadIdx.x % kWarpThreads; i < num_sequences; i += kWarpThreads) {
      is_equal = is_equal && units_of(arguments, i) == expected;
    }
    return __all_sync(0xffffffff, is_equal);
  }

  // This CTA's part of a tile that `size` CTAs share; units are counted from the tile's first.
  __device__ void take_part(int32_t size) {
    tile_begin = 0;
    int32_t const each = units / size, num_larger = units - each * size;
    unit = rank * each + min(rank, num_larger);
    end = unit + each + (rank < num_larger ? 1 : 0);
  }

  // The tile that `unit` is of.
  __device__ void find_tile(UnitSums const& sums) {
    int32_t const pass = arguments.tiles_per_head == 1 ? 0 : unit / sums.pass, pass_begin = pass * sums.pass;
    int32_t const sequence_begin = pass_begin + find_sequence(unit - pass_begin, sums.each);
    read_sequence();
    int32_t const head_kv = (unit - sequence_begin) / units;
    tile = head_kv * arguments.tiles_per_head + pass;
    tile_begin = sequence_begin + head_kv * units;
  }

  // Sets `batch` to the sequence of a unit of a pass, and returns that sequence's first unit in the pass. `each` as in
  // UnitSums.
  __device__ int32_t find_sequence(int32_t unit, int32_t each) {
    int32_t const num_sequences = static_cast<int32_t>(arguments.params.problem.batch);
    if (each > 0) {
      int32_t const size = arguments.heads_kv * each;
      batch = unit / size;
      return batch * size;
    }
    int32_t const lane = threadIdx.x % kWarpThreads;
    int32_t before = 0;
    for (int32_t first = 0;; first += kWarpThreads) {
      int32_t const size = first + lane < num_sequences ? arguments.heads_kv * units_of(arguments, first + lane) : 0;
      int32_t sum = size;
      CUTE_UNROLL
      for (int lanes = 1; lanes < kWarpThreads; lanes *= 2) {
        int32_t const other = __shfl_up_sync(0xffffffff, sum, lanes);
        if (lane >= lanes) sum += other;
      }
      uint32_t const after = __ballot_sync(0xffffffff, before + sum > unit);
      if (after != 0) {
        int const found = __ffs(static_cast<int>(after)) - 1;
        batch = first + found;
        return before + __shfl_sync(0xffffffff, sum - size, found);
      }
      before += __shfl_sync(0xffffffff, sum, kWarpThreads - 1);
    }
  }
};

}  // namespace flashmla::sm90
