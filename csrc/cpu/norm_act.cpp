#include "cpu/norm_act.h"

#include "cpu/isa.h"

namespace dmcp::cpu {

// Each from norm_act_kernels.cpp, compiled for that instruction set.
extern const NormActKernels norm_act_portable;
#ifdef DMCP_X86_64
extern const NormActKernels norm_act_x86_64_v3, norm_act_x86_64_v4, norm_act_avx512_bf16;
#endif

const NormActKernels& norm_act_kernels(const std::string& isa, DType dtype) {
  static constexpr Tables<NormActKernels> tables = {{
      &norm_act_portable,
#ifdef DMCP_X86_64
      &norm_act_x86_64_v3, &norm_act_x86_64_v4, &norm_act_avx512_bf16,
#endif
  }};
  return tables[compiled_for(isa, dtype)];
}

}  // namespace dmcp::cpu
