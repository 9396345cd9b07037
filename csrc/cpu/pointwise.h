// Convolutions with a kernel of one pixel, of CPU tensors whose channels come last: matrix
// products. Sizes are run-time numbers, and no call is cheaper for having been made with the same
// ones before.
#pragma once

#include <string>

#include "common/tensors.h"

namespace dmcp::cpu {

// A matrix [outputs, inputs] takes `inputs` channels of `rows` pixels to `outputs` channels.
struct Pointwise {
  int64_t rows, inputs, outputs;
};

// The kernels compiled for one instruction set. Activations are bfloat16, weights float, rounded to
// bfloat16 before they are used; sums are taken in float. The same bits for any number of threads.
struct PointwiseKernels {
  // y[r,o] = sum over i of x[r,i] weight[o,i]
  void (*forward)(const Pointwise&, Pitched<const void> x, Pitched<const float> weight,
                  Pitched<void> y);

  // grad_x[r,i] = sum over o of grad[r,o] weight[o,i]
  void (*grad_input)(const Pointwise&, Pitched<const void> grad, Pitched<const float> weight,
                     Pitched<void> grad_x);

  // into[o,i] = sum over r of grad[r,o] x[r,i], or added to it.
  void (*grad_weight)(const Pointwise&, Pitched<const void> grad, Pitched<const void> x,
                      Pitched<float> into, bool add);
};

// Throws std::invalid_argument if `isa` is none of isas().
const PointwiseKernels& pointwise_kernels(const std::string& isa);

}  // namespace dmcp::cpu
