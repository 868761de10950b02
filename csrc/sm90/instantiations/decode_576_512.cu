#include "sm90/decode/launch_decode.cuh"
template int64_t flashmla::sm90::decode_workspace_head_dims<576, 512>(flashmla::DecodeParams const&);
template const char* flashmla::sm90::launch_decode_head_dims<576, 512>(flashmla::DecodeParams const&, void*,
                                                                       cudaStream_t);
