// The Hopper backend's host side: checks, allocates, fills params and launches on the current stream.
//
// Registers flash_attn_forward and flash_attn_backward (defined in flashmla_hf/ops.py) for CUDA, through torch's stable
// ABI. Nothing here waits for the device: the values of cu_seqlens are not read back; the kernels clamp them to the
// tensors.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <tuple>

#include "host.h"
#include "sm90/launch.h"

// Of libtorch_cuda; the stable headers declare it only where torch was built with CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace flashmla {
namespace {

constexpr int64_t kLargestHeadDim = 256;
constexpr int64_t kLargestLength = int64_t{1} << 28;  // key positions are 32-bit numbers with room for windows

// TMA reads 16 bytes at a time from addresses and strides that are multiples of 16 bytes.
bool has_aligned_data(const Tensor& t) {
  return t.numel() == 0 || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

// The dimension whose stride TMA cannot read, or -1.
int64_t unaligned_dimension(const Tensor& t) {
  for (int64_t i = 0; t.numel() > 0 && i + 1 < t.dim(); ++i)
    if (t.size(i) > 1 && (t.stride(i) % 8 != 0 || t.stride(i) == 0)) return i;
  return -1;
}

void check_alignment(const char* op, const char* name, const Tensor& t) {
  if (!has_aligned_data(t)) fail(op, name, "a data pointer aligned to 16 bytes (call .clone())", "one that is not");
  if (const int64_t i = unaligned_dimension(t); i >= 0)
    fail(op, name, "strides that are positive multiples of 8 elements (call .contiguous())",
         "stride " + std::to_string(t.stride(i)) + " in dimension " + std::to_string(i));
}

// What autograd hands back lies as it likes: expanded, sliced, transposed.
Tensor aligned(const Tensor& t) {
  if (unaligned_dimension(t) >= 0) return torch::stable::contiguous(t);
  return has_aligned_data(t) ? t : torch::stable::clone(t);
}

void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

// Asked once a device: the two queries take as long as the rest of a call's checks.
void check_device(const char* op, const Tensor& q) {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> cache[kMaxDevices];  // 10 * major + minor
  const int device = q.get_device_index();
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

Problem check_problem(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                      const std::optional<Tensor>& sinks, const std::optional<Tensor>& cu_seqlens_q,
                      const std::optional<Tensor>& cu_seqlens_kv, int64_t max_seqlen_q, int64_t max_seqlen_kv,
                      double scale, int64_t window_left, int64_t window_right, double softcap, bool deterministic) {
  check_device(op, q);
  Problem p = check_inputs(op, q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv);
  if (p.dtype == DType::kFloat32) fail(op, "q", "dtype float16 or bfloat16", "float32");
  const std::pair<const char*, int64_t> head_dims[] = {{"q", p.head_dim_qk}, {"v", p.head_dim_v}};
  for (const auto& [name, head_dim] : head_dims)
    if (head_dim % 8 != 0 || head_dim > kLargestHeadDim)
      fail(op, name, "a head dimension that is a multiple of 8 up to " + std::to_string(kLargestHeadDim), head_dim);
  const std::pair<const char*, const Tensor*> inputs[] = {{"q", &q}, {"k", &k}, {"v", &v}};
  for (const auto& [name, t] : inputs) {
    check_alignment(op, name, *t);
    if (t->size(p.cu_seqlens_q ? 0 : 1) >= kLargestLength)
      fail(op, name, "fewer than 2^28 rows", "shape " + shape_name(shape_of(*t)));
  }
  if (p.cu_seqlens_q != nullptr) {
    check_flag_number(op, "max_seqlen_q", max_seqlen_q, 0);
    check_flag_number(op, "max_seqlen_kv", max_seqlen_kv, 0);
    // Windows are judged by what the sequences could be, not by bounds that nobody checks.
    p.seqlen_q = p.total_q;
    p.seqlen_kv = p.total_kv;
  }
  check_scalars(op, scale, window_left, window_right, softcap, p);
  if (p.cu_seqlens_q != nullptr) p.seqlen_q = std::min(max_seqlen_q, p.total_q);  // a hint how to tile
  p.deterministic = deterministic;
  return p;
}

std::tuple<Tensor, Tensor> flash_attn_forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> sinks,
                                              std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_kv,
                                              int64_t max_seqlen_q, int64_t max_seqlen_kv, double scale,
                                              int64_t window_left, int64_t window_right, double softcap,
                                              bool deterministic) {
  const char* op = "flash_attn_forward";
  const Problem p = check_problem(op, q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, scale,
                                  window_left, window_right, softcap, deterministic);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const auto [params, out, lse] = make_forward(p, q, k, v);
  if (out.numel() == 0) return {out, lse};
  const Tensor workspace = make_tensor(q, {sm90::forward_workspace(params)}, ScalarType::Byte);
  const char* error =
      sm90::launch_forward(params, workspace.mutable_data_ptr(), static_cast<cudaStream_t>(current_stream(q)));
  if (error != nullptr) throw std::runtime_error(std::string(op) + ": " + error);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> flash_attn_backward(
    Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    std::optional<Tensor> sinks, std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_kv,
    int64_t max_seqlen_q, int64_t max_seqlen_kv, double scale, int64_t window_left, int64_t window_right,
    double softcap, bool deterministic, bool needs_dq, bool needs_dk, bool needs_dv, bool needs_dsinks) {
  const char* op = "flash_attn_backward";
  const Problem p = check_problem(op, q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, scale,
                                  window_left, window_right, softcap, deterministic);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  check_saved(op, p, q, dout, dlse, out, lse);
  const Tensor dout_rows = aligned(dout), out_rows = aligned(out);  // kept until the kernels are launched
  const BackwardCall call =
      make_backward(op, p, dout_rows, dlse, q, k, v, out_rows, lse, needs_dq, needs_dk, needs_dv, needs_dsinks);
  if (needs_dq || needs_dk || needs_dv || needs_dsinks) {
    const Tensor workspace = make_tensor(q, {sm90::backward_workspace(call.params)}, ScalarType::Byte);
    const char* error =
        sm90::launch_backward(call.params, workspace.mutable_data_ptr(), static_cast<cudaStream_t>(current_stream(q)));
    if (error != nullptr) throw std::runtime_error(std::string(op) + ": " + error);
  }
  return {call.dq, call.dk, call.dv, call.dsinks};
}

}  // namespace
}  // namespace flashmla

STABLE_TORCH_LIBRARY_IMPL(flashmla, CUDA, m) {
  m.impl("flash_attn_forward", TORCH_BOX(&flashmla::flash_attn_forward));
  m.impl("flash_attn_backward", TORCH_BOX(&flashmla::flash_attn_backward));
}
