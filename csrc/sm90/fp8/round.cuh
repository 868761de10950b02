// Q, K and V rounded as quantize.cuh does, in bf16, which holds their values exactly: the backward multiplies what the
// forward has.
#pragma once

#include "sm90/fp8/quantize.cuh"

namespace flashmla::sm90 {

// One of Q, K and V, as bf16 numbers: contiguous, [rows, heads, head_dim].
struct RoundingArguments {
  Problem problem;
  TensorView x;
  cutlass::bfloat16_t* out;
  int64_t heads, head_dim;
  Side side;
  bool rotates, is_key;
};

// What a CTA has in shared memory.
template <int kHeadDim, class Element>
struct RoundShared {
  Staged<kHeadDim, Element> staged;
  Rotation<kHeadDim, Element> rotation;
  float of_warps[kQuantizeWarps];
};

// A CTA for each block of rows and head.
template <int kHeadDim, class Element>
__global__ void __launch_bounds__(kQuantizeThreads) round_kernel(RoundingArguments const arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Layout = RowLayout<kHeadDim>;
  extern __shared__ __align__(16) unsigned char quantize_memory[];
  auto& shared = *reinterpret_cast<RoundShared<kHeadDim, Element>*>(quantize_memory);
  Problem const& problem = arguments.problem;
  int const head_dim = static_cast<int>(arguments.head_dim);
  int32_t const head = blockIdx.y;
  BlockRows const rows = rows_of_block(problem, arguments.side, blockIdx.x);
  if (rows.count <= 0) return;
  shared.staged.template copy<Layout>(arguments.x, rows, head, head_dim);
  cute::cp_async_fence();
  if (arguments.rotates) {
    shared.rotation.set(head_dim, arguments.is_key);
    __syncthreads();
  }
  cute::cp_async_wait<0>();
  __syncwarp();  // the compiler leaves the reads behind it
  auto const words = [&](int i, int chunk) { return shared.staged.template word<Layout>(i, chunk); };
  QuantizedBlock<Layout> x;
  if (arguments.rotates) {
    shared.rotation.rotate(x.x, words);
  } else {
    x.template take<Element>(words);
  }
  x.find_scale(shared.of_warps);
  int64_t const seqlen = arguments.side == Side::kQueries ? problem.seqlen_q : problem.seqlen_kv;
  CUTE_UNROLL
  for (int i = 0; i < Layout::kRows; ++i) {
    if (Layout::row(i) >= rows.count) continue;
    int64_t const row = rows.batch * seqlen + rows.first_row + Layout::row(i);
    CUTE_UNROLL
    for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
      if (Layout::column(chunk) >= head_dim) continue;
      uint32_t pairs[4];
      unpack_e4m3(x.quantized(i, chunk), pairs);
      auto rounded = [&](uint32_t pair) {
        float2 const values = unpack<cutlass::half_t>(pair);
        return pack<cutlass::bfloat16_t>(values.x * x.scale.scale, values.y * x.scale.scale);
      };
      *reinterpret_cast<uint4*>(arguments.out + (row * arguments.heads + head) * head_dim + Layout::column(chunk)) =
          uint4{rounded(pairs[0]), rounded(pairs[1]), rounded(pairs[2]), rounded(pairs[3])};
    }
  }
#endif
}

}  // namespace flashmla::sm90
