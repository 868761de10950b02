// The rotation of rows of Q and K before they are quantised (flashmla_hf/fp8/quantization.py): random signs, then
// Hadamard matrices of the powers of two that the head dim is the sum of, the largest first.
//
// Sylvester's matrix of 2^n is a product of n butterflies, one for each bit of a column's number. A product with a
// matrix of 16 x 16 is four of them: the tensor cores take the bits 0, 1, 3 and 4, whose columns a quad has, out of
// 16-bit elements as they are, and sum in fp32. Bit 2 and those from 5 on are sums of a lane's own numbers. No number
// moves between lanes, and the four bits' numbers come back in the lane that gave them.
#pragma once

#include <cute/tensor.hpp>

#include "sm90/hopper/fragment.cuh"
#include "sm90/hopper/ptx.cuh"
#include "sm90/scheduling/scheduler.cuh"

namespace flashmla::sm90 {

// How a warp has 16 rows: lane 4 g + t has rows g and g + 8, and of each chunk of 32 columns those from 8 t on.
constexpr int kColumnsOfLane = 8, kColumnsOfChunk = 32;

// What the lanes of a warp multiply by, in shared memory.
template <int kHeadDim, class Element>
class Rotation {
 public:
  static constexpr int kChunks = kHeadDim / kColumnsOfChunk;

  // For all threads of a CTA, which meet at a barrier before they rotate.
  __device__ void set(int head_dim, bool is_key) {
    for (int i = threadIdx.x; i < kChunks * kWarpThreads; i += blockDim.x) {
      int const lane = i % kWarpThreads, chunk = i / kWarpThreads, n = lane / 4, t = lane % 4;
      auto two = [&](int j, int k) {  // of column n of product j, at depths k and k + 1
        int const column = n / 2 * 8 + j * 2 + n % 2, first = k % 8 / 2 * 8 + k / 8 * 2;
        return pack<Element>(entry(head_dim, is_key, chunk, first, column),
                             entry(head_dim, is_key, chunk, first + 1, column));
      };
      matrices_[chunk][lane] = {two(0, 2 * t), two(0, 2 * t + 8), two(1, 2 * t), two(1, 2 * t + 8)};
    }
    for (int i = threadIdx.x; i < kChunks; i += blockDim.x) sizes_[i] = matrix_of(head_dim, i * kColumnsOfChunk).y;
    for (int i = threadIdx.x; i < kHeadDim / kColumnsOfLane; i += blockDim.x) {
      auto two = [&](int column) {
        return sign_of(i * kColumnsOfLane + column) >> 16 | sign_of(i * kColumnsOfLane + column + 1);
      };
      signs_[i / 4][i % 4] = {two(0), two(2), two(4), two(6)};
    }
  }

  // A lane's numbers of two rows, 8 of each chunk, out of its words of these rows.
  template <class Words>
  __device__ void rotate(float (&x)[2][kChunks * kColumnsOfLane], Words const& words) const {
    int const lane = threadIdx.x % kWarpThreads;
    CUTE_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      uint4 const upper = words(0, chunk), lower = words(1, chunk), sign = signs_[chunk][lane % 4];
      uint4 const matrix = matrices_[chunk][lane];
      uint32_t const operands[2][4] = {{upper.x ^ sign.x, lower.x ^ sign.x, upper.y ^ sign.y, lower.y ^ sign.y},
                                       {upper.z ^ sign.z, lower.z ^ sign.z, upper.w ^ sign.w, lower.w ^ sign.w}};
      uint32_t const products[2][2] = {{matrix.x, matrix.y}, {matrix.z, matrix.w}};
      int const first = chunk * kColumnsOfLane;
      CUTE_UNROLL
      for (int half = 0; half < 2; ++half) {  // of a lane's columns: bit 2
        CUTE_UNROLL
        for (int j = 0; j < 2; ++j) {
          float sums[4] = {};
          ptx::multiply_add_m16n8k16<Element>(sums, operands[half], products[j]);
          CUTE_UNROLL
          for (int i = 0; i < 4; ++i) x[i / 2][first + half * 4 + j * 2 + i % 2] = sums[i];
        }
      }
      CUTE_UNROLL
      for (int c = 0; c < 4; ++c) {
        CUTE_UNROLL
        for (int row = 0; row < 2; ++row) butterfly(x[row][first + c], x[row][first + c + 4]);
      }
    }
    CUTE_UNROLL
    for (int chunks = 1; chunks < kChunks; chunks *= 2) {
      CUTE_UNROLL
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        // Matrices of more columns than a chunk begin with one.
        if ((chunk & chunks) != 0 || sizes_[chunk] <= chunks * kColumnsOfChunk) continue;
        CUTE_UNROLL
        for (int c = chunk * kColumnsOfLane; c < (chunk + 1) * kColumnsOfLane; ++c) {
          CUTE_UNROLL
          for (int row = 0; row < 2; ++row) butterfly(x[row][c], x[row][c + chunks * kColumnsOfLane]);
        }
      }
    }
  }

 private:
  uint4 matrices_[kChunks][kWarpThreads];
  uint4 signs_[kChunks][4];  // to be added to the sign bits of pairs
  int sizes_[kChunks];       // of the matrix that has a chunk's first column

  __device__ static void butterfly(float& a, float& b) {
    float const sum = a + b;
    b = a - b;
    a = sum;
  }

  // Where the matrix that has a column begins, and its size. Head dims are multiples of 8; behind one, every 8 columns
  // are a matrix.
  __device__ static int2 matrix_of(int head_dim, int column) {
    int begin = 0;
    for (int size = kHeadDim; size > kColumnsOfLane; size /= 2) {
      if ((head_dim & size) == 0) continue;
      if (column < begin + size) return {begin, size};
      begin += size;
    }
    return {column / kColumnsOfLane * kColumnsOfLane, kColumnsOfLane};
  }

  // Of two columns of a chunk that are equal in bit 2: the entry of the matrix that has both, or 0.
  __device__ static float entry(int head_dim, bool is_key, int chunk, int row, int column) {
    int2 const matrix = matrix_of(head_dim, chunk * kColumnsOfChunk + row);
    int2 const other = matrix_of(head_dim, chunk * kColumnsOfChunk + column);
    if (matrix.x != other.x) return 0.0f;
    int const log2 = 31 - __clz(matrix.y), halvings = is_key ? log2 / 2 : log2 - log2 / 2;
    uint32_t const negative = __popc(row & column & (matrix.y - 1)) % 2;
    return __uint_as_float(negative << 31 | static_cast<uint32_t>(127 - halvings) << 23);
  }

  // The sign bit of a column: the first 256 bits behind the point of pi, the highest first; 1 is positive.
  __device__ static uint32_t sign_of(int column) {
    auto word = [&] {
      switch (column / 32) {  // no array in memory
        case 0:
          return 0x243f6a88u;
        case 1:
          return 0x85a308d3u;
        case 2:
          return 0x13198a2eu;
        case 3:
          return 0x03707344u;
        case 4:
          return 0xa4093822u;
        case 5:
          return 0x299f31d0u;
        case 6:
          return 0x082efa98u;
        default:
          return 0xec4e6c89u;
      }
    };
    return ~(word() << column % 32) & 0x80000000u;
  }
};

}  // namespace flashmla::sm90
