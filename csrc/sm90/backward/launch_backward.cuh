// Host side of the backward: workspace, TMA descriptors and the chain of launches. One instantiation per head-dim row
// and dtype; a file of instantiations/ holds one row.
#pragma once

#include <algorithm>
#include <cmath>

#include "sm90/backward/backward.cuh"
#include "sm90/backward/backward_queries.cuh"
#include "sm90/backward/backward_rows.cuh"
#include "sm90/hopper/device.h"
#include "sm90/hopper/tensor_map.h"
#include "sm90/launch.h"

namespace flashmla::sm90 {

// The sums of dQ are held for as many kv heads at a time as fit in kUsualSums, at least one; or for more, up to
// kLargestSums, if that saves kWorthwhile of the time: each pass ends with multiprocessors that wait for the last.
constexpr int64_t kUsualSums = int64_t{256} << 20, kLargestSums = int64_t{512} << 20;
constexpr double kWorthwhile = 0.05;

// How one backward call is cut up, and where its parts lie in the workspace (bytes).
struct BackwardPlan {
  int64_t heads_kv;    // worked on at a time, by the last pass perhaps fewer
  int64_t heads_q;     // that they serve
  int64_t blocks;      // of query rows of one head
  int64_t num_splits;  // tiles that share a group's query heads
  int64_t schedule, query_schedule, lse, delta, dq, dq_semaphore, is_large, dsink_parts, parts, bytes;
};

// Of a call's work tiles, those of one kv head; of packed calls about as many.
struct TilesOfHead {
  int64_t count, group, bytes_of_part;  // of the part of dK and dV that a tile leaves if it is split
  int ctas;
  bool is_packed, are_equal;  // are_equal: as much work in each

  // Tiles that share the group's query heads, if there are too few for the GPU: the fewest that fill it once and a
  // half, or as many as there are heads, if their parts fit in kUsualSums. (Boundaries are on the device: packed calls
  // are not split.)
  int64_t num_splits(int64_t heads_kv) const {
    int64_t const tiles = count * heads_kv;
    int64_t splits = 1;
    while (!is_packed && splits < group && 2 * tiles * splits < 3 * ctas) {
      int64_t next = splits + 1;
      while (group % next != 0) ++next;
      if (tiles * next * bytes_of_part > kUsualSums) break;  // 71 heads have no divisor but 71
      splits = next;
    }
    return splits;
  }

  // Time of a pass over some kv heads, in tiles of one on average. Equal ones end in rounds; under a mask the longest
  // is two, comes first, and the last ones end half of one apart.
  double time_of_pass(int64_t heads_kv) const {
    if (heads_kv == 0) return 0.0;
    int64_t const splits = num_splits(heads_kv), tiles = count * heads_kv * splits;
    double const share = static_cast<double>(tiles) / ctas;
    double const rounds = are_equal ? std::ceil(share) : std::max(2.0, share + 0.5);
    return rounds / static_cast<double>(splits);
  }

  double time(int64_t all_heads_kv, int64_t heads_kv) const {
    return static_cast<double>(all_heads_kv / heads_kv) * time_of_pass(heads_kv) +
           time_of_pass(all_heads_kv % heads_kv);
  }
};

// How many kv heads' sums of dQ are held at a time, of `bytes` each. Passes are of equal size but the last.
inline int64_t heads_of_pass(TilesOfHead const& tiles, int64_t heads_kv, int64_t bytes) {
  auto passes_of = [&](int64_t limit) {
    int64_t const most = std::clamp<int64_t>(limit / std::max<int64_t>(1, bytes), 1, heads_kv);
    return (heads_kv + most - 1) / most;
  };
  auto heads_of = [&](int64_t passes) { return (heads_kv + passes - 1) / passes; };
  int64_t passes = passes_of(kUsualSums), best = heads_of(passes);
  for (int64_t const fewest = passes_of(kLargestSums); passes > fewest;) {
    int64_t const heads = heads_of(--passes);
    if (tiles.time(heads_kv, heads) < (1.0 - kWorthwhile) * tiles.time(heads_kv, best)) best = heads;
  }
  return best;
}

template <int kHeadDimQK, int kHeadDimV>
BackwardPlan plan_backward(BackwardParams const& params, int num_sms) {
  using Tiles = BackwardTiles<kHeadDimQK, kHeadDimV>;
  constexpr bool kSumsDQ = !Tiles::kSplitsColumns;
  Problem const& problem = params.problem;
  bool const is_packed = problem.cu_seqlens_q != nullptr;
  auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  BackwardPlan plan{};
  plan.blocks = is_packed ? ceil_div(problem.total_q, Tiles::kBlockQ) + problem.batch + 1
                          : ceil_div(problem.seqlen_q, Tiles::kBlockQ) * problem.batch;
  int64_t const group = problem.heads_q / problem.heads_kv;
  int64_t const bytes_kv_head = plan.blocks * group * Tiles::kBlockQ * kHeadDimQK * 4;
  int64_t const kv_blocks = is_packed ? ceil_div(problem.total_kv, Tiles::kBlockKV)
                                      : problem.batch * ceil_div(problem.seqlen_kv, Tiles::kBlockKV);
  constexpr int64_t kBytesOfPart = int64_t{Tiles::kBlockKV} * (kHeadDimQK + kHeadDimV) * 4;
  TilesOfHead const tiles{
      kv_blocks, group, kBytesOfPart, num_sms / Tiles::kNumCtas, is_packed, has_equal_tiles(problem)};
  plan.heads_kv = kSumsDQ ? heads_of_pass(tiles, problem.heads_kv, bytes_kv_head) : problem.heads_kv;
  plan.heads_q = plan.heads_kv * group;
  plan.num_splits = tiles.num_splits(plan.heads_kv);

  auto take = [&](int64_t bytes) {
    int64_t const offset = plan.bytes;
    plan.bytes += ceil_div(bytes, 256) * 256;
    return offset;
  };
  int64_t const rows = plan.blocks * Tiles::kBlockQ * plan.heads_q;
  plan.schedule = take(backward_schedule_bytes(problem, Tiles::kBlockKV));
  if constexpr (!kSumsDQ) {
    plan.query_schedule = take(forward_schedule_bytes(problem, BackwardQueryTiles<kHeadDimQK>::kBlockQ));
  }
  plan.lse = take(rows * 4);
  plan.delta = take(rows * 4);
  plan.dq = take(kSumsDQ && params.dq.data != nullptr ? rows * kHeadDimQK * 4 : 0);
  plan.dq_semaphore = take(kSumsDQ && problem.deterministic ? plan.blocks * plan.heads_q * 4 : 0);
  plan.is_large = take(plan.blocks * plan.heads_q * 4);
  plan.dsink_parts = take(params.dsinks != nullptr ? plan.blocks * plan.heads_q * 4 : 0);
  plan.parts = take(plan.num_splits > 1 ? kv_blocks * plan.heads_kv * plan.num_splits * kBytesOfPart : 0);
  return plan;
}

// The call for kv heads [first, first + plan.heads_kv) alone, or up to the last.
inline BackwardParams heads_of(BackwardParams params, BackwardPlan const& plan, int64_t first) {
  Problem& problem = params.problem;
  int64_t const group = problem.heads_q / problem.heads_kv, first_q = first * group;
  auto move = [&](TensorView& view, int64_t head) {
    // Every dtype here has two bytes.
    if (view.data != nullptr) view.data = static_cast<uint16_t*>(view.data) + head * view.stride_heads;
  };
  for (TensorView* view : {&params.q, &params.out, &params.dout, &params.dq}) move(*view, first_q);
  for (TensorView* view : {&params.k, &params.v, &params.dk, &params.dv}) move(*view, first);
  params.lse.data += first_q * params.lse.stride_heads;
  if (params.dlse.data != nullptr) params.dlse.data += first_q * params.dlse.stride_heads;
  if (params.dsinks != nullptr) params.dsinks += first_q;
  if (problem.sinks != nullptr) problem.sinks += first_q;
  problem.heads_kv = std::min(plan.heads_kv, problem.heads_kv - first);
  problem.heads_q = problem.heads_kv * group;
  return params;
}

// dQ of the head dims whose dK and dV kernel has no part of it.
template <int kHeadDim, class Element>
const char* launch_queries(BackwardParams const& params, BackwardRows const& rows, int num_sms, int device,
                           void* workspace, cudaStream_t stream) {
  using Kernel = BackwardQueries<kHeadDim, Element>;
  Problem const& problem = params.problem;
  BackwardQueriesArguments arguments{};
  int num_ctas = 0;
  const char* error = make_forward_schedule(problem, Kernel::kBlockQ, num_sms / Kernel::kNumCtas, workspace, stream,
                                            arguments.schedule, num_ctas);
  QueryMaps const maps{problem, arguments.schedule, Kernel::kSwizzleColumns, Kernel::kBlockKV};
  if (error == nullptr)
    error = maps.make_queries(arguments.q, params.q, problem.head_dim_qk, arguments.schedule.rows_per_block);
  if (error == nullptr)
    error = maps.make_queries(arguments.dout, params.dout, problem.head_dim_v, arguments.schedule.rows_per_block);
  if (error == nullptr) error = maps.make_keys(arguments.k, params.k, problem.head_dim_qk);
  if (error == nullptr) error = maps.make_keys(arguments.v, params.v, problem.head_dim_v);
  if (error != nullptr) return error;
  arguments.dq = params.dq;
  arguments.rows = rows;
  arguments.block_rows = BackwardTiles<kHeadDim, kHeadDim>::kBlockQ;
  arguments.problem = problem;
  arguments.window = window_of(problem);
  constexpr auto* kernel = backward_queries_kernel<kHeadDim, Element>;
  if (cudaError_t const status = allow_shared_memory<kernel>(Kernel::kSharedBytes, device); status != cudaSuccess) {
    return cudaGetErrorString(status);
  }
  return launch_kernel<BackwardQueriesArguments>(kernel, dim3(static_cast<unsigned>(num_ctas * Kernel::kNumCtas)),
                                                 Kernel::Tiles::kNumThreads, Kernel::kSharedBytes, stream,
                                                 Launch::kAlone, arguments, Kernel::kNumCtas);
}

template <int kHeadDimQK, int kHeadDimV, class Element>
const char* launch_heads(BackwardParams const& params, BackwardPlan const& plan, int num_sms, int device,
                         unsigned char* workspace, cudaStream_t stream) {
  using Tiles = BackwardTiles<kHeadDimQK, kHeadDimV>;
  constexpr bool kSumsDQ = !Tiles::kSplitsColumns;
  Problem const& problem = params.problem;
  bool const is_packed = problem.cu_seqlens_q != nullptr;
  int64_t const batch = is_packed ? 1 : problem.batch;
  int64_t const rows_q = batch == 0 ? 0 : is_packed ? problem.total_q : problem.seqlen_q;
  int64_t const rows_kv = batch == 0 ? 0 : is_packed ? problem.total_kv : problem.seqlen_kv;
  auto at = [&](int64_t offset) { return reinterpret_cast<float*>(workspace + offset); };

  BackwardArguments arguments{};
  arguments.dk = params.dk;
  arguments.dv = params.dv;
  arguments.rows = {plan.blocks * Tiles::kBlockQ,
                    at(plan.lse),
                    at(plan.delta),
                    kSumsDQ && params.dq.data != nullptr ? at(plan.dq) : nullptr,
                    kSumsDQ && problem.deterministic ? reinterpret_cast<int32_t*>(at(plan.dq_semaphore)) : nullptr,
                    reinterpret_cast<int32_t*>(at(plan.is_large))};
  arguments.problem = problem;
  arguments.window = window_of(problem);
  arguments.num_splits = static_cast<int32_t>(plan.num_splits);
  arguments.parts = plan.num_splits > 1 ? at(plan.parts) : nullptr;
  int num_ctas = 0;
  const char* error = nullptr;
  if (rows_kv > 0) {
    error = make_backward_schedule(problem, Tiles::kBlockKV, static_cast<int>(plan.num_splits),
                                   arguments.rows.dq_semaphore != nullptr, num_sms / Tiles::kNumCtas,
                                   workspace + plan.schedule, stream, arguments.schedule, num_ctas);
  }
  auto make_map = [&](CUtensorMap& map, TensorView const& view, int64_t head_dim, int64_t rows, int64_t heads,
                      int columns, int box_rows) {
    if (error != nullptr) return;
    error = make_row_map(map, view, problem, head_dim, rows, heads, columns, box_rows);
  };
  constexpr int kColumns = Tiles::kSwizzleColumns, kColumnsK = Tiles::kSwizzleColumnsK;
  make_map(arguments.q, params.q, problem.head_dim_qk, rows_q, problem.heads_q, kColumns, Tiles::kBlockQ);
  make_map(arguments.dout, params.dout, problem.head_dim_v, rows_q, problem.heads_q, kColumns, Tiles::kBlockQ);
  make_map(arguments.k, params.k, problem.head_dim_qk, rows_kv, problem.heads_kv, kColumnsK, Tiles::kBlockKV);
  make_map(arguments.v, params.v, problem.head_dim_v, rows_kv, problem.heads_kv, kColumns, Tiles::kBlockKV);
  if (error != nullptr) return error;

  // One dimension: the others end at 65,535.
  int64_t const row_blocks = plan.blocks * problem.heads_q;
  int64_t const parts =
      plan.num_splits > 1 && rows_kv > 0 ? arguments.schedule.num_row_blocks * problem.heads_kv * problem.batch : 0;
  if (std::max(row_blocks, parts) >= int64_t{1} << 31)
    return "expected fewer than 2^31 blocks of rows; split the batch";
  dim3 const row_grid(static_cast<unsigned>(row_blocks));
  float* const dsink_parts = params.dsinks != nullptr ? at(plan.dsink_parts) : nullptr;
  if (rows_q > 0) {
    error = launch_kernel<PreprocessArguments>(
        preprocess_kernel<Tiles::kBlockQ, kHeadDimQK, kHeadDimV, Element>, row_grid, kRowThreads, 0, stream,
        Launch::kAlone,
        {params.out, params.dout, params.lse, params.dlse, arguments.rows, problem, arguments.window, dsink_parts});
    if (error != nullptr) return error;
  }
  if (rows_kv > 0) {
    auto launch = [&](auto has_softcap) {
      constexpr auto* kernel = backward_kernel<kHeadDimQK, kHeadDimV, has_softcap(), Element>;
      constexpr int kSharedBytes = BackwardKernel<kHeadDimQK, kHeadDimV, has_softcap(), Element>::kSharedBytes;
      if (cudaError_t const status = allow_shared_memory<kernel>(kSharedBytes, device); status != cudaSuccess) {
        return cudaGetErrorString(status);
      }
      // CTAs that wait for each other's parts of dQ must all be running.
      Launch const how = arguments.rows.dq_semaphore != nullptr ? Launch::kTogether
                         : rows_q > 0                           ? Launch::kDependent
                                                                : Launch::kAlone;
      return launch_kernel<BackwardArguments>(kernel, dim3(static_cast<unsigned>(num_ctas * Tiles::kNumCtas)),
                                              Tiles::kNumThreads, kSharedBytes, stream, how, arguments,
                                              Tiles::kNumCtas);
    };
    if constexpr (Tiles::kHasSoftcap && !Tiles::kSplitsColumns) {
      error = problem.softcap > 0.0f ? launch(std::true_type{}) : launch(std::false_type{});
    } else {
      error = launch(std::bool_constant<Tiles::kHasSoftcap>{});
    }
    if (error != nullptr) return error;
  }
  if (params.dq.data != nullptr && rows_q > 0) {
    if constexpr (kSumsDQ) {
      error = launch_kernel<PostprocessArguments>(dq_postprocess_kernel<Tiles::kBlockQ, kHeadDimQK, Element>, row_grid,
                                                  kRowThreads, 0, stream, Launch::kDependent,
                                                  {params.dq, arguments.rows, problem});
    } else {
      error = launch_queries<kHeadDimQK, Element>(params, arguments.rows, num_sms, device,
                                                  workspace + plan.query_schedule, stream);
    }
    if (error != nullptr) return error;
  }
  if (parts > 0) {
    error = launch_kernel<BackwardArguments>(
        combine_splits_kernel<Tiles::kBlockKV, kHeadDimQK, kHeadDimV, Tiles::kSplitsColumns, Element>,
        dim3(static_cast<unsigned>(parts)), kRowThreads, 0, stream, Launch::kAlone, arguments);
    if (error != nullptr) return error;
  }
  if (dsink_parts != nullptr) {
    error = launch_kernel<SumSinksArguments>(
        sum_sinks_kernel<>, dim3(static_cast<unsigned>(problem.heads_q)), kRowThreads, 0, stream, Launch::kAlone,
        {dsink_parts, rows_q > 0 ? static_cast<int32_t>(plan.blocks) : 0, params.dsinks});
  }
  return error;
}

template <int kHeadDimQK, int kHeadDimV>
int64_t backward_workspace_head_dims(BackwardParams const& params) {
  int device = 0;
  cudaGetDevice(&device);
  return plan_backward<kHeadDimQK, kHeadDimV>(params, num_sms(device)).bytes;
}

template <int kHeadDimQK, int kHeadDimV>
const char* launch_backward_head_dims(BackwardParams const& params, void* workspace, cudaStream_t stream) {
  int device = 0;
  cudaGetDevice(&device);
  int const sms = num_sms(device);
  BackwardPlan const plan = plan_backward<kHeadDimQK, kHeadDimV>(params, sms);
  for (int64_t first = 0; first < params.problem.heads_kv; first += plan.heads_kv) {
    BackwardParams const part = heads_of(params, plan, first);
    auto* const launch = params.problem.dtype == DType::kFloat16
                             ? launch_heads<kHeadDimQK, kHeadDimV, cutlass::half_t>
                             : launch_heads<kHeadDimQK, kHeadDimV, cutlass::bfloat16_t>;
    if (const char* error = launch(part, plan, sms, device, static_cast<unsigned char*>(workspace), stream)) {
      return error;
    }
  }
  return nullptr;
}

}  // namespace flashmla::sm90
