#include "sm90/fp8/launch_fp8.cuh"
template int64_t flashmla::sm90::fp8_workspace_head_dim<256>(flashmla::Fp8ForwardParams const&);
template const char* flashmla::sm90::launch_fp8_head_dim<256>(flashmla::Fp8ForwardParams const&, void*, cudaStream_t);
template const char* flashmla::sm90::launch_fp8_rounding_head_dim<256>(flashmla::Fp8RoundingParams const&,
                                                                       cudaStream_t);
