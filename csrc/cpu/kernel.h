// The seam between the torch side (../ops_cpu.cpp) and the kernels: one table of function pointers per instruction set.
// Neither side sees the other's headers; what crosses is the plain data of ../params.h, a workspace and a way to run
// threads.
#pragma once

#include <cstdint>

#include "../params.h"

namespace flashmla {
namespace cpu {

// How a kernel runs threads: run() calls body(context, worker) once for every worker in [0, num_workers), in any order
// and possibly all from one thread. Kernels hand out their tasks from a shared counter, so they need no more than that.
struct Parallel {
  int64_t num_workers;
  void (*run)(int64_t num_workers, void (*body)(void* context, int64_t worker), void* context);
};

// Forward and backward for one dtype. The workspace is allocated by the caller, 64-byte aligned, not initialised.
struct Entry {
  int64_t (*forward_workspace)(const ForwardParams& params, int64_t num_workers);  // bytes
  void (*forward)(const ForwardParams& params, void* workspace, const Parallel& parallel);
  int64_t (*backward_workspace)(const BackwardParams& params, int64_t num_workers);  // bytes
  void (*backward)(const BackwardParams& params, void* workspace, const Parallel& parallel);
};

// Ordered: a level includes everything below it.
enum class Isa : int32_t { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };
constexpr int kNumIsas = 5;
constexpr const char* kIsaNames[kNumIsas] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};

struct Kernels {
  Isa isa;
  Entry by_dtype[3];  // indexed by DType
  Entry bf16_in_f32;  // bf16 computed in fp32, whatever by_dtype does
};

// Head dims below this are computed in fp32: padded to 32 they would gain little from bf16 products, and their short
// sums do not average the rounding of P and dS away.
constexpr int64_t kNarrowHeadDim = 16;

inline const Entry& entry_for(const Kernels& kernels, const Problem& p) {
  const bool is_narrow = p.head_dim_qk < kNarrowHeadDim || p.head_dim_v < kNarrowHeadDim;
  return is_narrow && p.dtype == DType::kBFloat16 ? kernels.bf16_in_f32 : kernels.by_dtype[static_cast<int>(p.dtype)];
}

// The best level this CPU and operating system can run (AMX: also permits its use for this process, arch_prctl).
Isa detect_isa();

// The kernels of one level; the caller has checked that `isa <= detect_isa()`.
Kernels kernels_for(Isa isa);

// The level in use, fixed when the library is loaded: detect_isa(), or lower where the environment variable
// FLASHMLA_CPU_ISA names a lower level (for tests; an unknown or higher name is an error at the first call, see
// ops_cpu.cpp).
const Kernels& active_kernels();
// What was wrong with FLASHMLA_CPU_ISA, or null.
const char* isa_override_error();

}  // namespace cpu
}  // namespace flashmla
