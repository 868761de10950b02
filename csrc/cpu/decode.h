// The two products of the forward pass for a handful of query rows (decoding without or with small groups).
//
// Packing K and V pays off when many rows use them. For one to four rows it would cost more than the products, so here
// both are read where they lie, once:
//   S[i, j] = Q[i, :] K[j, :]     kLanes keys at a time: one vector of partial sums per key, then a transpose adds them
//   up O[i, :] += P[i, j] V[j, :]    a strip of O stays in registers while j runs over the block of keys
#pragma once

#include "vec.h"

namespace flashmla {
namespace cpu {
namespace {

template <typename Input>
struct Decode {
  static constexpr int64_t kMaxRows = 4;

  // q [m, ld_q] fp32, zero from d to round_up(d, kLanes); k [n, d]; s [m, ld_s], written up to round_up(n, kLanes).
  static void scores(int64_t m, int64_t n, int64_t d, const float* q, int64_t ld_q, const Input* k, int64_t stride_k,
                     float* s, int64_t ld_s) {
    with_constant<1, kMaxRows + 1>(
        m, [&](auto rows) { scores_of<decltype(rows)::value>(n, d, q, ld_q, k, stride_k, s, ld_s); });
  }

  // p [m, ld_p]; v [n, d]; o [m, ld_o] with rows of round_up(d, kLanes).
  static void accumulate(int64_t m, int64_t n, int64_t d, const float* p, int64_t ld_p, const Input* v,
                         int64_t stride_v, float* o, int64_t ld_o) {
    with_constant<1, kMaxRows + 1>(
        m, [&](auto rows) { accumulate_of<decltype(rows)::value>(n, d, p, ld_p, v, stride_v, o, ld_o); });
  }

  // Rows of K and V are far apart where the heads of a token lie together: too far for the hardware to see the pattern.
  // A prefetch past the end reads nothing and cannot fault.
  static constexpr int64_t kAhead = 12;
  static void prefetch(const Input* p, int64_t n) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(p), end = begin + n * sizeof(Input);
    for (uintptr_t line = begin; line < end; line += 64) __builtin_prefetch(reinterpret_cast<const void*>(line));
  }

  template <int kRows>
  static void scores_of(int64_t n, int64_t d, const float* q, int64_t ld_q, const Input* k, int64_t stride_k, float* s,
                        int64_t ld_s) {
    const int64_t d_whole = round_down(d, kLanes);
    for (int64_t j = 0; j < n; j += kLanes) {
      VecF sums[kRows][kLanes];
      for (int64_t l = 0; l < kLanes; ++l) {
        const Input* key = k + min64(j + l, n - 1) * stride_k;
        prefetch(key + kAhead * stride_k, d);
        VecF sum[kRows] = {};
        for (int64_t c = 0; c < d_whole; c += kLanes) {
          const VecF x = load_as_f32(key + c);
          for (int i = 0; i < kRows; ++i) sum[i] = fma(x, load(q + i * ld_q + c), sum[i]);
        }
        if (d_whole < d) {
          const VecF x = load_as_f32(key + d_whole, d - d_whole);
          for (int i = 0; i < kRows; ++i) sum[i] = fma(x, load(q + i * ld_q + d_whole), sum[i]);
        }
        for (int i = 0; i < kRows; ++i) sums[i][l] = sum[i];
      }
      for (int i = 0; i < kRows; ++i) {
        transpose(sums[i]);
        VecF total = sums[i][0];
        for (int l = 1; l < kLanes; ++l) total += sums[i][l];
        store(s + i * ld_s + j, total);
      }
    }
  }

  template <int kRows>
  static void accumulate_of(int64_t n, int64_t d, const float* p, int64_t ld_p, const Input* v, int64_t stride_v,
                            float* o, int64_t ld_o) {
    int64_t c = 0;
    for (; c + 4 * kLanes <= d; c += 4 * kLanes) strip<kRows, 4>(n, p, ld_p, v + c, stride_v, o + c, ld_o);
    for (; c + kLanes <= d; c += kLanes) strip<kRows, 1>(n, p, ld_p, v + c, stride_v, o + c, ld_o);
    if (c == d) return;
    for (int64_t j = 0; j < n; ++j) {
      const VecF x = load_as_f32(v + j * stride_v + c, d - c);
      for (int i = 0; i < kRows; ++i) store(o + i * ld_o + c, fma(x, set1(p[i * ld_p + j]), load(o + i * ld_o + c)));
    }
  }

  // kVectors whole vectors of every row of O.
  template <int kRows, int kVectors>
  static void strip(int64_t n, const float* p, int64_t ld_p, const Input* v, int64_t stride_v, float* o, int64_t ld_o) {
    VecF sums[kRows][kVectors];
    for (int i = 0; i < kRows; ++i)
      for (int c = 0; c < kVectors; ++c) sums[i][c] = load(o + i * ld_o + c * kLanes);
    for (int64_t j = 0; j < n; ++j) {
      prefetch(v + (j + kAhead) * stride_v, kVectors * kLanes);
      for (int c = 0; c < kVectors; ++c) {
        const VecF x = load_as_f32(v + j * stride_v + c * kLanes);
        for (int i = 0; i < kRows; ++i) sums[i][c] = fma(x, set1(p[i * ld_p + j]), sums[i][c]);
      }
    }
    for (int i = 0; i < kRows; ++i)
      for (int c = 0; c < kVectors; ++c) store(o + i * ld_o + c * kLanes, sums[i][c]);
  }
};

}  // namespace
}  // namespace cpu
}  // namespace flashmla
