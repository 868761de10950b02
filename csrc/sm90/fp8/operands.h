// The quantised operands of an fp8 call: what quantize.cuh writes and forward_fp8.cuh reads.
//
// e4m3 numbers times fp32 scales, powers of two: flashmla_hf/fp8/quantization.py says which. A scale is that of a block
// of kRowsOfScale rows, which begin with their sequence, so that a kv_block of the kernel has one scale of K and one of
// V. A sequence's blocks begin at first_fp8_block, and what its last block lacks of keys is zero. V lies transposed,
// because wgmma takes fp8 operands with their depth contiguous, and its keys in the order in which a thread's
// probabilities lie in its registers (key_of_place).
#pragma once

#include <cstdint>

#include "params.h"

namespace flashmla::sm90 {

constexpr int kRowsOfScale = 128;

struct Fp8Operands {
  void* q;          // [rows of Q, heads_q, head_dim_qk]
  void* k;          // [heads_kv, blocks * kRowsOfScale, head_dim_qk]
  void* vt;         // [heads_kv, head_dim_v, blocks * kRowsOfScale]
  float* q_scales;  // [heads_q, blocks_q]
  float* k_scales;  // [heads_kv, blocks]
  float* v_scales;  // [heads_kv, blocks]
  int64_t blocks_q, blocks;
};

inline int64_t num_fp8_blocks(Problem const& problem, int64_t seqlen, int64_t total) {
  // Packed, rows behind the last boundary are one sequence more.
  return problem.cu_seqlens_q != nullptr ? total / kRowsOfScale + problem.batch + 1
                                         : problem.batch * ((seqlen + kRowsOfScale - 1) / kRowsOfScale);
}

// The first block of sequence `number`, whose rows begin at row `offset` of a packed tensor, or are `seqlen` of their
// own.
#if defined(__CUDACC__)
__host__ __device__
#endif
    inline int32_t first_fp8_block(Problem const& problem, int64_t seqlen, int32_t number, int32_t offset) {
  return problem.cu_seqlens_q != nullptr ? offset / kRowsOfScale + number
                                         : number * static_cast<int32_t>((seqlen + kRowsOfScale - 1) / kRowsOfScale);
}

// Which of 32 keys is at place `place` of V's rows. As an accumulator, quad lane c has columns 2c and 2c + 1 of every
// eight; as an fp8 operand, 4c ... 4c + 3 of every sixteen.
#if defined(__CUDACC__)
__host__ __device__
#endif
    inline int key_of_place(int place) {
  int const lane = place % 16 / 4, i = place % 4;
  return place / 16 * 16 + i / 2 * 8 + 2 * lane + i % 2;
}

}  // namespace flashmla::sm90
