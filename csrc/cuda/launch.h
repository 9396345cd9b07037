// For CUDA sources: a launch that fails, or a device that is missing, becomes an exception.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace dmcp::cuda {

inline void check(cudaError_t status, const char* kernel) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("CUDA kernel ") + kernel + ": " +
                             cudaGetErrorString(status));
}

inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            cudaStream_t stream, const Arguments&... arguments) {
  kernel<<<grid, block, 0, stream>>>(arguments...);
  check_launch(name);
}

// Of the current device.
inline int multiprocessors(const char* kernel) {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), kernel);
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), kernel);
  return count;
}

}  // namespace dmcp::cuda
