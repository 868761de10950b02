// The one table of tile sizes, stages, warpgroups and registers of the Hopper kernels. A head-dim row is one struct
// here, one instantiation file and one test parameter; dispatch reads the list of rows from here.
#pragma once

#include <cstdint>

namespace flashmla::sm90 {

// Exclusive: which comparisons the masked tiles of the score matrix need.
enum class MaskKind : int32_t {
  kNone,    // the ragged end of K
  kCausal,  // window_right >= 0, window_left unbounded: the right edge and the end
  kWindow,  // any window: both edges and the end
};

// Rows of Q a tile, rows of K and V a tile, depth of the K/V ring, Q buffers, consumer warpgroups (64 rows each), and
// the registers a thread of the producer and of the consumers has (setmaxnreg).
template <int kBlockQ_, int kBlockKV_, int kNumStages_, int kNumQStages_, int kNumConsumers_, int kProducerRegisters_,
          int kConsumerRegisters_, bool kPingPong_>
struct ForwardTile {
  static constexpr int kBlockQ = kBlockQ_;
  static constexpr int kBlockKV = kBlockKV_;
  static constexpr int kNumStages = kNumStages_;
  static constexpr int kNumQStages = kNumQStages_;
  static constexpr int kNumConsumers = kNumConsumers_;
  static constexpr int kProducerRegisters = kProducerRegisters_;
  static constexpr int kConsumerRegisters = kConsumerRegisters_;
  static constexpr bool kPingPong = kPingPong_;
  static constexpr int kNumThreads = 128 * (1 + kNumConsumers);
  static_assert(kBlockQ == 64 * kNumConsumers, "one wgmma row block of 64 per consumer warpgroup");
  // Registers move between warpgroups within what the launch allotted: as many a thread as 64K allow, in steps of 8.
  static constexpr int kLaunchRegisters = 65536 / kNumThreads / 8 * 8;
  static_assert(kProducerRegisters + kNumConsumers * kConsumerRegisters <= kLaunchRegisters * (1 + kNumConsumers),
                "a warpgroup would wait for registers for ever");
};

template <int kHeadDimQK, int kHeadDimV, MaskKind kMask>
struct ForwardTiles;

// S (kBlockKV/2 registers a thread), O (head_dim_v/2) and P (kBlockKV/4) live in registers together; Q (kNumQStages), K
// and V (kNumStages) in shared memory, at most 227 KiB.
template <MaskKind kMask>
struct ForwardTiles<64, 64, kMask> : ForwardTile<192, 128, 3, 2, 3, 32, 160, false> {};
template <MaskKind kMask>
struct ForwardTiles<96, 96, kMask> : ForwardTile<128, 128, 2, 2, 2, 24, 240, true> {};
template <MaskKind kMask>
struct ForwardTiles<128, 128, kMask> : ForwardTile<128, 128, 2, 2, 2, 24, 240, false> {};
template <>
struct ForwardTiles<128, 128, MaskKind::kNone> : ForwardTile<128, 176, 2, 1, 2, 24, 240, true> {};
template <MaskKind kMask>
struct ForwardTiles<192, 128, kMask> : ForwardTile<128, 128, 2, 1, 2, 24, 240, true> {};
template <MaskKind kMask>
struct ForwardTiles<192, 192, kMask> : ForwardTile<128, 80, 2, 2, 2, 24, 240, false> {};
template <MaskKind kMask>
struct ForwardTiles<256, 256, kMask> : ForwardTile<128, 80, 2, 1, 2, 24, 240, false> {};

// Rows of Q and of K and V a tile of the backward, depth of the rings of Q and dO, columns of a swizzled chunk (64 or
// 32), whether the two consumer warpgroups share dK and dV by columns (each of all keys) or by keys, and whether there
// is a kernel with softcap (else a wider row computes it).
template <int kBlockQ_, int kBlockKV_, int kNumStages_, int kSwizzleColumns_, bool kSplitsColumns_, bool kHasSoftcap_>
struct BackwardTiling {
  static constexpr int kBlockQ = kBlockQ_;
  static constexpr int kBlockKV = kBlockKV_;
  static constexpr int kNumStages = kNumStages_;
  static constexpr int kSwizzleColumns = kSwizzleColumns_;
  static constexpr bool kSplitsColumns = kSplitsColumns_;
  static constexpr bool kHasSoftcap = kHasSoftcap_;
  static_assert(kBlockKV == (kSplitsColumns ? 64 : 128), "64 key rows for each of two warpgroups, or for both");
};

template <int kHeadDimQK, int kHeadDimV>
struct BackwardTiles;

// By keys, a thread holds dK and dV (head_dim_qk/2 + head_dim_v/2 registers), and beside them S, dP (kBlockQ/2 each)
// and packed P (kBlockQ/4), then dQ (kBlockQ * head_dim_qk / 256). By columns, dK and dV (head_dim/4 each) and S or dP.
template <>
struct BackwardTiles<64, 64> : BackwardTiling<128, 128, 2, 64, false, false> {};
template <>
struct BackwardTiles<128, 128> : BackwardTiling<64, 128, 2, 64, false, true> {};
template <>
struct BackwardTiles<192, 128> : BackwardTiling<64, 128, 2, 32, false, false> {
};  // half of 192 columns is no multiple of 64
template <>
struct BackwardTiles<192, 192> : BackwardTiling<64, 64, 2, 32, true, true> {};
template <>
struct BackwardTiles<256, 256> : BackwardTiling<64, 64, 2, 64, true, true> {};

// Where dK and dV are shared by columns, dQ has a kernel of its own: rows of Q, rows of K and V a tile, and depth of
// the rings of K and V. A thread holds dQ (head_dim/2), S, dP (kBlockKV/2 each) and dS (kBlockKV/4); Q, dO and the
// rings fill the shared memory.
template <int kBlockQ_, int kBlockKV_, int kNumStages_>
struct BackwardQueryTiling {
  static constexpr int kBlockQ = kBlockQ_;
  static constexpr int kBlockKV = kBlockKV_;
  static constexpr int kNumStages = kNumStages_;
  static_assert(kBlockKV % 16 == 0, "the depth of dS K");
};
template <int kHeadDim>
struct BackwardQueryTiles;
template <>
struct BackwardQueryTiles<192> : BackwardQueryTiling<128, 64, 2> {};
template <>
struct BackwardQueryTiles<256> : BackwardQueryTiling<128, 48, 2> {};

}  // namespace flashmla::sm90
