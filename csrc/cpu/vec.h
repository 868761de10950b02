// Vectors of fp32 for one instruction set: the compiler's vector extensions for arithmetic, intrinsics only where they
// say what the compiler cannot (max, conversions, transposes), and exp and tanh.
//
// Everything in csrc/cpu/*.h is compiled once per instruction set, with that set's flags, inside an anonymous
// namespace: no symbol is shared between the copies, so the linker can never pick an AVX-512 copy for a CPU without it.
// For the same reason these headers use nothing of the C++ library but fixed-width integers.
#pragma once

#include <cstdint>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace flashmla {
namespace cpu {
namespace {

// function(constant of value `number`), for a number from kBegin on below kEnd; nothing for any other.
template <int kBegin, int kEnd, typename Function>
void with_constant(int64_t number, const Function& function) {
  if constexpr (kBegin < kEnd) {
    if (number == kBegin) return function(std::integral_constant<int, kBegin>{});
    with_constant<kBegin + 1, kEnd>(number, function);
  }
}

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VecF __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecH __attribute__((vector_size(2 * kLanes)));  // fp16 or bf16 bits

constexpr float kInf = __builtin_inff();
constexpr float kLog2E = 1.44269504088896340736f;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline VecF load(const float* p) {
  VecF x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, VecF x) {
  __builtin_memcpy(p, &x, sizeof x);
}
inline VecF set1(float x) {
  return x - VecF{};
}  // x - 0 keeps -0.0 and NaN

// a * b + c; one rounding where the instruction set has FMA (these files are compiled with -ffp-contract=fast).
inline VecF fma(VecF a, VecF b, VecF c) {
  return a * b + c;
}

// a * b, rounded before anything is added to it; a product of its own, so that the compiler still fuses others of a and
// b.
inline VecF rounded_product(VecF a, VecF b) {
  __asm__("" : "+m"(a));
  VecF x = a * b;
  __asm__("" : "+m"(x));
  return x;
}

// NaN in b is kept, NaN in a is not: fold data into b.
inline VecF max(VecF a, VecF b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline float horizontal_max(VecF x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#else
  float y = x[0];
  for (int i = 1; i < kLanes; ++i) y = y > x[i] ? y : x[i];
  return y;
#endif
}
inline float horizontal_sum(VecF x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#else
  float y = 0;
  for (int i = 0; i < kLanes; ++i) y += x[i];
  return y;
#endif
}

inline VecI lane_index() {
  VecI x;
  for (int i = 0; i < kLanes; ++i) x[i] = i;
  return x;
}

// x in lanes [begin, end), `other` elsewhere.
inline VecF keep_lanes(VecF x, int64_t begin, int64_t end, VecF other) {
  const int32_t b = begin < 0 ? 0 : begin > kLanes ? kLanes : static_cast<int32_t>(begin);
  const int32_t e = end < 0 ? 0 : end > kLanes ? kLanes : static_cast<int32_t>(end);
  const VecI lane = lane_index();
  return ((lane >= b) & (lane < e)) ? x : other;
}

// exp(x) for x <= 88; 0 below -87.3 (where the result would be subnormal); NaN stays NaN. About 1 ulp (kDegree = 6) or
// 1.5 ulp (5): x = (n + f) ln 2 with |f| <= 1/2, 2^f by a minimax polynomial with constant term 1, 2^n into the
// exponent bits.
template <int kDegree>
inline VecF exp(VecF x) {
  const VecF kRound =
      set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer and leaves that in the low mantissa bits
  const VecF t = fma(x, set1(kLog2E), kRound);
  const VecF n = t - kRound;
  const VecF f = fma(x, set1(kLog2E), -n);
  VecF y;
  if constexpr (kDegree == 6) {
    y = fma(f, set1(1.5353362e-4f), set1(1.3398874e-3f));
    y = fma(f, y, set1(9.6184374e-3f));
    y = fma(f, y, set1(5.5503324e-2f));
    y = fma(f, y, set1(2.4022648e-1f));
    y = fma(f, y, set1(6.9314720e-1f));
  } else {
    y = fma(f, set1(1.3264727e-3f), set1(9.6715127e-3f));
    y = fma(f, y, set1(5.5507337e-2f));
    y = fma(f, y, set1(2.4022242e-1f));
    y = fma(f, y, set1(6.9314698e-1f));
  }
  y = fma(f, y, set1(1.0f));
  const VecI shifted = (VecI)t << 23;
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask(x, set1(-87.33f), _CMP_NLT_UQ);  // true for NaN
  return (VecF)_mm512_maskz_add_epi32(normal, (__m512i)(VecI)y, (__m512i)shifted);
#else
  const VecF r = (VecF)((VecI)y + shifted);
  return x < set1(-87.33f) ? VecF{} : r;
#endif
}

// exp of one number, the same function as above.
inline float exp1(float x) {
  return exp<6>(set1(x))[0];
}

// tanh(x): an odd polynomial below 0.625 (Cephes tanhf), 1 - 2 / (exp(2x) + 1) above.
inline VecF tanh(VecF x) {
  const VecF a = x < VecF{} ? -x : x;
  const VecF z = x * x;
  VecF y = fma(z, set1(-5.70498872745e-3f), set1(2.06390887954e-2f));
  y = fma(z, y, set1(-5.37397155531e-2f));
  y = fma(z, y, set1(1.33314422036e-1f));
  y = fma(z, y, set1(-3.33332819422e-1f));
  const VecF small = fma(z * x, y, x);
  const VecF clamped = a > set1(20.0f) ? set1(20.0f) : a;
  const VecF large = 1.0f - 2.0f / (exp<6>(clamped + clamped) + 1.0f);
  const VecF signed_large = x < VecF{} ? -large : large;
  return a < set1(0.625f) ? small : a == a ? signed_large : x;
}

// Conversions. fp32 -> bf16 rounds to nearest even and keeps subnormals and NaN.
inline VecF bf16_to_f32(VecH x) {
  return (VecF)(__builtin_convertvector(x, VecU) << 16);
}
inline VecH f32_to_bf16(VecF x) {
  const VecU u = (VecU)x;
  const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VecU quiet = (u >> 16) | 0x40u;
  return __builtin_convertvector((VecU)(x == x ? (VecI)rounded : (VecI)quiet), VecH);
}

#if defined(__AVX512F__)
inline VecF f16_to_f32(VecH x) {
  return _mm512_cvtph_ps((__m256i)x);
}
inline VecH f32_to_f16(VecF x) {
  return (VecH)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__F16C__)
inline VecF f16_to_f32(VecH x) {
  return _mm256_cvtph_ps((__m128i)x);
}
inline VecH f32_to_f16(VecF x) {
  return (VecH)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
}
#else
// Without F16C: let the floating-point unit do the (de)normalising by multiplying with powers of two.
inline VecF f16_to_f32(VecH x) {
  const VecU h = __builtin_convertvector(x, VecU);
  const VecU sign = (h & 0x8000u) << 16;
  const VecU magnitude = (h & 0x7fffu) << 13;
  const VecF finite = (VecF)magnitude * set1(5.192296858534828e33f);  // 2^112: rebias the exponent, 127 - 15
  const VecU special = magnitude | 0x7f800000u;                       // inf and NaN
  const VecI is_special = (VecI)(h & 0x7c00u) == 0x7c00;
  return (VecF)((is_special ? special : (VecU)finite) | sign);
}
inline VecH f32_to_f16(VecF x) {
  const VecU u = (VecU)x;
  const VecU sign = (u >> 16) & 0x8000u;
  const VecU a = u & 0x7fffffffu;
  // Subnormal results: adding 0.5 aligns the mantissa so that the addition itself rounds to nearest even.
  const VecU subnormal = (VecU)((VecF)a + set1(0.5f)) - 0x3f000000u;
  const VecU normal = (a + 0xc8000fffu + ((a >> 13) & 1u)) >> 13;  // rebias by -112, round to nearest even
  VecU h = (VecI)a < 0x38800000 ? subnormal : normal;
  h = (VecI)a >= 0x47800000 ? VecU{} + 0x7c00u : h;
  h = (VecI)a > 0x7f800000 ? VecU{} + 0x7e00u : h;
  return __builtin_convertvector(h | sign, VecH);
}
#endif

// kLanes elements of any input dtype as fp32.
inline VecF load_as_f32(const float* p) {
  return load(p);
}
inline VecF load_as_f32(const BFloat16* p) {
  VecH x;
  __builtin_memcpy(&x, p, sizeof x);
  return bf16_to_f32(x);
}
inline VecF load_as_f32(const Float16* p) {
  VecH x;
  __builtin_memcpy(&x, p, sizeof x);
  return f16_to_f32(x);
}
inline void store_from_f32(float* p, VecF x) {
  store(p, x);
}
inline void store_from_f32(BFloat16* p, VecF x) {
  const VecH y = f32_to_bf16(x);
  __builtin_memcpy(p, &y, sizeof y);
}
inline void store_from_f32(Float16* p, VecF x) {
  const VecH y = f32_to_f16(x);
  __builtin_memcpy(p, &y, sizeof y);
}

// The first n <= kLanes elements only; the other lanes are 0 (load) or left alone (store).
template <typename T>
inline VecF load_as_f32(const T* p, int64_t n) {
  if (n >= kLanes) return load_as_f32(p);
  T buffer[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load_as_f32(buffer);
}
template <typename T>
inline void store_from_f32(T* p, VecF x, int64_t n) {
  if (n >= kLanes) return store_from_f32(p, x);
  T buffer[kLanes];
  store_from_f32(buffer, x);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

template <typename T>
inline float element_as_f32(const T* p) {
  return load_as_f32(p, 1)[0];
}

// Has a row of n elements neither infinity nor NaN? Times 0 they are NaN, and anything else is 0.
template <typename T>
inline bool is_finite(const T* p, int64_t n) {
  VecF sum = {};
  for (int64_t i = 0; i < n; i += kLanes) sum = fma(load_as_f32(p + i, n - i), VecF{}, sum);
  return horizontal_sum(sum) == 0.0f;
}

// y += factor * x, n elements; y is fp32.
template <typename T>
inline void add_multiple(float* y, float factor, const T* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes)
    store_from_f32(y + i, fma(load_as_f32(x + i, n - i), set1(factor), load_as_f32(y + i, n - i)), n - i);
}

// A number of a packed operand: fp32, or the bits of a bf16.
inline float to_f32(float x) {
  return x;
}
inline float to_f32(uint16_t bits) {
  const uint32_t u = static_cast<uint32_t>(bits) << 16;
  float x;
  __builtin_memcpy(&x, &u, sizeof x);
  return x;
}

// In place transpose of kLanes x kLanes.
inline void transpose(VecF (&x)[kLanes]) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
  for (int i = 0; i < 8; ++i) {  // pairs of rows
    a[2 * i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {  // 4 x 4 blocks inside every 128-bit lane
    b[4 * i] = _mm512_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
    b[4 * i + 1] = _mm512_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
    b[4 * i + 2] = _mm512_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
    b[4 * i + 3] = _mm512_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {  // 128-bit lanes between the blocks
    a[i] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_shuffle_f32x4(a[i], a[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_f32x4(a[i], a[i + 8], 0xdd);
    x[i + 4] = _mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0x88);
    x[i + 12] = _mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0xdd);
  }
#else
  VecF y[kLanes];
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) y[j][i] = x[i][j];
  for (int i = 0; i < kLanes; ++i) x[i] = y[i];
#endif
}

inline int64_t min64(int64_t a, int64_t b) {
  return a < b ? a : b;
}
inline int64_t max64(int64_t a, int64_t b) {
  return a > b ? a : b;
}
inline int64_t round_down(int64_t x, int64_t multiple) {
  return x - x % multiple;
}
inline int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

}  // namespace
}  // namespace cpu
}  // namespace flashmla
