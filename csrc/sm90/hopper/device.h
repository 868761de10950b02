// Device properties, and how kernels are launched.
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

// Sets an attribute of a kernel, always to the same value, once on each device.
template <auto kKernel, cudaFuncAttribute kAttribute>
cudaError_t set_attribute(int value, int device) {
  static std::atomic<uint64_t> done{0};  // a bit per device
  uint64_t const bit = uint64_t{1} << (device % 64);
  if (device < 64 && (done & bit) != 0) return cudaSuccess;
  cudaError_t const error = cudaFuncSetAttribute(kKernel, kAttribute, value);
  if (error == cudaSuccess && device < 64) done |= bit;
  return error;
}

// Kernels that need more than 48 KiB of shared memory have to ask for it.
template <auto kKernel>
cudaError_t allow_shared_memory(int bytes, int device) {
  return set_attribute<kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize>(bytes, device);
}

// Kernels whose clusters have more than eight CTAs have to ask for it.
template <auto kKernel>
cudaError_t allow_large_clusters(int device) {
  return set_attribute<kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed>(1, device);
}

// Makes the device's context current in the calling thread, whose first CUDA work this may be (a new thread,
// autograd's): memory may come from torch's cache and the driver encodes TMA descriptors for a current context alone.
// torch's device guard does not, if the device is the one the thread has by default.
inline cudaError_t bind_thread(int device) {
  thread_local int bound = -1;
  if (bound == device) return cudaSuccess;
  cudaError_t const error = cudaSetDevice(device);
  if (error == cudaSuccess) bound = device;
  return error;
}

// How a kernel starts.
enum class Launch : int32_t {
  kAlone,      // when the one before it in the stream has ended
  kDependent,  // it may set up before that (programmatic dependent launch), and waits by wait_on_dependent_grids before
               // it reads what that one wrote
  kTogether,   // as kAlone, with all blocks running at once (cooperative launch), or not at all
};

// `cluster_size` neighbours of the grid's first dimension reach each other's shared memory.
template <class Arguments>
const char* launch_kernel(void (*kernel)(Arguments), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                          Launch how, Arguments const& arguments, int cluster_size = 1) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchAttribute& cluster = attributes[0];
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(cluster_size), 1, 1};
  cudaLaunchAttribute& attribute = attributes[1];
  if (how == Launch::kTogether) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = cluster_size > 1 ? attributes : attributes + 1;
  config.numAttrs = (cluster_size > 1 ? 1 : 0) + (how == Launch::kAlone ? 0 : 1);
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  cudaError_t const status = cudaLaunchKernelExC(&config, reinterpret_cast<void const*>(kernel), pointers);
  if (status == cudaErrorCooperativeLaunchTooLarge) {
    return "deterministic: expected room for all thread blocks of the backward at once, since they wait for each "
           "other, and the current context (MPS, a green context) has fewer multiprocessors than the device; pass "
           "deterministic=False, or give it the whole device";
  }
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace flashmla::sm90
