#include "sm90/launch_backward.cuh"
template int64_t flashmla::sm90::backward_workspace_row<192, 128>(flashmla::BackwardParams const&);
template const char* flashmla::sm90::launch_backward_row<192, 128>(flashmla::BackwardParams const&, void*,
                                                                   cudaStream_t);
