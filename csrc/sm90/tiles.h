// The one table of tile sizes, stages, warpgroups and registers of the Hopper kernels.
//
// A new head dim is one entry here (and its name in the list below it), one file of instantiations/, and nothing else:
// dispatch.cpp, the host's limits, the package's (setup.py writes them to _build.json), the tests' list and the tables
// of README.md and docs/kernels.md are derived (csrc/sm90/tiles.py reads this file: write each entry as the others).
// Dates name the entry of docs/log.md that holds the measurement.
#pragma once

#include <cstdint>

namespace flashmla::sm90 {

// A warpgroup is four warps; wgmma gives it 64 rows of a product.
constexpr int kWarpThreads = 32, kWarpgroupThreads = 128, kWarpgroupRows = 64;
// Shared memory a CTA can have: 228 KiB of a multiprocessor, less 1 KiB that the system keeps.
constexpr int kMaxSharedBytes = 227 * 1024;
constexpr int kRegistersPerSM = 65536;
// TMA reads 16 bytes at a time: head dims are multiples of 8 elements of 16 bits.
constexpr int kHeadDimMultiple = 8;
// Of e4m3.
constexpr int kE4m3HeadDimMultiple = 16;

// The comparisons that masked tiles of the score matrix need; exclusive.
enum class MaskKind : int32_t {
  kNone,    // the ragged end of K
  kCausal,  // window_right >= 0, window_left unbounded: the right edge and the end
  kWindow,  // any window: both edges and the end
};

// Largest head dims of a kernel: a call runs in the first of a list that is wide enough for both.
template <int kHeadDimQK_, int kHeadDimV_>
struct HeadDims {
  static constexpr int kHeadDimQK = kHeadDimQK_, kHeadDimV = kHeadDimV_;
};
template <class...>
struct HeadDimList {};

// ---- forward --------------------------------------------------------------------------------------------------------
//
// kBlockQ x kBlockKV: rows of Q and of K/V in a tile. kNumStages: depth of the rings of K and V. kNumQStages: Q
// buffers. kNumConsumers: consumer warpgroups. k*Registers: of a thread, by setmaxnreg. kPingPong: consumer warpgroups
// take turns at the tensor cores. S (kBlockKV/2 registers a thread), O (head_dim_v/2) and P (kBlockKV/4) live in
// registers together.

template <int kHeadDimQK, int kHeadDimV, MaskKind kMask>
struct ForwardConfig;

// Three warpgroups: 128 x 128 with two was slower at 1k (2026-11-22). They keep apart by themselves: turns cost 1 to
// 5 % (2026-11-26).
template <MaskKind kMask>
struct ForwardConfig<64, 64, kMask> {
  static constexpr int kBlockQ = 192, kBlockKV = 128;
  static constexpr int kNumStages = 3, kNumQStages = 2;
  static constexpr int kNumConsumers = 3, kProducerRegisters = 32, kConsumerRegisters = 160;
  static constexpr bool kPingPong = false;
};

// The tile of 128, with turns; docs/log.md has no measurement of this entry alone.
template <MaskKind kMask>
struct ForwardConfig<96, 96, kMask> {
  static constexpr int kBlockQ = 128, kBlockKV = 128;
  static constexpr int kNumStages = 2, kNumQStages = 2;
  static constexpr int kNumConsumers = 2, kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr bool kPingPong = true;
};

// Three K/V stages with one Q buffer gained nothing (2026-11-22). Without turns: causal 4k 560 -> 572 TFLOP/s, 16k with
// 32/8 heads 640 -> 655 (2026-11-26).
template <MaskKind kMask>
struct ForwardConfig<128, 128, kMask> {
  static constexpr int kBlockQ = 128, kBlockKV = 128;
  static constexpr int kNumStages = 2, kNumQStages = 2;
  static constexpr int kNumConsumers = 2, kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr bool kPingPong = false;
};

// Without a mask wider tiles pay: 128 x 160 with two Q buffers gained nothing over this (2026-11-22). With turns 533
// TFLOP/s at 1k, without 517 (2026-11-26).
template <>
struct ForwardConfig<128, 128, MaskKind::kNone> {
  static constexpr int kBlockQ = 128, kBlockKV = 176;
  static constexpr int kNumStages = 2, kNumQStages = 1;
  static constexpr int kNumConsumers = 2, kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr bool kPingPong = true;
};

// 128 x 96 with two Q buffers: no gain (2026-11-22), 516 against 581 TFLOP/s (2026-11-26).
template <MaskKind kMask>
struct ForwardConfig<192, 128, kMask> {
  static constexpr int kBlockQ = 128, kBlockKV = 128;
  static constexpr int kNumStages = 2, kNumQStages = 1;
  static constexpr int kNumConsumers = 2, kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr bool kPingPong = true;
};

// 80 keys are what shared memory holds beside two Q buffers. The products are long against the exponentials: turns
// order nothing (2026-11-22).
template <MaskKind kMask>
struct ForwardConfig<192, 192, kMask> {
  static constexpr int kBlockQ = 128, kBlockKV = 80;
  static constexpr int kNumStages = 2, kNumQStages = 2;
  static constexpr int kNumConsumers = 2, kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr bool kPingPong = false;
};

// As 192/192, beside one Q buffer.
template <MaskKind kMask>
struct ForwardConfig<256, 256, kMask> {
  static constexpr int kBlockQ = 128, kBlockKV = 80;
  static constexpr int kNumStages = 2, kNumQStages = 1;
  static constexpr int kNumConsumers = 2, kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr bool kPingPong = false;
};

// Two CTAs, each with the scores of 64 rows and half of the columns of O (forward_pair.cuh). kNumKChunks: depth of the
// ring of K, in chunks of 128 columns, of which a kv_block has four. They fill the shared memory: 8,192 causal, 16/2
// heads 355 -> 593 TFLOP/s (2026-11-28, head dim 512 again).
template <MaskKind kMask>
struct ForwardConfig<512, 512, kMask> {
  static constexpr int kBlockQ = 128, kBlockKV = 64;
  static constexpr int kNumStages = 2, kNumQStages = 1, kNumKChunks = 5;
  static constexpr int kNumConsumers = 2, kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr bool kPingPong = false;
};

using ForwardHeadDims = HeadDimList<HeadDims<64, 64>, HeadDims<96, 96>, HeadDims<128, 128>, HeadDims<192, 128>,
                                    HeadDims<192, 192>, HeadDims<256, 256>, HeadDims<512, 512>>;

// ---- forward of e4m3 operands ---------------------------------------------------------------------------------------
//
// As the forward's. A thread holds S (kBlockKV/2 registers), P (kBlockKV/8), O and the product of a tile that joins it
// (head_dim/2 each). kParksOutput: there is no such product; shared memory holds O once more, as fp16. A kv_block is
// the block of keys that has one scale. A turn is passed on in the middle of a row's exponentials.

template <int kHeadDim>
struct Fp8ForwardConfig;

// The tile of 128. The products are half as long as the exponentials, so that turns pay: 16,384 with 32 heads, without
// quantisation, full 4,179 -> 3,992 us, causal 2,181 -> 2,021 (2026-11-28).
template <>
struct Fp8ForwardConfig<64> {
  static constexpr int kBlockQ = 128, kBlockKV = 128;
  static constexpr int kNumStages = 4, kNumQStages = 2;
  static constexpr int kNumConsumers = 2, kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr bool kPingPong = true, kParksOutput = false;
};

// What registers hold. With turns 16,384 with 16 heads, without quantisation, is slower: full 2,456 -> 2,625 us, causal
// 1,283 -> 1,382 (2026-11-28).
template <>
struct Fp8ForwardConfig<128> {
  static constexpr int kBlockQ = 128, kBlockKV = 128;
  static constexpr int kNumStages = 4, kNumQStages = 2;
  static constexpr int kNumConsumers = 2, kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr bool kPingPong = false, kParksOutput = false;
};

// What registers and shared memory hold (2026-11-29, eighth session).
template <>
struct Fp8ForwardConfig<256> {
  static constexpr int kBlockQ = 128, kBlockKV = 128;
  static constexpr int kNumStages = 2, kNumQStages = 1;
  static constexpr int kNumConsumers = 2, kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr bool kPingPong = false, kParksOutput = true;
};

using Fp8ForwardHeadDims = HeadDimList<HeadDims<64, 64>, HeadDims<128, 128>, HeadDims<256, 256>>;

// ---- backward by keys: dK, dV and, unless the warpgroups share columns, dQ ------------------------------------------
//
// kBlockQ x kBlockKV: rows of Q and of K/V in a tile. kNumStages: depth of the rings of Q and dO. kSwizzleColumns:
// columns of a swizzled chunk. kSplitsColumns: the two consumer warpgroups share dK and dV by columns (each of all
// keys) instead of by keys. kHasSoftcap: there is a kernel with softcap (else a wider one computes it). By keys a
// thread holds dK and dV (head_dim_qk/2 + head_dim_v/2 registers), and beside them S, dP (kBlockQ/2 each) and packed P
// (kBlockQ/4), then dQ (kBlockQ * head_dim_qk / 256); by columns dK and dV (head_dim/4 each) and S or dP.

template <int kHeadDimQK, int kHeadDimV>
struct BackwardConfig;

// dQ a step late, from 128 queries: full 16k 487 -> 537 TFLOP/s (2026-11-24, night).
template <>
struct BackwardConfig<64, 64> {
  static constexpr int kBlockQ = 128, kBlockKV = 128;
  static constexpr int kNumStages = 2, kSwizzleColumns = 64;
  static constexpr int kNumConsumers = 2, kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr bool kSplitsColumns = false, kHasSoftcap = false;
};

// As 128, where a quarter or more of the products of 72 to 96 columns was of zeros (2026-11-28, sixth session).
template <>
struct BackwardConfig<96, 96> {
  static constexpr int kBlockQ = 64, kBlockKV = 128;
  static constexpr int kNumStages = 2, kSwizzleColumns = 32;
  static constexpr int kNumConsumers = 2, kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr bool kSplitsColumns = false, kHasSoftcap = false;
};

// 16 registers more, and ptxas serializes wgmma: 64 queries (2026-11-24).
template <>
struct BackwardConfig<128, 128> {
  static constexpr int kBlockQ = 64, kBlockKV = 128;
  static constexpr int kNumStages = 2, kSwizzleColumns = 64;
  static constexpr int kNumConsumers = 2, kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr bool kSplitsColumns = false, kHasSoftcap = true;
};

// dQ leaves by red from the registers: 433 -> 449 TFLOP/s at 4k, 483 -> 500 at 16k (2026-11-26). Chunks of 64 columns
// of Q, V and dO where K has 32: full 464 -> 469, deterministic 4 % faster (2026-11-28, sixth session).
template <>
struct BackwardConfig<192, 128> {
  static constexpr int kBlockQ = 64, kBlockKV = 128;
  static constexpr int kNumStages = 2, kSwizzleColumns = 64;
  static constexpr int kNumConsumers = 2, kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr bool kSplitsColumns = false, kHasSoftcap = false;
};

// dK and dV of 64 keys fill half of the registers; a part of dQ for every 64 keys took 40 % of the time, so dQ has a
// kernel of its own (2026-11-24, later).
template <>
struct BackwardConfig<192, 192> {
  static constexpr int kBlockQ = 64, kBlockKV = 64;
  static constexpr int kNumStages = 2, kSwizzleColumns = 32;
  static constexpr int kNumConsumers = 2, kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr bool kSplitsColumns = true, kHasSoftcap = true;
};

// As 192/192: full 16k 381 -> 427 TFLOP/s (2026-11-24, later).
template <>
struct BackwardConfig<256, 256> {
  static constexpr int kBlockQ = 64, kBlockKV = 64;
  static constexpr int kNumStages = 2, kSwizzleColumns = 64;
  static constexpr int kNumConsumers = 2, kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr bool kSplitsColumns = true, kHasSoftcap = true;
};

// Two CTAs, one with K and dK, one with V and dV: 8,192 causal, 16/2 heads 199 TFLOP/s with dQ (2026-11-28).
template <>
struct BackwardConfig<512, 512> {
  static constexpr int kBlockQ = 64, kBlockKV = 64;
  static constexpr int kNumStages = 2, kSwizzleColumns = 64;
  static constexpr int kNumConsumers = 2, kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr bool kSplitsColumns = true, kHasSoftcap = true;
};

using BackwardHeadDims = HeadDimList<HeadDims<64, 64>, HeadDims<96, 96>, HeadDims<128, 128>, HeadDims<192, 128>,
                                     HeadDims<192, 192>, HeadDims<256, 256>, HeadDims<512, 512>>;

// ---- backward by queries: dQ of the head dims whose dK and dV are shared by columns ---------------------------------
//
// kBlockQ x kBlockKV: rows of Q and of K/V in a tile. kNumStages: depth of the rings of K and V. A thread holds dQ
// (head_dim/2), S, dP (kBlockKV/2 each) and dS (kBlockKV/4); Q, dO and the rings fill the shared memory.

template <int kHeadDim>
struct BackwardQueriesConfig;

// 64 keys are what shared memory holds (2026-11-24, later).
template <>
struct BackwardQueriesConfig<192> {
  static constexpr int kBlockQ = 128, kBlockKV = 64;
  static constexpr int kNumStages = 2;
  static constexpr int kNumConsumers = 2, kProducerRegisters = 24, kConsumerRegisters = 240;
};

// 48 keys are what shared memory holds (2026-11-24, later).
template <>
struct BackwardQueriesConfig<256> {
  static constexpr int kBlockQ = 128, kBlockKV = 48;
  static constexpr int kNumStages = 2;
  static constexpr int kNumConsumers = 2, kProducerRegisters = 24, kConsumerRegisters = 240;
};

// Two CTAs of 256 columns each. 32 keys are what shared memory holds beside the other's parts of S and dP: 8,192
// causal, 16/2 heads 4.1 ms; CTAs that share rows as the forward's do 7.3 ms (2026-11-28, head dim 512 again).
template <>
struct BackwardQueriesConfig<512> {
  static constexpr int kBlockQ = 128, kBlockKV = 32;
  static constexpr int kNumStages = 2;
  static constexpr int kNumConsumers = 2, kProducerRegisters = 24, kConsumerRegisters = 240;
};

// ---- decode: queries at the end of sequences whose keys lie in a cache ----------------------------------------------
//
// kBlockKV: keys of a step. kNumStages: depth of the rings of K and V. kNumCtas: CTAs that share a multiprocessor. One
// consumer warpgroup holds S (kBlockKV/2 registers a thread), P (kBlockKV/4) and O (head_dim_v/2): memory is waited
// for, not the tensor cores, so what counts is bytes on their way, about 192 KiB a multiprocessor in each entry.

template <int kHeadDimQK, int kHeadDimV>
struct DecodeConfig;

// 4 x 8,192 with 64/8 heads: 2,060 GB/s; 128 keys and one CTA 2,020; 128 keys and two spilled 164 bytes (2026-11-27,
// evening).
template <>
struct DecodeConfig<64, 64> {
  static constexpr int kBlockKV = 64;
  static constexpr int kNumStages = 6, kNumCtas = 2;
};

// 64 x 2,048 with 32/8 heads: 2,919 GB/s; 128 keys, three stages and one CTA 2,852 (2026-11-27, evening).
template <>
struct DecodeConfig<128, 128> {
  static constexpr int kBlockKV = 64;
  static constexpr int kNumStages = 3, kNumCtas = 2;
};

// Five stages are what shared memory holds; no other was tried (2026-11-27, evening).
template <>
struct DecodeConfig<192, 128> {
  static constexpr int kBlockKV = 64;
  static constexpr int kNumStages = 5, kNumCtas = 1;
};

// Three stages are what shared memory holds: 1 x 32,768 with 16/8 heads 2,786 GB/s (2026-11-27, evening).
template <>
struct DecodeConfig<256, 256> {
  static constexpr int kBlockKV = 64;
  static constexpr int kNumStages = 3, kNumCtas = 1;
};

// Latents: keys of 576 columns whose first 512 are the values. The two warpgroups share O by columns (latent.cuh);
// shared memory holds two stages.
template <>
struct DecodeConfig<576, 512> {
  static constexpr int kBlockKV = 64;
  static constexpr int kNumStages = 2, kNumCtas = 1;
  static constexpr int kNumConsumers = 2, kProducerRegisters = 40, kConsumerRegisters = 232;
};

using LatentHeadDims = HeadDims<576, 512>;

using DecodeHeadDims = HeadDimList<HeadDims<64, 64>, HeadDims<128, 128>, HeadDims<192, 128>, HeadDims<256, 256>>;

// ---- decode from caches of e4m3 -------------------------------------------------------------------------------------
//
// kBlockKV: keys of a stage, which is a warp's. kNumCtas: CTAs that share a multiprocessor. A tile has as few query
// rows as a product may have columns, of which a lane holds O (head_dim / 4 registers), Q (half of that) and S
// (kBlockKV / 4): of 16 rows ptxas spills (docs/log.md, 2026-11-28). The ring of K and V has what shared memory holds
// beside the parts of four warps.

template <int kHeadDim>
struct E4m3DecodeConfig;

// Two CTAs, as of 16 bits.
template <>
struct E4m3DecodeConfig<64> {
  static constexpr int kBlockKV = 64, kNumCtas = 2;
};

// A lane has all of the 168 registers that ten warps leave it.
template <>
struct E4m3DecodeConfig<128> {
  static constexpr int kBlockKV = 64, kNumCtas = 2;
};

// The parts of four warps and a ring of as many bytes as that of 128 leave no room for a second CTA.
template <>
struct E4m3DecodeConfig<256> {
  static constexpr int kBlockKV = 64, kNumCtas = 1;
};

using E4m3DecodeHeadDims = HeadDimList<HeadDims<64, 64>, HeadDims<128, 128>, HeadDims<256, 256>>;

// ---- what follows from an entry, and what it must satisfy -----------------------------------------------------------

// CTAs that share a work tile: a row of more than 256 columns of fp32 does not fit the registers of two warpgroups.
constexpr int num_ctas(int head_dim) {
  return head_dim > 256 ? 2 : 1;
}

// A CTA is one producer warpgroup and the consumers.
template <class Config>
struct WarpgroupPlan : Config {
  static constexpr int kNumThreads = kWarpgroupThreads * (1 + Config::kNumConsumers);
  // Registers move between warpgroups within what the launch allotted: as many a thread as 64K allow, in steps of 8.
  static constexpr int kLaunchRegisters = kRegistersPerSM / kNumThreads / 8 * 8;
  static_assert(Config::kProducerRegisters + Config::kNumConsumers * Config::kConsumerRegisters <=
                    kLaunchRegisters * (1 + Config::kNumConsumers),
                "setmaxnreg would deadlock: more registers requested than the launch allots");
};

template <int kHeadDimQK, int kHeadDimV, MaskKind kMask>
struct ForwardTiles : WarpgroupPlan<ForwardConfig<kHeadDimQK, kHeadDimV, kMask>> {
  using Config = ForwardConfig<kHeadDimQK, kHeadDimV, kMask>;
  static constexpr int kNumCtas = num_ctas(kHeadDimV);
  static_assert(Config::kBlockQ == kWarpgroupRows * Config::kNumConsumers, "64 query rows per consumer warpgroup");
};

template <int kHeadDim>
struct Fp8ForwardTiles : WarpgroupPlan<Fp8ForwardConfig<kHeadDim>> {};

// The widest chunk, `most` columns or fewer, of which `columns` are a multiple.
constexpr int widest_chunk(int columns, int most) {
  return columns % most == 0 ? most : widest_chunk(columns, most / 2);
}

template <int kHeadDimQK, int kHeadDimV>
struct BackwardTiles : WarpgroupPlan<BackwardConfig<kHeadDimQK, kHeadDimV>> {
  using Config = BackwardConfig<kHeadDimQK, kHeadDimV>;
  static constexpr int kNumCtas = num_ctas(kHeadDimV);
  // Of K: where the warpgroups share dQ of 64 queries by columns, half of them are whole chunks of K.
  static constexpr int kSwizzleColumnsK = Config::kBlockQ > kWarpgroupRows
                                              ? Config::kSwizzleColumns
                                              : widest_chunk(kHeadDimQK / 2, Config::kSwizzleColumns);
  static_assert(Config::kNumConsumers == 2 &&
                    Config::kBlockKV == kWarpgroupRows * (Config::kSplitsColumns ? 1 : Config::kNumConsumers),
                "64 key rows for each of two warpgroups, or for both");
};

template <int kHeadDim>
struct BackwardQueryTiles : WarpgroupPlan<BackwardQueriesConfig<kHeadDim>> {
  using Config = BackwardQueriesConfig<kHeadDim>;
  static constexpr int kNumCtas = num_ctas(kHeadDim);
  static_assert(Config::kBlockQ == kWarpgroupRows * Config::kNumConsumers, "64 query rows per consumer warpgroup");
  static_assert(Config::kBlockKV % 16 == 0, "the depth of dS K");
};

// kRows: query rows of a tile.
template <int kHeadDimQK, int kHeadDimV>
struct DecodeTiles : DecodeConfig<kHeadDimQK, kHeadDimV> {
  static constexpr int kRows = kWarpgroupRows;
  static constexpr int kNumThreads = kWarpgroupThreads + kWarpThreads;  // consumers, and a warp that loads
};

template <>
struct DecodeTiles<LatentHeadDims::kHeadDimQK, LatentHeadDims::kHeadDimV>
    : WarpgroupPlan<DecodeConfig<LatentHeadDims::kHeadDimQK, LatentHeadDims::kHeadDimV>> {
  static constexpr int kRows = kWarpgroupRows;
};

template <int kHeadDim>
struct E4m3DecodeTiles : E4m3DecodeConfig<kHeadDim> {
  using Config = E4m3DecodeConfig<kHeadDim>;
  static constexpr int kRows = 8;
  static constexpr int kNumThreads = kWarpgroupThreads + kWarpThreads;  // warps that compute, and one that loads
  // Parts of four warps, with their padding and sums; a kv_block with its scales; barriers, and what the system keeps.
  static constexpr int kPartBytes = 4 * kRows * (4 * (kHeadDim + 4) + 8),
                       kStageBytes = Config::kBlockKV * (2 * kHeadDim + 8);
  static constexpr int kNumStages = (228 * 1024 / Config::kNumCtas - 1024 - kPartBytes - 512) / kStageBytes;
  static_assert(kNumStages >= 4, "then the block before in a stage is none of those that a warp has yet to come to");
};

// The last of a list is the widest.
template <class First, class... Rest>
constexpr int largest_head_dim(HeadDimList<First, Rest...>) {
  if constexpr (sizeof...(Rest) > 0) {
    return largest_head_dim(HeadDimList<Rest...>{});
  } else {
    static_assert(First::kHeadDimQK == First::kHeadDimV, "one limit for both head dims");
    return First::kHeadDimQK;
  }
}
constexpr int kLargestHeadDim = largest_head_dim(ForwardHeadDims{});
constexpr int kLargestFp8HeadDim = largest_head_dim(Fp8ForwardHeadDims{});
static_assert(largest_head_dim(BackwardHeadDims{}) == kLargestHeadDim, "what has a forward has a backward");
constexpr int kLargestDecodeHeadDim = largest_head_dim(DecodeHeadDims{});
constexpr int kLargestE4m3DecodeHeadDim = largest_head_dim(E4m3DecodeHeadDims{});

}  // namespace flashmla::sm90
