// The CPU backend's host side: checks, allocates, fills params and calls the kernel of this machine's instruction set.
//
// Registers flash_attn_forward, flash_attn_backward and flash_attn_decode (defined in flashmla_hf/ops.py and
// decode_ops.py) for the CPU, through torch's stable ABI, and defines `flashmla::cpu_isa() -> str`: the instruction set
// in use, one of baseline, avx2, avx512, avx512_bf16, amx. The environment variable FLASHMLA_CPU_ISA, read once when
// this library is loaded, lowers it for tests.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>

#include "cpu/cache.h"
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

Workspace make_workspace(const TensorInfo& like, int64_t bytes) {
  Tensor storage = make_tensor(like, {bytes + 64}, ScalarType::Byte);
  const uintptr_t address = reinterpret_cast<uintptr_t>(storage.mutable_data_ptr());
  return {storage, reinterpret_cast<void*>((address + 63) / 64 * 64)};
}

// Rows at and after `begin` of a contiguous [total, ...] tensor belong to no sequence.
void zero_rows_after(const TensorInfo& t, int64_t begin) {
  const int64_t total = t.size(0);
  if (begin >= total) return;
  const int64_t row_bytes = t.numel() / total * element_size(t.dtype);
  std::memset(static_cast<char*>(t.data) + begin * row_bytes, 0, (total - begin) * row_bytes);
}

void check_device(const char* op, const TensorInfo& q) {
  if (q.device_type != aoti_torch_device_type_cpu()) fail(op, "q", "a tensor on the CPU", "one on another device");
}

void check_lengths(const char* op, const char* name, const std::optional<TensorInfo>& lengths, const Problem& p) {
  for (int64_t b = 0; lengths && b < p.batch; ++b)
    if (const int32_t value = static_cast<const int32_t*>(lengths->data)[b]; value < 0 || value > p.seqlen_kv)
      fail(op, name, "numbers from 0 to " + std::to_string(p.seqlen_kv) + " (the rows a sequence may have)",
           std::to_string(value) + " for sequence " + std::to_string(b));
}

// Of the pages that hold keys which some query may see. The others may be anything.
void check_pages(const char* op, const DecodeParams& params) {
  for (int64_t b = 0; params.block_table != nullptr && b < params.problem.batch; ++b) {
    const cpu::CacheKeys keys = cpu::keys_in_cache(params, b);
    if (keys.begin == keys.end) continue;
    for (int64_t n = keys.begin / params.page_size; n * params.page_size < keys.end; ++n)
      if (const int32_t page = params.block_table[b * params.stride_block_table + n];
          page < 0 || page >= params.num_pages)
        fail(op, "block_table", "pages from 0 to " + std::to_string(params.num_pages - 1) + " where keys are read",
             std::to_string(page) + " at [" + std::to_string(b) + ", " + std::to_string(n) + "]");
  }
}

struct Cpu {
  static Problem check(const char* op, const Arguments& arguments) {
    check_device(op, arguments.q);
    Problem p = check_inputs(op, arguments);
    if (p.cu_seqlens_q != nullptr) {
      // The kernel takes the true longest sequences: a caller's generous bound costs nothing.
      p.seqlen_q = check_cu_seqlens(op, "cu_seqlens_q", "max_seqlen_q", p.cu_seqlens_q, p.batch, p.total_q,
                                    arguments.max_seqlen_q);
      p.seqlen_kv = check_cu_seqlens(op, "cu_seqlens_kv", "max_seqlen_kv", p.cu_seqlens_kv, p.batch, p.total_kv,
                                     arguments.max_seqlen_kv);
    }
    check_scalars(op, arguments, p);
    p.deterministic = arguments.deterministic;  // this kernel always is
    return p;
  }

  static bool can_read(const TensorInfo&) { return true; }
  static Tensor make_readable(const Tensor& t) { return t; }

  static void run_forward(const char* op, const ForwardParams& params, const Arguments& arguments,
                          const TensorInfo& out) {
    const Problem& p = params.problem;
    const cpu::Entry& entry = cpu::entry_for(checked_kernels(op), p);
    const cpu::Parallel parallel = make_parallel();
    if (out.numel() > 0) {
      const Workspace workspace = make_workspace(arguments.q, entry.forward_workspace(params, parallel.num_workers));
      entry.forward(params, workspace.data, parallel);
    }
    if (p.cu_seqlens_q != nullptr) {
      const int64_t used = p.cu_seqlens_q[p.batch];
      zero_rows_after(out, used);
      const RowView& lse = params.lse;
      for (int64_t h = 0; lse.data != nullptr && h < p.heads_q; ++h)
        std::fill(lse.data + h * lse.stride_heads + used, lse.data + h * lse.stride_heads + p.total_q,
                  -std::numeric_limits<float>::infinity());
    }
  }

  static Problem check_decode(const char* op, const DecodeArguments& arguments) {
    check_device(op, arguments.q);
    const Problem p = check_decode_inputs(op, arguments);
    check_lengths(op, "cache_seqlens", arguments.cache_seqlens, p);
    check_lengths(op, "kv_start", arguments.kv_start, p);
    return p;
  }

  static void run_decode(const char* op, const DecodeParams& params, const DecodeArguments& arguments,
                         const TensorInfo& out) {
    if (out.numel() == 0) return;
    check_pages(op, params);
    const cpu::Parallel parallel = make_parallel();
    cpu::CacheAttention attention(params, cpu::entry_for(checked_kernels(op), params.problem), parallel.num_workers);
    const Workspace workspace = make_workspace(arguments.q, attention.workspace());
    attention.run(workspace.data, parallel);
  }

  static void run_backward(const char* op, const BackwardParams& params, const Arguments& arguments,
                           const BackwardTensors& tensors) {
    const Problem& p = params.problem;
    if (params.dsinks != nullptr) std::memset(params.dsinks, 0, sizeof(float) * p.heads_q);
    const cpu::Entry& entry = cpu::entry_for(checked_kernels(op), p);
    const cpu::Parallel parallel = make_parallel();
    const Workspace workspace = make_workspace(arguments.q, entry.backward_workspace(params, parallel.num_workers));
    entry.backward(params, workspace.data, parallel);
    if (p.cu_seqlens_q != nullptr) {
      if (tensors.dq) zero_rows_after(*tensors.dq, p.cu_seqlens_q[p.batch]);
      if (tensors.dk) zero_rows_after(*tensors.dk, p.cu_seqlens_kv[p.batch]);
      if (tensors.dv) zero_rows_after(*tensors.dv, p.cu_seqlens_kv[p.batch]);
    }
  }
};

}  // namespace
}  // namespace flashmla

STABLE_TORCH_LIBRARY_FRAGMENT(flashmla, m) {
  m.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(flashmla, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&flashmla::cpu_isa));
}

FLASHMLA_HOST(flashmla::Cpu, CPU)
