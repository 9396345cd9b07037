// The instruction sets that kernels are compiled for, and which of them this machine runs.
#pragma once

#include <string>
#include <vector>

#include "common/tensors.h"

namespace dmcp::cpu {

// Names of the instruction sets that this machine can run, the best one last.
std::vector<std::string> isas();

// How often CMake compiles a source of kernels: the same for every dtype, but once more for
// bfloat16 alone.
enum class Compiled : int { portable, x86_64_v3, x86_64_v4, avx512_bf16 };

#ifdef DMCP_X86_64
constexpr int kCompiled = 4;
#else
constexpr int kCompiled = 1;
#endif

// The table of kernels from each, in the order of Compiled.
template <typename Kernels>
struct Tables {
  const Kernels* of[kCompiled];

  const Kernels& operator[](Compiled compiled) const { return *of[static_cast<int>(compiled)]; }
};

// What serves activations of this dtype. Throws std::invalid_argument if `isa` is none of isas().
Compiled compiled_for(const std::string& isa, DType dtype);

// Whether this set has the instructions that multiply tiles of bfloat16 (AMX). Throws likewise.
bool multiplies_tiles(const std::string& isa);

}  // namespace dmcp::cpu
