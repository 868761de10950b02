#include "sm90/backward/launch_backward.cuh"
template int64_t flashmla::sm90::backward_workspace_head_dims<512, 512>(flashmla::BackwardParams const&);
template const char* flashmla::sm90::launch_backward_head_dims<512, 512>(flashmla::BackwardParams const&, void*,
                                                                         cudaStream_t);
