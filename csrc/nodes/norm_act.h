// Normalise-activate-mask of torch's tensors on CPU, by the statistics of the batch: what the ops
// norm_act_train and norm_act_train_backward compute (dmcp/ops/norm_act.py), for dense activations.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "common/norm_act.h"

namespace dmcp::nodes {

using at::Tensor;

// What a norm does to x. Tensors may be undefined; the vectors have at least as many elements as x
// has channels, of which the first ones take part.
struct Norm {
  Tensor weight, bias, scale;
  Tensor residual;
  Tensor running_mean, running_var;
  double momentum, eps;
  Act act;
  Residual place;
};

Norm norm_of(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
             const std::optional<Tensor>& scale, const std::optional<Tensor>& residual,
             const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var,
             double momentum, double eps, int64_t act, bool before);

// Whether a norm can be applied to activations of these sizes, and else like x; if `is_prefix`, the
// first channels of its weight and bias.
bool takes(at::IntArrayRef sizes, const Tensor& x, const Norm& norm, bool is_prefix);

struct Normalised {
  Tensor y;
  Tensor moments;  // [2, C]: mean and biased variance
};

// x is dense, and of sizes that the norm `takes`.
Normalised normalise(const Tensor& x, const Norm& norm);

struct Gradients {
  Tensor x;         // undefined unless wanted
  Tensor sums;      // [3, C]: of bias, weight and scale
  Tensor residual;  // undefined without one
};

// `norm.residual` is looked at only if it comes before the activation. The gradients of weight and
// bias are also added to the first elements of `add_weight` and `add_bias`, where those are
// defined.
Gradients gradients(const Tensor& grad, const Tensor& x, const Tensor& moments, const Norm& norm,
                    const Tensor& add_weight, const Tensor& add_bias, bool wants_x);

}  // namespace dmcp::nodes
