#include "cpu/isa.h"

#include <stdexcept>

#if defined(DMCP_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dmcp::cpu {

namespace {

struct Isa {
  const char* name;
  bool runs;
  Compiled compiled;
  Compiled bfloat16;
  bool tiles = false;  // of bfloat16, by AMX
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

bool runs_avx512_bf16() { return runs_v4() && __builtin_cpu_supports("avx512bf16"); }

#if defined(DMCP_AMX) && defined(__linux__)
// A process has to ask for the registers of tiles. Whether they are 8 of 16 rows of 64 bytes, which
// the kernels take for granted, is told by their size: hypervisors hide the leaf on tiles.
bool runs_amx() {
  constexpr int kTileData = 18, kRequestPermission = 0x1023;
  unsigned size, b, c, d;
  return runs_avx512_bf16() && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-bf16") &&
         __get_cpuid_count(0xd, kTileData, &size, &b, &c, &d) && size == 8 * 16 * 64 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool runs_amx() { return false; }
#endif
#endif

const std::vector<Isa>& table() {
  static const std::vector<Isa> table = {
      {"portable", true, Compiled::portable, Compiled::portable},
#ifdef DMCP_X86_64
      {"x86-64-v3", runs_v3(), Compiled::x86_64_v3, Compiled::x86_64_v3},
      {"x86-64-v4", runs_v4(), Compiled::x86_64_v4, Compiled::x86_64_v4},
      {"x86-64-v4+avx512_bf16", runs_avx512_bf16(), Compiled::x86_64_v4, Compiled::avx512_bf16},
      {"x86-64-v4+amx_bf16", runs_amx(), Compiled::x86_64_v4, Compiled::avx512_bf16, true},
#endif
  };
  return table;
}

const Isa& find(const std::string& isa) {
  for (const Isa& candidate : table())
    if (candidate.runs && candidate.name == isa) return candidate;
  throw std::invalid_argument("isa must be one of cpu_isas(), got '" + isa + "'");
}

}  // namespace

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Isa& isa : table())
    if (isa.runs) names.push_back(isa.name);
  return names;
}

Compiled compiled_for(const std::string& isa, DType dtype) {
  const Isa& found = find(isa);
  return dtype == DType::bfloat16 ? found.bfloat16 : found.compiled;
}

bool multiplies_tiles(const std::string& isa) { return find(isa).tiles; }

}  // namespace dmcp::cpu
