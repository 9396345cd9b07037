#include "nodes/gradients.h"

namespace dmcp::nodes {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class Once : public torch::autograd::Function<Once> {
 public:
  static Tensor forward(AutogradContext*, const Tensor& gradient) { return gradient.detach(); }

  static variable_list backward(AutogradContext*, variable_list) {
    TORCH_CHECK(false,
                "trying to differentiate twice a function that was marked with "
                "@once_differentiable");
  }
};

}  // namespace

Tensor gradient_of(const Tensor& leaf) {
  const Tensor& grad = leaf.grad();
  TORCH_CHECK(grad.defined(),
              "the .grad that gradients were to be added to was set to None after the forward "
              "pass; clear gradients before it");
  return grad;
}

void forbid_second_derivatives(std::vector<Tensor>& gradients, const Tensor& grad) {
  if (!at::GradMode::is_enabled() || !grad.requires_grad()) return;
  for (Tensor& gradient : gradients)
    if (gradient.defined()) gradient = Once::apply(gradient.detach().requires_grad_());
}

}  // namespace dmcp::nodes
