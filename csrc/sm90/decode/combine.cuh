// Adds up the parts of tiles that several CTAs of decode_kernel share.
//
// parts.cuh says what a part is. A CTA has kCombineColumns columns of a row, and each of its warps some of
// them in all parts, so that warps need nothing of each other: no shared memory, and a CTA finds room beside those of
// decode_kernel. If there are many rows a CTA has several in turn: to find out that a tile was not split takes longer
// than a row. Every sum is taken in an order that depends on the number of parts alone.
#pragma once

#include <cutlass/arch/grid_dependency_control.h>

#include <cute/tensor.hpp>

#include "sm90/decode/decode_rows.cuh"
#include "sm90/decode/decode_schedule.cuh"
#include "sm90/decode/parts.cuh"
#include "sm90/hopper/ptx.cuh"

namespace flashmla::sm90 {

constexpr int kCombineThreads = 128, kCombineColumns = 64;
constexpr unsigned kCombineCtasPerSm = 32;  // at most: two waves

// kTileRows: of decode_kernel's tiles.
template <class Element, int kTileRows>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(__grid_constant__ DecodeArguments const arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kVectors = kCombineColumns / 4 / (kCombineThreads / kWarpThreads);  // of four columns, in a warp
  constexpr int kGroups = kWarpThreads / kVectors;  // of lanes: group g has parts g, g + kGroups, ...
  constexpr int kAhead = 8;                         // parts that a lane reads before it knows the maximum

  DecodeParams const& params = arguments.params;
  Problem const& problem = params.problem;
  // A CTA looks at one tile, or if there are more tiles than CTAs of decode_kernel, at the last one of a share.
  bool const is_share = gridDim.x == arguments.num_ctas;
  int32_t const heads = static_cast<int32_t>(problem.batch) * arguments.heads_kv;
  int32_t const pass = blockIdx.x / heads, place = blockIdx.x - pass * heads;  // if it looks at a tile
  UnitSums const sums = sum_units(arguments, place / arguments.heads_kv);
  Shares const shares(arguments.num_ctas, sums.pass * arguments.tiles_per_head, sums.each);
  int32_t const unit = is_share ? static_cast<int32_t>(shares.begin(blockIdx.x + 1)) - 1
                                : pass * sums.pass + sums.before +
                                      place % arguments.heads_kv *
                                          (sums.each > 0 ? sums.each : units_of(arguments, place / arguments.heads_kv));
  DecodeWalk const walk(arguments, sums, unit);
  int32_t const num_rows = num_rows_of<kTileRows>(arguments, walk.tile);
  int32_t const first = static_cast<int32_t>(shares.of(walk.tile_begin));
  int32_t const num_parts = static_cast<int32_t>(shares.of(walk.tile_begin + walk.units - 1)) + 1 - first;

  // decode_kernel has written it, nobody has to, or the CTA of another share does.
  bool const has_nothing = num_parts == 1 || (is_share && first != blockIdx.x);
  // One CTA waits in any case: a kernel that ends before the one before it has would let the next begin.
  bool const is_first = blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0;
  if (has_nothing && !is_first) return;
  // The next kernel may set up beside the end of decode_kernel: all CTAs of this one are running or have ended when it
  // starts, so that it takes no room from them, and it waits until they have ended.
  cutlass::arch::launch_dependent_grids();
  ptx::wait_on_dependent_grids();
  if (has_nothing) return;

  int const lane = threadIdx.x % kWarpThreads, group = lane / kVectors;
  int32_t const column = blockIdx.z * kCombineColumns + (threadIdx.x / kWarpThreads * kVectors + lane % kVectors) * 4;
  bool const has_column = column < problem.head_dim_v;
  auto read_out = [&](int64_t index) {
    return has_column ? *reinterpret_cast<float4 const*>(arguments.partial_out + index * problem.head_dim_v + column)
                      : float4{0.0f, 0.0f, 0.0f, 0.0f};
  };
  auto reduce = [&](float x, auto const& combine) {  // over the groups
    CUTE_UNROLL
    for (int lanes = kVectors; lanes < kWarpThreads; lanes *= 2) x = combine(x, __shfl_xor_sync(0xffffffff, x, lanes));
    return x;
  };
  auto plus = [](float a, float b) { return a + b; };

  for (int32_t row_in_tile = blockIdx.y; row_in_tile < num_rows; row_in_tile += gridDim.y) {
    auto index_of = [&](int32_t part) {
      return int64_t{partial_of(first + part, part == 0)} * arguments.partial_rows + row_in_tile;
    };
    float2 max_and_sum[kAhead];
    float4 out[kAhead];
    float largest = -INFINITY;
    CUTE_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      int32_t const part = group + i * kGroups;
      max_and_sum[i] = {-INFINITY, 0.0f};
      out[i] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (part < num_parts) {
        max_and_sum[i] = arguments.partial_sums[index_of(part)];
        out[i] = read_out(index_of(part));
      }
    }
    CUTE_UNROLL
    for (int i = 0; i < kAhead; ++i) largest = fmaxf(largest, max_and_sum[i].x);
    for (int32_t part = group + kAhead * kGroups; part < num_parts; part += kGroups) {
      largest = fmaxf(largest, arguments.partial_sums[index_of(part)].x);
    }
    float const row_max = reduce(largest, [](float a, float b) { return fmaxf(a, b); });

    SumOfParts parts(problem, row_max);
    CUTE_UNROLL
    for (int i = 0; i < kAhead; ++i) parts.add(max_and_sum[i], out[i]);
#pragma unroll 4
    for (int32_t part = group + kAhead * kGroups; part < num_parts; part += kGroups) {
      parts.add(arguments.partial_sums[index_of(part)], read_out(index_of(part)));
    }
    float4& x = parts.x;
    parts.sum = reduce(parts.sum, plus);
    x = {reduce(x.x, plus), reduce(x.y, plus), reduce(x.z, plus), reduce(x.w, plus)};

    // A tile without keys is one unit, and not split.
    parts.write<Element>(arguments, walk.batch, row_of<kTileRows>(arguments, walk.tile, row_in_tile), column, true,
                         group == 0 && has_column, threadIdx.x == 0 && blockIdx.z == 0);
  }
#endif
}

}  // namespace flashmla::sm90
