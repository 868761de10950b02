#include "sm90/decode/launch_e4m3_decode.cuh"
template int64_t flashmla::sm90::e4m3_decode_workspace_head_dim<64>(flashmla::E4m3DecodeParams const&);
template const char* flashmla::sm90::launch_e4m3_decode_head_dim<64>(flashmla::E4m3DecodeParams const&, void*,
                                                                     cudaStream_t);
