#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace dmcp::cuda {

// The contracts of cpu/retain.h on device pointers, queued on `stream` of the current device.
// Reading the offsets here would stop the host, so they are not checked: they are clamped to the
// arrays. Throws std::runtime_error when the launch fails.

template <typename T>
void retain(const T* alpha, const int32_t* offsets, T* q, int64_t chains, int64_t total,
            cudaStream_t stream);

template <typename T>
void retain_backward(const T* grad_q, const T* alpha, const T* q, const int32_t* offsets,
                     T* grad_alpha, int64_t chains, int64_t total, cudaStream_t stream);

}  // namespace dmcp::cuda
