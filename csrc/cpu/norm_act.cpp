#include "cpu/norm_act.h"

#include <stdexcept>

namespace dmcp::cpu {

// Each from norm_act_kernels.cpp, compiled for that instruction set.
extern const NormActKernels norm_act_portable;
#ifdef DMCP_X86_64
extern const NormActKernels norm_act_x86_64_v3, norm_act_x86_64_v4, norm_act_avx512_bf16;
#endif

namespace {

struct Isa {
  const char* name;
  bool runs;
  const NormActKernels* kernels;
  const NormActKernels* bfloat16;
};

#ifdef DMCP_X86_64
bool runs_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("f16c");
}

bool runs_v4() {
  return runs_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#endif

const std::vector<Isa>& table() {
  static const std::vector<Isa> table = {
      {"portable", true, &norm_act_portable, &norm_act_portable},
#ifdef DMCP_X86_64
      {"x86-64-v3", runs_v3(), &norm_act_x86_64_v3, &norm_act_x86_64_v3},
      {"x86-64-v4", runs_v4(), &norm_act_x86_64_v4, &norm_act_x86_64_v4},
      {"x86-64-v4+avx512_bf16", runs_v4() && __builtin_cpu_supports("avx512bf16"),
       &norm_act_x86_64_v4, &norm_act_avx512_bf16},
#endif
  };
  return table;
}

}  // namespace

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Isa& isa : table())
    if (isa.runs) names.push_back(isa.name);
  return names;
}

const NormActKernels& norm_act_kernels(const std::string& isa, DType dtype) {
  for (const Isa& candidate : table()) {
    if (candidate.runs && candidate.name == isa)
      return *(dtype == DType::bfloat16 ? candidate.bfloat16 : candidate.kernels);
  }
  throw std::invalid_argument("isa must be one of cpu_isas(), got '" + isa + "'");
}

}  // namespace dmcp::cpu
