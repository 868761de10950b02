// The kernels for AVX2, FMA and F16C. fp16 and bf16 are computed in fp32.
#include "gemm_f32.h"
#include "isa_table.h"

namespace flashmla {
namespace cpu {

Kernels kernels_avx2() {
  return make_kernels<GemmF32>(Isa::kAvx2);
}

}  // namespace cpu
}  // namespace flashmla
