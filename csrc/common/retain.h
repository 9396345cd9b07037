// The arithmetic of the retain probabilities, shared by the CPU and the CUDA kernels.
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace dmcp {

// Everything is computed in double, also for float tensors: a product of a hundred probabilities
// then rounds once, when it is stored. The chains of a whole network are a few hundred numbers.

// Transition probability p = sigmoid(alpha). exp() may overflow to infinity: p is then exactly 0.
DMCP_HOST_DEVICE double transition(double alpha) { return 1.0 / (1.0 + std::exp(-alpha)); }

// 1 - p, without the cancellation of that subtraction.
DMCP_HOST_DEVICE double stop(double alpha) { return 1.0 / (1.0 + std::exp(alpha)); }

}  // namespace dmcp
