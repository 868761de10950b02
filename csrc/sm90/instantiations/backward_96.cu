#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // a wgmma of 48 columns
#include "sm90/backward/launch_backward.cuh"
template int64_t flashmla::sm90::backward_workspace_head_dims<96, 96>(flashmla::BackwardParams const&);
template const char* flashmla::sm90::launch_backward_head_dims<96, 96>(flashmla::BackwardParams const&, void*,
                                                                       cudaStream_t);
