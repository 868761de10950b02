// Two CTAs of a cluster that share a work tile whose head dim is too wide for one.
//
// Both walk the same tiles in the same order. What one has that the other needs goes to the other's shared memory by
// st.async, which counts its bytes on a barrier there: the reader waits for data, not for the writer. A buffer may be
// written again when its reader has said so on the writer's own barrier.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/tensor.hpp>

#include "sm90/hopper/operands.cuh"
#include "sm90/hopper/ptx.cuh"
#include "sm90/tiles.h"

namespace flashmla::sm90 {

// Rank of this CTA among the kNumCtas that share its tiles; what a CTA alone asks for costs nothing.
template <int kNumCtas>
__device__ int cta_rank() {
  static_assert(kNumCtas == 1 || kNumCtas == 2);
  if constexpr (kNumCtas == 1) return 0;
  return static_cast<int>(cute::block_rank_in_cluster());
}

// All threads of the cluster. Before the first access to the other's shared memory, when barriers are set up, and after
// the last: a CTA that has ended has no shared memory.
template <int kNumCtas>
__device__ void sync_ctas() {
  if constexpr (kNumCtas == 1) {
    __syncthreads();
  } else {
    __syncwarp();  // the cluster's barrier is one of whole warps
    cute::cluster_sync();
  }
}

// Fragments on their way between the warpgroups of the same number: thread t of one writes what thread t of the other
// reads. kVectors of 16 bytes a thread.
template <int kVectors, int kNumWarpgroups>
struct PairBuffers {
  static constexpr int kBytes = kVectors * kWarpgroupThreads * 16;  // of a warpgroup
  alignas(128) float4 vectors[kNumWarpgroups][kVectors][kWarpgroupThreads];
  uint64_t full[kNumWarpgroups], empty[kNumWarpgroups];

  __device__ void init() {
    for (uint64_t& barrier : full) ClusterBarrier::init(&barrier, 1);
    for (uint64_t& barrier : empty) ClusterBarrier::init(&barrier, kWarpgroupThreads / kWarpThreads);
  }
};

// Says on the other CTA's `barrier` that this warp has read what that CTA stored here, so that it may store there
// again. `words`: the bitwise and of one word of each load. An arrival waits for no load that is on its way, and the
// other CTA's next store has overtaken loads of shared memory that the tensor cores kept waiting (docs/log.md,
// 2026-11-28): the vote needs what they bring. All bits are never set, neither in probabilities nor in sums, whose NaN
// is 0x7fffffff.
__device__ inline void release_to_other(uint64_t& barrier, uint32_t words) {
  bool const has_all_bits = __any_sync(0xffffffff, words == 0xffffffffu);
  if (threadIdx.x % kWarpThreads == 0 && !has_all_bits) {
    ptx::arrive_remote(ptx::address_in(static_cast<uint32_t>(cta_rank<2>()) ^ 1, &barrier));
  }
}

// Adds the other CTA's part of a sum whose part this CTA has; both then hold the same bits. `phase` flips from call to
// call.
template <int kNumWarpgroups, int kVectors, class Fragment>
__device__ void add_other_part(Fragment& part, PairBuffers<kVectors, kNumWarpgroups>& buffers, int warpgroup,
                               uint32_t& phase) {
  static_assert(decltype(cute::size(part))::value == 4 * kVectors);
  int const thread = threadIdx.x % kWarpgroupThreads;
  uint32_t const other = static_cast<uint32_t>(cta_rank<2>()) ^ 1;
  using Buffers = PairBuffers<kVectors, kNumWarpgroups>;
  if (thread == 0) ClusterTransactionBarrier::arrive_and_expect_tx(&buffers.full[warpgroup], Buffers::kBytes);
  ClusterBarrier::wait(&buffers.empty[warpgroup], phase ^ 1);  // the other has read the last one
  uint32_t const target = ptx::address_in(other, &buffers.vectors[warpgroup][0][thread]);
  uint32_t const barrier = ptx::address_in(other, &buffers.full[warpgroup]);
  CUTE_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    ptx::store_async(target + i * (kWarpgroupThreads * 16), barrier, part(4 * i), part(4 * i + 1), part(4 * i + 2),
                     part(4 * i + 3));
  }
  ClusterBarrier::wait(&buffers.full[warpgroup], phase);
  uint32_t words = 0xffffffffu;
  CUTE_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    float4 const x = buffers.vectors[warpgroup][i][thread];
    words &= __float_as_uint(x.x);
    part(4 * i) += x.x, part(4 * i + 1) += x.y, part(4 * i + 2) += x.z, part(4 * i + 3) += x.w;
  }
  release_to_other(buffers.empty[warpgroup], words);
  phase ^= 1;
}

}  // namespace flashmla::sm90
