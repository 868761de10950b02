// The boundary between the host code (sees torch) and the kernels (do not).
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace flashmla::sm90 {

// Bytes of device memory launch_forward needs for its schedule.
int64_t forward_workspace(ForwardParams const& params);

// Launches the forward on `stream` of the current device. Returns null, or a sentence that says what went wrong.
const char* launch_forward(ForwardParams const& params, void* workspace, cudaStream_t stream);

}  // namespace flashmla::sm90
