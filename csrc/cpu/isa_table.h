// The last lines of every isa_*.cpp: the entries of a table from the templates compiled in that file.
#pragma once

#include "backward.h"
#include "forward.h"
#include "kernel.h"

namespace flashmla {
namespace cpu {
namespace {

template <typename G>
inline Entry make_entry() {
  return {Forward<G>::workspace, Forward<G>::run, Backward<G>::workspace, Backward<G>::run};
}

template <template <typename> class G>
inline Kernels make_kernels(Isa isa) {
  return {
      isa, {make_entry<G<float>>(), make_entry<G<Float16>>(), make_entry<G<BFloat16>>()}, make_entry<G<BFloat16>>()};
}

}  // namespace
}  // namespace cpu
}  // namespace flashmla
