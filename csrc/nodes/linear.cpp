// The node of dmcp/ops/linear.py: a linear layer that adds to the gradients of its leaves itself.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "nodes/gradients.h"
#include "nodes/kernels.h"
#include "nodes/products.h"

namespace dmcp::nodes {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Rows are pixels of a pointwise convolution.
Products products_of(const Tensor& weight) {
  const Convolution pointwise{weight.size(1), {1, 1}, {1, 1}, {0, 0}, {1, 1}, false};
  return {pointwise, {1, weight.size(1), 1, 1}};
}

Tensor image_of(const Tensor& rows) {
  return rows.as_strided({rows.size(0), rows.size(1), 1, 1},
                         {rows.size(1), 1, rows.size(1), rows.size(1)});
}

class Linear : public torch::autograd::Function<Linear> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& bias, std::vector<int64_t> widths) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Products products = products_of(weight);
    Tensor y = products.output(image_of(x), products.cut(weight, widths)).flatten(1);
    if (bias) y.add_(bias->narrow(0, 0, widths[0]).to(y.scalar_type()));
    ctx->save_for_backward({weight.requires_grad() ? x : Tensor(), weight});
    ctx->saved_data["weight"] = weight;
    ctx->saved_data["bias"] = bias;
    ctx->saved_data["widths"] = std::move(widths);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    // Whoever hooks saved tensors may give them back with other strides.
    const Tensor x = saved[0].defined() ? saved[0].contiguous() : Tensor();
    const Tensor& weight = saved[1];
    const std::vector<int64_t> widths = ctx->saved_data["widths"].toIntVector();
    const std::optional<Tensor> bias = ctx->saved_data["bias"].toOptional<Tensor>();
    Wanted wanted(*ctx);
    const bool wants_x = wanted.next(), wants_weight = wanted.next();
    const bool wants_bias = wanted.next(bias.has_value());
    variable_list found(4);
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      const Products products = products_of(weight);
      const Tensor cut = products.cut(weight, widths);
      const Tensor rows = grads[0].contiguous(), image = image_of(rows);
      if (wants_x)
        found[0] = products.grad_input(image, cut, {rows.size(0), widths[1], 1, 1}).flatten(1);
      if (wants_weight) {
        const Tensor into = gradient_of(ctx->saved_data["weight"].toTensor());
        products.add_grad_weight(image, image_of(x), cut, products.cut(into, widths));
      }
      if (wants_bias)
        gradient_of(*bias).narrow(0, 0, widths[0]).add_(rows.sum(0, false, bias->scalar_type()));
    }
    forbid_second_derivatives(found, grads[0]);
    return found;
  }
};

// None where the arguments are not what the node takes.
std::optional<Tensor> linear(const Tensor& x, const Tensor& weight,
                             const std::optional<Tensor>& bias, at::IntArrayRef widths) {
  const auto fits = [&](const Tensor& parameter) {
    return parameter.is_cpu() && parameter.scalar_type() == vector_dtype(x);
  };
  if (!has_kernels(x) || x.dim() != 2 || !x.is_contiguous() || x.numel() == 0) return std::nullopt;
  if (!fits(weight) || weight.dim() != 2 || (bias && !fits(*bias))) return std::nullopt;
  if (x.size(1) != widths[1]) return std::nullopt;
  return Linear::apply(x, weight, bias, widths.vec());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dmcp, library) {
  library.def("linear_node(Tensor x, Tensor weight, Tensor? bias, int[2] widths) -> Tensor?",
              &linear);
}

}  // namespace dmcp::nodes
