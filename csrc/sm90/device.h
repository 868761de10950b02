// What the host side of every kernel asks of a device, and how it launches there.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

namespace flashmla::sm90 {

// Device properties, asked once: the queries take longer than a launch.
inline int num_sms(int device) {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> cache[kMaxDevices];
  if (device < kMaxDevices && cache[device] != 0) return cache[device];
  int count = 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (device < kMaxDevices) cache[device] = count;
  return count;
}

// Kernels that need more than 48 KiB of shared memory have to ask for it, once on each device.
template <auto kKernel>
cudaError_t allow_shared_memory(int bytes, int device) {
  static std::atomic<uint64_t> done{0};  // a bit per device
  uint64_t const bit = uint64_t{1} << (device % 64);
  if (device < 64 && (done & bit) != 0) return cudaSuccess;
  cudaError_t const error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) done |= bit;
  return error;
}

// A dependent kernel may set up while the one before it in the stream ends (programmatic dependent launch): it waits by
// wait_on_dependent_grids before it reads what that one wrote.
template <class Arguments>
const char* launch_kernel(void (*kernel)(Arguments), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                          bool is_dependent, Arguments const& arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = is_dependent ? 1 : 0;
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  cudaError_t const status = cudaLaunchKernelExC(&config, reinterpret_cast<void const*>(kernel), pointers);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace flashmla::sm90
