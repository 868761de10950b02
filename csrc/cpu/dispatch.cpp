// Chooses the instruction set once, when the library is loaded.
#include <cstdlib>
#include <cstring>

#include "kernel.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace flashmla {
namespace cpu {

Kernels kernels_baseline();
#if defined(__x86_64__)
Kernels kernels_avx2();
Kernels kernels_avx512();
void add_kernels_avx512_bf16(Kernels& kernels);
void add_kernels_amx(Kernels& kernels);
#endif

#if defined(__x86_64__) && defined(__linux__)
namespace {

// Linux hands out AMX state on request, once per process (Documentation/arch/x86/xstate.rst).
constexpr long kArchReqXcompPerm = 0x1023;
constexpr long kXfeatureTileData = 18;

bool has_amx_bf16() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool has_tile = d & (1u << 24), has_bf16 = d & (1u << 22);
  if (!has_tile || !has_bf16) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;  // the operating system saves tile configuration and data
  if ((low & kTileState) != kTileState) return false;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
}

bool has_avx512_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
}

}  // namespace

Isa detect_isa() {
  // __builtin_cpu_supports also checks that the operating system saves the registers (xgetbv).
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return Isa::kBaseline;
  unsigned a, b, c, d;
  const bool has_f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
  if (!has_f16c) return Isa::kBaseline;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")))
    return Isa::kAvx2;
  if (!has_avx512_bf16()) return Isa::kAvx512;
  return has_amx_bf16() ? Isa::kAmx : Isa::kAvx512Bf16;
}
#else
Isa detect_isa() {
  return Isa::kBaseline;
}
#endif

Kernels kernels_for(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) {
    Kernels kernels = kernels_avx512();
    if (isa == Isa::kAvx512Bf16) add_kernels_avx512_bf16(kernels);
    if (isa == Isa::kAmx) add_kernels_amx(kernels);
    kernels.isa = isa;
    return kernels;
  }
  if (isa == Isa::kAvx2) return kernels_avx2();
#endif
  (void)isa;
  return kernels_baseline();
}

namespace {

struct Active {
  Kernels kernels;
  const char* error = nullptr;

  Active() {
    const Isa best = detect_isa();
    Isa isa = best;
    if (const char* name = std::getenv("FLASHMLA_CPU_ISA"); name != nullptr && *name != '\0') {
      error = "is not one of baseline, avx2, avx512, avx512_bf16, amx";
      for (int i = 0; i < kNumIsas; ++i) {
        if (std::strcmp(name, kIsaNames[i]) != 0) continue;
        error = i > static_cast<int>(best) ? "names an instruction set that this CPU or operating system does not offer"
                                           : nullptr;
        if (error == nullptr) isa = static_cast<Isa>(i);
      }
    }
    kernels = kernels_for(isa);
  }
};

const Active active;  // before main() or during dlopen(): the environment is never read later

}  // namespace

const Kernels& active_kernels() {
  return active.kernels;
}
const char* isa_override_error() {
  return active.error;
}

}  // namespace cpu
}  // namespace flashmla
