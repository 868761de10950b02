// The bf16 kernels whose products run on VDPBF16PS; fp32 and fp16 stay with isa_avx512.cpp.
#include "gemm_bf16.h"
#include "isa_table.h"

namespace flashmla {
namespace cpu {

void add_kernels_avx512_bf16(Kernels& kernels) {
  kernels.by_dtype[static_cast<int>(DType::kBFloat16)] = make_entry<GemmBF16<DotUnit>>();
}

}  // namespace cpu
}  // namespace flashmla
