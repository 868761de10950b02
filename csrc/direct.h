// What a backend's library offers direct/direct.cpp, which calls it without torch's dispatcher. The types are no
// promise to anyone else: setup.py gives both the same FLASHMLA_DIRECT_ABI, and nothing is called where they differ.
#pragma once

#include <cstddef>

#include "checks.h"

namespace flashmla {

enum DirectResult : int {
  kDirectDone = 0,
  kDirectNot = 1,          // something is not as it should be, or has to be copied first: the operator says or does it
  kDirectFailed = 2,       // in the kernel's launch; `message` says how
  kDirectOutOfMemory = 3,  // torch could not allocate `bytes`
};

struct DirectError {
  char message[512] = "";
  int64_t bytes = 0;
};

struct DirectForward {
  Arguments arguments;
  TensorInfo out;
  std::optional<TensorInfo> lse;  // not there: nobody wants it
};

struct DirectBackward {
  Arguments arguments;
  BackwardTensors tensors;
};

// Exported as flashmla_direct_forward, flashmla_direct_backward and flashmla_direct_abi, which gives
// FLASHMLA_DIRECT_ABI.
using DirectForwardFunction = DirectResult(const DirectForward& call, DirectError& failure);
using DirectBackwardFunction = DirectResult(const DirectBackward& call, DirectError& failure);
using DirectAbiFunction = uint32_t();

}  // namespace flashmla
