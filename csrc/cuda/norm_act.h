// Normalise-activate-mask on CUDA tensors. See common/norm_act.h for what is computed.
#pragma once

#include <cuda_runtime_api.h>

#include "common/norm_act.h"

namespace dmcp::cuda {

// The contracts of cpu/norm_act.h on device pointers, queued on `stream` of the current device.
// They throw std::runtime_error when a launch fails. What is added in which order depends on the
// shape, the pitches, the alignment and the device only: the same call gives the same bits.

// Bytes of device memory that norm_stats and norm_act_sums want as `workspace`, whatever the pitch
// and the alignment.
int64_t norm_workspace(const Shape& shape);

void norm_stats(const Shape& shape, Pitched<const void> x, void* mean, void* var,
                void* running_mean, void* running_var, double momentum, void* workspace,
                cudaStream_t stream);

void norm_act(const Shape& shape, const Affine& affine, Act act, Residual kind,
              Pitched<const void> x, Pitched<const void> residual, Pitched<void> y,
              cudaStream_t stream);

void norm_act_sums(const Shape& shape, const Affine& affine, Act act, Pitched<const void> grad,
                   Pitched<const void> x, Pitched<const void> residual, Pitched<void> grad_residual,
                   void* sums, void* workspace, cudaStream_t stream);

void norm_act_grad(const Shape& shape, const Affine& affine, Act act, const void* sums,
                   double count, Pitched<const void> grad, Pitched<const void> x,
                   Pitched<void> grad_x, cudaStream_t stream);

}  // namespace dmcp::cuda
