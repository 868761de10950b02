#include "sm90/launch_forward.cuh"
template const char* flashmla::sm90::launch_forward_row<192, 192>(flashmla::ForwardParams const&, void*, cudaStream_t);
