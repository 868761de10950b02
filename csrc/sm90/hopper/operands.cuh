// Operands of the tensor cores in shared memory, the product of two of them, and the names of the barriers that say
// when they are there.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/tensor.hpp>

namespace flashmla::sm90 {

using cutlass::arch::ClusterBarrier;
using cutlass::arch::ClusterTransactionBarrier;
using cutlass::arch::NamedBarrier;

// Tiles in shared memory: chunks of kSwizzleColumns columns, one swizzle row wide, as TMA boxes write them and wgmma
// reads them. Rows x columns x depth, and the same memory read as columns x rows.
template <class Element, int kSwizzleColumns>
struct SharedLayouts {
  static_assert(kSwizzleColumns == 64 || kSwizzleColumns == 32 || kSwizzleColumns == 16);
  using AtomK = std::conditional_t<kSwizzleColumns == 64, cute::GMMA::Layout_K_SW128_Atom<Element>,
                                   std::conditional_t<kSwizzleColumns == 32, cute::GMMA::Layout_K_SW64_Atom<Element>,
                                                      cute::GMMA::Layout_K_SW32_Atom<Element>>>;
  using AtomMN = std::conditional_t<kSwizzleColumns == 64, cute::GMMA::Layout_MN_SW128_Atom<Element>,
                                    std::conditional_t<kSwizzleColumns == 32, cute::GMMA::Layout_MN_SW64_Atom<Element>,
                                                       cute::GMMA::Layout_MN_SW32_Atom<Element>>>;
  template <int kRows, int kColumns, int kDepth>
  using Rows =
      decltype(cute::tile_to_shape(AtomK{}, cute::Shape<cute::Int<kRows>, cute::Int<kColumns>, cute::Int<kDepth>>{}));
  template <int kRows, int kColumns, int kDepth>
  using Columns =
      decltype(cute::tile_to_shape(AtomMN{}, cute::Shape<cute::Int<kColumns>, cute::Int<kRows>, cute::Int<kDepth>>{},
                                   cute::Step<cute::_2, cute::_1, cute::_3>{}));
};

// A two-dimensional tile's layout of kDepth 1, repeated kDepth times, kStride elements apart: a part of each stage of a
// ring.
template <class Layout, int kDepth, int kStride>
using InStages = decltype(cute::make_composed_layout(
    Layout{}.layout_a(), Layout{}.offset(),
    cute::make_layout(cute::get<0>(Layout{}.layout_b()), cute::get<1>(Layout{}.layout_b()),
                      cute::Layout<cute::Int<kDepth>, cute::Int<kStride>>{})));

// Whether each of these products of kN columns a warpgroup is one wgmma. Where CUTLASS knows none of that width it
// takes several narrower ones, in silence. Without the macro it knows 8, 16, 32, 64, 96, 128, 192 and 256 columns; what
// the macro adds costs a source a minute of compiling, so only those define it that need it.
template <int kN, class... Mma>
constexpr bool is_one_wgmma() {
  static_assert(((cute::size<1>(typename Mma::AtomShape_MNK{}) == kN) && ...),
                "define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED at the top of this file of instantiations/");
  return true;
}

// Issues c = a b, or c += a b, over k_begin <= k < k_end, as one group.
template <class Mma, class A, class B, class C>
__device__ void multiply(Mma& mma, A const& a, B const& b, C& c, bool is_sum, int k_begin, int k_end) {
  cute::warpgroup_fence_operand(c);
  cute::warpgroup_arrive();
  mma.accumulate_ = is_sum ? cute::GMMA::ScaleOut::One : cute::GMMA::ScaleOut::Zero;
  CUTE_UNROLL
  for (int k = k_begin; k < k_end; ++k) {
    cute::gemm(mma, a(cute::_, cute::_, k), b(cute::_, cute::_, k), c);
    mma.accumulate_ = cute::GMMA::ScaleOut::One;
  }
  cute::warpgroup_commit_batch();
}

// Over all k.
template <class Mma, class A, class B, class C>
__device__ void multiply(Mma& mma, A const& a, B const& b, C& c, bool is_sum) {
  multiply(mma, a, b, c, is_sum, 0, cute::size<2>(a));
}

}  // namespace flashmla::sm90
