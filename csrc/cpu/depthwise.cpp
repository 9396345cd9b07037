#include "cpu/depthwise.h"

#include "cpu/isa.h"

namespace dmcp::cpu {

// Each from depthwise_kernels.cpp, compiled for that instruction set.
extern const DepthwiseKernels depthwise_portable;
#ifdef DMCP_X86_64
extern const DepthwiseKernels depthwise_x86_64_v3, depthwise_x86_64_v4, depthwise_avx512_bf16;
#endif

const DepthwiseKernels& depthwise_kernels(const std::string& isa, DType dtype) {
  static constexpr Tables<DepthwiseKernels> tables = {{
      &depthwise_portable,
#ifdef DMCP_X86_64
      &depthwise_x86_64_v3, &depthwise_x86_64_v4, &depthwise_avx512_bf16,
#endif
  }};
  return tables[compiled_for(isa, dtype)];
}

}  // namespace dmcp::cpu
