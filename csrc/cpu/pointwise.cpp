#include "cpu/pointwise.h"

#include "cpu/isa.h"

namespace dmcp::cpu {

// Each from pointwise_kernels.cpp, compiled for that instruction set.
extern const PointwiseKernels pointwise_portable;
#ifdef DMCP_X86_64
extern const PointwiseKernels pointwise_x86_64_v3, pointwise_x86_64_v4, pointwise_avx512_bf16;
#endif
#ifdef DMCP_AMX
extern const PointwiseKernels pointwise_amx_bf16;
#endif

const PointwiseKernels& pointwise_kernels(const std::string& isa) {
  static constexpr Tables<PointwiseKernels> tables = {{
      &pointwise_portable,
#ifdef DMCP_X86_64
      &pointwise_x86_64_v3,
      &pointwise_x86_64_v4,
      &pointwise_avx512_bf16,
#endif
  }};
#ifdef DMCP_AMX
  if (multiplies_tiles(isa)) return pointwise_amx_bf16;
#endif
  return tables[compiled_for(isa, DType::bfloat16)];
}

}  // namespace dmcp::cpu
