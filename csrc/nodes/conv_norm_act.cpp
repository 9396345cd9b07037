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

// What comes back in the backward and is no tensor: one list, as entries of `saved_data` take time
// and compiled autograd takes no objects of our own.
struct Plan {
  static constexpr size_t kNumbers = 16;
  Convolution conv;
  std::vector<int64_t> widths;  // empty: all, and gradients are autograd's
  std::vector<int64_t> sizes;   // of x
  Act act;
  bool has_residual;

  static c10::IValue packed(const Convolution& conv, at::IntArrayRef widths, at::IntArrayRef sizes,
                            const Norm& norm) {
    const auto& [inputs, kernel, stride, padding, dilation, depthwise] = conv;
    std::vector<int64_t> n{inputs,
                           kernel[0],
                           kernel[1],
                           stride[0],
                           stride[1],
                           padding[0],
                           padding[1],
                           dilation[0],
                           dilation[1],
                           depthwise,
                           sizes[0],
                           sizes[1],
                           sizes[2],
                           sizes[3],
                           static_cast<int64_t>(norm.act),
                           norm.residual.defined()};
    n.insert(n.end(), widths.begin(), widths.end());
    return n;
  }

  explicit Plan(const c10::IValue& value) {
    const std::vector<int64_t> n = value.toIntVector();
    conv = {n[0], {n[1], n[2]}, {n[3], n[4]}, {n[5], n[6]}, {n[7], n[8]}, n[9] != 0};
    sizes.assign(n.begin() + 10, n.begin() + 14);
    act = static_cast<Act>(n[14]);
    has_residual = n[15] != 0;
    widths.assign(n.begin() + kNumbers, n.end());
  }
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
    auto& data = ctx->saved_data;
    data["plan"] = Plan::packed(conv, widths, x.sizes(), norm);
    data["eps"] = norm.eps;
    if (!widths.empty()) {
      // Saved tensors need not come back as the leaves that hold the gradients.
      data["weight"] = weight;
      data["norm_weight"] = norm_weight;
      data["norm_bias"] = norm_bias;
    }
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    // Whoever hooks saved tensors may give them back with other strides.
    const Tensor x = channels_last(saved[0]), z = channels_last(saved[2]);
    const Tensor &weight = saved[1], &moments = saved[3];
    auto& data = ctx->saved_data;
    const Plan plan(data["plan"]);
    Norm norm{saved[4], saved[5], saved[6], saved[7]};
    norm.eps = data["eps"].toDouble();
    norm.act = plan.act;

    Wanted wanted(*ctx);
    const bool wants_x = wanted.next(), wants_weight = wanted.next();
    const bool wants_gain = wanted.next(norm.weight.defined());
    const bool wants_bias = wanted.next(norm.bias.defined());
    const bool wants_scale = wanted.next(norm.scale.defined());
    const bool wants_residual = wanted.next(plan.has_residual);
    const bool in_autograd = plan.widths.empty();

    variable_list found(9);
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      const auto leaf_gradient = [&](const char* name, bool wants_it) {
        return wants_it && !in_autograd ? gradient_of(data[name].toTensor()) : Tensor();
      };
      Tensor into = leaf_gradient("weight", wants_weight);
      if (in_autograd && wants_weight)
        into = found[1] = at::zeros_like(weight, {}, at::MemoryFormat::ChannelsLast);
      const Gradients all =
          gradients(grads[0], z, moments, norm, leaf_gradient("norm_weight", wants_gain),
                    leaf_gradient("norm_bias", wants_bias), wants_x || wants_weight);
      const Products products(plan.conv, plan.sizes);
      const Tensor cut = products.cut(weight, plan.widths);
      if (wants_x) found[0] = products.grad_input(all.x, cut, plan.sizes);
      if (into.defined()) products.add_grad_weight(all.x, x, cut, products.cut(into, plan.widths));
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

// As autocast gives it to a convolution; undefined where that is no dtype of the kernels.
Tensor as_autocast(const Tensor& x) {
  const at::ScalarType dtype = x.scalar_type(), to = at::autocast::get_autocast_dtype(at::kCPU);
  const bool casts = at::isFloatingType(dtype) && dtype != at::kDouble &&
                     at::autocast::is_autocast_enabled(at::kCPU);
  if (!casts || dtype == to) return x;
  return to == at::kBFloat16 ? x.to(to) : Tensor();
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
  if (!x.defined() || !has_kernels(x) || x.dim() != 4 || weight.dim() != 4 ||
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
