// Activations as the CPU and the CUDA kernels see them.
#pragma once

#include <cstdint>

namespace dmcp {

enum class DType : int { float32, bfloat16, float16, float64 };

// One tensor of a call. Its pitch is the distance in elements from one pixel to the next where
// channels come last, else from one sample to the next: channels may be a prefix of a wider buffer.
template <typename Data>
struct Pitched {
  Data* data;
  int64_t pitch;
};

}  // namespace dmcp
