// The schedule as a CTA reads it (schedule.h): its next work tile, and what that tile sees; and the position in a ring
// of buffers.
#pragma once

#include "sm90/hopper/ptx.cuh"
#include "sm90/scheduling/schedule.h"
#include "sm90/tiles.h"

namespace flashmla::sm90 {

// Position in a ring of `kDepth` buffers.
template <int kDepth>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ void advance() {
    if (++stage == kDepth) stage = 0, phase ^= 1;
  }
  // The buffer before this one: where the last step was.
  __device__ int stage_before() const { return kDepth == 2 ? stage ^ 1 : stage == 0 ? kDepth - 1 : stage - 1; }
  __device__ Ring before() const { return stage == 0 ? Ring{kDepth - 1, phase ^ 1} : Ring{stage - 1, phase}; }
};

// Boundaries are read on the device and not trusted: whatever they hold, rows stay inside the tensors.
// Sequence number problem.batch is the rows of `side` past the last boundary, with nothing on the other side.
__device__ inline Sequence sequence_at(Problem const& problem, int32_t number, Side side) {
  if (problem.cu_seqlens_q == nullptr) {
    return {0, 0, static_cast<int32_t>(problem.seqlen_q), static_cast<int32_t>(problem.seqlen_kv)};
  }
  auto boundary = [](int32_t const* cu_seqlens, int64_t index, int64_t total) {
    return min(max(cu_seqlens[index], 0), static_cast<int32_t>(total));
  };
  int32_t const begin_q = boundary(problem.cu_seqlens_q, number, problem.total_q);
  int32_t const begin_kv = boundary(problem.cu_seqlens_kv, number, problem.total_kv);
  if (number == problem.batch) {
    return side == Side::kQueries ? Sequence{begin_q, 0, static_cast<int32_t>(problem.total_q) - begin_q, 0}
                                  : Sequence{0, begin_kv, 0, static_cast<int32_t>(problem.total_kv) - begin_kv};
  }
  return {begin_q, begin_kv, max(0, boundary(problem.cu_seqlens_q, number + 1, problem.total_q) - begin_q),
          max(0, boundary(problem.cu_seqlens_kv, number + 1, problem.total_kv) - begin_kv)};
}

// Keys [begin, end) are seen by some query at positions first ... last, [unmasked_begin, unmasked_end) by each of them.
struct VisibleKeys {
  int32_t begin, end, unmasked_begin, unmasked_end;
};

__host__ __device__ inline VisibleKeys visible_keys(Window window, int32_t seqlen_kv, int32_t first, int32_t last) {
  VisibleKeys keys{0, seqlen_kv, 0, seqlen_kv};
  if (window.right >= 0) {
    keys.end = max(0, min(seqlen_kv, last + window.right + 1));
    keys.unmasked_end = max(0, min(seqlen_kv, first + window.right + 1));
  }
  if (window.left >= 0) {
    keys.begin = max(0, first - window.left);
    keys.unmasked_begin = max(0, last - window.left);
  }
  return keys;
}

// Queries [begin, end) that see some key of first ... last.
struct VisibleQueries {
  int32_t begin, end;
};

__device__ inline VisibleQueries visible_queries(Window window, Sequence const& sequence, int32_t first, int32_t last) {
  int32_t const shift = sequence.seqlen_kv - sequence.seqlen_q;
  VisibleQueries queries{0, first <= last ? sequence.seqlen_q : 0};
  if (window.right >= 0) queries.begin = max(0, first - shift - window.right);
  if (window.left >= 0) queries.end = max(0, min(queries.end, last - shift + window.left + 1));
  return queries;
}

// Where tile `index` of the walk is; head is negative past the last.
struct TilePlace {
  int32_t head, batch, row_block;
};

__device__ inline TilePlace place_of(Schedule const& schedule, int32_t index) {
  bool const is_packed = schedule.num_items != nullptr;
  int32_t const num_row_blocks = is_packed ? *schedule.num_items : schedule.num_row_blocks;
  if (num_row_blocks <= 0 || index / num_row_blocks >= schedule.num_pairs) return {-1, 0, 0};
  int32_t const section_size = schedule.pairs_per_section * num_row_blocks;
  int32_t const section = index / section_size;
  int32_t const within = index - section * section_size;
  int32_t const first_pair = section * schedule.pairs_per_section;
  int32_t const section_pairs = min(schedule.pairs_per_section, schedule.num_pairs - first_pair);
  int32_t const rank = within / section_pairs;
  int32_t const pair = first_pair + within - rank * section_pairs;
  if (is_packed) return {pair, schedule.items[rank].x, schedule.items[rank].y};
  return {pair % schedule.num_heads, pair / schedule.num_heads,
          schedule.is_backwards ? num_row_blocks - 1 - rank : rank};
}

// Writes `tile`, which no one may be reading.
template <int kBlockKV, int kNumConsumers>
__device__ void write_work_tile(WorkTile& tile, Schedule const& schedule, Problem const& problem, Window window,
                                TilePlace place) {
  tile.head = place.head < 0 ? -1 : place.head * schedule.heads_packed;
  if (place.head < 0) return;
  tile.batch = place.batch;
  Sequence const sequence = sequence_at(problem, place.batch, Side::kQueries);
  tile.sequence = sequence;
  int32_t const shift = sequence.seqlen_kv - sequence.seqlen_q;
  int32_t q_begin = place.row_block * schedule.rows_per_block;
  if (window.right >= 0) {
    // q_blocks end with the sequence instead of beginning with it, so that the part-empty one sees the fewest keys, not
    // the most. Its first rows lie before the sequence and belong to no query.
    int32_t const num_q_blocks = (sequence.seqlen_q + schedule.rows_per_block - 1) / schedule.rows_per_block;
    q_begin -= num_q_blocks * schedule.rows_per_block - sequence.seqlen_q;
  }
  tile.q_begin = q_begin;
  int32_t const q_end = min(q_begin + schedule.rows_per_block, sequence.seqlen_q);
  int32_t kv_block_begin = 1 << 30, kv_block_end = 0;
  for (int warpgroup = 0; warpgroup < kNumConsumers; ++warpgroup) {
    int32_t const first = max(0, q_begin + warpgroup * kWarpgroupRows / schedule.heads_packed);
    int32_t const last =
        min(q_begin + (warpgroup * kWarpgroupRows + (kWarpgroupRows - 1)) / schedule.heads_packed, q_end - 1);
    VisibleBlocks blocks{0, 0, 0, 0};
    if (first <= last) {
      VisibleKeys const keys = visible_keys(window, sequence.seqlen_kv, first + shift, last + shift);
      blocks = {keys.begin / kBlockKV, (keys.end + kBlockKV - 1) / kBlockKV,
                (keys.unmasked_begin + kBlockKV - 1) / kBlockKV, keys.unmasked_end / kBlockKV};
      if (blocks.begin < blocks.end) {
        kv_block_begin = min(kv_block_begin, blocks.begin);
        kv_block_end = max(kv_block_end, blocks.end);
      }
    }
    tile.visible[warpgroup] = blocks;
  }
  tile.kv_block_begin = min(kv_block_begin, kv_block_end);
  tile.kv_block_end = kv_block_end;
}

// A counter that the kernel clears itself: a memset before it would take as long as several tiles of a short call.
// CTA 0 clears it and writes the call's ticket behind it, which the others wait for (next_index). A ticket is 64 bits
// that no other call has, so old memory is taken for it once in 2^64 calls. The last CTA to request work clears the
// ticket, because a replayed CUDA graph uses the same one again.
__device__ inline uint64_t* ticket_of(Schedule const& schedule) {
  return reinterpret_cast<uint64_t*>(schedule.next_tile) + 1;
}

__device__ inline void open_counter(Schedule const& schedule) {
  if (schedule.ticket == 0 || blockIdx.x != 0) return;
  *schedule.next_tile = 0;
  ptx::store_release(ticket_of(schedule), schedule.ticket);
}

// The number of the tile that this CTA takes in its round `round`; kNumCtas neighbours take it together, dealt out
// statically. Dealt out statically, rounds run to and fro, so that the CTA with the longest tile of one round has the
// shortest of the next; otherwise CTAs take the next tile by counter.
template <int kNumCtas = 1>
__device__ int32_t next_index(Schedule const& schedule, int32_t round) {
  int32_t const num_ctas = gridDim.x / kNumCtas, number = blockIdx.x / kNumCtas;
  auto to_and_fro = [&](int32_t round) { return round % 2 == 0 ? number : num_ctas - 1 - number; };
  if (kNumCtas > 1 || (schedule.next_tile == nullptr && !schedule.is_ordered)) {
    return round * num_ctas + to_and_fro(round);
  }
  if (schedule.next_tile == nullptr) {
    // The longest tiles come last. Dealt out from them on, so that it is the shortest that not every CTA gets one more
    // of, but begun with the shortest.
    int32_t const num_tiles = schedule.num_pairs * schedule.num_row_blocks, whole_rounds = num_tiles / num_ctas;
    int32_t const rounds = whole_rounds + (to_and_fro(whole_rounds) < num_tiles % num_ctas ? 1 : 0);
    int32_t const left = rounds - 1 - round;
    return left < 0 ? num_tiles : num_tiles - 1 - (left * num_ctas + to_and_fro(left));
  }
  if (round == 0) return blockIdx.x;
  if (schedule.ticket != 0 && round == 1) {
    while (ptx::load_acquire(ticket_of(schedule)) != schedule.ticket) {
    }
  }
  int32_t const asked = atomicAdd(schedule.next_tile, 1);
  // CTAs request every tile but their first, and each requests one more than there is: num_tiles requests in all.
  if (schedule.ticket != 0 && asked == schedule.num_pairs * schedule.num_row_blocks - 1) *ticket_of(schedule) = 0;
  return num_ctas + asked;
}

}  // namespace flashmla::sm90
