// Cycles a warp instruction takes on a quarter of a multiprocessor (SMSP), with two warps on each, as the fp8 forward has.
#include <cstdint>
#include <cstdio>
#include <cuda_fp16.h>
constexpr int kSteps = 64, kWide = 16;
template <int kWhat>
__global__ void measure(long long* cycles, float* out, float seed) {
  float x[kWide]; uint32_t w[kWide]; int n[kWide];
  for (int i = 0; i < kWide; ++i) { x[i] = seed * (threadIdx.x + i) * 1e-3f; w[i] = __float_as_uint(x[i]); n[i] = w[i]; }
  __syncthreads();
  long long const begin = clock64();
#pragma unroll 1
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      if (kWhat == 0 || kWhat == 5 || kWhat == 7) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x[i]));
      if (kWhat == 1 || ((kWhat == 5 || kWhat == 8) && i % 2 == 0))
        asm volatile("{ .reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, %1, %2; mov.b32 {_, h}, %0; mov.b32 %0, {l, h}; }"
                     : "+r"(w[i]) : "f"(seed), "f"(1.0f));
      if (kWhat == 2 || kWhat == 8) asm volatile("max.f32 %0, %0, %1;" : "+f"(x[i]) : "f"(seed));
      if (kWhat == 3) n[i] = __vimax3_s32(n[i], n[(i + 1) % kWide], w[i]);
      if (kWhat == 4 || kWhat == 7) asm volatile("fma.rn.f32 %0, %1, %2, %0;" : "+f"(x[(i + 7) % kWide]) : "f"(seed), "f"(seed));
      if (kWhat == 6) asm volatile("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w[i]) : "f"(x[i]), "f"(__uint_as_float(w[(i + 1) % kWide])));
      if (kWhat == 9) asm volatile("fma.rn.f16x2 %0, %1, %1, %0;" : "+r"(w[i]) : "r"(n[0]));
      if (kWhat == 10) asm volatile("{ .reg .b16 l; cvt.rn.satfinite.e4m3x2.f16x2 l, %0; mov.b32 %0, {l, l}; }" : "+r"(w[i]));
      if (kWhat == 11) asm volatile("ex2.approx.f16x2 %0, %0;" : "+r"(w[i]));
    }
  }
  long long const end = clock64();
  float sum = 0;
  for (int i = 0; i < kWide; ++i) sum += x[i] + __uint_as_float(w[i]) + n[i];
  out[threadIdx.x] = sum;
  if (threadIdx.x == 0) *cycles = end - begin;
}
template <int kWhat>
void run(const char* name) {
  long long* cycles; float* out;
  cudaMallocManaged(&cycles, 8); cudaMalloc(&out, 4096);
  for (int warps : {4, 8}) {
    for (int i = 0; i < 3; ++i) { measure<kWhat><<<1, 32 * warps>>>(cycles, out, 1.0f); cudaDeviceSynchronize(); }
    printf("  %-34s %d warps an SMSP: %6.2f cycles a step of one warp\n", name, warps / 4, double(*cycles) / (kSteps * kWide) / (warps / 4));
  }
}
int main() {
  run<0>("MUFU.EX2"); run<1>("F2FP.E4M3 of f32"); run<2>("FMNMX"); run<3>("VIMNMX3"); run<4>("FFMA"); run<6>("F2FP.F16");
  run<9>("HFMA2"); run<10>("F2FP.E4M3 of f16x2"); run<11>("ex2.f16x2"); run<5>("MUFU + 1/2 F2FP.E4M3"); run<7>("MUFU + FFMA"); run<8>("FMNMX + 1/2 F2FP.E4M3");
  printf("%s\n", cudaGetErrorString(cudaGetLastError()));
}
