// Which configuration of tiles.h runs a call: the first that is wide enough. Columns that the call lacks of its width
// arrive as zeros from TMA and are not stored.
#include "sm90/launch.h"
#include "sm90/scheduling/schedule.h"
#include "sm90/tiles.h"

namespace flashmla::sm90 {

// Defined by one file of instantiations/ each.
template <int kHeadDimQK, int kHeadDimV>
const char* launch_forward_head_dims(ForwardParams const& params, void* workspace, cudaStream_t stream);
template <int kHeadDimQK, int kHeadDimV>
int64_t backward_workspace_head_dims(BackwardParams const& params);
template <int kHeadDimQK, int kHeadDimV>
const char* launch_backward_head_dims(BackwardParams const& params, void* workspace, cudaStream_t stream);
template <int kHeadDimQK, int kHeadDimV>
int64_t decode_workspace_head_dims(DecodeParams const& params);
template <int kHeadDimQK, int kHeadDimV>
const char* launch_decode_head_dims(DecodeParams const& params, void* workspace, cudaStream_t stream);
template <int kHeadDim>
int64_t e4m3_decode_workspace_head_dim(E4m3DecodeParams const& params);
template <int kHeadDim>
const char* launch_e4m3_decode_head_dim(E4m3DecodeParams const& params, void* workspace, cudaStream_t stream);
template <int kHeadDim>
int64_t fp8_workspace_head_dim(Fp8ForwardParams const& params);
template <int kHeadDim>
const char* launch_fp8_head_dim(Fp8ForwardParams const& params, void* workspace, cudaStream_t stream);
template <int kHeadDim>
const char* launch_fp8_rounding_head_dim(Fp8RoundingParams const& params, cudaStream_t stream);

namespace {

// A row of tiles.h: what it is wide enough for, and its way in.
template <class Params>
struct HeadDimConfig {
  int64_t head_dim_qk, head_dim_v;
  int64_t (*workspace)(Params const& params);
  const char* (*launch)(Params const& params, void* workspace, cudaStream_t stream);

  bool takes(Problem const& problem) const {
    return problem.head_dim_qk <= head_dim_qk && problem.head_dim_v <= head_dim_v;
  }
};

struct ForwardHeadDimConfig : HeadDimConfig<ForwardParams> {
  int block_q, num_ctas;
};

struct BackwardHeadDimConfig : HeadDimConfig<BackwardParams> {
  bool has_softcap;

  bool takes(Problem const& problem) const {
    return HeadDimConfig::takes(problem) && (problem.softcap <= 0.0f || has_softcap);
  }
};

struct Fp8HeadDimConfig : HeadDimConfig<Fp8ForwardParams> {
  const char* (*launch_rounding)(Fp8RoundingParams const& params, cudaStream_t stream);
};

// The host has checked that no head dim is larger than the last configuration's.
template <class Config, size_t kCount>
Config const& first_that_takes(Problem const& problem, Config const (&configs)[kCount]) {
  Config const* config = configs;
  while (!config->takes(problem)) ++config;
  return *config;
}

template <class... Dims>
ForwardHeadDimConfig const& config_of(ForwardParams const& params, HeadDimList<Dims...>) {
  static constexpr ForwardHeadDimConfig kConfigs[] = {
      {{Dims::kHeadDimQK, Dims::kHeadDimV, nullptr, launch_forward_head_dims<Dims::kHeadDimQK, Dims::kHeadDimV>},
       ForwardTiles<Dims::kHeadDimQK, Dims::kHeadDimV, MaskKind::kNone>::kBlockQ,
       ForwardTiles<Dims::kHeadDimQK, Dims::kHeadDimV, MaskKind::kNone>::kNumCtas}...};
  return first_that_takes(params.problem, kConfigs);
}

template <class... Dims>
BackwardHeadDimConfig const& config_of(BackwardParams const& params, HeadDimList<Dims...>) {
  static constexpr BackwardHeadDimConfig kConfigs[] = {
      {{Dims::kHeadDimQK, Dims::kHeadDimV, backward_workspace_head_dims<Dims::kHeadDimQK, Dims::kHeadDimV>,
        launch_backward_head_dims<Dims::kHeadDimQK, Dims::kHeadDimV>},
       BackwardTiles<Dims::kHeadDimQK, Dims::kHeadDimV>::kHasSoftcap}...};
  return first_that_takes(params.problem, kConfigs);
}

template <class... Dims>
HeadDimConfig<DecodeParams> const& config_of(DecodeParams const& params, HeadDimList<Dims...>) {
  static constexpr HeadDimConfig<DecodeParams> kConfigs[] = {
      {Dims::kHeadDimQK, Dims::kHeadDimV, decode_workspace_head_dims<Dims::kHeadDimQK, Dims::kHeadDimV>,
       launch_decode_head_dims<Dims::kHeadDimQK, Dims::kHeadDimV>}...};
  return first_that_takes(params.problem, kConfigs);
}

template <class... Dims>
HeadDimConfig<E4m3DecodeParams> const& config_of(E4m3DecodeParams const& params, HeadDimList<Dims...>) {
  static constexpr HeadDimConfig<E4m3DecodeParams> kConfigs[] = {{Dims::kHeadDimQK, Dims::kHeadDimV,
                                                                  e4m3_decode_workspace_head_dim<Dims::kHeadDimQK>,
                                                                  launch_e4m3_decode_head_dim<Dims::kHeadDimQK>}...};
  return first_that_takes(params.problem, kConfigs);
}

template <class... Dims>
Fp8HeadDimConfig const& config_of(Fp8ForwardParams const& params, HeadDimList<Dims...>) {
  static constexpr Fp8HeadDimConfig kConfigs[] = {
      {{Dims::kHeadDimQK, Dims::kHeadDimV, fp8_workspace_head_dim<Dims::kHeadDimQK>,
        launch_fp8_head_dim<Dims::kHeadDimQK>},
       launch_fp8_rounding_head_dim<Dims::kHeadDimQK>}...};
  return first_that_takes(params.problem, kConfigs);
}

ForwardHeadDimConfig const& config_for(ForwardParams const& params) {
  return config_of(params, ForwardHeadDims{});
}

BackwardHeadDimConfig const& config_for(BackwardParams const& params) {
  return config_of(params, BackwardHeadDims{});
}

HeadDimConfig<DecodeParams> const& config_for(DecodeParams const& params) {
  bool const is_wide =
      params.problem.head_dim_qk > kLargestDecodeHeadDim || params.problem.head_dim_v > kLargestDecodeHeadDim;
  return is_wide ? config_of(params, HeadDimList<LatentHeadDims>{}) : config_of(params, DecodeHeadDims{});
}

HeadDimConfig<E4m3DecodeParams> const& config_for(E4m3DecodeParams const& params) {
  return config_of(params, E4m3DecodeHeadDims{});
}

Fp8HeadDimConfig const& config_for(Fp8ForwardParams const& params) {
  return config_of(params, Fp8ForwardHeadDims{});
}

// A dense forward as attention to a cache that holds a page a sequence, all of it full.
DecodeParams as_decode(ForwardParams const& params) {
  DecodeParams decode;
  decode.problem = params.problem;
  decode.q = params.q;
  decode.k = params.k;
  decode.v = params.v;
  decode.out = params.out;
  decode.lse = params.lse;
  decode.num_pages = params.problem.batch;
  decode.page_size = params.problem.seqlen_kv;
  return decode;
}

// Up to here one warpgroup has room for the rows of most models, and reading K and V takes longer than the products.
constexpr int64_t kMostDecodeQueries = 16;

bool is_decode(Problem const& problem) {
  return problem.cu_seqlens_q == nullptr && problem.seqlen_q <= kMostDecodeQueries &&
         problem.head_dim_qk <= kLargestDecodeHeadDim && problem.head_dim_v <= kLargestDecodeHeadDim &&
         problem.seqlen_q * (problem.heads_q / problem.heads_kv) <= kWarpgroupRows;
}

}  // namespace

int64_t forward_workspace(ForwardParams const& params) {
  if (is_decode(params.problem)) return decode_workspace(as_decode(params));
  return forward_schedule_bytes(params.problem, config_for(params).block_q, config_for(params).num_ctas);
}

const char* launch_forward(ForwardParams const& params, void* workspace, cudaStream_t stream) {
  if (is_decode(params.problem)) return launch_decode(as_decode(params), workspace, stream);
  return config_for(params).launch(params, workspace, stream);
}

int64_t backward_workspace(BackwardParams const& params) {
  return config_for(params).workspace(params);
}

const char* launch_backward(BackwardParams const& params, void* workspace, cudaStream_t stream) {
  return config_for(params).launch(params, workspace, stream);
}

int64_t decode_workspace(DecodeParams const& params) {
  return config_for(params).workspace(params);
}

const char* launch_decode(DecodeParams const& params, void* workspace, cudaStream_t stream) {
  return config_for(params).launch(params, workspace, stream);
}

int64_t e4m3_decode_workspace(E4m3DecodeParams const& params) {
  return config_for(params).workspace(params);
}

const char* launch_e4m3_decode(E4m3DecodeParams const& params, void* workspace, cudaStream_t stream) {
  return config_for(params).launch(params, workspace, stream);
}

int64_t fp8_forward_workspace(Fp8ForwardParams const& params) {
  return config_for(params).workspace(params);
}

const char* launch_fp8_forward(Fp8ForwardParams const& params, void* workspace, cudaStream_t stream) {
  return config_for(params).launch(params, workspace, stream);
}

const char* launch_fp8_rounding(Fp8RoundingParams const& params, cudaStream_t stream) {
  return config_for(params).launch_rounding(params, stream);
}

}  // namespace flashmla::sm90
