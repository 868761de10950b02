// The bf16 kernels whose products run on AMX tiles; fp32 and fp16 stay with isa_avx512.cpp.
#include "gemm_bf16.h"
#include "isa_table.h"

namespace flashmla {
namespace cpu {

void add_kernels_amx(Kernels& kernels) {
  kernels.by_dtype[static_cast<int>(DType::kBFloat16)] = make_entry<GemmBF16<AmxUnit>>();
}

}  // namespace cpu
}  // namespace flashmla
