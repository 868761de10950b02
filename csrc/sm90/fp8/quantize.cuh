// Q, K and V as e4m3 numbers and scales (operands.h), in one pass over each; bit for bit those of
// flashmla_hf/fp8/quantization.py, which says why. Tensors that are e4m3 keep their numbers, and their factors are the
// scales of all their blocks; a negative factor becomes the sign of the numbers, and one that is not finite makes them
// NaN, since the kernel's scales are neither.
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
#include "sm90/fp8/scale.cuh"
#include "sm90/hopper/fragment.cuh"
#include "sm90/hopper/ptx.cuh"
#include "sm90/scheduling/scheduler.cuh"

namespace flashmla::sm90 {

constexpr int kQuantizeWarps = 8, kQuantizeThreads = kQuantizeWarps * kWarpThreads;

struct QuantizeArguments {
  Problem problem;
  TensorView q, k, v;
  ScaleView q_descale, k_descale, v_descale;  // of e4m3 tensors, [batch, 1, heads_kv]
  Fp8Operands operands;
  bool rotates;
};

// A CTA quantises a block of rows of a head, and a warp 16 of them. Eight lanes share a row: lane l of them has the
// columns from 8 l on of every 64, 16 bytes of each chunk. Lanes of group g (of 8) have four rows, those whose numbers
// are one word of V transposed (key_of_place).
template <int kHeadDim>
struct QuantizeLayout {
  static constexpr int kLanesOfRow = 8, kRowsOfWarp = kRowsOfScale / kQuantizeWarps;
  static constexpr int kRows = 4;                // of a lane
  static constexpr int kChunks = kHeadDim / 64;  // of 64 columns
  static constexpr int kValues = kChunks * 8;    // of a row in a lane
  static_assert(kRowsOfWarp == kRows * kWarpThreads / kLanesOfRow && kRowsOfWarp == 16);

  __device__ static int lane() { return threadIdx.x % kLanesOfRow; }
  __device__ static int group() { return threadIdx.x % kWarpThreads / kLanesOfRow; }
  __device__ static int warp() { return threadIdx.x / kWarpThreads; }
  __device__ static int row(int i) { return warp() * kRowsOfWarp + key_of_place(group() * kRows + i); }
  __device__ static int column(int chunk) { return chunk * 64 + lane() * 8; }
};

// Signs, and Hadamard matrices of the powers of two that the head dim is the sum of, the largest first. A head dim is a
// multiple of 8, so the eight columns of a chunk are in one of them.
template <int kHeadDim>
struct Rotation {
  using Layout = QuantizeLayout<kHeadDim>;
  static constexpr int kChunks = Layout::kChunks;
  uint32_t signs[kChunks * 4];  // to be added to the sign bits of pairs
  float magnitude[kChunks];
  int size[kChunks];

  __device__ Rotation(int head_dim, bool is_key) {
    CUTE_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      int const first = Layout::column(chunk);
      int begin = 0;
      size[chunk] = kHeadDim;
      while (size[chunk] > 8 && !((head_dim & size[chunk]) != 0 && first < begin + size[chunk])) {
        begin += head_dim & size[chunk];
        size[chunk] /= 2;
      }
      int const log2 = 31 - __clz(size[chunk]), halvings = is_key ? log2 / 2 : log2 - log2 / 2;
      magnitude[chunk] = __uint_as_float(static_cast<uint32_t>(127 - halvings) << 23);
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) {
        signs[chunk * 4 + i] = sign_of(first + 2 * i) >> 16 | sign_of(first + 2 * i + 1);
      }
    }
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

// The rows of a block: those of a sequence from first_row on, as far as it goes.
struct BlockRows {
  int32_t sequence;  // the number of sequences, for rows that are in none
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
  return {low, is_packed ? 0 : low, int64_t{sequence.x} + begin, begin, min(kRowsOfScale, sequence.y - begin)};
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

// A thread's part of a block of rows: read, rotated where `rotation` is given, and with the scale of the whole block.
template <int kHeadDim, class Element>
struct QuantizedBlock {
  using Layout = QuantizeLayout<kHeadDim>;
  static constexpr int kRows = Layout::kRows, kChunks = Layout::kChunks, kValues = Layout::kValues;
  float x[kRows][kValues];
  Scale scale;
  bool has_infinity;  // of the block

  // Of a tensor that is e4m3.
  __device__ QuantizedBlock(TensorView const& view, BlockRows const& rows, int32_t head, int head_dim, float descale) {
    bool const is_finite = fabsf(descale) < INFINITY;
    float const sign = is_finite ? copysignf(1.0f, descale) : NAN;
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      Element const* const row = row_of<Element>(view, rows, head, Layout::row(i));
      CUTE_UNROLL
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        int const column = Layout::column(chunk);
        uint2 bytes = {};
        if (Layout::row(i) < rows.count && column < head_dim) bytes = *reinterpret_cast<uint2 const*>(row + column);
        uint32_t pairs[4];
        ptx::unpack_e4m3(bytes.x, pairs[0], pairs[1]);
        ptx::unpack_e4m3(bytes.y, pairs[2], pairs[3]);
        CUTE_UNROLL
        for (int c = 0; c < 4; ++c) {
          float2 const pair = unpack<cutlass::half_t>(pairs[c]);
          x[i][chunk * 8 + 2 * c] = sign * pair.x;
          x[i][chunk * 8 + 2 * c + 1] = sign * pair.y;
        }
      }
    }
    scale = {is_finite ? fabsf(descale) : 1.0f, 1.0f};
    has_infinity = false;
  }

  __device__ QuantizedBlock(TensorView const& view, BlockRows const& rows, int32_t head, int head_dim, bool rotates,
                            bool is_key, float (&of_warps)[kQuantizeWarps]) {
    // All are on their way before the first is looked at. What a row or the block lacks is 0.
    uint4 words[kRows][kChunks];
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      Element const* const row = row_of<Element>(view, rows, head, Layout::row(i));
      CUTE_UNROLL
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        int const column = Layout::column(chunk);
        words[i][chunk] = {};
        if (Layout::row(i) < rows.count && column < head_dim) {
          words[i][chunk] = *reinterpret_cast<uint4 const*>(row + column);
        }
      }
    }
    if (rotates) {
      Rotation<kHeadDim> const rotation(head_dim, is_key);
      CUTE_UNROLL
      for (int i = 0; i < kRows; ++i) {
        CUTE_UNROLL
        for (int chunk = 0; chunk < kChunks; ++chunk) set(i, chunk, words[i][chunk], &rotation);
        if (head_dim == kHeadDim) {
          rotate<true>(i, rotation);
        } else {
          rotate<false>(i, rotation);
        }
      }
    } else {
      CUTE_UNROLL
      for (int i = 0; i < kRows; ++i) {
        CUTE_UNROLL
        for (int chunk = 0; chunk < kChunks; ++chunk) set(i, chunk, words[i][chunk], nullptr);
      }
    }
    float largest = largest_of_block(largest_of([](float value) { return fabsf(value); }), of_warps);
    has_infinity = largest == INFINITY;
    if (has_infinity) {  // for all threads alike
      __syncthreads();
      largest = largest_of_block(largest_of([](float value) { return fabsf(value) < INFINITY ? fabsf(value) : 0.0f; }),
                                 of_warps);
    }
    scale = scale_of(largest);
  }

  // The eight numbers of row i and a chunk as e4m3, the first in the lowest byte. Infinity is to become NaN, not 448.
  __device__ uint2 quantized(int i, int chunk) const {
    auto word = [&](int first) {
      auto scaled = [&](int c) {
        float const value = x[i][chunk * 8 + first + c];
        return has_infinity && fabsf(value) == INFINITY ? NAN : value * scale.inverse;
      };
      return ptx::pack_e4m3(scaled(0), scaled(1), scaled(2), scaled(3));
    };
    return {word(0), word(4)};
  }

 private:
  __device__ void set(int i, int chunk, uint4 const& words, Rotation<kHeadDim> const* rotation) {
    uint32_t const pairs[4] = {words.x, words.y, words.z, words.w};
    CUTE_UNROLL
    for (int c = 0; c < 4; ++c) {
      float2 const pair = unpack<Element>(rotation != nullptr ? pairs[c] ^ rotation->signs[chunk * 4 + c] : pairs[c]);
      float const factor = rotation != nullptr ? rotation->magnitude[chunk] : 1.0f;
      x[i][chunk * 8 + 2 * c] = pair.x * factor;
      x[i][chunk * 8 + 2 * c + 1] = pair.y * factor;
    }
  }

  // kIsWhole: the head dim is kHeadDim, one matrix.
  template <bool kIsWhole>
  __device__ void rotate(int row, Rotation<kHeadDim> const& rotation) {
    auto butterfly = [](float& a, float& b) {
      float const sum = a + b;
      b = a - b;
      a = sum;
    };
    float (&of_row)[kValues] = x[row];
    CUTE_UNROLL
    for (int distance = 1; distance < 8; distance *= 2) {
      CUTE_UNROLL
      for (int i = 0; i < kValues; ++i) {
        if ((i & distance) == 0) butterfly(of_row[i], of_row[i + distance]);
      }
    }
    CUTE_UNROLL
    for (int lanes = 1; lanes < Layout::kLanesOfRow; lanes *= 2) {
      float const sign = (Layout::lane() & lanes) != 0 ? -1.0f : 1.0f;
      CUTE_UNROLL
      for (int i = 0; i < kValues; ++i) {
        float const other = __shfl_xor_sync(0xffffffff, of_row[i], lanes);
        bool const is_apart = !kIsWhole && lanes * 8 >= rotation.size[i / 8];
        of_row[i] = is_apart ? of_row[i] : __fmaf_rn(of_row[i], sign, other);
      }
    }
    CUTE_UNROLL
    for (int chunks = 1; chunks < kChunks; chunks *= 2) {
      CUTE_UNROLL
      for (int i = 0; i < kValues; ++i) {
        if ((i & chunks * 8) == 0 && (kIsWhole || chunks * 64 < rotation.size[i / 8])) {
          butterfly(of_row[i], of_row[i + chunks * 8]);
        }
      }
    }
  }

  template <class Magnitude>
  __device__ float largest_of(Magnitude const& magnitude) const {
    float most = 0.0f;
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      CUTE_UNROLL
      for (int c = 0; c < kValues; ++c) most = fmaxf(most, magnitude(x[i][c]));
    }
    return most;
  }
};

// A CTA for each block and head: of Q, then of K, then of V, neighbouring heads side by side.
template <int kHeadDim, class Element>
__global__ void __launch_bounds__(kQuantizeThreads, kHeadDim > 128 ? 1 : 2)
    quantize_kernel(QuantizeArguments const arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Layout = QuantizeLayout<kHeadDim>;
  using Block = QuantizedBlock<kHeadDim, Element>;
  __shared__ float of_warps[kQuantizeWarps];
  __shared__ alignas(16) uint32_t columns[kHeadDim * kRowsOfScale / 4];  // of V transposed

  Problem const& problem = arguments.problem;
  Fp8Operands const& operands = arguments.operands;
  int32_t const heads_q = static_cast<int32_t>(problem.heads_q), heads_kv = static_cast<int32_t>(problem.heads_kv);
  int32_t const of_q = static_cast<int32_t>(operands.blocks_q) * heads_q;
  int32_t const of_k = static_cast<int32_t>(operands.blocks) * heads_kv;
  int32_t index = blockIdx.x;
  bool const is_query = index < of_q, is_key = !is_query && index < of_q + of_k;
  index -= is_query ? 0 : is_key ? of_q : of_q + of_k;
  int32_t const heads = is_query ? heads_q : heads_kv, head = index % heads, block = index / heads;
  BlockRows const rows = rows_of_block(problem, is_query ? Side::kQueries : Side::kKeys, block);
  if (rows.count <= 0) return;
  TensorView const& view = is_query ? arguments.q : is_key ? arguments.k : arguments.v;
  int const head_dim = static_cast<int>(is_query || is_key ? problem.head_dim_qk : problem.head_dim_v);
  Block const x = [&] {
    if constexpr (cute::is_same_v<Element, cutlass::float_e4m3_t>) {
      ScaleView const& descale = is_query ? arguments.q_descale : is_key ? arguments.k_descale : arguments.v_descale;
      int32_t const head_kv = is_query ? head / (heads_q / heads_kv) : head;
      return Block(view, rows, head, head_dim,
                   rows.sequence < problem.batch
                       ? descale.data[rows.sequence * descale.stride_batch + head_kv * descale.stride_heads]
                       : 1.0f);
    } else {
      return Block(view, rows, head, head_dim, arguments.rotates && (is_query || is_key), is_key, of_warps);
    }
  }();
  if (threadIdx.x == 0) {
    (is_query ? operands.q_scales + head * operands.blocks_q
     : is_key ? operands.k_scales + head * operands.blocks
              : operands.v_scales + head * operands.blocks)[block] = x.scale.scale;
  }
  int64_t const place = int64_t{block} * kRowsOfScale, places = operands.blocks * kRowsOfScale;
  if (is_query || is_key) {
    int64_t const first_row = is_query ? rows.batch * problem.seqlen_q + rows.first_row : head * places + place;
    uint8_t* const target = static_cast<uint8_t*>(is_query ? operands.q : operands.k);
    CUTE_UNROLL
    for (int i = 0; i < Block::kRows; ++i) {
      if (is_query && Layout::row(i) >= rows.count) continue;
      int64_t const row = first_row + Layout::row(i);
      CUTE_UNROLL
      for (int chunk = 0; chunk < Block::kChunks; ++chunk) {
        *reinterpret_cast<uint2*>(target + (is_query ? row * heads_q + head : row) * kHeadDim + Layout::column(chunk)) =
            x.quantized(i, chunk);
      }
    }
    return;
  }
  // Word w of column c lies at 32 c + (w + 4 (c / 8)) % 32: a warp that writes a word of eight columns of each lane's,
  // or reads whole columns, meets every bank once.
  constexpr int kWords = kRowsOfScale / 4;  // of a column
  auto word_of = [&](int column, int word) { return column * kWords + (word + column / 8 * 4) % kWords; };
  CUTE_UNROLL
  for (int chunk = 0; chunk < Block::kChunks; ++chunk) {
    uint2 of_rows[Block::kRows];
    CUTE_UNROLL
    for (int i = 0; i < Block::kRows; ++i) of_rows[i] = x.quantized(i, chunk);
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      uint32_t words[4];
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) words[i] = half == 0 ? of_rows[i].x : of_rows[i].y;
      CUTE_UNROLL
      for (int pair = 0; pair < 2; ++pair) {  // columns 2 pair and 2 pair + 1 of four
        uint32_t const low = __byte_perm(words[0], words[1], pair == 0 ? 0x5140 : 0x7362);
        uint32_t const high = __byte_perm(words[2], words[3], pair == 0 ? 0x5140 : 0x7362);
        int const column = Layout::column(chunk) + half * 4 + pair * 2, word = Layout::warp() * 4 + Layout::group();
        columns[word_of(column, word)] = __byte_perm(low, high, 0x5410);
        columns[word_of(column + 1, word)] = __byte_perm(low, high, 0x7632);
      }
    }
  }
  __syncthreads();
  uint8_t* const vt = static_cast<uint8_t*>(operands.vt) + int64_t{head} * kHeadDim * places + place;
  CUTE_UNROLL
  for (int i = threadIdx.x; i < kHeadDim * kWords / 4; i += kQuantizeThreads) {
    int const column = i / (kWords / 4), word = i % (kWords / 4) * 4;
    *reinterpret_cast<uint4*>(vt + column * places + word * 4) =
        *reinterpret_cast<uint4 const*>(columns + word_of(column, word));
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

// Rounds as the kernel above does, so that the backward multiplies what the forward has. A CTA for each block of rows
// and head.
template <int kHeadDim, class Element>
__global__ void __launch_bounds__(kQuantizeThreads) round_kernel(RoundingArguments const arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Layout = QuantizeLayout<kHeadDim>;
  using Block = QuantizedBlock<kHeadDim, Element>;
  __shared__ float of_warps[kQuantizeWarps];
  Problem const& problem = arguments.problem;
  int32_t const head = blockIdx.y;
  BlockRows const rows = rows_of_block(problem, arguments.side, blockIdx.x);
  if (rows.count <= 0) return;
  Block const x(arguments.x, rows, head, static_cast<int>(arguments.head_dim), arguments.rotates, arguments.is_key,
                of_warps);
  int64_t const seqlen = arguments.side == Side::kQueries ? problem.seqlen_q : problem.seqlen_kv;
  CUTE_UNROLL
  for (int i = 0; i < Block::kRows; ++i) {
    if (Layout::row(i) >= rows.count) continue;
    int64_t const row = rows.batch * seqlen + rows.first_row + Layout::row(i);
    CUTE_UNROLL
    for (int chunk = 0; chunk < Block::kChunks; ++chunk) {
      if (Layout::column(chunk) >= arguments.head_dim) continue;
      uint2 const bytes = x.quantized(i, chunk);
      auto rounded = [&](int c) {
        uint32_t const word = c < 4 ? bytes.x : bytes.y;
        return static_cast<float>(cutlass::float_e4m3_t::bitcast(static_cast<uint8_t>(word >> 8 * (c % 4)))) *
               x.scale.scale;
      };
      auto pair = [&](int c) { return pack<cutlass::bfloat16_t>(rounded(c), rounded(c + 1)); };
      *reinterpret_cast<uint4*>(arguments.out + (row * arguments.heads + head) * arguments.head_dim +
                                Layout::column(chunk)) = uint4{pair(0), pair(2), pair(4), pair(6)};
    }
  }
#endif
}

}  // namespace flashmla::sm90
