#pragma once

#include <cuda_runtime_api.h>

#include "common/expected_cost.h"

namespace dmcp::cuda {

// The contracts of cpu/expected_cost.h on device pointers, queued on `stream` of the current
// device. The table is not checked: reading it here would stop the host. Throws std::runtime_error
// when the launch fails.

template <typename T>
void expected_cost(const CostTable& table, const T* alpha, const ExpectedCost<T>& out,
                   cudaStream_t stream);

template <typename T>
void expected_cost_backward(const CostTable& table, const ExpectedCostGrad<T>& grad,
                            const double* saved, T* grad_alpha, cudaStream_t stream);

}  // namespace dmcp::cuda
