// Hopper attention of a few queries to a long cache of e4m3 keys and values, with an fp32 scale per token and kv head.
//
// The cache is read as it is, half the bytes of one of 16 bits, and widened in registers on its way to the tensor
// cores: e4m3 is exact in fp16, and a pair costs one instruction. So both products are of fp16, whatever q's dtype, and
// the scales are factors of scores and of probabilities, of which there are few:
//
//   S^T = (K8 Q^T) scale_k     O^T += V8^T (P^T scale_v)
//
// Keys are the rows of S^T and columns of V the rows of O^T: K8 and V8 are the left operands, which the tensor cores
// take from registers, and eight query rows the columns (mma.m16n8k16). Nothing is written to shared memory but what
// comes from memory.
//
// Schedule. A CTA is a warp that loads and four that compute. The loading warp streams K8 and V8 by TMA, and their
// scales by cp.async, into one ring of kv_blocks. Each of the other warps takes every fourth kv_block, with a softmax
// of its own: it waits for no other. At the end of a tile the four parts are added up in shared memory.
//
// Ranges. A row of q in bf16 is brought into fp16's by a power of two, exactly; what is 2^-29 of the row's largest
// entry loses bits. P scale_v is taken relative to the largest scale_v of the kv_blocks so far, again by a power of
// two, below 2^14: it has the precision of fp16 down to 2^-28 of that.
//
// Source: Flash-Decoding and Stream-K, as decode.cuh.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/tensor.hpp>

#include "params.h"
#include "sm90/decode/decode_cta.cuh"
#include "sm90/decode/decode_rows.cuh"
#include "sm90/decode/decode_schedule.cuh"
#include "sm90/decode/parts.cuh"
#include "sm90/hopper/fragment.cuh"
#include "sm90/hopper/operands.cuh"
#include "sm90/hopper/ptx.cuh"
#include "sm90/hopper/softmax.cuh"
#include "sm90/tiles.h"

namespace flashmla::sm90 {

template <int kHeadDim_, class Element_>
struct E4m3Decode {
  using Element = Element_;  // of q and out
  using Tiles = E4m3DecodeTiles<kHeadDim_>;
  static constexpr int kHeadDim = kHeadDim_, kHeadDimQK = kHeadDim, kHeadDimV = kHeadDim, kRows = Tiles::kRows;
  static constexpr bool kReadsValues = true, kReadsE4m3 = true;
  static constexpr int kBlockKV = Tiles::kBlockKV, kNumStages = Tiles::kNumStages, kNumQStages = 0;
  static constexpr int kNumWarps = kWarpgroupThreads / kWarpThreads;  // that compute
  static constexpr int kRowColumns = 8;                               // query rows of a product
  static constexpr int kRowTiles = kRows / kRowColumns;
  static constexpr int kKeyTiles = kBlockKV / 16;
  // Bytes of a row in shared memory: a swizzle row. Wider rows are several chunks of columns.
  static constexpr int kChunk = kHeadDim < 128 ? kHeadDim : 128, kChunks = kHeadDim / kChunk;
  static_assert(kChunk == 64 || kChunk == 128);
  static constexpr int kLoads = kHeadDim / 64;               // of 16 columns of K, in a lane
  static constexpr int kColumns = kChunk / kRowColumns;      // of V, in a lane and chunk
  static constexpr int kOutTiles = kHeadDim / 16;            // of 16 columns of V
  static constexpr int kScores = kRowTiles * kKeyTiles * 4;  // in a lane

  // What a warp leaves of a tile.
  struct WarpPart {
    float2 sums[kRows];
    float out[kRows][kHeadDim + 4];  // 4: rows begin in different banks
  };
  struct SharedStorage {
    alignas(1024) unsigned char k[kNumStages][kBlockKV * kHeadDim];
    alignas(1024) unsigned char v[kNumStages][kBlockKV * kHeadDim];
    alignas(16) WarpPart parts[kNumWarps];
    float k_scale[kNumStages][kBlockKV], v_scale[kNumStages][kBlockKV];
    uint64_t full[kNumStages], empty[kNumStages];
  };
  static constexpr int kSharedBytes = sizeof(SharedStorage);
  static_assert((kSharedBytes + kSystemBytes) * Tiles::kNumCtas <= kMaxSharedBytes + kSystemBytes);

  // ---- loading warp -------------------------------------------------------------------------------------------------

  // A kv_block into its stage, which is free: `places.here` is where the lane's box lies, which has a key if `has_box`.
  __device__ static void load_block(DecodeArguments const& arguments, SharedStorage& shared, int stage,
                                    BoxPlaces<kBlockKV> const& places, int32_t kv_block, int32_t head_kv, bool has_box,
                                    int num_boxes, uint64_t hint) {
    SequenceKeys const& keys = places.keys;
    DecodeParams const& params = arguments.params;
    int32_t const lane = threadIdx.x % kWarpThreads, rows = arguments.rows_per_box;
    int32_t const rows_log2 = __ffs(rows) - 1;  // boxes are powers of two
    uint64_t& full = shared.full[stage];
    if (lane == 0) ClusterTransactionBarrier::arrive_and_expect_tx(&full, num_boxes * rows * 2 * kHeadDim);
    __syncwarp();
    if (has_box) {
      auto copy = [&](CUtensorMap const& map, unsigned char* buffer) {
        CUTE_UNROLL
        for (int chunk = 0; chunk < kChunks; ++chunk) {
          cute::SM90_TMA_LOAD_4D::copy(&map, &full, hint,
                                       buffer + chunk * kBlockKV * kChunk + places.first_row() * kChunk, chunk * kChunk,
                                       places.here.row, head_kv, places.here.page);
        }
      };
      copy(arguments.k, shared.k[stage]);
      copy(arguments.v, shared.v[stage]);
    }
    __syncwarp();
    // Scales of rows that are no keys of the sequence are 0 and not read.
    CUTE_UNROLL
    for (int i = 0; i < kBlockKV; i += kWarpThreads) {
      int32_t const key_in_block = i + lane, key = kv_block * kBlockKV + key_in_block;
      int32_t const lane_of_box = places.first_lane + (key_in_block >> rows_log2);
      int32_t const page = __shfl_sync(0xffffffff, places.here.page, lane_of_box);
      int32_t const row = __shfl_sync(0xffffffff, places.here.row, lane_of_box) + (key_in_block & (rows - 1));
      bool const has_scale = key >= keys.begin && key < keys.end && page >= 0 && page < params.num_pages;
      auto copy = [&](ScaleView const& scales, float& target) {
        float const* const source =
            scales.data +
            (has_scale ? page * scales.stride_batch + row * scales.stride_seqlen + head_kv * scales.stride_heads : 0);
        cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<float>::copy(*source, target, has_scale);
      };
      copy(arguments.k_scale, shared.k_scale[stage][key_in_block]);
      copy(arguments.v_scale, shared.v_scale[stage][key_in_block]);
    }
    cutlass::arch::cpasync_barrier_arrive_noinc(&full);
  }

  // ---- warps that compute -------------------------------------------------------------------------------------------
  //
  // Lane 4 g + t. Of S^T it has keys g and g + 8 of each 16, and rows 2 t and 2 t + 1 of each 8; of O^T columns
  // 16 g ... 16 g + 15 (8 g ... 8 g + 7 if there are 64) of each chunk, and the same rows. Which column of K is which
  // depth of the product does not matter as long as Q has the same: lane t takes 16 bytes at a time.

  // The first column of load i of lane t.
  __device__ static int column_of_load(int i, int t) {
    return kChunk == 64 ? 16 * t : i / 2 * kChunk + 16 * (2 * t + i % 2);
  }

  struct Queries {
    uint32_t pairs[kRowTiles][kLoads * 4][2];  // fp16
    float factor[kRowTiles][2];                // of the lane's rows: what they were divided by
  };

  __device__ static void read_queries(DecodeArguments const& arguments, Queries& queries, int32_t batch, int32_t tile) {
    int const lane = threadIdx.x % kWarpThreads, g = lane / 4, t = lane % 4;
    CUTE_UNROLL
    for (int n = 0; n < kRowTiles; ++n) {
      TileRow const row = row_of<kRows>(arguments, tile, n * kRowColumns + g);
      Element const* const q = row_pointer<Element>(arguments.params.q, batch, row);
      uint32_t words[kLoads * 2][4];
      CUTE_UNROLL
      for (int i = 0; i < kLoads * 2; ++i) {
        int const column = column_of_load(i / 2, t) + i % 2 * 8;
        uint4 x{0, 0, 0, 0};
        if (row.is_valid && column < arguments.params.problem.head_dim_qk)
          x = *reinterpret_cast<uint4 const*>(q + column);
        words[i][0] = x.x, words[i][1] = x.y, words[i][2] = x.z, words[i][3] = x.w;
      }
      if constexpr (!std::is_same_v<Element, cutlass::half_t>) {
        uint32_t largest = 0;  // magnitudes of two numbers; what is not finite is larger than what is
        CUTE_UNROLL
        for (int i = 0; i < kLoads * 2; ++i) {
          CUTE_UNROLL
          for (int w = 0; w < 4; ++w) largest = __vmaxu2(largest, words[i][w] & 0x7fff7fff);
        }
        largest = max(largest >> 16, largest & 0xffff);
        largest = max(largest, __shfl_xor_sync(0xffffffff, largest, 1));
        largest = max(largest, __shfl_xor_sync(0xffffffff, largest, 2));
        // The largest number becomes one of [2^14, 2^15).
        uint32_t const exponent = max(largest >> 7, 15u);
        float const inverse = __uint_as_float((268 - exponent) << 23), factor = __uint_as_float((exponent - 14) << 23);
        CUTE_UNROLL
        for (int i = 0; i < kLoads * 2; ++i) {
          CUTE_UNROLL
          for (int w = 0; w < 4; ++w) {
            float2 const x = unpack<Element>(words[i][w]);
            words[i][w] = pack<cutlass::half_t>(x.x * inverse, x.y * inverse);
          }
        }
        CUTE_UNROLL
        for (int r = 0; r < 2; ++r) queries.factor[n][r] = __shfl_sync(0xffffffff, factor, 4 * (2 * t + r));
      }
      CUTE_UNROLL
      for (int i = 0; i < kLoads * 2; ++i) {
        CUTE_UNROLL
        for (int w = 0; w < 4; ++w) queries.pairs[n][i * 2 + w / 2][w % 2] = words[i][w];
      }
    }
  }

  // Rows of V that are no keys of the sequence may hold anything, and 0 * NaN is NaN. By a warp.
  __device__ static void clear_values(unsigned char* v, SequenceKeys const& keys, int32_t kv_block) {
    constexpr int kVectors = kChunk / 16;
    int32_t const first = kv_block * kBlockKV;
    for (int i = threadIdx.x % kWarpThreads; i < kChunks * kBlockKV * kVectors; i += kWarpThreads) {
      int32_t const key = first + i / kVectors % kBlockKV;
      if (key >= keys.begin && key < keys.end) continue;
      reinterpret_cast<uint4*>(v)[i] = uint4{0, 0, 0, 0};  // all of a row: its vectors' order does not matter
    }
    cutlass::arch::fence_view_async_shared();  // TMA writes here next
    __syncwarp();
  }

  // A warp's softmax and sums of a tile.
  struct State {
    float row_max[kRowTiles][2], row_sum[kRowTiles][2];  // row_sum: of this lane's keys
    float out[kRowTiles][kOutTiles][4];
    // Exponent of the largest scale of V so far, with its bias of 127; not so small that 2^14 over it overflows.
    uint32_t value_exponent;

    __device__ void reset() {
      value_exponent = 14;
      CUTE_UNROLL
      for (int n = 0; n < kRowTiles; ++n) {
        CUTE_UNROLL
        for (int r = 0; r < 2; ++r) row_max[n][r] = -INFINITY, row_sum[n][r] = 0.0f;
        CUTE_UNROLL
        for (int m = 0; m < kOutTiles; ++m) {
          CUTE_UNROLL
          for (int e = 0; e < 4; ++e) out[n][m][e] = 0.0f;
        }
      }
    }
    // What O is to be multiplied by, at the end: 2^-140 of the exponent.
    __device__ float value_factor() const { return __uint_as_float((value_exponent - 13) << 23); }
  };

  // Element e of key tile m and row tile n: key 16 m + g + 8 (e / 2), row 8 n + 2 t + e % 2.
  __device__ static constexpr int score_at(int n, int m, int e) { return (n * kKeyTiles + m) * 4 + e; }

  // S^T before its scales.
  template <class Scores>
  __device__ static void multiply_keys(Scores& scores, unsigned char const* k, Queries const& queries) {
    int const lane = threadIdx.x % kWarpThreads, g = lane / 4, t = lane % 4;
    CUTE_UNROLL
    for (int i = 0; i < kScores; ++i) scores(i) = 0.0f;
    CUTE_UNROLL
    for (int m = 0; m < kKeyTiles; ++m) {
      CUTE_UNROLL
      for (int i = 0; i < kLoads; ++i) {
        int const vector = kChunk == 64 ? t ^ (g / 2) : (2 * t + i % 2) ^ g;  // swizzled
        unsigned char const* const address = k + i / 2 * (kBlockKV * kChunk) + (16 * m + g) * kChunk + vector * 16;
        uint4 const low = *reinterpret_cast<uint4 const*>(address);
        uint4 const high = *reinterpret_cast<uint4 const*>(address + 8 * kChunk);
        uint32_t const low_words[4] = {low.x, low.y, low.z, low.w}, high_words[4] = {high.x, high.y, high.z, high.w};
        CUTE_UNROLL
        for (int w = 0; w < 4; ++w) {
          uint32_t a[4];
          ptx::unpack_e4m3(low_words[w], a[0], a[2]);
          ptx::unpack_e4m3(high_words[w], a[1], a[3]);
          CUTE_UNROLL
          for (int n = 0; n < kRowTiles; ++n) {
            ptx::multiply_add_m16n8k16<cutlass::half_t>(&scores(score_at(n, m, 0)), a, queries.pairs[n][i * 4 + w]);
          }
        }
      }
    }
  }

  // O^T += V8^T P^T. pairs: of P^T, keys 2 t, 2 t + 1 and 2 t + 8, 2 t + 9 of each 16, row g.
  __device__ static void multiply_values(State& state, unsigned char const* v,
                                         uint32_t const (&pairs)[kRowTiles][kKeyTiles][2]) {
    int const lane = threadIdx.x % kWarpThreads, g = lane / 4, t = lane % 4;
    constexpr int kWords = kColumns / 4;
    CUTE_UNROLL
    for (int m = 0; m < kKeyTiles; ++m) {
      CUTE_UNROLL
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        uint32_t words[4][kWords];  // of four keys
        CUTE_UNROLL
        for (int j = 0; j < 4; ++j) {
          int const key = 2 * t + j % 2;  // the others are 8 further on, swizzled alike
          unsigned char const* const row = v + chunk * (kBlockKV * kChunk) + (16 * m + 8 * (j / 2) + key) * kChunk;
          if constexpr (kChunk == 64) {
            uint2 const x = *reinterpret_cast<uint2 const*>(row + ((g / 2) ^ t) * 16 + g % 2 * 8);
            words[j][0] = x.x, words[j][1] = x.y;
          } else {
            uint4 const x = *reinterpret_cast<uint4 const*>(row + (g ^ key) * 16);
            words[j][0] = x.x, words[j][1] = x.y, words[j][2] = x.z, words[j][3] = x.w;
          }
        }
        CUTE_UNROLL
        for (int w = 0; w < kWords; ++w) {
          CUTE_UNROLL
          for (int half = 0; half < 2; ++half) {
            // Two columns of two keys, column by column.
            uint32_t const selector = half == 0 ? 0x5140 : 0x7362;
            uint32_t a[4];
            ptx::unpack_e4m3(__byte_perm(words[0][w], words[1][w], selector), a[0], a[1]);
            ptx::unpack_e4m3(__byte_perm(words[2][w], words[3][w], selector), a[2], a[3]);
            CUTE_UNROLL
            for (int n = 0; n < kRowTiles; ++n) {
              ptx::multiply_add_m16n8k16<cutlass::half_t>(state.out[n][chunk * (kColumns / 2) + 2 * w + half], a,
                                                          pairs[n][m]);
            }
          }
        }
      }
    }
  }

  // Column of V of elements e and e + 1 ... of out tile m: column, and column + 1 for e >= 2.
  __device__ static int column_of_out(int m, int g) {
    return m / (kColumns / 2) * kChunk + kColumns * g + m % (kColumns / 2) * 2;
  }

  __device__ static void store_part(State const& state, WarpPart& part) {
    int const lane = threadIdx.x % kWarpThreads, g = lane / 4, t = lane % 4;
    float const factor = state.value_factor();
    CUTE_UNROLL
    for (int n = 0; n < kRowTiles; ++n) {
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        int const row = n * kRowColumns + 2 * t + r;
        float sum = state.row_sum[n][r];
        CUTE_UNROLL
        for (int lanes = 4; lanes < kWarpThreads; lanes *= 2) sum += __shfl_xor_sync(0xffffffff, sum, lanes);
        if (g == 0) part.sums[row] = {state.row_max[n][r], sum};
        CUTE_UNROLL
        for (int m = 0; m < kOutTiles; m += 2) {
          auto const &x = state.out[n][m], &y = state.out[n][m + 1];
          *reinterpret_cast<float4*>(&part.out[row][column_of_out(m, g)]) = {x[r] * factor, x[r + 2] * factor,
                                                                             y[r] * factor, y[r + 2] * factor};
        }
      }
    }
  }

  // One step of a warp: O and the sums of a kv_block more. finish_scores(scores): what is done before the softmax.
  template <class FinishScores>
  __device__ static void attend(State& state, Queries const& queries, unsigned char const* k, unsigned char const* v,
                                float const* k_scale, float const* v_scale, FinishScores const& finish_scores,
                                float scale_log2) {
    int const lane = threadIdx.x % kWarpThreads, g = lane / 4;
    auto scores = cute::make_tensor<float>(cute::Int<kScores>{});
    multiply_keys(scores, k, queries);
    float value_scale[kKeyTiles][2];
    uint32_t largest_scale = 0;
    CUTE_UNROLL
    for (int m = 0; m < kKeyTiles; ++m) {
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) {
        float const key_scale = k_scale[16 * m + g + 8 * h];
        value_scale[m][h] = v_scale[16 * m + g + 8 * h];
        largest_scale = max(largest_scale, __float_as_uint(value_scale[m][h]) & 0x7fffffff);
        CUTE_UNROLL
        for (int n = 0; n < kRowTiles; ++n) {
          CUTE_UNROLL
          for (int r = 0; r < 2; ++r) {
            float& score = scores(score_at(n, m, 2 * h + r));
            if constexpr (!std::is_same_v<Element, cutlass::half_t>) score *= queries.factor[n][r];
            score *= key_scale;
          }
        }
      }
    }
    finish_scores(scores);

    // The softmax of this warp's keys.
    largest_scale = __reduce_max_sync(0xffffffff, largest_scale);
    uint32_t const exponent = max(state.value_exponent, min(largest_scale >> 23, 254u));
    bool has_grown = exponent > state.value_exponent;
    uint32_t const shift = exponent - state.value_exponent;
    float const value_correction = shift < 127 ? __uint_as_float((127 - shift) << 23) : 0.0f;
    state.value_exponent = exponent;
    float correction[kRowTiles][2], base[kRowTiles][2];
    CUTE_UNROLL
    for (int n = 0; n < kRowTiles; ++n) {
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        float largest[2] = {-INFINITY, -INFINITY};
        CUTE_UNROLL
        for (int m = 0; m < kKeyTiles; ++m) {
          CUTE_UNROLL
          for (int h = 0; h < 2; ++h) largest[h] = fmaxf(largest[h], scores(score_at(n, m, 2 * h + r)));
        }
        float here = fmaxf(largest[0], largest[1]);
        CUTE_UNROLL
        for (int lanes = 4; lanes < kWarpThreads; lanes *= 2) {
          here = fmaxf(here, __shfl_xor_sync(0xffffffff, here, lanes));
        }
        float const old = state.row_max[n][r], now = fmaxf(old, here);
        has_grown |= now > old;
        base[n][r] = now == -INFINITY ? 0.0f : now;  // exp2(-inf) = 0 where nothing is seen yet, and not NaN
        correction[n][r] = now > old ? exp2f((old - base[n][r]) * scale_log2) : 1.0f;
        state.row_max[n][r] = now;
      }
    }
    if (__any_sync(0xffffffff, has_grown)) {
      CUTE_UNROLL
      for (int n = 0; n < kRowTiles; ++n) {
        CUTE_UNROLL
        for (int r = 0; r < 2; ++r) {
          state.row_sum[n][r] *= correction[n][r];
          float const factor = correction[n][r] * value_correction;
          CUTE_UNROLL
          for (int m = 0; m < kOutTiles; ++m) {
            state.out[n][m][r] *= factor;
            state.out[n][m][r + 2] *= factor;
          }
        }
      }
    }
    float const to_fp16 = __uint_as_float((267 - exponent) << 23);
    uint32_t pairs[kRowTiles][kKeyTiles][2];
    CUTE_UNROLL
    for (int m = 0; m < kKeyTiles; ++m) {
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) {
        float const factor = value_scale[m][h] * to_fp16;
        CUTE_UNROLL
        for (int n = 0; n < kRowTiles; ++n) {
          float p[2];
          CUTE_UNROLL
          for (int r = 0; r < 2; ++r) {
            p[r] = exp2f((scores(score_at(n, m, 2 * h + r)) - base[n][r]) * scale_log2);
            state.row_sum[n][r] += p[r];
          }
          pairs[n][m][h] = ptx::transpose_matrix(pack<cutlass::half_t>(p[0] * factor, p[1] * factor));
        }
      }
    }
    multiply_values(state, v, pairs);
  }

  template <class Scores>
  __device__ static void hide(Scores& scores, DecodeArguments const& arguments, SequenceKeys const& keys, int32_t tile,
                              int32_t first_key) {
    if (first_key >= keys.unmasked_begin && first_key + kBlockKV <= keys.unmasked_end) return;
    int const lane = threadIdx.x % kWarpThreads, g = lane / 4, t = lane % 4;
    CUTE_UNROLL
    for (int n = 0; n < kRowTiles; ++n) {
      // Found anew: few steps hide keys, and no step has registers to spare.
      RowKeys const seen = row_keys<1, kRows>(arguments, keys, tile, n * kRowColumns + 2 * t);
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        // Relative, so that each element compares with a constant.
        int32_t const begin = seen.begin[r] - first_key - g, end = seen.end[r] - first_key - g;
        CUTE_UNROLL
        for (int m = 0; m < kKeyTiles; ++m) {
          CUTE_UNROLL
          for (int h = 0; h < 2; ++h) {
            if (16 * m + 8 * h < begin || 16 * m + 8 * h >= end) scores(score_at(n, m, 2 * h + r)) = -INFINITY;
          }
        }
      }
    }
  }

  __device__ static void consume(DecodeArguments const& arguments, SharedStorage& shared) {
    int const warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
    Problem const& problem = arguments.params.problem;
    bool const has_transform = problem.softcap > 0.0f || problem.scale <= 0.0f;
    float const scale_log2 = has_transform ? kLog2e : problem.scale * kLog2e;
    uint32_t first_of_tile = 0;  // kv_blocks before this tile's
    for (DecodeWalk walk = begin_walk(arguments); walk.find(); walk.next_tile()) {
      SequenceKeys const keys = walk.keys;
      KVBlocks const blocks = walk.blocks;
      Queries queries;
      read_queries(arguments, queries, walk.batch, walk.tile);
      State state;
      state.reset();

#pragma unroll 1
      for (int32_t kv_block = blocks.begin + warp; kv_block < blocks.end; kv_block += kNumWarps) {
        uint32_t const number = first_of_tile + static_cast<uint32_t>(kv_block - blocks.begin);
        uint32_t const turns = number / kNumStages, stage = number - turns * kNumStages;
        // The block before this one in the stage is another warp's, which may wait for it still. A wait for a phase
        // knows its parity alone: it would take the phase two before for its own, and pass.
        if constexpr (kNumStages % kNumWarps != 0) ClusterBarrier::wait(&shared.empty[stage], (turns & 1) ^ 1);
        ClusterBarrier::wait(&shared.full[stage], turns & 1);
        __syncwarp();
        if (has_hidden_rows<kBlockKV>(keys, kv_block)) clear_values(shared.v[stage], keys, kv_block);
        attend(
            state, queries, shared.k[stage], shared.v[stage], shared.k_scale[stage], shared.v_scale[stage],
            [&](auto& scores) {
              if (has_transform) transform_scores<kScores>(scores, problem.scale, problem.softcap);
              hide(scores, arguments, keys, walk.tile, kv_block * kBlockKV);
            },
            scale_log2);
        // An arrival does not wait for loads of shared memory that are on their way, and TMA writes here next.
        cutlass::arch::fence_view_async_shared();
        __syncwarp();
        if (lane == 0) ClusterBarrier::arrive(&shared.empty[stage]);
      }
      first_of_tile += static_cast<uint32_t>(blocks.end - blocks.begin);

      NamedBarrier::sync(kWarpgroupThreads, kConsumerBarrier);  // the parts of the tile before have been read
      store_part(state, shared.parts[warp]);
      add_parts(arguments, shared, walk);
      if (arguments.cluster_size > 1) return;  // it has one tile
    }
  }

  // The warps' parts, to where the tile's go.
  __device__ static void add_parts(DecodeArguments const& arguments, SharedStorage& shared, DecodeWalk const& walk) {
    int32_t const num_rows = num_rows_of<kRows>(arguments, walk.tile);
    int64_t const head_dim_v = arguments.params.problem.head_dim_v;
    // Calls f(row, column, sum of the warps' parts, maximum) for four columns at a time.
    auto for_sums = [&](auto const& f) {
      constexpr int kVectors = kHeadDim / 4;
      for (int32_t i = threadIdx.x; i < num_rows * kVectors; i += kWarpgroupThreads) {
        int32_t const row = i / kVectors, column = i % kVectors * 4;
        float2 sums[kNumWarps];
        float row_max = -INFINITY;
        CUTE_UNROLL
        for (int w = 0; w < kNumWarps; ++w) {
          sums[w] = shared.parts[w].sums[row];
          row_max = fmaxf(row_max, sums[w].x);
        }
        SumOfParts parts(arguments.params.problem, row_max);
        CUTE_UNROLL
        for (int w = 0; w < kNumWarps; ++w) {
          parts.add(sums[w], *reinterpret_cast<float4 const*>(&shared.parts[w].out[row][column]));
        }
        f(row, column, parts);
      }
    };
    if (arguments.cluster_size > 1) {
      add_parts_of_cluster<E4m3Decode>(arguments, shared, walk, num_rows, [&](auto& cluster_part) {
        for_sums([&](int32_t row, int32_t column, SumOfParts const& parts) {
          *reinterpret_cast<float4*>(&cluster_part.out[row][column]) = parts.x;
          if (column == 0) cluster_part.sums[row] = {parts.row_max, parts.sum};
        });
      });
      return;
    }
    NamedBarrier::sync(kWarpgroupThreads, kConsumerBarrier);
    if (walk.is_whole()) {
      for_sums([&](int32_t row, int32_t column, SumOfParts const& parts) {
        parts.template write<Element>(arguments, walk.batch, row_of<kRows>(arguments, walk.tile, row), column,
                                      walk.keys.length > 0, column < head_dim_v, column == 0);
      });
    } else {
      int64_t const part = int64_t{partial_of(blockIdx.x, walk.unit == walk.tile_begin)} * arguments.partial_rows;
      for_sums([&](int32_t row, int32_t column, SumOfParts const& parts) {
        if (column < head_dim_v) {
          *reinterpret_cast<float4*>(arguments.partial_out + (part + row) * head_dim_v + column) = parts.x;
        }
        if (column == 0) arguments.partial_sums[part + row] = {parts.row_max, parts.sum};
      });
    }
  }

  __device__ static void run(DecodeArguments const& arguments, SharedStorage& shared) {
    if (threadIdx.x == 0) {
      if (cute::cast_smem_ptr_to_uint(&shared) % 1024 != 0) __trap();
      for (int stage = 0; stage < kNumStages; ++stage) {
        ClusterBarrier::init(&shared.full[stage], 1 + kWarpThreads);  // the bytes, and each lane's scales
        ClusterBarrier::init(&shared.empty[stage], 1);
      }
      cutlass::arch::fence_barrier_init();
    }
    if (threadIdx.x == kWarpgroupThreads && arguments.params.num_pages > 0 && arguments.params.page_size > 0) {
      cute::prefetch_tma_descriptor(&arguments.k);
      cute::prefetch_tma_descriptor(&arguments.v);
    }
    __syncthreads();
    if (threadIdx.x >= kWarpgroupThreads) {
      load_tiles<E4m3Decode>(arguments, shared);
      cute::cp_async_wait<0>();  // shared memory is written until then
    } else {
      consume(arguments, shared);
    }
  }
};

}  // namespace flashmla::sm90
