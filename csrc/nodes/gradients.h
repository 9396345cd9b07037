// What the backwards of all nodes have in common.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace dmcp::nodes {

using at::Tensor;

// The .grad that a backward adds to. Throws RuntimeError if it is gone since the forward.
Tensor gradient_of(const Tensor& leaf);

// An error for whoever differentiates these gradients again, as torch's once_differentiable makes.
void forbid_second_derivatives(std::vector<Tensor>& gradients, const Tensor& grad);

}  // namespace dmcp::nodes
