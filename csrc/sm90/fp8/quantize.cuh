// Q, K and V as e4m3 numbers and scales (operands.h), in one pass over each; those of
// flashmla_hf/fp8/quantization.py, which says why, bit for bit but for the rounding of a rotation's sums. Tensors that
// are e4m3 keep their numbers, and their factors are the scales of all their blocks; a negative factor becomes the sign
// of the numbers, and one that is not finite makes them NaN, since the kernel's scales are neither.
//
// A scale is the smallest power of two that is at least amax / 448. NaN and infinity become NaN, and do not enter amax.
// With `rotates`, rows of Q and K are rotated first (rotation.cuh), which leaves Q K^T as it is and spreads what stands
// out.
//
// Source: FlashAttention-3 (arXiv 2407.08608, section 3.3: blocks and "incoherent processing").
#pragma once

#include <cutlass/arch/grid_dependency_control.h>

#include <cute/tensor.hpp>

#include "params.h"
#include "sm90/fp8/operands.h"
#include "sm90/fp8/rotation.cuh"
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

// How the threads of a CTA have a block of rows, of whose 128 a warp has 16: a lane has kRows rows, and of each chunk
// of their columns kColumnsOfLane, 16 bytes.
template <int kHeadDim>
struct RowLayout {  // that of products: rotation.cuh
  static constexpr int kRows = 2, kChunks = kHeadDim / kColumnsOfChunk;
  __device__ static int row(int i) { return threadIdx.x / kWarpThreads * 16 + threadIdx.x % kWarpThreads / 4 + 8 * i; }
  __device__ static int column(int chunk) { return chunk * kColumnsOfChunk + threadIdx.x % 4 * kColumnsOfLane; }
};

template <int kHeadDim>
struct TransposedLayout {  // four rows, whose numbers are one word of V transposed
  static constexpr int kRows = 4, kChunks = kHeadDim / (8 * kColumnsOfLane);
  __device__ static int word() { return threadIdx.x / 8; }  // in a column
  __device__ static int row(int i) { return key_of_place(word() * kRows + i); }
  __device__ static int column(int chunk) { return (chunk * 8 + threadIdx.x % 8) * kColumnsOfLane; }
};

// The rows of a block: those of a sequence from first_row on, as far as it goes.
struct BlockRows {
  int32_t sequence;  // the number of sequences, for rows that are in none
  int32_t batch, first_row, count;
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
  return {low, is_packed ? 0 : low, sequence.x + begin, min(kRowsOfScale, sequence.y - begin)};
}

template <class Element>
__device__ Element const* row_of(TensorView const& view, BlockRows const& rows, int32_t head, int row) {
  return static_cast<Element const*>(view.data) + rows.batch * view.stride_batch + head * view.stride_heads +
         (int64_t{rows.first_row} + row) * view.stride_seqlen;
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

// Where a thread's words of a block of rows lie in shared memory, from when their copies begin until they are read.
// They are those of no other thread, and take no registers meanwhile.
template <int kHeadDim, class Element>
class Staged {
 public:
  using Word = cute::conditional_t<sizeof(Element) == 1, uint2, uint4>;  // kColumnsOfLane numbers

  // What a row or the block lacks becomes 0.
  template <class Layout>
  __device__ void copy(TensorView const& view, BlockRows const& rows, int32_t head, int head_dim) {
    using Copy = cute::conditional_t<sizeof(Element) == 1, cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<Word>,
                                     cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<Word>>;
    CUTE_UNROLL
    for (int i = 0; i < Layout::kRows; ++i) {
      bool const has_row = Layout::row(i) < rows.count;
      Element const* const row = row_of<Element>(view, rows, head, has_row ? Layout::row(i) : 0);
      CUTE_UNROLL
      for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
        bool const has_column = Layout::column(chunk) < head_dim;
        Copy::copy(*reinterpret_cast<Word const*>(row + (has_column ? Layout::column(chunk) : 0)),
                   words_[i * Layout::kChunks + chunk][threadIdx.x], has_row && has_column);
      }
    }
  }

  template <class Layout>
  __device__ Word word(int i, int chunk) const {
    return words_[i * Layout::kChunks + chunk][threadIdx.x];
  }

 private:
  Word words_[kHeadDim / 16][kQuantizeThreads];
};

// Eight e4m3 numbers as pairs of fp16.
__device__ inline void unpack_e4m3(uint2 bytes, uint32_t (&pairs)[4]) {
  ptx::unpack_e4m3(bytes.x, pairs[0], pairs[1]);
  ptx::unpack_e4m3(bytes.y, pairs[2], pairs[3]);
}

// A thread's part of a block of rows, and the scale of the whole block.
template <class Layout>
struct QuantizedBlock {
  static constexpr int kRows = Layout::kRows, kChunks = Layout::kChunks, kValues = kChunks * kColumnsOfLane;
  float x[kRows][kValues];
  Scale scale;

  // Of e4m3 numbers.
  template <class Words>
  __device__ void take_e4m3(Words const& words, float descale) {
    bool const is_finite = fabsf(descale) < INFINITY;
    float const sign = is_finite ? copysignf(1.0f, descale) : NAN;
    for_each_chunk([&](int i, int chunk, float* values) {
      uint32_t pairs[4];
      unpack_e4m3(words(i, chunk), pairs);
      CUTE_UNROLL
      for (int c = 0; c < kColumnsOfLane; ++c) values[c] = sign * part(unpack<cutlass::half_t>(pairs[c / 2]), c);
    });
    scale = {is_finite ? fabsf(descale) : 1.0f, 1.0f};
  }

  // Of 16-bit numbers: as they are.
  template <class Element, class Words>
  __device__ void take(Words const& words) {
    for_each_chunk([&](int i, int chunk, float* values) {
      uint4 const word = words(i, chunk);
      uint32_t const pairs[4] = {word.x, word.y, word.z, word.w};
      CUTE_UNROLL
      for (int c = 0; c < kColumnsOfLane; ++c) values[c] = part(unpack<Element>(pairs[c / 2]), c);
    });
  }

  // For all threads of a CTA. `of_warps` is not that of the call before.
  __device__ void find_scale(float (&of_warps)[kQuantizeWarps]) {
    float largest = largest_of_block(largest_of_thread(), of_warps);
    if (largest == INFINITY) {  // for all threads alike: infinity becomes NaN, which is no maximum
      for_each_chunk([&](int, int, float* values) {
        CUTE_UNROLL
        for (int c = 0; c < kColumnsOfLane; ++c) values[c] = fabsf(values[c]) == INFINITY ? NAN : values[c];
      });
      __syncthreads();
      largest = largest_of_block(largest_of_thread(), of_warps);
    }
    scale = scale_of(largest);
  }

  // The eight numbers of row i and a chunk as e4m3, the first in the lowest byte.
  __device__ uint2 quantized(int i, int chunk) const {
    float const* const values = &x[i][chunk * kColumnsOfLane];
    auto word = [&](int first) {
      auto scaled = [&](int c) { return ptx::multiply_denormal(values[first + c], scale.inverse); };
      return ptx::pack_e4m3(scaled(0), scaled(1), scaled(2), scaled(3));
    };
    return {word(0), word(4)};
  }

 private:
  template <class Visit>
  __device__ void for_each_chunk(Visit const& visit) {
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      CUTE_UNROLL
      for (int chunk = 0; chunk < kChunks; ++chunk) visit(i, chunk, &x[i][chunk * kColumnsOfLane]);
    }
  }

  __device__ static float part(float2 pair, int c) { return c % 2 == 0 ? pair.x : pair.y; }

  __device__ float largest_of_thread() const {
    float most = 0.0f;
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      CUTE_UNROLL
      for (int c = 0; c < kValues; ++c) most = fmaxf(most, fabsf(x[i][c]));
    }
    return most;
  }
};

// What a CTA has in shared memory.
template <int kHeadDim, class Element>
struct QuantizeShared {
  static constexpr int kWordsOfColumn = kRowsOfScale / 4;
  Staged<kHeadDim, Element> staged[2];
  Rotation<kHeadDim, Element> rotation;
  uint4 columns[kHeadDim * kWordsOfColumn / 4];  // of V transposed
  float of_warps[2][kQuantizeWarps];

  // Word w of column c lies at 32 c + (w + 4 (c / 8)) % 32: a warp that writes a word of eight columns of each lane's,
  // or reads whole columns, meets every bank once.
  __device__ uint32_t* word_of_column(int column, int word) {
    return reinterpret_cast<uint32_t*>(columns) + column * kWordsOfColumn + (word + column / 8 * 4) % kWordsOfColumn;
  }
};

// A block of Q, then of K, then of V, neighbouring heads side by side.
struct QuantizeTask {
  Side side;
  bool is_value;
  int32_t head, heads, block;
  BlockRows rows;  // none, behind the last

  __device__ QuantizeTask(Problem const& problem, Fp8Operands const& operands, int64_t index) {
    int32_t const heads_q = static_cast<int32_t>(problem.heads_q), heads_kv = static_cast<int32_t>(problem.heads_kv);
    int32_t const of_q = static_cast<int32_t>(operands.blocks_q) * heads_q;
    int32_t const of_k = static_cast<int32_t>(operands.blocks) * heads_kv;
    is_value = index >= of_q + of_k;
    side = index < of_q ? Side::kQueries : Side::kKeys;
    heads = is_query() ? heads_q : heads_kv;
    int32_t const number = static_cast<int32_t>(index - (is_query() ? 0 : is_value ? of_q + of_k : of_q));
    head = number % heads;
    block = number / heads;
    rows = index < of_q + 2 * int64_t{of_k} ? rows_of_block(problem, side, block) : BlockRows{};
  }

  __device__ bool is_query() const { return side == Side::kQueries; }

  template <class T>
  __device__ T const& of(T const& q, T const& k, T const& v) const {
    return is_value ? v : is_query() ? q : k;
  }
};

// What a CTA does with its blocks.
template <int kHeadDim, class Element>
class Quantizer {
 public:
  using Shared = QuantizeShared<kHeadDim, Element>;
  using Transposed = TransposedLayout<kHeadDim>;
  using Rows = RowLayout<kHeadDim>;

  __device__ Quantizer(QuantizeArguments const& arguments, Shared& shared)
      : arguments_(arguments), problem_(arguments.problem), operands_(arguments.operands), shared_(shared) {}

  // Has the numbers of a block copied to a stage.
  __device__ void copy(QuantizeTask const& task, int stage) {
    TensorView const& view = task.of(arguments_.q, arguments_.k, arguments_.v);
    int const head_dim = static_cast<int>(task.is_value ? problem_.head_dim_v : problem_.head_dim_qk);
    if (task.is_value) {
      shared_.staged[stage].template copy<Transposed>(view, task.rows, task.head, head_dim);
    } else {
      shared_.staged[stage].template copy<Rows>(view, task.rows, task.head, head_dim);
    }
    cute::cp_async_fence();
  }

  // Q and K.
  __device__ void quantize_rows(QuantizeTask const& task, int stage) {
    QuantizedBlock<Rows> x;
    take(x, task, stage);
    uint8_t* const target = static_cast<uint8_t*>(task.is_query() ? operands_.q : operands_.k);
    CUTE_UNROLL
    for (int i = 0; i < Rows::kRows; ++i) {
      if (task.is_query() && Rows::row(i) >= task.rows.count) continue;
      int64_t const row =
          task.is_query()
              ? (task.rows.batch * problem_.seqlen_q + task.rows.first_row + Rows::row(i)) * task.heads + task.head
              : first_place(task) + Rows::row(i);
      CUTE_UNROLL
      for (int chunk = 0; chunk < Rows::kChunks; ++chunk) {
        *reinterpret_cast<uint2*>(target + row * kHeadDim + Rows::column(chunk)) = x.quantized(i, chunk);
      }
    }
  }

  // V, by way of shared memory.
  __device__ void quantize_transposed(QuantizeTask const& task, int stage) {
    QuantizedBlock<Transposed> x;
    take(x, task, stage);
    CUTE_UNROLL
    for (int chunk = 0; chunk < Transposed::kChunks; ++chunk) write_columns(x, chunk);
    __syncthreads();
    int64_t const places = operands_.blocks * kRowsOfScale;
    uint8_t* const vt = static_cast<uint8_t*>(operands_.vt) + int64_t{task.head} * kHeadDim * places +
                        int64_t{task.block} * kRowsOfScale;
    constexpr int kVectors = kRowsOfScale / 16;  // of a column
    CUTE_UNROLL
    for (int i = threadIdx.x; i < kHeadDim * kVectors; i += kQuantizeThreads) {
      *reinterpret_cast<uint4*>(vt + i / kVectors * places + i % kVectors * 16) =
          *reinterpret_cast<uint4 const*>(shared_.word_of_column(i / kVectors, i % kVectors * 4));
    }
    if constexpr (kIsE4m3) __syncthreads();  // no maximum stands between this block and the next
  }

 private:
  static constexpr bool kIsE4m3 = cute::is_same_v<Element, cutlass::float_e4m3_t>;

  QuantizeArguments const& arguments_;
  Problem const& problem_;
  Fp8Operands const& operands_;
  Shared& shared_;
  int turn_ = 0;       // of the maxima: those of the last block may still be read
  int rotation_ = -1;  // the side that shared_.rotation is of

  __device__ int64_t first_place(QuantizeTask const& task) const {
    return (task.head * operands_.blocks + task.block) * kRowsOfScale;
  }

  // The numbers of a block and its scale, which is written.
  template <class Layout>
  __device__ void take(QuantizedBlock<Layout>& x, QuantizeTask const& task, int stage) {
    auto const words = [&](int i, int chunk) { return shared_.staged[stage].template word<Layout>(i, chunk); };
    if constexpr (kIsE4m3) {
      ScaleView const& descale = task.of(arguments_.q_descale, arguments_.k_descale, arguments_.v_descale);
      int64_t const head = task.is_query() ? task.head / (problem_.heads_q / problem_.heads_kv) : task.head;
      bool const has_factor = task.rows.sequence < problem_.batch;
      x.take_e4m3(words, has_factor
                             ? descale.data[task.rows.sequence * descale.stride_batch + head * descale.stride_heads]
                             : 1.0f);
    } else {
      if (!task.is_value && arguments_.rotates) {
        if constexpr (cute::is_same_v<Layout, Rows>) rotate(x, task, words);
      } else {
        x.template take<Element>(words);
      }
      x.find_scale(shared_.of_warps[turn_]);
      turn_ ^= 1;
    }
    if (threadIdx.x == 0) {
      float* const scales = task.of(operands_.q_scales, operands_.k_scales, operands_.v_scales);
      scales[task.head * (task.is_query() ? operands_.blocks_q : operands_.blocks) + task.block] = x.scale.scale;
    }
  }

  template <class Words>
  __device__ void rotate(QuantizedBlock<Rows>& x, QuantizeTask const& task, Words const& words) {
    if (rotation_ != static_cast<int>(task.side)) {  // for all threads alike, at most twice
      rotation_ = static_cast<int>(task.side);
      __syncthreads();
      shared_.rotation.set(static_cast<int>(problem_.head_dim_qk), !task.is_query());
      __syncthreads();
    }
    shared_.rotation.rotate(x.x, words);
  }

  // The four keys of a chunk's columns that a thread has, a word of each column.
  __device__ void write_columns(QuantizedBlock<Transposed> const& x, int chunk) {
    uint2 of_rows[Transposed::kRows];
    CUTE_UNROLL
    for (int i = 0; i < Transposed::kRows; ++i) of_rows[i] = x.quantized(i, chunk);
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      uint32_t words[4];
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) words[i] = half == 0 ? of_rows[i].x : of_rows[i].y;
      CUTE_UNROLL
      for (int pair = 0; pair < 2; ++pair) {  // columns 2 pair and 2 pair + 1 of four
        uint32_t const low = __byte_perm(words[0], words[1], pair == 0 ? 0x5140 : 0x7362);
        uint32_t const high = __byte_perm(words[2], words[3], pair == 0 ? 0x5140 : 0x7362);
        int const column = Transposed::column(chunk) + half * 4 + pair * 2;
        *shared_.word_of_column(column, Transposed::word()) = __byte_perm(low, high, 0x5410);
        *shared_.word_of_column(column + 1, Transposed::word()) = __byte_perm(low, high, 0x7632);
      }
    }
  }
};

// On a multiprocessor.
template <int kHeadDim>
constexpr int kQuantizeCtas = kHeadDim > 128  ? 1
                              : kHeadDim > 64 ? 2
                                              : 3;

// Each CTA takes blocks a grid apart. The next one's numbers are on their way while it computes.
template <int kHeadDim, class Element>
__global__ void __launch_bounds__(kQuantizeThreads, kQuantizeCtas<kHeadDim>)
    quantize_kernel(__grid_constant__ QuantizeArguments const arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(16) unsigned char quantize_memory[];
  cutlass::arch::launch_dependent_grids();  // the forward may set up where a CTA has ended
  Problem const& problem = arguments.problem;
  Fp8Operands const& operands = arguments.operands;
  Quantizer<kHeadDim, Element> quantizer(arguments,
                                         *reinterpret_cast<QuantizeShared<kHeadDim, Element>*>(quantize_memory));
  int64_t const count = operands.blocks_q * problem.heads_q + 2 * operands.blocks * problem.heads_kv;
  QuantizeTask task(problem, operands, blockIdx.x);
  quantizer.copy(task, 0);
  int stage = 0;
  for (int64_t index = blockIdx.x; index < count; index += gridDim.x) {
    QuantizeTask const next(problem, operands, index + gridDim.x);
    quantizer.copy(next, stage ^ 1);
    cute::cp_async_wait<1>();   // the next block's alone may be on their way
    __syncwarp();               // the compiler leaves the reads behind it
    if (task.rows.count > 0) {  // else no tile reads it
      if (task.is_value) {
        quantizer.quantize_transposed(task, stage);
      } else {
        quantizer.quantize_rows(task, stage);
      }
    }
    task = next;
    stage ^= 1;
  }
  cute::cp_async_wait<0>();  // shared memory is written until then
#endif
}

}  // namespace flashmla::sm90
