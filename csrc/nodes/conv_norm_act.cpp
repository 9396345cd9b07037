// The node of dmcp/ops/conv_norm_act.py: a convolution and everything up to the next one.
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "nodes/gradients.h"
#include "nodes/kernels.h"
#include "nodes/norm_act.h"
#include "nodes/products.h"

namespace dmcp::nodes {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What comes back in the backward beside saved tensors.
struct State : torch::CustomClassHolder {
  Convolution conv;
  std::vector<int64_t> widths;  // empty: all, and gradients are autograd's
  std::vector<int64_t> sizes;   // of x
  double eps;
  Act act;
  bool has_residual;
  // Unless widths are empty: saved tensors need not come back as the leaves that hold gradients.
  Tensor weight, norm_weight, norm_bias;
};

Tensor channels_last(const Tensor& image) {
  return image.defined() ? image.contiguous(at::MemoryFormat::ChannelsLast) : image;
}

class ConvNormAct : public torch::autograd::Function<ConvNormAct> {
 public:
  // Differentiable tensors apart, so that each is an edge of the graph.
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& norm_weight,
                        const std::optional<Tensor>& norm_bias, const std::optional<Tensor>& scale,
                        const std::optional<Tensor>& residual, const Norm& norm,
                        const Convolution& conv, at::IntArrayRef widths) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Products products(conv, x.sizes());
    const Tensor z = products.output(x, products.cut(weight, widths));
    auto [y, moments] = normalise(z, norm);
    const Tensor kept = weight.requires_grad() ? x : Tensor();
    const Tensor before = norm.place == Residual::before ? norm.residual : Tensor();
    ctx->save_for_backward({kept, weight, z, moments, norm.weight, norm.bias, norm.scale, before});
    auto state = c10::make_intrusive<State>();
    state->conv = conv;
    state->widths = widths.vec();
    state->sizes = x.sizes().vec();
    state->eps = norm.eps;
    state->act = norm.act;
    state->has_residual = norm.residual.defined();
    if (!widths.empty()) {
      state->weight = weight;
      state->norm_weight = norm.weight;
      state->norm_bias = norm.bias;
    }
    ctx->saved_data["state"] = c10::IValue::make_capsule(std::move(state));
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    // Whoever hooks saved tensors may give them back with other strides.
    const Tensor x = channels_last(saved[0]), z = channels_last(saved[2]);
    const Tensor &weight = saved[1], &moments = saved[3];
    const auto capsule = ctx->saved_data["state"].toCapsule();
    const State& state = static_cast<const State&>(*capsule);
    Norm norm{saved[4], saved[5], saved[6], saved[7]};
    norm.eps = state.eps;
    norm.act = state.act;

    Wanted wanted(*ctx);
    const bool wants_x = wanted.next(), wants_weight = wanted.next();
    const bool wants_gain = wanted.next(norm.weight.defined());
    const bool wants_bias = wanted.next(norm.bias.defined());
    const bool wants_scale = wanted.next(norm.scale.defined());
    const bool wants_residual = wanted.next(state.has_residual);
    const bool in_autograd = state.widths.empty();

    variable_list found(9);
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      const auto leaf_gradient = [&](const Tensor& leaf, bool wants_it) {
        return wants_it && !in_autograd ? gradient_of(leaf) : Tensor();
      };
      Tensor into = leaf_gradient(state.weight, wants_weight);
      if (in_autograd && wants_weight)
        into = found[1] = at::zeros_like(weight, {}, at::MemoryFormat::ChannelsLast);
      const Gradients all =
          gradients(grads[0], z, moments, norm, leaf_gradient(state.norm_weight, wants_gain),
                    leaf_gradient(state.norm_bias, wants_bias), wants_x || wants_weight);
      const Products products(state.conv, state.sizes);
      const Tensor cut = products.cut(weight, state.widths);
      if (wants_x) found[0] = products.grad_input(all.x, cut, state.sizes);
      if (into.defined()) products.add_grad_weight(all.x, x, cut, products.cut(into, state.widths));
      if (in_autograd && wants_gain) found[2] = all.sums.select(0, 1);
      if (in_autograd && wants_bias) found[3] = all.sums.select(0, 0);
      if (wants_scale) found[4] = all.sums.select(0, 2);
      if (wants_residual) found[5] = all.residual;
    }
    forbid_second_derivatives(found, grads[0]);
    return found;
  }
};

Pair pair(at::IntArrayRef values) { return {values[0], values[1]}; }

// As autocast gives it to a convolution.
Tensor as_autocast(const Tensor& x) {
  if (x.scalar_type() == at::kDouble || !at::autocast::is_autocast_enabled(at::kCPU)) return x;
  return x.to(at::autocast::get_autocast_dtype(at::kCPU));
}

// None where the arguments are not what the node takes: whoever calls finds out why, or how to do
// without it.
std::optional<Tensor> conv_norm_act(
    const Tensor& given, const Tensor& weight, const std::optional<Tensor>& norm_weight,
    const std::optional<Tensor>& norm_bias, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& residual, const std::optional<Tensor>& running_mean,
    const std::optional<Tensor>& running_var, int64_t inputs, at::IntArrayRef kernel,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool depthwise,
    double momentum, double eps, int64_t act, bool before, at::OptionalIntArrayRef widths) {
  const Norm norm = norm_of(norm_weight, norm_bias, scale, residual, running_mean, running_var,
                            momentum, eps, act, before);
  const Convolution conv{inputs,        pair(kernel),   pair(stride),
                         pair(padding), pair(dilation), depthwise};
  const at::IntArrayRef lengths = widths.value_or(at::IntArrayRef());
  const Tensor x = as_autocast(given);
  if (!has_kernels(x) || x.dim() != 4 || weight.dim() != 4 ||
      !x.is_contiguous(at::MemoryFormat::ChannelsLast) || !weight.is_cpu() ||
      weight.scalar_type() != vector_dtype(x))
    return std::nullopt;
  // One channel is channels last in every layout: which one is meant, it does not say.
  if (x.size(1) == 1) return std::nullopt;
  const Products products(conv, x.sizes());
  const auto sizes = products.output_sizes(x, products.cut(weight, lengths));
  if (!sizes || !takes(*sizes, x, norm, /*is_prefix=*/!lengths.empty())) return std::nullopt;
  return ConvNormAct::apply(x, weight, norm_weight, norm_bias, scale, residual, norm, conv,
                            lengths);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dmcp, library) {
  library.def(
      "conv_norm_act_node(Tensor x, Tensor weight, Tensor? norm_weight, Tensor? norm_bias, "
      "Tensor? scale, Tensor? residual, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "int inputs, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, bool depthwise, "
      "float momentum, float eps, int act, bool before, int[]? widths) -> Tensor?",
      &conv_norm_act);
}

}  // namespace dmcp::nodes
