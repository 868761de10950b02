#include "sm90/launch_forward.cuh"
template const char* flashmla::sm90::launch_forward_row<128, 128>(flashmla::ForwardParams const&, void*, cudaStream_t);
