// What the backwards of all nodes have in common.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/custom_function.h>

#include <vector>

namespace dmcp::nodes {

using at::Tensor;

// Asked in the order of a forward's differentiable arguments, which of them want a gradient. Only
// those that were given have an edge in the graph.
class Wanted {
 public:
  explicit Wanted(const torch::autograd::AutogradContext& context) : context_(context) {}

  bool next(bool given = true) { return given && context_.needs_input_grad(edge_++); }

 private:
  const torch::autograd::AutogradContext& context_;
  size_t edge_ = 0;
};

// The .grad that a backward adds to. Throws RuntimeError if it is gone since the forward.
Tensor gradient_of(const Tensor& leaf);

// An error for whoever differentiates these gradients again, as torch's once_differentiable makes.
void forbid_second_derivatives(std::vector<Tensor>& gradients, const Tensor& grad);

}  // namespace dmcp::nodes
