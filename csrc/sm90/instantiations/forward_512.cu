#include "sm90/forward/launch_forward.cuh"
template const char* flashmla::sm90::launch_forward_head_dims<512, 512>(flashmla::ForwardParams const&, void*,
                                                                        cudaStream_t);
