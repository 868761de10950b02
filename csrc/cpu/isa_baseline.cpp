// The kernels for any CPU: the compiler's generic vectors of 4. fp16 and bf16 are computed in fp32.
#include "gemm_f32.h"
#include "isa_table.h"

namespace flashmla {
namespace cpu {

Kernels kernels_baseline() {
  return make_kernels<GemmF32>(Isa::kBaseline);
}

}  // namespace cpu
}  // namespace flashmla
