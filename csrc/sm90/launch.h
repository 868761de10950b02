// The boundary between the host code (sees torch) and the kernels (do not).
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace flashmla::sm90 {

// Bytes of device memory launch_forward needs for its schedule.
int64_t forward_workspace(ForwardParams const& params);

// Launches the forward on `stream` of the current device. Returns null, or a sentence that says what went wrong.
const char* launch_forward(ForwardParams const& params, void* workspace, cudaStream_t stream);

// The same of the backward; the workspace holds sums of dQ as well. Gradients that are wanted are written whole.
int64_t backward_workspace(BackwardParams const& params);
const char* launch_backward(BackwardParams const& params, void* workspace, cudaStream_t stream);

// The same of attention to caches; the workspace holds parts that CTAs leave for each other's tiles.
int64_t decode_workspace(DecodeParams const& params);
const char* launch_decode(DecodeParams const& params, void* workspace, cudaStream_t stream);

// The same of caches of e4m3.
int64_t e4m3_decode_workspace(E4m3DecodeParams const& params);
const char* launch_e4m3_decode(E4m3DecodeParams const& params, void* workspace, cudaStream_t stream);

// The same of the fp8 forward; the workspace holds the quantised operands as well.
int64_t fp8_forward_workspace(Fp8ForwardParams const& params);
const char* launch_fp8_forward(Fp8ForwardParams const& params, void* workspace, cudaStream_t stream);

// Q, K and V as that forward takes them. Needs no workspace.
const char* launch_fp8_rounding(Fp8RoundingParams const& params, cudaStream_t stream);

}  // namespace flashmla::sm90
