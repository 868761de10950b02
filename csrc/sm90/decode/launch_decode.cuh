// Host side of the decode kernels: TMA descriptors, shares and launches. One instantiation per head-dim row and dtype,
// with the kernels that the row has.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>

#include "sm90/decode/combine.cuh"
#include "sm90/decode/decode.cuh"
#include "sm90/decode/few_rows.cuh"
#include "sm90/decode/latent.cuh"
#include "sm90/hopper/device.h"
#include "sm90/hopper/tensor_map.h"
#include "sm90/launch.h"

namespace flashmla::sm90 {

// What runs a call of the head dims: latents have a kernel of their own, which reads K alone.
template <int kHeadDimQK, int kHeadDimV, class Element>
struct DecodeKernel {
  using Type = Decode<kHeadDimQK, kHeadDimV, Element>;
};
template <class Element>
struct DecodeKernel<LatentHeadDims::kHeadDimQK, LatentHeadDims::kHeadDimV, Element> {
  using Type = LatentDecode<LatentHeadDims::kHeadDimQK, LatentHeadDims::kHeadDimV, Element>;
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::Tiles::kNumThreads, Kernel::Tiles::kNumCtas)
    decode_kernel(__grid_constant__ DecodeArguments const arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  // Swizzled tiles need 1,024-byte alignment; the dynamic shared memory of a kernel without any other begins so.
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<typename Kernel::SharedStorage*>(memory);
  if constexpr (Kernel::kReadsValues && !Kernel::kReadsE4m3) {
    run_decode<Kernel>(arguments, shared);
  } else {
    Kernel::run(arguments, shared);
  }
#endif
}

inline int64_t num_tiles(DecodeArguments const& arguments) {
  return arguments.params.problem.batch * arguments.heads_kv * arguments.tiles_per_head;
}

// What follows from the shapes: everything but descriptors and the workspace.
template <class Tiles>
DecodeArguments plan_decode(DecodeParams const& params) {
  Problem const& problem = params.problem;
  int device = 0;
  cudaGetDevice(&device);
  auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };

  DecodeArguments arguments{};
  arguments.params = params;
  arguments.window = window_of(problem);
  arguments.block_kv = Tiles::kBlockKV;
  static_assert((Tiles::kBlockKV & (Tiles::kBlockKV - 1)) == 0);
  while (1 << arguments.block_kv_log2 < Tiles::kBlockKV) ++arguments.block_kv_log2;
  int64_t rows_per_box = Tiles::kBlockKV;
  if (params.block_table != nullptr) {
    while (params.page_size % rows_per_box != 0) rows_per_box /= 2;  // pages are multiples of 16
  }
  arguments.rows_per_box = static_cast<int32_t>(rows_per_box);
  arguments.group = static_cast<int32_t>(problem.heads_q / problem.heads_kv);
  arguments.num_rows = static_cast<int32_t>(arguments.group * problem.seqlen_q);
  arguments.heads_kv = static_cast<int32_t>(problem.heads_kv);
  arguments.tiles_per_head = static_cast<int32_t>(ceil_div(arguments.num_rows, Tiles::kRows));
  arguments.partial_rows = std::min<int32_t>(arguments.num_rows, Tiles::kRows);
  int64_t const tiles = num_tiles(arguments);
  int64_t const units = std::max<int64_t>(1, ceil_div(problem.seqlen_kv, Tiles::kBlockKV));
  int64_t most = int64_t{Tiles::kNumCtas} * num_sms(device);
  if (arguments.tiles_per_head < most) most -= most % arguments.tiles_per_head;  // decode_schedule.cuh says why
  arguments.num_ctas = static_cast<int32_t>(std::min(most, params.can_split ? tiles * units : tiles));
  arguments.cluster_size = 1;
  // As Shares of tiles that have as many units each.
  int64_t const ctas_per_tile = arguments.num_ctas / tiles;
  if (ctas_per_tile * tiles * 10 >= int64_t{arguments.num_ctas} * 9) {
    arguments.ctas_per_tile = static_cast<int32_t>(ctas_per_tile);
  }
  arguments.pages = cutlass::FastDivmod(static_cast<int>(std::max<int64_t>(1, params.page_size)));
  return arguments;
}

// How the CTAs of a call are grouped, and the shared memory that each asks for.
struct Clusters {
  int size, shared_bytes;
};

// Clusters of the kernel that run at once, by the device's own account; 0 if it takes none. Asked once.
template <auto kKernel>
int max_active_clusters(int device, int size, int threads, int shared_bytes, bool is_alone) {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> cache[kMaxDevices][2][kMaxClusterSize + 1];  // number + 1
  std::atomic<int>* const cached = device < kMaxDevices ? &cache[device][is_alone ? 1 : 0][size] : nullptr;
  if (cached != nullptr && *cached != 0) return *cached - 1;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(size));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int count = 0;
  if (cudaOccupancyMaxActiveClusters(&count, reinterpret_cast<void const*>(kKernel), &config) != cudaSuccess) {
    cudaGetLastError();
    count = 0;
  }
  if (cached != nullptr) *cached = count + 1;
  return count;
}

// Keys of a CTA in a cluster, at most. A longer call hardly feels its second kernel, and a cluster's CTAs, of which a
// multiprocessor has one, have less on its way from memory (docs/log.md, 2026-11-28: 256 and 640 keys gain 5 and 11 %,
// 1,024 and 2,048 lose 9 and 18).
constexpr int64_t kMostKeysOfCluster = 768;

// Clusters, one a tile, if they are about as many CTAs as shares would have, and run at once; else size 1. Sequences of
// lengths that the host does not know are left to shares, unless there is but one.
template <class Kernel, auto kKernel>
Clusters clusters_of(DecodeArguments const& arguments, int device) {
  DecodeParams const& params = arguments.params;
  Clusters const none{1, Kernel::kSharedBytes};
  bool const has_equal = has_equal_lengths(params);
  if (!params.can_split || (!has_equal && params.problem.batch > 1)) return none;
  int64_t const tiles = num_tiles(arguments), sms = num_sms(device);
  int64_t const capacity = (params.problem.seqlen_kv + Kernel::kBlockKV - 1) / Kernel::kBlockKV;
  int64_t const units = has_equal ? units_of(arguments, 0) : capacity;
  constexpr int kAloneBytes = 114 * 1024;  // a multiprocessor has no room for two
  for (int size = kMaxClusterSize; size > 1; size /= 2) {
    if (tiles * size > Kernel::Tiles::kNumCtas * sms || size / 2 >= units) continue;
    if ((tiles * size * 10 < sms * 9 && size < units) || units * Kernel::kBlockKV > kMostKeysOfCluster * size) break;
    if (allow_large_clusters<kKernel>(device) != cudaSuccess) break;
    bool const can_be_alone = tiles * size <= sms && Kernel::kSharedBytes < kAloneBytes;
    auto have_room = [&](int bytes, bool is_alone) {
      return max_active_clusters<kKernel>(device, size, Kernel::Tiles::kNumThreads, bytes, is_alone) >= tiles;
    };
    if (can_be_alone && have_room(kAloneBytes, true)) return {size, kAloneBytes};
    if (have_room(Kernel::kSharedBytes, false)) return {size, Kernel::kSharedBytes};
  }
  return none;
}

// Whether tiles may be split among CTAs. Lengths that lie on the device are not known here.
inline bool may_split(DecodeArguments const& arguments) {
  DecodeParams const& params = arguments.params;
  if (!params.can_split || !has_equal_lengths(params)) return params.can_split;
  uint32_t const units = static_cast<uint32_t>(units_of(arguments, 0));
  uint32_t const tiles = static_cast<uint32_t>(num_tiles(arguments));
  return !Shares(static_cast<uint32_t>(arguments.num_ctas), tiles * units, units).has_whole_tiles(units);
}

inline int64_t partial_sums_bytes(DecodeArguments const& arguments) {
  return 2 * int64_t{arguments.num_ctas} * arguments.partial_rows * static_cast<int64_t>(sizeof(float2));
}

template <class Tiles>
int64_t decode_workspace_tiles(DecodeParams const& params) {
  DecodeArguments const arguments = plan_decode<Tiles>(params);
  if (!may_split(arguments)) return 0;
  return partial_sums_bytes(arguments) *
         (1 + params.problem.head_dim_v * static_cast<int64_t>(sizeof(float)) / static_cast<int64_t>(sizeof(float2)));
}

// Params: DecodeParams, or E4m3DecodeParams where the kernel reads e4m3.
template <class Kernel, class Params>
const char* launch_decode_kernel(Params const& params, void* workspace, cudaStream_t stream) {
  using Element = typename Kernel::Element;
  Problem const& problem = params.problem;
  DecodeArguments arguments = plan_decode<typename Kernel::Tiles>(params);
  MapElement cache_element = map_element(problem.dtype);
  int cache_chunk = kDecodeSwizzleColumns;
  if constexpr (Kernel::kReadsE4m3) {
    arguments.k_scale = params.k_scale;
    arguments.v_scale = params.v_scale;
    cache_element = MapElement::kE4m3;
    cache_chunk = Kernel::kChunk;
  }
  double const units = std::ceil(static_cast<double>(problem.seqlen_kv) / Kernel::kBlockKV);
  if (static_cast<double>(num_tiles(arguments)) * std::max(1.0, units) > INT32_MAX) {
    return "the cache is too large: expected fewer than 2^31 blocks of keys over all sequences and heads; pass a part "
           "of "
           "the batch at a time";
  }
  arguments.partial_sums = static_cast<float2*>(workspace);
  arguments.partial_out =
      reinterpret_cast<float*>(static_cast<unsigned char*>(workspace) + partial_sums_bytes(arguments));
  auto make_cache = [&](CUtensorMap& map, TensorView const& view, int64_t head_dim) -> const char* {
    if (params.num_pages == 0 || params.page_size == 0) return nullptr;  // nothing is loaded
    return make_tensor_map(map, view.data, cache_element,
                           {{head_dim, 1, cache_chunk},
                            {params.page_size, view.stride_seqlen, arguments.rows_per_box},
                            {problem.heads_kv, view.stride_heads, 1},
                            {params.num_pages, view.stride_batch, 1}},
                           // An H200 reads 10 % less a second with 256 bytes: a copy brings 128 of a row at a time
                           // (docs/log.md, 2026-11-28).
                           CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
  };
  const char* error = make_cache(arguments.k, params.k, problem.head_dim_qk);
  if (error == nullptr && Kernel::kReadsValues) error = make_cache(arguments.v, params.v, problem.head_dim_v);
  if constexpr (Kernel::kNumQStages > 0) {  // a tile has all queries of a kv head
    if (error == nullptr) {
      error = make_tensor_map(arguments.q, params.q.data, map_element(problem.dtype),
                              {{problem.head_dim_qk, 1, kDecodeSwizzleColumns},
                               {problem.heads_q, params.q.stride_heads, arguments.group},
                               {problem.seqlen_q, params.q.stride_seqlen, static_cast<int>(problem.seqlen_q)},
                               {problem.batch, params.q.stride_batch, 1}},
                              CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
    }
  }
  if (error != nullptr) return error;

  int device = 0;
  cudaGetDevice(&device);
  constexpr auto* kernel = decode_kernel<Kernel>;
  if (cudaError_t const status = allow_shared_memory<kernel>(kMaxSharedBytes, device); status != cudaSuccess) {
    return cudaGetErrorString(status);
  }
  if constexpr (Kernel::kReadsValues) {
    if (Clusters const clusters = clusters_of<Kernel, kernel>(arguments, device); clusters.size > 1) {
      DecodeArguments in_clusters = arguments;
      in_clusters.cluster_size = clusters.size;
      dim3 const grid(static_cast<unsigned>(num_tiles(arguments) * clusters.size));
      error = launch_kernel<DecodeArguments>(kernel, grid, Kernel::Tiles::kNumThreads, clusters.shared_bytes, stream,
                                             Launch::kDependent, in_clusters, clusters.size);
      if (error == nullptr) return nullptr;
      cudaGetLastError();  // a context of few multiprocessors may have no room for a cluster: shares fit everywhere
    }
  }
  error = launch_kernel<DecodeArguments>(kernel, dim3(static_cast<unsigned>(arguments.num_ctas)),
                                         Kernel::Tiles::kNumThreads, Kernel::kSharedBytes, stream, Launch::kDependent,
                                         arguments);
  if (error != nullptr || !may_split(arguments)) return error;
  // A tile that is split begins in a share and ends in a later one: a share has one such tile at most.
  dim3 grid(static_cast<unsigned>(std::min<int64_t>(num_tiles(arguments), arguments.num_ctas)), 1,
            static_cast<unsigned>((problem.head_dim_v + kCombineColumns - 1) / kCombineColumns));
  unsigned const most = kCombineCtasPerSm * static_cast<unsigned>(num_sms(device)) / (grid.x * grid.z);
  grid.y = std::min(static_cast<unsigned>(arguments.partial_rows), std::max(1u, most));
  return launch_kernel<DecodeArguments>(combine_kernel<Element, Kernel::Tiles::kRows>, grid, kCombineThreads, 0, stream,
                                        Launch::kDependent, arguments);
}

// Whether a call has tiles of so few rows that keys are the tensor cores' rows.
template <int kHeadDimQK, int kHeadDimV>
bool takes_few_rows(Problem const& problem) {
  return has_few_rows_kernel<kHeadDimQK, kHeadDimV>() &&
         problem.heads_q / problem.heads_kv * problem.seqlen_q <= kFewRows;
}

template <int kHeadDimQK, int kHeadDimV>
int64_t decode_workspace_head_dims(DecodeParams const& params) {
  return takes_few_rows<kHeadDimQK, kHeadDimV>(params.problem)
             ? decode_workspace_tiles<FewRowsTiles<kHeadDimQK, kHeadDimV>>(params)
             : decode_workspace_tiles<DecodeTiles<kHeadDimQK, kHeadDimV>>(params);
}

template <int kHeadDimQK, int kHeadDimV, class Element>
const char* launch_decode_element(DecodeParams const& params, void* workspace, cudaStream_t stream) {
  if constexpr (has_few_rows_kernel<kHeadDimQK, kHeadDimV>()) {
    if (takes_few_rows<kHeadDimQK, kHeadDimV>(params.problem)) {
      return launch_decode_kernel<FewRowsDecode<kHeadDimQK, kHeadDimV, Element>>(params, workspace, stream);
    }
  }
  return launch_decode_kernel<typename DecodeKernel<kHeadDimQK, kHeadDimV, Element>::Type>(params, workspace, stream);
}

template <int kHeadDimQK, int kHeadDimV>
const char* launch_decode_head_dims(DecodeParams const& params, void* workspace, cudaStream_t stream) {
  return params.problem.dtype == DType::kFloat16
             ? launch_decode_element<kHeadDimQK, kHeadDimV, cutlass::half_t>(params, workspace, stream)
             : launch_decode_element<kHeadDimQK, kHeadDimV, cutlass::bfloat16_t>(params, workspace, stream);
}

}  // namespace flashmla::sm90
