// C[m, n] (+)= sum_k A[m, k] B[k, n] with bf16 operands and fp32 sums, and how the operands are packed.
//
// A is row-major. B is in panels of 16 columns; inside a panel, rows k and k + 1 are interleaved ("VNNI"): a panel row
// of 64 bytes holds B[k, n], B[k + 1, n] for 16 n, the format both units below want:
//   AMX         TDPBF16PS: a 16 x 32 tile of A times a 32 x 16 tile of B. A block of C is 2 x 2 tiles: every tile
//   loaded is used
//               twice, and 4 independent sums cover the latency of the unit (52 cycles; a tile product issues every
//               16).
//   AVX512-BF16 VDPBF16PS: a pair of A broadcast times a panel row. A block of C is 8 rows x 2 panels.
// Everything is padded with zeros: m and k to 32, n to 16.
#pragma once

#include "gemm_f32.h"

namespace flashmla {
namespace cpu {
namespace {

#if defined(__AMX_BF16__)
struct AmxUnit {
  static constexpr bool kOverlap = true;  // the matrix unit can work while the vector units do something else

  // All eight tiles are 16 rows of 64 bytes. Tile state belongs to the thread: configure before, release after.
  static void begin() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  static void end() { _tile_release(); }

  // The compiler does not know that tile loads read memory: keep its stores on their side.
  static void fence() { __asm__ volatile("" ::: "memory"); }

  static void block_32x32(int64_t k, const uint16_t* a, int64_t lda, const uint16_t* b, int64_t stride_panel, float* c,
                          int64_t ldc, bool accumulate) {
    const int64_t c_bytes = ldc * 4, a_bytes = lda * 2;
    float* c_low = c + 16 * ldc;
    if (accumulate) {
      _tile_loadd(0, c, c_bytes);
      _tile_loadd(1, c + 16, c_bytes);
      _tile_loadd(2, c_low, c_bytes);
      _tile_loadd(3, c_low + 16, c_bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    const uint16_t* a_low = a + 16 * lda;
    const uint16_t* b_right = b + stride_panel;
    for (int64_t l = 0; l < k; l += 32) {
      _tile_loadd(4, a + l, a_bytes);
      _tile_loadd(6, b + l * 16, 64);
      _tile_loadd(7, b_right + l * 16, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, a_low + l, a_bytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16, c_bytes);
    _tile_stored(2, c_low, c_bytes);
    _tile_stored(3, c_low + 16, c_bytes);
  }

  static void block_32x16(int64_t k, const uint16_t* a, int64_t lda, const uint16_t* b, float* c, int64_t ldc,
                          bool accumulate) {
    const int64_t c_bytes = ldc * 4, a_bytes = lda * 2;
    float* c_low = c + 16 * ldc;
    if (accumulate) {
      _tile_loadd(0, c, c_bytes);
      _tile_loadd(2, c_low, c_bytes);
    } else {
      _tile_zero(0);
      _tile_zero(2);
    }
    const uint16_t* a_low = a + 16 * lda;
    for (int64_t l = 0; l < k; l += 32) {
      _tile_loadd(4, a + l, a_bytes);
      _tile_loadd(6, b + l * 16, 64);
      _tile_loadd(5, a_low + l, a_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(2, c_low, c_bytes);
  }

  static void gemm(int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t lda, const uint16_t* b,
                   int64_t stride_panel, float* c, int64_t ldc, bool accumulate) {
    fence();
    for (int64_t i = 0; i < m; i += 32) {
      int64_t j = 0;
      for (; j + 32 <= n; j += 32)
        block_32x32(k, a + i * lda, lda, b + j / 16 * stride_panel, stride_panel, c + i * ldc + j, ldc, accumulate);
      if (j < n) block_32x16(k, a + i * lda, lda, b + j / 16 * stride_panel, c + i * ldc + j, ldc, accumulate);
    }
    fence();
  }
};
#endif

#if defined(__AVX512BF16__)
struct DotUnit {
  static constexpr bool kOverlap = false;

  static void begin() {}
  static void end() {}

  template <int kPanels>
  static void block(int64_t k, const uint16_t* a, int64_t lda, const uint16_t* b, int64_t stride_panel, float* c,
                    int64_t ldc, bool accumulate) {
    __m512 acc[8][kPanels];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) acc[i][p] = accumulate ? load(c + i * ldc + p * 16) : VecF{};
    for (int64_t l = 0; l < k; l += 2) {
      __m512i bv[kPanels];
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) bv[p] = _mm512_loadu_si512(b + p * stride_panel + l * 16);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        int32_t pair;
        __builtin_memcpy(&pair, a + i * lda + l, 4);
        const __m512bh av = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
        for (int p = 0; p < kPanels; ++p) acc[i][p] = _mm512_dpbf16_ps(acc[i][p], av, (__m512bh)bv[p]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) store(c + i * ldc + p * 16, acc[i][p]);
  }

  static void gemm(int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t lda, const uint16_t* b,
                   int64_t stride_panel, float* c, int64_t ldc, bool accumulate) {
    for (int64_t j = 0; j < n; j += 32) {
      const uint16_t* panel = b + j / 16 * stride_panel;
      for (int64_t i = 0; i < m; i += 8) {
        if (j + 32 <= n) {
          block<2>(k, a + i * lda, lda, panel, stride_panel, c + i * ldc + j, ldc, accumulate);
        } else {
          block<1>(k, a + i * lda, lda, panel, stride_panel, c + i * ldc + j, ldc, accumulate);
        }
      }
    }
  }
};
#endif

template <typename Unit>
struct GemmBF16 {
  using Input = BFloat16;
  using Element = uint16_t;
  static constexpr int kExpDegree = 5;  // P is rounded to 8 bits; its sum, and so lse, still has 1.5 ulp per term
  static constexpr int64_t kPanel = 16;
  static constexpr int64_t kAlignM = 32, kAlignK = 32, kAlignN = 16;
  static constexpr int64_t kTrimBegin = 32, kTrimEnd = 32, kVectorStep = 32;
  // Forward: S is 32 x 256 fp32 = 32 KiB, which fits L1 beside P.
  static constexpr bool kOverlap = Unit::kOverlap;
  static constexpr int64_t kForwardBlockQ = 32, kForwardBlockKV = 256;
  // Backward: S and dP of 32 x 32 are consumed while in L1; 128 queries give the sums dV and dK 4 tile products per
  // load of C.
  static constexpr int64_t kBackwardBlockQ = 128, kBackwardSubKV = 32, kBackwardSubQ = 32;

  static void begin() { Unit::begin(); }
  static void end() { Unit::end(); }

  static int64_t size_b(int64_t n, int64_t k) { return round_up(n, 32) * round_up(k, 32); }
  static OperandB<uint16_t> operand_b(const uint16_t* data, int64_t /*n*/, int64_t k) {
    return {data, kPanel, kPanel * k};
  }
  static OperandB<uint16_t> operand_ds(const uint16_t* data, int64_t n, int64_t k) { return operand_b(data, n, k); }

  static const uint16_t* ds_at(const uint16_t* data, int64_t query, int64_t key, int64_t num_keys) {
    return data + round_down(query, kPanel) * num_keys + round_down(key, 2) * kPanel + query % kPanel * 2 + key % 2;
  }

  static void gemm(int64_t m, int64_t n, int64_t k, OperandA<uint16_t> a, OperandB<uint16_t> b, float* c, int64_t ldc,
                   bool accumulate) {
    Unit::gemm(m, n, k, a.data, a.stride_m, b.data, b.stride_panel, c, ldc, accumulate);
  }

  // 32 (16) elements from p, zero from the n-th on.
  static __m512i load32(const BFloat16* p, int64_t n) {
    const __mmask32 mask = n >= 32 ? ~__mmask32{0} : n <= 0 ? __mmask32{0} : (__mmask32{1} << n) - 1;
    return _mm512_maskz_loadu_epi16(mask, p);
  }
  static __m512i interleave_low(__m512i even, __m512i odd) {  // elements 0-15 of both rows as 16 pairs
    const __m512i index = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    return _mm512_permutex2var_epi16(even, index, odd);
  }
  static __m512i interleave_high(__m512i even, __m512i odd) {  // elements 16-31
    const __m512i index = _mm512_set_epi16(63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54,
                                           22, 53, 21, 52, 20, 51, 19, 50, 18, 49, 17, 48, 16);
    return _mm512_permutex2var_epi16(even, index, odd);
  }

  static void pack_row(uint16_t* dst, const BFloat16* src, int64_t n, int64_t ld) {
    for (int64_t i = 0; i < ld; i += 32) _mm512_storeu_si512(dst + i, load32(src + i, n - i));
  }

  // B[k, n] = src[k][n]; rows from num_rows to num_k are zero.
  static void pack_b(uint16_t* dst, const BFloat16* const* rows, int64_t num_rows, int64_t num_k, int64_t n) {
    for (int64_t k = 0; k < num_k; k += 2)
      for (int64_t i = 0; i < n; i += 32) {
        const __m512i even = k < num_rows ? load32(rows[k] + i, n - i) : _mm512_setzero_si512();
        const __m512i odd = k + 1 < num_rows ? load32(rows[k + 1] + i, n - i) : _mm512_setzero_si512();
        uint16_t* out = dst + i * num_k + k * 16;
        _mm512_storeu_si512(out, interleave_low(even, odd));
        if (i + 16 < n) _mm512_storeu_si512(out + 16 * num_k, interleave_high(even, odd));
      }
  }

  // B[k, n] = src[n][k]: a transpose of pairs, which are 32 bits wide.
  static void pack_b_transposed(uint16_t* dst, const BFloat16* const* rows, int64_t num_rows, int64_t n, int64_t k,
                                int64_t k_padded) {
    for (int64_t j = 0; j < n; j += 16)
      for (int64_t i = 0; i < k_padded; i += 32) {
        VecF x[16];
        for (int l = 0; l < 16; ++l) x[l] = j + l < num_rows ? (VecF)load32(rows[j + l] + i, k - i) : VecF{};
        transpose(x);
        for (int l = 0; l < 16; ++l)
          _mm512_storeu_ps(reinterpret_cast<float*>(dst + j * k_padded + (i + 2 * l) * 16), x[l]);
      }
  }

  // A[m, k] = src[k][m], m < n, rows `ld` apart: pairs of rows interleaved, then a transpose of pairs.
  static void pack_a_transposed(uint16_t* dst, const BFloat16* const* rows, int64_t num_rows, int64_t n, int64_t ld) {
    for (int64_t k = 0; k < num_rows; k += 32)
      for (int64_t i = 0; i < round_up(n, kAlignM); i += 16) {
        VecF x[16];
        for (int l = 0; l < 16; ++l) {
          const int64_t row = k + 2 * l;
          const __m512i even = row < num_rows ? load32(rows[row] + i, min64(16, n - i)) : _mm512_setzero_si512();
          const __m512i odd = row + 1 < num_rows ? load32(rows[row + 1] + i, min64(16, n - i)) : _mm512_setzero_si512();
          x[l] = (VecF)interleave_low(even, odd);
        }
        transpose(x);
        for (int l = 0; l < 16; ++l) _mm512_storeu_ps(reinterpret_cast<float*>(dst + (i + l) * ld + k), x[l]);
      }
  }

  // 32 numbers rounded to bf16, in order.
  static void store_pair(uint16_t* p, VecF low, VecF high) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }

  // dS^T of keys `key`, `key` + 1 (even) and 32 queries from `query` on: as two rows of an A operand at `dst`, and into
  // the B operand `b` of `num_keys` keys.
  static void store_ds(uint16_t* dst, int64_t ld, uint16_t* b, int64_t key, int64_t query, int64_t num_keys,
                       const VecF (&ds)[2][2]) {
    const __m512i even = (__m512i)_mm512_cvtne2ps_pbh(ds[0][1], ds[0][0]);
    const __m512i odd = (__m512i)_mm512_cvtne2ps_pbh(ds[1][1], ds[1][0]);
    _mm512_storeu_si512(dst, even);
    _mm512_storeu_si512(dst + ld, odd);
    uint16_t* out = b + query * num_keys + key * 16;
    _mm512_storeu_si512(out, interleave_low(even, odd));
    _mm512_storeu_si512(out + 16 * num_keys, interleave_high(even, odd));
  }
};

}  // namespace
}  // namespace cpu
}  // namespace flashmla
