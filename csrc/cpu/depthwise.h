// Depthwise convolution of CPU tensors whose channels come last.
#pragma once

#include <string>

#include "common/tensors.h"

namespace dmcp::cpu {

// One convolution, of [batch, height, width, channels], padded by half the kernel, p = kernel / 2:
//   y[n,i,j,c] = sum over u, v of x[n, i stride + u - p, j stride + v - p, c] w[c,u,v]
struct Depthwise {
  int64_t batch, channels, height, width;
  int kernel;  // 3 or 5
  int stride;  // 1 or 2
  DType dtype;

  int64_t out_height() const { return (height - 1) / stride + 1; }
  int64_t out_width() const { return (width - 1) / stride + 1; }
};

// The kernels compiled for one instruction set. Weights are dense [channels, kernel, kernel], of
// float (double for DType::float64), what sums are taken in too.
struct DepthwiseKernels {
  void (*forward)(const Depthwise&, Pitched<const void> x, const void* weight, Pitched<void> y);

  void (*grad_input)(const Depthwise&, Pitched<const void> grad, const void* weight,
                     Pitched<void> grad_x);

  // The same bits for any number of threads.
  void (*grad_weight)(const Depthwise&, Pitched<const void> grad, Pitched<const void> x,
                      void* grad_weight);
};

// The kernels for activations of this dtype. Throws std::invalid_argument if `isa` is none of
// isas().
const DepthwiseKernels& depthwise_kernels(const std::string& isa, DType dtype);

}  // namespace dmcp::cpu
