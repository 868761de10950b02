// The kernels for AVX-512 F, BW, DQ and VL. fp16 and bf16 are computed in fp32.
#include "gemm_f32.h"
#include "isa_table.h"

namespace flashmla {
namespace cpu {

Kernels kernels_avx512() {
  return make_kernels<GemmF32>(Isa::kAvx512);
}

}  // namespace cpu
}  // namespace flashmla
