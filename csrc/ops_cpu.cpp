// The CPU backend's host side: checks, allocates, fills params and calls the kernel of this machine's instruction set.
//
// Registers flash_attn_forward and flash_attn_backward (defined in flashmla_hf/ops.py) for the CPU, through torch's
// stable ABI, and defines `flashmla::cpu_isa() -> str`: the instruction set in use, one of baseline, avx2, avx512,
// avx512_bf16, amx. The environment variable FLASHMLA_CPU_ISA, read once when this library is loaded, lowers it for
// tests.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <tuple>

#include "cpu/kernel.h"
#include "host.h"

namespace flashmla {
namespace {

const cpu::Kernels& checked_kernels(const char* op) {
  if (cpu::isa_override_error() != nullptr)
    throw std::runtime_error(std::string(op) + ": the environment variable FLASHMLA_CPU_ISA " +
                             cpu::isa_override_error());
  return cpu::active_kernels();
}

std::string cpu_isa() {
  return cpu::kIsaNames[static_cast<int>(checked_kernels("cpu_isa").isa)];
}

// torch's own thread pool.
void run_parallel(int64_t num_workers, void (*body)(void* context, int64_t worker), void* context) {
  torch::stable::parallel_for(0, num_workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) body(context, worker);
  });
}

cpu::Parallel make_parallel() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()), run_parallel};
}

// An uninitialised workspace and its first 64-byte boundary.
struct Workspace {
  Tensor storage;
  void* data;
};

Workspace make_workspace(const Tensor& like, int64_t bytes) {
  const int64_t size[] = {bytes + 64};
  Tensor storage = torch::stable::new_empty(like, {size, 1}, ScalarType::Byte);
  const uintptr_t address = reinterpret_cast<uintptr_t>(storage.mutable_data_ptr());
  return {storage, reinterpret_cast<void*>((address + 63) / 64 * 64)};
}

// Rows at and after `begin` of a contiguous [total, ...] tensor belong to no sequence.
void zero_rows_after(const Tensor& t, int64_t begin) {
  const int64_t total = t.size(0);
  if (begin >= total) return;
  const int64_t row_bytes = t.numel() / total * static_cast<int64_t>(t.element_size());
  std::memset(static_cast<char*>(t.mutable_data_ptr()) + begin * row_bytes, 0, (total - begin) * row_bytes);
}

Problem check_problem(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                      const std::optional<Tensor>& sinks, const std::optional<Tensor>& cu_seqlens_q,
                      const std::optional<Tensor>& cu_seqlens_kv, int64_t max_seqlen_q, int64_t max_seqlen_kv,
                      double scale, int64_t window_left, int64_t window_right, double softcap, bool deterministic) {
  if (!q.is_cpu()) fail(op, "q", "a tensor on the CPU", "one on another device");
  Problem p = check_inputs(op, q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv);
  if (p.cu_seqlens_q != nullptr) {
    // The kernel takes the true longest sequences: a caller's generous bound costs nothing.
    p.seqlen_q = check_cu_seqlens(op, "cu_seqlens_q", "max_seqlen_q", p.cu_seqlens_q, p.batch, p.total_q, max_seqlen_q);
    p.seqlen_kv =
        check_cu_seqlens(op, "cu_seqlens_kv", "max_seqlen_kv", p.cu_seqlens_kv, p.batch, p.total_kv, max_seqlen_kv);
  }
  check_scalars(op, scale, window_left, window_right, softcap, p);
  p.deterministic = deterministic;  // this kernel always is
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
  const auto [params, out, lse] = make_forward(p, q, k, v);

  const cpu::Entry& entry = cpu::entry_for(checked_kernels(op), p);
  const cpu::Parallel parallel = make_parallel();
  if (out.numel() > 0) {
    const Workspace workspace = make_workspace(q, entry.forward_workspace(params, parallel.num_workers));
    entry.forward(params, workspace.data, parallel);
  }
  if (p.cu_seqlens_q != nullptr) {
    const int64_t used = p.cu_seqlens_q[p.batch];
    zero_rows_after(out, used);
    float* rows = static_cast<float*>(lse.mutable_data_ptr());
    for (int64_t h = 0; h < p.heads_q; ++h)
      for (int64_t i = used; i < p.total_q; ++i) rows[h * p.total_q + i] = -std::numeric_limits<float>::infinity();
  }
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
  check_saved(op, p, q, dout, dlse, out, lse);
  const BackwardCall call =
      make_backward(op, p, dout, dlse, q, k, v, out, lse, needs_dq, needs_dk, needs_dv, needs_dsinks);
  const BackwardParams& params = call.params;
  if (needs_dsinks) std::memset(params.dsinks, 0, sizeof(float) * p.heads_q);

  const cpu::Entry& entry = cpu::entry_for(checked_kernels(op), p);
  if (needs_dq || needs_dk || needs_dv || needs_dsinks) {
    const cpu::Parallel parallel = make_parallel();
    const Workspace workspace = make_workspace(q, entry.backward_workspace(params, parallel.num_workers));
    entry.backward(params, workspace.data, parallel);
  }
  if (p.cu_seqlens_q != nullptr) {
    if (needs_dq) zero_rows_after(call.dq, p.cu_seqlens_q[p.batch]);
    if (needs_dk) zero_rows_after(call.dk, p.cu_seqlens_kv[p.batch]);
    if (needs_dv) zero_rows_after(call.dv, p.cu_seqlens_kv[p.batch]);
  }
  return {call.dq, call.dk, call.dv, call.dsinks};
}

}  // namespace
}  // namespace flashmla

STABLE_TORCH_LIBRARY_FRAGMENT(flashmla, m) {
  m.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(flashmla, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&flashmla::cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(flashmla, CPU, m) {
  m.impl("flash_attn_forward", TORCH_BOX(&flashmla::flash_attn_forward));
  m.impl("flash_attn_backward", TORCH_BOX(&flashmla::flash_attn_backward));
}
