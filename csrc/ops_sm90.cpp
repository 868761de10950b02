// The Hopper backend's host side: checks, allocates, fills params and launches on the current stream.
//
// Registers flash_attn_forward, flash_attn_backward and flash_attn_decode (defined in flashmla_hf/ops.py and
// decode_ops.py) for CUDA, through torch's stable ABI. Nothing here waits for the device: the values of cu_seqlens are
// not read back; the kernels clamp them to the tensors.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <atomic>

#include "host.h"
#include "sm90/hopper/device.h"
#include "sm90/launch.h"
#include "sm90/tiles.h"

// Of libtorch_cuda; the stable headers declare it only where torch was built with CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace flashmla {
namespace {

constexpr int64_t kLargestLength = int64_t{1} << 28;  // key positions are 32-bit numbers with room for windows

// TMA reads 16 bytes at a time from addresses and strides that are multiples of 16 bytes.
bool has_aligned_data(const TensorInfo& t) {
  return t.numel() == 0 || reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
}

// The dimension whose stride TMA cannot read, or -1.
int64_t unaligned_dimension(const TensorInfo& t) {
  for (int64_t i = 0; t.numel() > 0 && i + 1 < t.dim; ++i)
    if (t.size(i) > 1 && (t.stride(i) % 8 != 0 || t.stride(i) == 0)) return i;
  return -1;
}

void check_alignment(const char* op, const char* name, const TensorInfo& t) {
  if (!has_aligned_data(t)) fail(op, name, "a data pointer aligned to 16 bytes (call .clone())", "one that is not");
  if (const int64_t i = unaligned_dimension(t); i >= 0)
    fail(op, name, "strides that are positive multiples of 8 elements (call .contiguous())",
         "stride " + std::to_string(t.stride(i)) + " in dimension " + std::to_string(i));
}

cudaStream_t current_stream(const TensorInfo& t) {
  void* stream = nullptr;
  expect_success(aoti_torch_get_current_cuda_stream(t.device_index, &stream), "aoti_torch_get_current_cuda_stream");
  return static_cast<cudaStream_t>(stream);
}

// Asked once a device: the two queries take as long as the rest of a call's checks.
void check_device(const char* op, const TensorInfo& q) {
  if (q.device_type != aoti_torch_device_type_cuda())
    fail(op, "q", "a tensor on a Hopper GPU", "one on another device");
  constexpr int kMaxDevices = 64;
  static std::atomic<int> cache[kMaxDevices];  // 10 * major + minor
  const int device = q.device_index;
  int capability = device < kMaxDevices ? cache[device].load() : 0;
  if (capability == 0) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    capability = 10 * major + minor;
    if (device < kMaxDevices) cache[device] = capability;
  }
  if (capability != 90)
    fail(op, "q", "a tensor on a Hopper GPU (compute capability 9.0)",
         "compute capability " + std::to_string(capability / 10) + "." + std::to_string(capability % 10));
}

// dtypes, head dims, addresses, strides and lengths that no kernel takes.
template <class Call>
void check_kernel_limits(const char* op, const Call& arguments, const Problem& p, int64_t largest) {
  if (p.dtype == DType::kFloat32) fail(op, "q", "dtype float16 or bfloat16", "float32");
  const std::pair<const char*, int64_t> head_dims[] = {{"q", p.head_dim_qk}, {"v", p.head_dim_v}};
  for (const auto& [name, head_dim] : head_dims)
    if (head_dim % sm90::kHeadDimMultiple != 0 || head_dim > largest)
      fail(op, name,
           "a head dimension that is a multiple of " + std::to_string(sm90::kHeadDimMultiple) + " up to " +
               std::to_string(largest),
           head_dim);
  const std::pair<const char*, const TensorInfo*> inputs[] = {
      {"q", &arguments.q}, {"k", &arguments.k}, {"v", &arguments.v}};
  for (const auto& [name, t] : inputs) {
    check_alignment(op, name, *t);
    if (t->size(t->dim - 3) >= kLargestLength)
      fail(op, name, "fewer than 2^28 rows", "shape " + shape_name(t->shape()));
  }
  if (p.seqlen_kv >= kLargestLength) fail(op, "k", "room for fewer than 2^28 keys a sequence", p.seqlen_kv);
}

struct Sm90 {
  static Problem check(const char* op, const Arguments& arguments) {
    check_device(op, arguments.q);
    Problem p = check_inputs(op, arguments);
    check_kernel_limits(op, arguments, p, sm90::kLargestHeadDim);
    if (p.cu_seqlens_q != nullptr) {
      check_flag_number(op, "max_seqlen_q", arguments.max_seqlen_q, 0);
      check_flag_number(op, "max_seqlen_kv", arguments.max_seqlen_kv, 0);
      // Windows are judged by what the sequences could be, not by bounds that nobody checks.
      p.seqlen_q = p.total_q;
      p.seqlen_kv = p.total_kv;
    }
    check_scalars(op, arguments, p);
    if (p.cu_seqlens_q != nullptr) p.seqlen_q = std::min(arguments.max_seqlen_q, p.total_q);  // a hint how to tile
    p.deterministic = arguments.deterministic;
    return p;
  }

  // What autograd hands back lies as it likes: expanded, sliced, transposed.
  static bool can_read(const TensorInfo& t) { return unaligned_dimension(t) < 0 && has_aligned_data(t); }
  static Tensor make_readable(const Tensor& t) {
    const TensorInfo info = info_of(t);
    return can_read(info) ? t : make_copy(info, t);
  }

  static void run_forward(const char* op, const ForwardParams& params, const Arguments& arguments,
                          const TensorInfo& out) {
    if (out.numel() == 0) return;
    launch(op, arguments.q, sm90::forward_workspace, sm90::launch_forward, params);
  }

  static Problem check_decode(const char* op, const DecodeArguments& arguments) {
    check_device(op, arguments.q);
    const Problem p = check_decode_inputs(op, arguments);
    check_kernel_limits(op, arguments, p, sm90::kLargestDecodeHeadDim);
    return p;
  }

  static void run_decode(const char* op, const DecodeParams& params, const DecodeArguments& arguments,
                         const TensorInfo& out) {
    if (out.numel() == 0) return;
    launch(op, arguments.q, sm90::decode_workspace, sm90::launch_decode, params);
  }

  static void run_backward(const char* op, const BackwardParams& params, const Arguments& arguments,
                           const BackwardTensors&) {
    launch(op, arguments.q, sm90::backward_workspace, sm90::launch_backward, params);
  }

  template <class Params>
  static void launch(const char* op, const TensorInfo& q, int64_t (*workspace_bytes)(Params const&),
                     const char* (*launch_kernels)(Params const&, void*, cudaStream_t), const Params& params) {
    const torch::stable::accelerator::DeviceGuard guard(q.device_index);
    if (const cudaError_t status = sm90::bind_thread(q.device_index); status != cudaSuccess)
      throw std::runtime_error(std::string(op) + ": cudaSetDevice(" + std::to_string(q.device_index) +
                               "): " + cudaGetErrorString(status));
    const Tensor workspace = make_tensor(q, {workspace_bytes(params)}, ScalarType::Byte);
    const char* error = launch_kernels(params, workspace.mutable_data_ptr(), current_stream(q));
    if (error != nullptr) throw std::runtime_error(std::string(op) + ": " + error);
  }
};

}  // namespace
}  // namespace flashmla

FLASHMLA_HOST(flashmla::Sm90, CUDA)
