// C[m, n] (+)= sum_k A[m, k] B[k, n] in fp32, and how its operands are packed from rows of any input dtype.
//
// A is read one number at a time (broadcast), so it may be transposed freely: any strides. B is read in vectors along
// n, in panels of kPanel columns, k-major inside a panel. A block of kBlockM x kPanel of C stays in registers for the
// whole of k: 6 x 64 with AVX-512 (24 accumulators, 4 vectors of B and one broadcast of 32 registers), 6 x 16 with AVX2
// (12 + 2 + 1 of 16), 6 x 8 at the baseline. Each block does 6 * 4 multiply-adds per 4 loads and 6 broadcasts, within
// the load ports' rate.
#pragma once

#include "vec.h"

namespace flashmla {
namespace cpu {
namespace {

template <typename E>
struct OperandA {
  const E* data;
  int64_t stride_m, stride_k;
};
template <typename E>
struct OperandB {
  const E* data;
  int64_t stride_k;      // between rows k of one panel
  int64_t stride_panel;  // between panels
};

template <typename InputT>
struct GemmF32 {
  using Input = InputT;   // dtype of q, k, v, out
  using Element = float;  // dtype of the packed operands
  static constexpr int kExpDegree = 6;
  static constexpr int64_t kVectorsPerPanel = kLanes == 16 ? 4 : 2;
  static constexpr int64_t kPanel = kVectorsPerPanel * kLanes;
  static constexpr int64_t kAlignM = 1, kAlignK = 1;
  static constexpr int64_t kAlignN = kLanes;  // columns computed are rounded up to this
  // A range of columns of B (or of the k they become in the next product) begins and ends at multiples of these.
  static constexpr int64_t kTrimBegin = kPanel, kTrimEnd = kLanes;
  static constexpr int64_t kVectorStep = kLanes;  // softmax works on this many columns at a time
  // Tiles. Forward: S is 96 x 128 fp32 = 48 KiB; 96 = 16 register blocks of 6 rows.
  static constexpr bool kOverlap = false;  // products and softmax use the same units
  static constexpr int64_t kForwardBlockQ = 96, kForwardBlockKV = 128;
  // Backward: lanes are queries; one panel of 64 at AVX-512. 48 keys = 8 register blocks.
  static constexpr int64_t kBackwardBlockQ = 64, kBackwardSubKV = 48, kBackwardSubQ = 64;
  static constexpr bool kSeparateTransposes =
      false;  // A may be read transposed: one copy of K and of dS serves both ways

  static void begin() {}
  static void end() {}

  // Elements of a packed B with n columns and k rows.
  static int64_t size_b(int64_t n, int64_t k) { return round_up(n, kPanel) * k; }
  static OperandB<float> operand_b(const float* data, int64_t /*n*/, int64_t k) { return {data, kPanel, kPanel * k}; }
  // dS^T [kv, q] as a B operand, where it was written as an A operand with rows of `n` numbers.
  static OperandB<float> operand_ds(const float* data, int64_t n, int64_t /*k*/) { return {data, n, kPanel}; }

  static const float* ds_at(const float* data, int64_t query, int64_t key, int64_t /*num_keys*/) {
    return data + key * kBackwardBlockQ + query;
  }

  // One row of A: n elements, zero up to the leading dimension `ld`.
  static void pack_row(float* dst, const Input* src, int64_t n, int64_t ld) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(dst + i, load_as_f32(src + i));
    for (; i < ld; i += kLanes) {
      const VecF x = load_as_f32(src + min64(i, n), n - i);
      for (int64_t l = 0; l < min64(kLanes, ld - i); ++l) dst[i + l] = x[l];
    }
  }

  // B[k, n] = src[k][n]: rows of the source are k. Row k of `rows` goes to row k of every panel.
  static void pack_b_row(float* dst, int64_t k, int64_t num_k, const Input* src, int64_t n) {
    for (int64_t panel = 0; panel < n; panel += kPanel) {
      float* out = dst + panel * num_k + k * kPanel;
      for (int64_t i = panel; i < min64(n, panel + kPanel); i += kLanes)
        store(out + (i - panel), load_as_f32(src + i, n - i));
    }
  }
  static void pack_b(float* dst, const Input* const* rows, int64_t num_rows, int64_t num_k, int64_t n) {
    for (int64_t k = 0; k < num_rows; ++k) pack_b_row(dst, k, num_k, rows[k], n);
    for (int64_t k = num_rows; k < num_k; ++k)
      for (int64_t i = 0; i < n; i += kLanes)
        store(dst + round_down(i, kPanel) * num_k + k * kPanel + i % kPanel, VecF{});
  }
  // B[k, n] = src[n][k]: rows of the source are n; missing rows are zero.
  static void pack_b_transposed(float* dst, const Input* const* rows, int64_t num_rows, int64_t n, int64_t k,
                                int64_t /*k_padded*/) {
    for (int64_t j = 0; j < n; j += kLanes) {
      float* panel = dst + round_down(j, kPanel) * k + j % kPanel;
      for (int64_t i = 0; i < k; i += kLanes) {
        VecF x[kLanes];
        for (int l = 0; l < kLanes; ++l) x[l] = j + l < num_rows ? load_as_f32(rows[j + l] + i, k - i) : VecF{};
        transpose(x);
        for (int64_t l = 0; l < min64(kLanes, k - i); ++l) store(panel + (i + l) * kPanel, x[l]);
      }
    }
  }

  template <int kRows, int kVectors>
  static void block(const float* a, int64_t sm, int64_t sk, const float* b, int64_t sb, int64_t k, float* c,
                    int64_t ldc, bool accumulate) {
    VecF acc[kRows][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[i][v] = accumulate ? load(c + i * ldc + v * kLanes) : VecF{};
    const float* a_high = a + 3 * sm;  // two bases and one stride address all six rows
    for (int64_t l = 0; l < k; ++l) {
      VecF bv[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) bv[v] = load(b + v * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const VecF av = set1(i < 3 ? a[i * sm] : a_high[(i - 3) * sm]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[i][v] = fma(av, bv[v], acc[i][v]);
      }
      a += sk;
      a_high += sk;
      b += sb;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(c + i * ldc + v * kLanes, acc[i][v]);
  }

  template <int kVectors>
  static void rows_of_blocks(int64_t m, int64_t k, OperandA<float> a, const float* b, int64_t sb, float* c, int64_t ldc,
                             bool accumulate) {
    int64_t i = 0;
    for (; i + 6 <= m; i += 6)
      block<6, kVectors>(a.data + i * a.stride_m, a.stride_m, a.stride_k, b, sb, k, c + i * ldc, ldc, accumulate);
    const float* ai = a.data + i * a.stride_m;
    float* ci = c + i * ldc;
    with_constant<1, 6>(m - i, [&](auto rows) {
      block<decltype(rows)::value, kVectors>(ai, a.stride_m, a.stride_k, b, sb, k, ci, ldc, accumulate);
    });
  }

  // C has rows of at least round_up(n, kLanes) numbers.
  static void gemm(int64_t m, int64_t n, int64_t k, OperandA<float> a, OperandB<float> b, float* c, int64_t ldc,
                   bool accumulate) {
    for (int64_t j = 0; j < n; j += kPanel) {
      const float* panel = b.data + j / kPanel * b.stride_panel;
      with_constant<1, kVectorsPerPanel + 1>((min64(kPanel, n - j) + kLanes - 1) / kLanes, [&](auto vectors) {
        rows_of_blocks<decltype(vectors)::value>(m, k, a, panel, b.stride_k, c + j, ldc, accumulate);
      });
    }
  }
};

}  // namespace
}  // namespace cpu
}  // namespace flashmla
