// Q, K and V as e4m3 numbers and scales (operands.h), in one pass over each; bit for bit those of
// flashmla_hf/fp8/quantization.py, which says why.
//
// A scale is the smallest power of two that is at least amax / 448. NaN and infinity become NaN, and do not enter amax.
// With `rotates`, rows of Q and K are multiplied by random signs and then Hadamard matrices of the powers of two that
// the head dim is the sum of, which leaves Q K^T as it is and spreads what stands out.
//
// Source: FlashAttention-3 (arXiv 2407.08608, section 3.3: blocks and "incoherent processing").
#pragma once

#include <cute/tensor.hpp>

#include "params.h"
#include "sm90/fp8/operands.h"
#include "sm90/hopper/fragment.cuh"
#include "sm90/hopper/ptx.cuh"
#include "sm90/scheduling/scheduler.cuh"

namespace flashmla::sm90 {

constexpr int kQuantizeWarps = 8, kQuantizeThreads = kQuantizeWarps * kWarpThreads;

struct QuantizeArguments {
  Problem problem;
  TensorView q, k, v;
  Fp8Operands operands;
  bool rotates;
};

// What a lane needs to rotate its columns: signs, which carry the power of two that all are multiplied by, and the size
// of the Hadamard matrix that the columns are of. The head dim is cut into powers of two, the largest first; it is a
// multiple of 8, so a lane's columns are in one of them.
template <int kHeadDim>
struct Rotation {
  static constexpr int kValues = kHeadDim / kWarpThreads;
  float factor[kValues];
  int size;

  __device__ Rotation(int head_dim, bool is_key) {
    int const first = threadIdx.x % kWarpThreads * kValues;
    int begin = 0;
    size = kHeadDim;
    while (size > kValues && !((head_dim & size) != 0 && first < begin + size)) {
      begin += head_dim & size;
      size /= 2;
    }
    int const log2 = 31 - __clz(size), halvings = is_key ? log2 / 2 : log2 - log2 / 2;
    uint32_t const magnitude = static_cast<uint32_t>(127 - halvings) << 23;
    CUTE_UNROLL
    for (int i = 0; i < kValues; ++i) factor[i] = __uint_as_float(magnitude | sign_of(first + i));
  }

  // The sign bit of a column: the first 256 bits behind the point of pi, the highest first; 1 is positive.
  __device__ static uint32_t sign_of(int column) {
    constexpr uint32_t kPi[] = {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344,
                                0xa4093822, 0x299f31d0, 0x082efa98, 0xec4e6c89};
    uint32_t word = 0;
    CUTE_UNROLL
    for (int i = 0; i < 8; ++i) word = column / 32 == i ? kPi[i] : word;  // no array in memory
    return ~(word << column % 32) & 0x80000000u;
  }
};

// A row of kHeadDim numbers in a warp: lane l has the kValues from column kValues * l on.
template <int kHeadDim, class Element>
struct RowInWarp {
  static constexpr int kValues = kHeadDim / kWarpThreads;
  static_assert(kValues == 2 || kValues == 4, "pairs are read as one word");
  struct alignas(2 * kValues) Words {
    uint32_t pairs[kValues / 2];
  };
  float x[kValues];

  __device__ void set(Words const& words) {
    CUTE_UNROLL
    for (int i = 0; i < kValues; i += 2) {
      float2 const pair = unpack<Element>(words.pairs[i / 2]);
      x[i] = pair.x;
      x[i + 1] = pair.y;
    }
  }

  __device__ void rotate(Rotation<kHeadDim> const& rotation) {
    int const lane = threadIdx.x % kWarpThreads;
    CUTE_UNROLL
    for (int i = 0; i < kValues; ++i) x[i] *= rotation.factor[i];
    CUTE_UNROLL
    for (int distance = 1; distance < kValues; distance *= 2) {
      CUTE_UNROLL
      for (int i = 0; i < kValues; ++i) {
        if (i & distance) continue;
        float const a = x[i], b = x[i + distance];
        x[i] = a + b;
        x[i + distance] = a - b;
      }
    }
    CUTE_UNROLL
    for (int distance = 1; distance < kWarpThreads; distance *= 2) {
      bool const is_apart = distance * kValues >= rotation.size, is_second = lane & distance;
      CUTE_UNROLL
      for (int i = 0; i < kValues; ++i) {
        float const other = __shfl_xor_sync(0xffffffff, x[i], distance);
        x[i] = is_apart ? x[i] : is_second ? other - x[i] : x[i] + other;
      }
    }
  }

  __device__ float largest() const {  // of this lane
    float most = 0.0f;
    CUTE_UNROLL
    for (float const value : x) most = fmaxf(most, fabsf(value) < INFINITY ? fabsf(value) : 0.0f);
    return most;
  }

  // kValues bytes, the first in the lowest. Infinity is to become NaN, not 448.
  __device__ uint32_t quantized(float inverse) const {
    auto scaled = [&](int i) { return fabsf(x[i]) == INFINITY ? NAN : x[i] * inverse; };
    if constexpr (kValues == 4) {
      return ptx::pack_e4m3(scaled(0), scaled(1), scaled(2), scaled(3));
    } else {
      return ptx::pack_e4m3(scaled(0), scaled(1), 0.0f, 0.0f);
    }
  }

  __device__ void write(uint8_t* row, float inverse) const {
    int const lane = threadIdx.x % kWarpThreads;
    uint32_t const word = quantized(inverse);
    if constexpr (kValues == 4) {
      *reinterpret_cast<uint32_t*>(row + lane * kValues) = word;
    } else {
      *reinterpret_cast<uint16_t*>(row + lane * kValues) = static_cast<uint16_t>(word);
    }
  }
};

__device__ inline float largest_of_warp(float x) {
  CUTE_UNROLL
  for (int lanes = 1; lanes < kWarpThreads; lanes *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, lanes));
  return x;
}

// A power of two and its inverse.
struct Scale {
  float scale, inverse;
};

// The smallest, at least 2^-126, that is at least largest / 448, and 448 = 1.75 * 2^8. (Below 2^-118 the exponent's
// bits, also those of denormal numbers, give 2^-126.)
__device__ inline Scale scale_of(float largest) {
  uint32_t const bits = __float_as_uint(largest);
  int const exponent = static_cast<int>(bits >> 23) - 127 - ((bits & 0x7fffff) <= 0x600000 ? 8 : 7);
  int const bounded = max(exponent, -126);
  return {__uint_as_float(static_cast<uint32_t>(127 + bounded) << 23),
          __uint_as_float(static_cast<uint32_t>(127 - bounded) << 23)};
}

// The rows of a block: those of a sequence from first_row on, as far as it goes.
struct BlockRows {
  int64_t batch, first_row;
  int32_t begin, count;  // of the sequence's rows
};

// Of block `block`, of queries or keys. `count` is not positive if no tile reads it.
__device__ inline BlockRows rows_of_block(Problem const& problem, Side side, int32_t block) {
  bool const is_packed = problem.cu_seqlens_q != nullptr, is_q = side == Side::kQueries;
  int64_t const seqlen = is_q ? problem.seqlen_q : problem.seqlen_kv;
  auto sequence_of = [&](int32_t number) {
    Sequence const sequence = sequence_at(problem, number, side);
    return is_q ? int2{sequence.offset_q, sequence.seqlen_q} : int2{sequence.offset_kv, sequence.seqlen_kv};
  };
  // The last sequence whose blocks begin here or before: an empty one has none, but a number all the same.
  int32_t low = 0, high = static_cast<int32_t>(problem.batch) - (is_packed ? 0 : 1);
  while (low < high) {
    int32_t const middle = (low + high + 1) / 2;
    if (first_fp8_block(problem, seqlen, middle, sequence_of(middle).x) <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  int2 const sequence = sequence_of(low);
  int32_t const begin = (block - first_fp8_block(problem, seqlen, low, sequence.x)) * kRowsOfScale;
  return {is_packed ? 0 : low, int64_t{sequence.x} + begin, begin, min(kRowsOfScale, sequence.y - begin)};
}

template <class Element>
__device__ Element const* row_of(TensorView const& view, BlockRows const& rows, int32_t head, int row) {
  return static_cast<Element const*>(view.data) + rows.batch * view.stride_batch + head * view.stride_heads +
         (rows.first_row + row) * view.stride_seqlen;
}

// The largest of a CTA's numbers.
__device__ inline float largest_of_block(float x, float (&of_warps)[kQuantizeWarps]) {
  x = largest_of_warp(x);
  if (threadIdx.x % kWarpThreads == 0) of_warps[threadIdx.x / kWarpThreads] = x;
  __syncthreads();
  CUTE_UNROLL
  for (float const other : of_warps) x = fmaxf(x, other);
  return x;
}

constexpr int kRowsOfWarp = kRowsOfScale / kQuantizeWarps;

// The rows of a block that are a warp's, as they lie in memory; what a row or the block lacks is 0. All are on their
// way before the first is looked at.
template <int kHeadDim, class Element>
struct RowsOfWarp {
  using Row = RowInWarp<kHeadDim, Element>;
  using Words = typename Row::Words;
  Words words[kRowsOfWarp];

  __device__ RowsOfWarp(TensorView const& view, BlockRows const& rows, int32_t head, int64_t head_dim) {
    int const first = threadIdx.x / kWarpThreads * kRowsOfWarp;
    int const column = threadIdx.x % kWarpThreads * Row::kValues;  // the head dim is a multiple of 8
    CUTE_UNROLL
    for (int i = 0; i < kRowsOfWarp; ++i) {
      words[i] = {};
      if (first + i < rows.count && column < head_dim) {
        words[i] = *reinterpret_cast<Words const*>(row_of<Element>(view, rows, head, first + i) + column);
      }
    }
  }
};

// A CTA for each block of queries and head.
template <int kHeadDim, class Element>
__global__ void __launch_bounds__(kQuantizeThreads) quantize_queries_kernel(QuantizeArguments const arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ float of_warps[kQuantizeWarps];
  Problem const& problem = arguments.problem;
  int32_t const block = blockIdx.x, head = blockIdx.y;
  BlockRows const rows = rows_of_block(problem, Side::kQueries, block);
  if (rows.count <= 0) return;
  int const first = threadIdx.x / kWarpThreads * kRowsOfWarp;
  Rotation<kHeadDim> const rotation(static_cast<int>(problem.head_dim_qk), false);
  RowsOfWarp<kHeadDim, Element> const read(arguments.q, rows, head, problem.head_dim_qk);
  RowInWarp<kHeadDim, Element> q[kRowsOfWarp];
  float largest = 0.0f;
  CUTE_UNROLL
  for (int i = 0; i < kRowsOfWarp; ++i) {
    q[i].set(read.words[i]);
    if (arguments.rotates) q[i].rotate(rotation);
    largest = fmaxf(largest, q[i].largest());
  }
  Scale const scale = scale_of(largest_of_block(largest, of_warps));
  CUTE_UNROLL
  for (int i = 0; i < kRowsOfWarp; ++i) {
    if (first + i >= rows.count) break;
    int64_t const row = rows.batch * problem.seqlen_q + rows.first_row + first + i;
    q[i].write(static_cast<uint8_t*>(arguments.operands.q) + (row * problem.heads_q + head) * kHeadDim, scale.inverse);
  }
  if (threadIdx.x == 0) arguments.operands.q_scales[head * arguments.operands.blocks_q + block] = scale.scale;
#endif
}

// A CTA for each block of keys and kv head.
template <int kHeadDim, class Element>
__global__ void __launch_bounds__(kQuantizeThreads, 2) quantize_keys_kernel(QuantizeArguments const arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kValues = RowInWarp<kHeadDim, Element>::kValues;
  constexpr int kPitch = kRowsOfScale + 4;  // bytes of a column in shared memory
  __shared__ float of_warps_k[kQuantizeWarps], of_warps_v[kQuantizeWarps];
  __shared__ alignas(16) uint8_t columns[kHeadDim * kPitch];

  Problem const& problem = arguments.problem;
  Fp8Operands const& operands = arguments.operands;
  int32_t const block = blockIdx.x, head = blockIdx.y;
  BlockRows const rows = rows_of_block(problem, Side::kKeys, block);
  if (rows.count <= 0) return;
  int const lane = threadIdx.x % kWarpThreads, first = threadIdx.x / kWarpThreads * kRowsOfWarp;
  int64_t const place = int64_t{block} * kRowsOfScale, places = operands.blocks * kRowsOfScale;
  RowsOfWarp<kHeadDim, Element> const read_k(arguments.k, rows, head, problem.head_dim_qk);
  {
    Rotation<kHeadDim> const rotation(static_cast<int>(problem.head_dim_qk), true);
    RowInWarp<kHeadDim, Element> k[kRowsOfWarp];
    float largest = 0.0f;
    CUTE_UNROLL
    for (int i = 0; i < kRowsOfWarp; ++i) {
      k[i].set(read_k.words[i]);
      if (arguments.rotates) k[i].rotate(rotation);
      largest = fmaxf(largest, k[i].largest());
    }
    Scale const scale = scale_of(largest_of_block(largest, of_warps_k));
    uint8_t* const target = static_cast<uint8_t*>(operands.k) + (head * places + place + first) * kHeadDim;
    CUTE_UNROLL
    for (int i = 0; i < kRowsOfWarp; ++i) k[i].write(target + i * kHeadDim, scale.inverse);
    if (threadIdx.x == 0) operands.k_scales[head * operands.blocks + block] = scale.scale;
  }
  RowsOfWarp<kHeadDim, Element> const read_v(arguments.v, rows, head, problem.head_dim_v);
  RowInWarp<kHeadDim, Element> v[kRowsOfWarp];
  float largest = 0.0f;
  CUTE_UNROLL
  for (int i = 0; i < kRowsOfWarp; ++i) {
    v[i].set(read_v.words[i]);
    largest = fmaxf(largest, v[i].largest());
  }
  Scale const scale = scale_of(largest_of_block(largest, of_warps_v));
  CUTE_UNROLL
  for (int place = 0; place < kRowsOfWarp; place += 4) {  // a warp's keys have the places from `first` on
    uint32_t words[4];
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) words[i] = v[key_of_place(place + i)].quantized(scale.inverse);
    CUTE_UNROLL
    for (int c = 0; c < kValues; ++c) {  // byte c of each
      uint32_t const low = __byte_perm(words[0], words[1], c | (4 + c) << 4);
      uint32_t const high = __byte_perm(words[2], words[3], c | (4 + c) << 4);
      *reinterpret_cast<uint32_t*>(columns + (lane * kValues + c) * kPitch + first + place) =
          __byte_perm(low, high, 0x5410);
    }
  }
  if (threadIdx.x == 0) operands.v_scales[head * operands.blocks + block] = scale.scale;
  __syncthreads();
  constexpr int kWords = kRowsOfScale / 4;  // of a column
  uint8_t* const vt = static_cast<uint8_t*>(operands.vt) + int64_t{head} * kHeadDim * places + place;
  for (int i = threadIdx.x; i < kHeadDim * kWords; i += kQuantizeThreads) {
    int const column = i / kWords, word = i % kWords;
    *reinterpret_cast<uint32_t*>(vt + column * places + word * 4) =
        *reinterpret_cast<uint32_t const*>(columns + column * kPitch + word * 4);
  }
#endif
}

// One of Q, K and V, as bf16 numbers: contiguous, [rows, heads, head_dim].
struct RoundingArguments {
  Problem problem;
  TensorView x;
  cutlass::bfloat16_t* out;
  int64_t heads, head_dim;
  Side side;
  bool rotates, is_key;
};

// Rounds as the kernels above do, so that the backward multiplies what the forward has. A CTA for each block of rows
// and head.
template <int kHeadDim, class Element>
__global__ void __launch_bounds__(kQuantizeThreads) round_kernel(RoundingArguments const arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kValues = RowInWarp<kHeadDim, Element>::kValues;
  __shared__ float of_warps[kQuantizeWarps];
  Problem const& problem = arguments.problem;
  int32_t const head = blockIdx.y;
  BlockRows const rows = rows_of_block(problem, arguments.side, blockIdx.x);
  if (rows.count <= 0) return;
  int const first = threadIdx.x / kWarpThreads * kRowsOfWarp, column = threadIdx.x % kWarpThreads * kValues;
  Rotation<kHeadDim> const rotation(static_cast<int>(arguments.head_dim), arguments.is_key);
  RowsOfWarp<kHeadDim, Element> const read(arguments.x, rows, head, arguments.head_dim);
  RowInWarp<kHeadDim, Element> x[kRowsOfWarp];
  float largest = 0.0f;
  CUTE_UNROLL
  for (int i = 0; i < kRowsOfWarp; ++i) {
    x[i].set(read.words[i]);
    if (arguments.rotates) x[i].rotate(rotation);
    largest = fmaxf(largest, x[i].largest());
  }
  Scale const scale = scale_of(largest_of_block(largest, of_warps));
  int64_t const seqlen = arguments.side == Side::kQueries ? problem.seqlen_q : problem.seqlen_kv;
  CUTE_UNROLL
  for (int i = 0; i < kRowsOfWarp; ++i) {
    if (first + i >= rows.count) break;
    int64_t const row = rows.batch * seqlen + rows.first_row + first + i;
    uint32_t const word = x[i].quantized(scale.inverse);
    auto rounded = [&](int c) {
      return static_cast<float>(cutlass::float_e4m3_t::bitcast(static_cast<uint8_t>(word >> 8 * c))) * scale.scale;
    };
    CUTE_UNROLL
    for (int c = 0; c < kValues; c += 2) {
      if (column + c >= arguments.head_dim) break;
      *reinterpret_cast<uint32_t*>(arguments.out + (row * arguments.heads + head) * arguments.head_dim + column + c) =
          pack<cutlass::bfloat16_t>(rounded(c), rounded(c + 1));
    }
  }
#endif
}

}  // namespace flashmla::sm90
