// The products of a convolution without bias, of torch's tensors on CPU; see
// dmcp/ops/convolution.py for which kernels suit which shape.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

namespace dmcp::nodes {

using at::Tensor;
using Pair = std::array<int64_t, 2>;

// What is fixed about a convolution; `Convolution` in dmcp/ops/convolution.py.
struct Convolution {
  int64_t inputs;
  Pair kernel, stride, padding, dilation;
  bool depthwise;
};

// Activations are dense channels-last images of float32, bfloat16 or float64, and so are results;
// weights are [O, C or 1, kh, kw], of float32 (of float64 for float64 activations).
class Products {
 public:
  enum class Way { pointwise, depthwise, gathered, torch };

  // Of an x [N, C, H, W] with these sizes.
  Products(const Convolution& conv, at::IntArrayRef sizes);

  // What the other methods take of a weight: a view of its first outputs and inputs, as many as
  // `widths` says, all where that is empty; a matrix [O, C] where the kernel is one pixel.
  Tensor cut(const Tensor& weight, at::IntArrayRef widths) const;

  // Of the output; none where a cut weight does not fit x, or x is smaller than a window.
  std::optional<std::array<int64_t, 4>> output_sizes(const Tensor& x, const Tensor& weight) const;

  Tensor output(const Tensor& x, const Tensor& weight) const;
  Tensor grad_input(const Tensor& grad, const Tensor& weight, at::IntArrayRef sizes) const;

  // Adds the gradient of `weight` to what `cut` made of a tensor.
  void add_grad_weight(const Tensor& grad, const Tensor& x, const Tensor& weight,
                       const Tensor& into) const;

 private:
  Convolution conv_;
  Way way_;
};

}  // namespace dmcp::nodes
