#include <cutlass/arch/grid_dependency_control.h>

#include <algorithm>
#include <atomic>
#include <cub/block/block_scan.cuh>
#include <random>

#include "sm90/hopper/device.h"
#include "sm90/scheduling/scheduler.cuh"

namespace flashmla::sm90 {
namespace {

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// How many (batch, head) pairs the forward walks together: as many as `wanted`, in sections of equal size.
int64_t pairs_per_section(int64_t pairs, int64_t pairs_per_kv_head, int64_t wanted) {
  int64_t const most = std::max<int64_t>(1, wanted / pairs_per_kv_head) * pairs_per_kv_head;
  return ceil_div(ceil_div(pairs, ceil_div(pairs, most)), pairs_per_kv_head) * pairs_per_kv_head;
}

// K and V of the pairs that the forward walks together, at the most. Otherwise so many that each has four of its tiles
// at work at a time: fewer pairs share what they read better, more balance better. Measured (docs/log.md, 2026-11-24).
constexpr int64_t kForwardSectionBytes = int64_t{128} << 20;

// Q, dO and sums of dQ of the pairs that the backward walks together, unless the mask or turns want others.
// Measured (docs/log.md, 2026-11-24).
constexpr int64_t kBackwardSectionBytes = int64_t{24} << 20;

// Packed: what the documents walked together, of the heads walked together, read again and again. Measured
// (docs/log.md, 2026-11-24): with more, short documents of many heads share nothing in L2.
constexpr int64_t kChunkBytes = int64_t{16} << 20;

constexpr int kScheduleThreads = 1024;

struct ScheduleArguments {
  Schedule schedule;
  Problem problem;
  Window window;
};

constexpr int kNumChunks = 16, kNumCosts = 64;  // buckets of the sort
static_assert(kNumChunks * kNumCosts == kScheduleThreads, "one bucket a thread");
using Scan = cub::BlockScan<int32_t, kScheduleThreads>;

// row_blocks of a sequence.
__device__ int32_t blocks_of(Schedule const& schedule, Sequence const& sequence) {
  int32_t const rows = schedule.side == Side::kQueries ? sequence.seqlen_q : sequence.seqlen_kv;
  return (rows + schedule.rows_per_block - 1) / schedule.rows_per_block;
}

// Makes of how many items each bucket has the place where they begin.
__device__ void place_buckets(int32_t (&buckets)[kScheduleThreads], Scan::TempStorage& scan_storage) {
  __syncthreads();
  int32_t begin;
  Scan(scan_storage).ExclusiveSum(buckets[threadIdx.x], begin);
  __syncthreads();
  buckets[threadIdx.x] = begin;
  __syncthreads();
}

// The items of a sequence side by side, from the last row_block to the first; sequences that have many rows of the
// other side first, so that the walk ends with short ones. A warp writes those of a sequence. What there is no room for
// are the first row_blocks of a sequence, which no other waits for. `buckets` is 0.
__device__ void write_ordered_items(ScheduleArguments const& arguments, int32_t (&buckets)[kScheduleThreads],
                                    Scan::TempStorage& scan_storage, int32_t num_sequences, int32_t num_items,
                                    int32_t longest) {
  Schedule const& schedule = arguments.schedule;
  auto bucket_of = [&](Sequence const& sequence) {
    int64_t const rows = schedule.side == Side::kQueries ? sequence.seqlen_kv : sequence.seqlen_q;
    return kScheduleThreads - 1 - static_cast<int32_t>(rows * (kScheduleThreads - 1) / max(1, longest));
  };
  auto room_of = [&](int32_t number) {
    int32_t const end = number + 1 < num_sequences ? schedule.first_item[number + 1] : num_items;
    return end - schedule.first_item[number];
  };
  for (int32_t number = threadIdx.x; number < num_sequences; number += kScheduleThreads) {
    atomicAdd(&buckets[bucket_of(sequence_at(arguments.problem, number, schedule.side))], room_of(number));
  }
  place_buckets(buckets, scan_storage);
  int32_t const lane = threadIdx.x % kWarpThreads;
  for (int32_t number = threadIdx.x / kWarpThreads; number < num_sequences; number += kScheduleThreads / kWarpThreads) {
    Sequence const sequence = sequence_at(arguments.problem, number, schedule.side);
    int32_t const room = room_of(number), last = blocks_of(schedule, sequence) - 1;
    int32_t first = 0;
    if (lane == 0) first = atomicAdd(&buckets[bucket_of(sequence)], room);
    first = __shfl_sync(0xffffffff, first, 0);
    for (int32_t i = lane; i < room; i += kWarpThreads) schedule.items[first + i] = int2{number, last - i};
  }
}

// Counting sort of the items: by chunk of the other side's rows that fits in L2, then by how many of them are visible,
// most first. Equal ones stay in no particular order; a tile's result does not depend on its place.
__global__ void __launch_bounds__(kScheduleThreads)
    schedule_kernel(__grid_constant__ ScheduleArguments const arguments) {
  Schedule const& schedule = arguments.schedule;
  Problem const& problem = arguments.problem;
  Window const window = arguments.window;
  __shared__ typename Scan::TempStorage scan_storage;
  __shared__ int32_t buckets[kScheduleThreads];
  __shared__ int32_t longest;  // of the other side
  cutlass::arch::launch_dependent_grids();
  int32_t const thread = threadIdx.x;
  if (thread == 0) {
    *schedule.next_tile = 0;
    longest = 0;
  }
  buckets[thread] = 0;
  __syncthreads();

  int32_t const num_sequences = static_cast<int32_t>(problem.batch) + 1;  // with the rows past the last one
  // Boundaries that fall or overlap could ask for more than there is room for, by far.
  auto within_room = [most = static_cast<uint32_t>(schedule.max_items)](int32_t a, int32_t b) {
    return static_cast<int32_t>(min(static_cast<uint32_t>(a) + static_cast<uint32_t>(b), most));
  };
  int32_t num_items = 0;
  for (int32_t base = 0; base < num_sequences; base += kScheduleThreads) {
    int32_t const number = base + thread;
    int32_t blocks = 0;
    if (number < num_sequences) {
      Sequence const sequence = sequence_at(problem, number, schedule.side);
      blocks = within_room(blocks_of(schedule, sequence), 0);
      atomicMax(&longest, schedule.side == Side::kQueries ? sequence.seqlen_kv : sequence.seqlen_q);
    }
    int32_t before, sum;
    Scan(scan_storage).ExclusiveScan(blocks, before, 0, within_room, sum);
    __syncthreads();
    if (number < num_sequences) schedule.first_item[number] = within_room(num_items, before);
    num_items = within_room(num_items, sum);
  }
  if (thread == 0) *schedule.num_items = num_items;
  __syncthreads();

  auto item_at = [&](int32_t index) {
    int32_t low = 0, high = num_sequences - 1;  // the last sequence whose first item is not after index
    while (low < high) {
      int32_t const middle = (low + high + 1) / 2;
      if (schedule.first_item[middle] <= index)
        low = middle;
      else
        high = middle - 1;
    }
    return int2{low, index - schedule.first_item[low]};
  };
  if (schedule.is_ordered) {
    write_ordered_items(arguments, buckets, scan_storage, num_sequences, num_items, longest);
    return;
  }
  auto bucket_of = [&](int2 item) {
    Sequence const sequence = sequence_at(problem, item.x, schedule.side);
    int32_t const first = item.y * schedule.rows_per_block, last = first + schedule.rows_per_block - 1;
    int64_t cost;  // rows of the other side that it sees
    int32_t offset;
    if (schedule.side == Side::kQueries) {
      int32_t const shift = sequence.seqlen_kv - sequence.seqlen_q;
      VisibleKeys const keys = visible_keys(window, sequence.seqlen_kv, first + shift, last + shift);
      cost = max(0, keys.end - keys.begin);
      offset = sequence.offset_kv;
    } else {
      VisibleQueries const queries = visible_queries(window, sequence, first, last);
      cost = max(0, queries.end - queries.begin);
      offset = sequence.offset_q;
    }
    int32_t const chunk = min(kNumChunks - 1, offset / schedule.rows_per_chunk);
    return chunk * kNumCosts + kNumCosts - 1 - static_cast<int32_t>(cost * (kNumCosts - 1) / max(1, longest));
  };
  for (int32_t index = thread; index < num_items; index += kScheduleThreads) {
    atomicAdd(&buckets[bucket_of(item_at(index))], 1);
  }
  place_buckets(buckets, scan_storage);
  for (int32_t index = thread; index < num_items; index += kScheduleThreads) {
    int2 const item = item_at(index);
    schedule.items[atomicAdd(&buckets[bucket_of(item)], 1)] = item;
  }
}

// Queries of a tile of block_q rows, `heads` of each query; each of its parts has whole queries.
int64_t queries_per_block(int block_q, int64_t heads, int num_parts) {
  return block_q / num_parts / heads * num_parts;
}

// How many query heads share a work tile: all of a group, if packing them saves a tenth of the tiles.
int32_t heads_packed(Problem const& problem, int block_q, int num_parts) {
  int64_t const group = problem.heads_q / problem.heads_kv;
  if (group == 1 || group > block_q / num_parts) return 1;
  int64_t const tiles = ceil_div(problem.seqlen_q, block_q) * group;
  int64_t const tiles_packed = ceil_div(problem.seqlen_q, queries_per_block(block_q, group, num_parts));
  return 10 * tiles_packed <= 9 * tiles ? static_cast<int32_t>(group) : 1;
}

// Room for the items of `rows` rows: each sequence, and the rows past the last one, may end in a block of its own.
int64_t max_items(Problem const& problem, int64_t rows, int64_t rows_per_block) {
  return ceil_div(rows, rows_per_block) + problem.batch + 1;
}

// Not 0, and no other in this process; random in its beginning (the finalizer of splitmix64, a bijection).
uint64_t new_ticket() {
  static std::atomic<uint64_t> count{[] {
    std::random_device device;
    return uint64_t{device()} << 32 | device();
  }()};
  for (;;) {
    uint64_t x = count.fetch_add(1, std::memory_order_relaxed);
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    x ^= x >> 31;
    if (x != 0) return x;
  }
}

// next_tile and num_items, first_item, items; a dense batch uses next_tile and its ticket alone.
int64_t schedule_bytes(Problem const& problem, int64_t rows, int64_t rows_per_block) {
  if (problem.cu_seqlens_q == nullptr) return 16;
  return 16 + ceil_div(problem.batch + 2, 4) * 16 + max_items(problem, rows, rows_per_block) * 8;
}

// What both directions do once side, order, num_heads, rows_per_block and heads_packed are set. `pairs_per_section` and
// `rows_per_chunk` are wishes.
const char* finish_schedule(Problem const& problem, int64_t rows, int64_t pairs_per_section, int64_t rows_per_chunk,
                            int num_sms, void* workspace, cudaStream_t stream, Schedule& schedule, int& num_ctas) {
  bool const is_packed = problem.cu_seqlens_q != nullptr;
  int64_t const pairs = is_packed ? schedule.num_heads : schedule.num_heads * problem.batch;
  int64_t const items =
      is_packed ? max_items(problem, rows, schedule.rows_per_block) : ceil_div(rows, schedule.rows_per_block);
  int64_t const num_tiles = pairs * items;
  if (num_tiles >= int64_t{1} << 30 || items * schedule.rows_per_block >= int64_t{1} << 31) {
    return "expected fewer than 2^30 tiles of work; split the batch";
  }
  schedule.num_pairs = static_cast<int32_t>(pairs);
  schedule.pairs_per_section = static_cast<int32_t>(std::min(pairs, std::max<int64_t>(1, pairs_per_section)));
  schedule.num_row_blocks = static_cast<int32_t>(items);
  schedule.max_items = static_cast<int32_t>(items);
  schedule.rows_per_chunk = static_cast<int32_t>(std::min<int64_t>(rows_per_chunk, int64_t{1} << 30));
  num_ctas = static_cast<int>(std::min<int64_t>(num_tiles, num_sms));
  schedule.next_tile = schedule.num_items = schedule.first_item = nullptr;
  schedule.items = nullptr;
  schedule.ticket = 0;
  int32_t* const words = static_cast<int32_t*>(workspace);
  if (is_packed) {
    schedule.next_tile = words;
    schedule.num_items = words + 1;
    schedule.first_item = words + 4;
    schedule.items = reinterpret_cast<int2*>(words + 4 + ceil_div(problem.batch + 2, 4) * 4);
    return launch_kernel<ScheduleArguments>(schedule_kernel, dim3(1), kScheduleThreads, 0, stream, Launch::kAlone,
                                            {schedule, problem, window_of(problem)});
  }
  if (num_tiles > num_sms && (schedule.pairs_per_section < schedule.num_pairs ||
                              (schedule.is_ordered ? has_equal_tiles(problem) : num_tiles > 3 * num_sms))) {
    // Several sections: each begins, or ends, with long tiles again, and only a counter balances that. Many tiles: some
    // multiprocessors are faster than others. A few tiles of one section, dealt to and fro, are balanced as they are.
    // If tiles wait for each other, CTAs that run ahead only wait longer; but those of equal length are done in the
    // order in which they began, and so begin the next.
    schedule.next_tile = words;
    schedule.ticket = new_ticket();
  }
  return nullptr;
}

}  // namespace

int64_t forward_schedule_bytes(Problem const& problem, int block_q, int num_parts) {
  int64_t const queries = queries_per_block(block_q, heads_packed(problem, block_q, num_parts), num_parts);
  return schedule_bytes(problem, problem.total_q, queries);
}

int64_t backward_schedule_bytes(Problem const& problem, int block_kv) {
  return schedule_bytes(problem, problem.total_kv, block_kv);
}

Window window_of(Problem const& problem) {
  return {static_cast<int32_t>(problem.window_left), static_cast<int32_t>(problem.window_right)};
}

const char* make_forward_schedule(Problem const& problem, int block_q, int num_sms, void* workspace,
                                  cudaStream_t stream, Schedule& schedule, int& num_ctas, int num_parts) {
  bool const is_packed = problem.cu_seqlens_q != nullptr;
  schedule.side = Side::kQueries;
  schedule.is_ordered = false;
  schedule.is_backwards = true;  // under a causal mask the last queries see the most
  schedule.heads_packed = heads_packed(problem, block_q, num_parts);
  schedule.rows_per_block = static_cast<int32_t>(queries_per_block(block_q, schedule.heads_packed, num_parts));
  schedule.num_heads = static_cast<int32_t>(problem.heads_q / schedule.heads_packed);
  int64_t const bytes_row = 2 * (problem.head_dim_qk + problem.head_dim_v);
  int64_t const rows_kv = std::max<int64_t>(1, is_packed ? problem.total_kv : problem.seqlen_kv);
  // Tiles of equal length need no order among heads: those of one kv head, side by side, share its K and V best.
  bool const is_equal = has_equal_tiles(problem);
  int64_t const pairs_per_kv_head = schedule.num_heads / problem.heads_kv;
  int64_t const pairs = is_packed ? schedule.num_heads : schedule.num_heads * problem.batch;
  // K and V of the kv heads walked together.
  int64_t const most_heads_kv = std::max<int64_t>(1, kForwardSectionBytes / (rows_kv * bytes_row));
  int64_t const section = is_equal
                              ? pairs_per_kv_head
                              : pairs_per_section(pairs, pairs_per_kv_head,
                                                  std::min<int64_t>(num_sms / 4, most_heads_kv * pairs_per_kv_head));
  int64_t const heads_kv = ceil_div(section, pairs_per_kv_head);  // walked together
  return finish_schedule(problem, is_packed ? problem.total_q : problem.seqlen_q, section,
                         std::max(kChunkBytes / (bytes_row * heads_kv), rows_kv / 16 + 1), num_sms, workspace, stream,
                         schedule, num_ctas);
}

const char* make_backward_schedule(Problem const& problem, int block_kv, int num_splits, bool takes_turns, int num_sms,
                                   void* workspace, cudaStream_t stream, Schedule& schedule, int& num_ctas) {
  bool const is_packed = problem.cu_seqlens_q != nullptr;
  schedule.side = Side::kKeys;
  schedule.is_ordered = schedule.is_backwards = takes_turns;
  schedule.heads_packed = 1;
  schedule.rows_per_block = block_kv;
  schedule.num_heads = static_cast<int32_t>(problem.heads_kv * num_splits);
  // Q, dO and the fp32 dQ of the query heads of a pair: read, or added to, by each of its tiles.
  int64_t const bytes_row = (problem.heads_q / schedule.num_heads) * (6 * problem.head_dim_qk + 2 * problem.head_dim_v);
  int64_t const rows_q = std::max<int64_t>(1, is_packed ? problem.total_q : problem.seqlen_q);
  int64_t const rows_kv = std::max<int64_t>(1, is_packed ? problem.total_kv : problem.seqlen_kv);
  int64_t const pairs = is_packed ? schedule.num_heads : schedule.num_heads * problem.batch;
  int64_t const most = num_sms / 4;  // as in the forward
  int64_t wanted = std::max<int64_t>(1, kBackwardSectionBytes / (rows_q * bytes_row));
  bool const is_equal = has_equal_tiles(problem);
  if (takes_turns) {
    // Tiles of one head wait for each other, those of many share less in L2. But if tiles are few, and the longest come
    // last, one section is balanced better (next_index).
    constexpr int64_t kManyRounds = 8;
    bool const is_many = pairs * ceil_div(rows_kv, block_kv) >= kManyRounds * num_sms;
    wanted = is_equal || is_many ? std::max<int64_t>(1, most / 4) : std::max<int64_t>(1, pairs);
  } else if (!is_equal) {
    // A section ends with short tiles and the next begins with long ones: sections need rounds enough to make up for
    // it.
    wanted = std::clamp(ceil_div(4 * num_sms * block_kv, rows_kv), wanted, std::max(wanted, most));
  }
  int64_t const section = pairs == 0 ? 0 : ceil_div(pairs, ceil_div(pairs, wanted));
  return finish_schedule(problem, is_packed ? problem.total_kv : problem.seqlen_kv, section,
                         std::max(kChunkBytes / (bytes_row * std::max<int64_t>(1, section)), rows_q / 16 + 1), num_sms,
                         workspace, stream, schedule, num_ctas);
}

}  // namespace flashmla::sm90
