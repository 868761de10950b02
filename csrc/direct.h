// What a backend's library offers direct/direct.cpp, which calls it without torch's dispatcher. These types are
// private: setup.py compiles both sides with the same FLASHMLA_DIRECT_ABI, and libraries with different ones are not
// called.
#pragma once

#include <cstddef>

#include "checks_decode.h"

namespace flashmla {

enum DirectResult : int {
  kDirectDone = 0,
  kDirectNotApplicable = 1,  // call the operator instead: it reports the error or makes the copy
  kDirectFailed = 2,         // in the kernel's launch; `message` says how
  kDirectOutOfMemory = 3,    // torch could not allocate `bytes`
};

struct DirectError {
  char message[512] = "";
  int64_t bytes = 0;
};

struct DirectForward {
  Arguments arguments;
  TensorInfo out;
  std::optional<TensorInfo> lse;  // absent: not wanted
};

struct DirectDecode {
  DecodeArguments arguments;
  TensorInfo out;
  std::optional<TensorInfo> lse;
};

struct DirectBackward {
  Arguments arguments;
  BackwardTensors tensors;
};

// Exported as flashmla_direct_forward, flashmla_direct_backward, flashmla_direct_decode and flashmla_direct_abi, which
// gives FLASHMLA_DIRECT_ABI.
using DirectForwardFunction = DirectResult(const DirectForward& call, DirectError& failure);
using DirectBackwardFunction = DirectResult(const DirectBackward& call, DirectError& failure);
using DirectDecodeFunction = DirectResult(const DirectDecode& call, DirectError& failure);
using DirectAbiFunction = uint32_t();

}  // namespace flashmla
