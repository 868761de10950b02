#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // a wgmma of 80 columns
#include "sm90/forward/launch_forward.cuh"
template const char* flashmla::sm90::launch_forward_head_dims<256, 256>(flashmla::ForwardParams const&, void*,
                                                                        cudaStream_t);
