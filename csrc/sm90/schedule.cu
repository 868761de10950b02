#include <cutlass/arch/grid_dependency_control.h>

#include <algorithm>
#include <cub/block/block_scan.cuh>

#include "sm90/scheduler.cuh"

namespace flashmla::sm90 {
namespace {

// K and V of the heads walked together. Measured: long sequences balance better in large sections and stream through L2
// anyhow; short ones are read while they are in use, and share the 50 MB of L2 with Q and O.
int64_t section_bytes(int64_t bytes_kv_head) {
  return int64_t{bytes_kv_head > int64_t{1} << 20 ? 64 : 16} << 20;
}

constexpr int kScheduleThreads = 1024;

// Counting sort of the items: by chunk of K and V that fits in L2, then by visible keys, most first. Equal ones stay in
// no particular order; a tile's result does not depend on its place.
__global__ void __launch_bounds__(kScheduleThreads)
    schedule_kernel(Schedule const schedule, Problem const problem, Window const window) {
  constexpr int kNumChunks = 16, kNumCosts = 64;
  static_assert(kNumChunks * kNumCosts == kScheduleThreads, "one bucket a thread");
  using Scan = cub::BlockScan<int32_t, kScheduleThreads>;
  __shared__ typename Scan::TempStorage scan_storage;
  __shared__ int32_t bucket_end[kScheduleThreads];
  __shared__ int32_t longest_kv;
  cutlass::arch::launch_dependent_grids();
  int32_t const thread = threadIdx.x;
  if (thread == 0) {
    *schedule.next_tile = 0;
    longest_kv = 0;
  }
  bucket_end[thread] = 0;
  __syncthreads();

  int32_t const num_sequences = static_cast<int32_t>(problem.batch) + 1;  // with the rows past the last one
  int32_t num_items = 0;
  for (int32_t base = 0; base < num_sequences; base += kScheduleThreads) {
    int32_t const number = base + thread;
    int32_t blocks = 0;
    if (number < num_sequences) {
      Sequence const sequence = sequence_at(problem, number);
      blocks = (sequence.seqlen_q + schedule.queries_per_block - 1) / schedule.queries_per_block;
      atomicMax(&longest_kv, sequence.seqlen_kv);
    }
    int32_t before, sum;
    Scan(scan_storage).ExclusiveSum(blocks, before, sum);
    __syncthreads();
    if (number < num_sequences) schedule.first_item[number] = num_items + before;
    num_items += sum;
  }
  // Boundaries that fall or overlap could ask for more than there is room for.
  num_items = min(num_items, schedule.max_items);
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
  auto bucket_of = [&](int2 item) {
    Sequence const sequence = sequence_at(problem, item.x);
    int32_t const first = item.y * schedule.queries_per_block + sequence.seqlen_kv - sequence.seqlen_q;
    VisibleKeys const keys = visible_keys(window, sequence.seqlen_kv, first, first + schedule.queries_per_block - 1);
    int64_t const cost = max(0, keys.end - keys.begin);
    int32_t const chunk = min(kNumChunks - 1, sequence.offset_kv / schedule.rows_per_chunk);
    return chunk * kNumCosts + kNumCosts - 1 - static_cast<int32_t>(cost * (kNumCosts - 1) / max(1, longest_kv));
  };
  for (int32_t index = thread; index < num_items; index += kScheduleThreads) {
    atomicAdd(&bucket_end[bucket_of(item_at(index))], 1);
  }
  __syncthreads();
  int32_t begin;
  Scan(scan_storage).ExclusiveSum(bucket_end[thread], begin);
  __syncthreads();
  bucket_end[thread] = begin;
  __syncthreads();
  for (int32_t index = thread; index < num_items; index += kScheduleThreads) {
    int2 const item = item_at(index);
    schedule.items[atomicAdd(&bucket_end[bucket_of(item)], 1)] = item;
  }
}

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// How many query heads share a tile: all of a group where that fills tiles that one head leaves part empty.
int32_t heads_packed(Problem const& problem, int block_q) {
  int64_t const group = problem.heads_q / problem.heads_kv;
  if (group == 1 || group > block_q) return 1;
  int64_t const tiles = ceil_div(problem.seqlen_q, block_q) * group;
  int64_t const tiles_packed = ceil_div(problem.seqlen_q, block_q / group);
  return 10 * tiles_packed <= 9 * tiles ? static_cast<int32_t>(group) : 1;
}

int64_t max_items(Problem const& problem, int block_q) {
  // Each sequence, and the rows past the last one, may end in a tile of its own.
  return ceil_div(problem.total_q, block_q / heads_packed(problem, block_q)) + problem.batch + 1;
}

}  // namespace

// next_tile and num_items, first_item, items; a dense batch uses next_tile alone.
int64_t schedule_bytes(Problem const& problem, int block_q) {
  if (problem.cu_seqlens_q == nullptr) return 16;
  return 16 + ceil_div(problem.batch + 2, 4) * 16 + max_items(problem, block_q) * 8;
}

Window window_of(Problem const& problem) {
  return {static_cast<int32_t>(problem.window_left), static_cast<int32_t>(problem.window_right)};
}

const char* make_schedule(Problem const& problem, int block_q, int num_sms, void* workspace, cudaStream_t stream,
                          Schedule& schedule, int& num_blocks) {
  bool const is_packed = problem.cu_seqlens_q != nullptr;
  schedule.heads_packed = heads_packed(problem, block_q);
  schedule.queries_per_block = block_q / schedule.heads_packed;
  int64_t const heads = problem.heads_q / schedule.heads_packed;
  int64_t const pairs = is_packed ? heads : heads * problem.batch;
  int64_t const pairs_per_kv_head = heads / problem.heads_kv;
  int64_t const bytes_row = 2 * (problem.head_dim_qk + problem.head_dim_v);
  int64_t const rows_kv = std::max<int64_t>(1, is_packed ? problem.total_kv : problem.seqlen_kv);
  // Tiles of equal length need no order among heads: those of one kv head, side by side, share its K and V best.
  bool const is_equal = !is_packed && problem.window_left < 0 && problem.window_right < 0;
  int64_t const kv_heads_per_section =
      is_equal ? 1 : std::max<int64_t>(1, section_bytes(rows_kv * bytes_row) / (rows_kv * bytes_row));
  int64_t const items =
      is_packed ? max_items(problem, block_q) : ceil_div(problem.seqlen_q, schedule.queries_per_block);
  int64_t const num_tiles = pairs * items;
  if (num_tiles >= int64_t{1} << 30 || items * schedule.queries_per_block >= int64_t{1} << 31) {
    return "expected fewer than 2^30 tiles of work; split the batch";
  }
  schedule.num_pairs = static_cast<int32_t>(pairs);
  schedule.pairs_per_section = static_cast<int32_t>(std::min(pairs, kv_heads_per_section * pairs_per_kv_head));
  schedule.num_q_blocks = static_cast<int32_t>(items);
  schedule.max_items = static_cast<int32_t>(items);
  schedule.rows_per_chunk = static_cast<int32_t>(
      std::min<int64_t>(std::max((int64_t{32} << 20) / bytes_row, rows_kv / 16 + 1), int64_t{1} << 30));
  num_blocks = static_cast<int>(std::min<int64_t>(num_tiles, num_sms));
  schedule.next_tile = schedule.num_items = schedule.first_item = nullptr;
  schedule.items = nullptr;
  int32_t* const words = static_cast<int32_t*>(workspace);
  if (is_packed) {
    schedule.next_tile = words;
    schedule.num_items = words + 1;
    schedule.first_item = words + 4;
    schedule.items = reinterpret_cast<int2*>(words + 4 + ceil_div(problem.batch + 2, 4) * 4);
    schedule_kernel<<<1, kScheduleThreads, 0, stream>>>(schedule, problem, window_of(problem));
  } else if (num_tiles > num_sms && schedule.pairs_per_section < schedule.num_pairs) {
    // Several sections: each begins with long tiles again, and only asking for work balances that. One section, dealt
    // to and fro, is balanced as it is and saves the launch.
    schedule.next_tile = words;
    cudaMemsetAsync(words, 0, sizeof(int32_t), stream);
  }
  cudaError_t const error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace flashmla::sm90
