// One function for each instruction of PTX that neither CUDA C++ nor CUTLASS offers, with its section of the PTX ISA
// (9.7 is the instruction set). Kernels hold no assembly of their own.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cutlass/numeric_types.h>

#include <cstdint>
#include <cute/tensor.hpp>

namespace flashmla::sm90::ptx {

// ---- arithmetic -----------------------------------------------------------------------------------------------------

// 9.7.3, tanh: 2^-11 relative error.
__device__ inline float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 9.7.3, min.NaN: the smaller of x and 1; NaN stays.
__device__ inline float at_most_one(float x) {
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(1.0f));
  return x;
}

// 9.7.4, min.NaN: two packed elements, each cut to 1; NaN stays.
template <class Element>
__device__ uint32_t at_most_one(uint32_t pair) {
  uint32_t cut;
  if constexpr (std::is_same_v<Element, cutlass::half_t>) {
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(cut) : "r"(pair), "r"(0x3c003c00u));
  } else {
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(cut) : "r"(pair), "r"(0x3f803f80u));
  }
  return cut;
}

// 9.7.9.22, cvt.rn.satfinite: four floats as e4m3, the first in the lowest byte. Too large ones become 448, NaN stays.
__device__ inline uint32_t pack_e4m3(float a, float b, float c, float d) {
  uint32_t word;
  asm("{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, %2, %1; cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "  mov.b32 %0, {low, high}; }"
      : "=r"(word)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return word;
}

// 9.7.3.3, mul: without the compiler's option that makes zeros of denormal numbers.
__device__ inline float multiply_denormal(float a, float b) {
  float product;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
  return product;
}

// 9.7.9.22, cvt.f16x2.e4m3x2: four e4m3 numbers as fp16, exactly; the lower two of the word, and the upper two.
__device__ inline void unpack_e4m3(uint32_t word, uint32_t& low, uint32_t& high) {
  asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b; }"
      : "=r"(low), "=r"(high)
      : "r"(word));
}

// ---- products of a warp ---------------------------------------------------------------------------------------------

// 9.7.14.5, mma.m16n8k16 of fp16 or bf16: c += a b, in fp32. Lane 4 g + t has rows g, g + 8 of a at depths 2 t, 2 t + 1
// (a[0], a[1]) and 2 t + 8, 2 t + 9 (a[2], a[3]); column g of b at these depths (b[0], b[1]); columns 2 t, 2 t + 1 of c
// in row g (c[0], c[1]) and g + 8 (c[2], c[3]).
template <class Element>
__device__ void multiply_add_m16n8k16(float* c, uint32_t const (&a)[4], uint32_t const (&b)[2]) {
  if constexpr (std::is_same_v<Element, cutlass::half_t>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// 9.7.14.5.17, movmatrix: the transpose of an 8 x 8 matrix of 16-bit elements, of which lane 4 g + t has columns 2 t
// and 2 t + 1 of row g.
__device__ inline uint32_t transpose_matrix(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// ---- 8 x 8 matrices of 16-bit elements between registers and shared memory ------------------------------------------

// 9.7.15.5.16, stmatrix: lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void stmatrix_x4(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

// 9.7.15.5.15, ldmatrix.
__device__ inline void ldmatrix_x4(uint32_t address, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
               : "r"(address)
               : "memory");
}

// ---- global memory that other CTAs read -----------------------------------------------------------------------------

// 9.7.9.8, ld.acquire, at the scope of the GPU.
__device__ inline int32_t load_acquire(int32_t const* address) {
  int32_t value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ inline uint64_t load_acquire(uint64_t const* address) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.b64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

// 9.7.9.11, st.release, at the scope of the GPU.
__device__ inline void store_release(uint64_t* address, uint64_t value) {
  asm volatile("st.release.gpu.global.b64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

// 9.7.13.7, red.release: adds 1.
__device__ inline void reduce_release_increment(int32_t* address) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(address) : "memory");
}

// 9.7.13.7, red: adds four floats to 16 aligned bytes.
__device__ inline void reduce_add(float* address, float4 x) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
}

// 9.7.9.15, prefetch.
__device__ inline void prefetch_to_l2(void const* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address) : "memory");
}

// ---- the other CTA of a cluster -------------------------------------------------------------------------------------

// 9.7.9.23, mapa: the address, in the cluster's shared memory, of what CTA `rank` has where this one has `pointer`.
__device__ inline uint32_t address_in(uint32_t rank, void const* pointer) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(cute::cast_smem_ptr_to_uint(pointer)), "r"(rank));
  return address;
}

// 9.7.9.12, st.async: 16 bytes to another CTA, counted there on `barrier`; both by address_in.
__device__ inline void store_async(uint32_t address, uint32_t barrier, float a, float b, float c, float d) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
      "f"(a), "f"(b), "f"(c), "f"(d), "r"(barrier)
      : "memory");
}

__device__ inline void store_async(uint32_t address, uint32_t barrier, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  store_async(address, barrier, __uint_as_float(a), __uint_as_float(b), __uint_as_float(c), __uint_as_float(d));
}

// 9.7.13.15.13, mbarrier.arrive, with release at the CTA's scope; by address_in. It says that the tensor cores have
// read this CTA's shared memory; that loads have, release_to_other says. At the cluster's scope ptxas has the warp wait
// for all its writes to memory (MEMBAR.ALL.GPU), a thousand cycles or so; st.async needs none, its bytes are counted
// where they arrive.
__device__ inline void arrive_remote(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// 9.7.9.8, ld of a cluster's shared memory, by address_in: after the cluster's barrier.
__device__ inline float2 load_remote_float2(uint32_t address) {
  float2 x;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}

__device__ inline float4 load_remote_float4(uint32_t address) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

// 9.7.13.4, barrier.cluster: of all threads of the cluster that have not ended, by whole warps. What was written before
// is seen behind it. CUTLASS's functions let loads and stores move across.
__device__ inline void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- other kernels of the stream
// -------------------------------------------------------------------------------------

// 9.7.13.13, griddepcontrol.wait: until the kernels before have ended. CUTLASS's function lets loads move across.
__device__ inline void wait_on_dependent_grids() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// ---- the copy engine ------------------------------------------------------------------------------------------------

// 9.7.9.25.4.2, cp.reduce.async.bulk: has it add floats of shared memory to global memory.
__device__ inline void bulk_reduce_add(float* target, float const* source, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(target),
               "r"(cute::cast_smem_ptr_to_uint(source)), "r"(bytes)
               : "memory");
}

// 9.7.9.25.3.1, cp.async.bulk.commit_group.
__device__ inline void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// 9.7.9.25.3.2, cp.async.bulk.wait_group: until all groups are done, or have read their sources.
__device__ inline void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
__device__ inline void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// ---- what keeps ptxas from a choice of its own ----------------------------------------------------------------------

// 10.1, %tid.x: read here and kept. threadIdx.x may be read anew by every use, which takes longer than a register
// move; where registers are short the compiler does so in every step, and waits.
__device__ inline int read_thread_index() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// 9.7.13.1, bar.arrive, never reached, since sums of exponentials are not negative. ptxas moves a wait for wgmma up,
// ahead of exponentials that should overlap the product, but not past a barrier, and this one needs the sum of all.
__device__ inline void keep_before(float sum) {
  asm volatile("{ .reg .pred p; setp.lt.f32 p, %0, 0f00000000; @p bar.arrive 15, 32; }" ::"f"(sum) : "memory");
}

}  // namespace flashmla::sm90::ptx
