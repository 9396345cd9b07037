// Normalise-activate-mask on CPU tensors. See common/norm_act.h for what is computed.
#pragma once

#include <string>

#include "common/norm_act.h"

namespace dmcp::cpu {

// The kernels compiled for one instruction set.
struct NormActKernels {
  // mean and biased variance of each channel; updates the running ones where they are given.
  void (*stats)(const Shape&, Pitched<const void> x, void* mean, void* var, void* running_mean,
                void* running_var, double momentum);

  void (*forward)(const Shape&, const Affine&, Act, Residual, Pitched<const void> x,
                  Pitched<const void> residual, Pitched<void> y);

  // sums [3, channels]: d bias, d weight, d scale. With a residual, which then comes before the
  // activation, also its gradient.
  void (*sums)(const Shape&, const Affine&, Act, Pitched<const void> grad, Pitched<const void> x,
               Pitched<const void> residual, Pitched<void> grad_residual, void* sums);

  // sums may be nullptr: mean and var do not depend on x.
  void (*grad)(const Shape&, const Affine&, Act, const void* sums, double count,
               Pitched<const void> grad, Pitched<const void> x, Pitched<void> grad_x);
};

// The kernels for activations of this dtype. Throws std::invalid_argument if `isa` is none of
// isas().
const NormActKernels& norm_act_kernels(const std::string& isa, DType dtype);

}  // namespace dmcp::cpu
