// The quantised operands of an fp8 call: what quantize.cuh writes and forward_fp8.cuh reads.
//
// e4m3 numbers times fp32 scales. Keys lie in blocks of kKeysOfScale, which begin with their sequence, so that a kv_block
// of the kernel has one scale of K and one of V: a sequence's blocks begin at first_block, and what its last block lacks
// of keys is zero. V lies transposed, because wgmma takes fp8 operands with their depth contiguous, and its keys in the
// order in which a thread's probabilities lie in its registers (key_of_place).
#pragma once

#include <cstdint>

#include "params.h"

namespace flashmla::sm90 {

constexpr int kKeysOfScale = 128;

struct Fp8Operands {
  void* q;          // [rows of Q, heads_q, head_dim_qk]
  void* k;          // [heads_kv, blocks * kKeysOfScale, head_dim_qk]
  void* vt;         // [heads_kv, head_dim_v, blocks * kKeysOfScale]
  float* q_scales;  // [rows of Q, heads_q]
  float* k_scales;  // [heads_kv, blocks]
  float* v_scales;  // [heads_kv, blocks]
  int64_t blocks;
};

inline int64_t num_fp8_blocks(Problem const& problem) {
  return problem.cu_seqlens_q != nullptr
             ? problem.total_kv / kKeysOfScale + problem.batch
             : problem.batch * ((problem.seqlen_kv + kKeysOfScale - 1) / kKeysOfScale);
}

// The first block of sequence `number`, whose keys begin at row `offset` of the packed K, or are seqlen_kv of their own.
#if defined(__CUDACC__)
__host__ __device__
#endif
inline int32_t first_fp8_block(Problem const& problem, int32_t number, int32_t offset) {
  return problem.cu_seqlens_q != nullptr
             ? offset / kKeysOfScale + number
             : number * static_cast<int32_t>((problem.seqlen_kv + kKeysOfScale - 1) / kKeysOfScale);
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

// Its inverse.
#if defined(__CUDACC__)
__host__ __device__
#endif
inline int place_of_key(int key) {
  int const within = key % 16, lane = within % 8 / 2;
  return key / 16 * 16 + 4 * lane + within / 8 * 2 + within % 2;
}

}  // namespace flashmla::sm90
