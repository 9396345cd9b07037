#include "nodes/products.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "nodes/kernels.h"

namespace dmcp::nodes {

namespace {

// Up to as many windows in a batch, gathering them costs less than what oneDNN's blocks waste.
constexpr int64_t kFewWindows = 256;

Products::Way way_of(const Convolution& conv, at::IntArrayRef sizes) {
  using Way = Products::Way;
  const auto& [inputs, kernel, stride, padding, dilation, depthwise] = conv;
  const bool square = kernel[0] == kernel[1] && stride[0] == stride[1];
  const bool same = padding[0] == kernel[0] / 2 && padding[1] == padding[0];
  if (dilation == Pair{1, 1} && square && same) {
    if (depthwise) {
      const bool known = (kernel[0] == 3 || kernel[0] == 5) && (stride[0] == 1 || stride[0] == 2);
      return known ? Way::depthwise : Way::torch;
    }
    if (kernel[0] == 1 && stride[0] == 1) return Way::pointwise;
  }
  if (depthwise) return Way::torch;
  const int64_t windows = sizes[0] * sizes[2] * sizes[3] / (stride[0] * stride[1]);
  return sizes[1] != inputs || windows <= kFewWindows ? Way::gathered : Way::torch;
}

int64_t pixels(const Tensor& image) { return image.size(0) * image.size(2) * image.size(3); }

// [pixels, C], a view.
Tensor rows(const Tensor& image) {
  return image.as_strided({pixels(image), image.size(1)}, {image.size(1), 1});
}

Tensor empty_image(const Tensor& like, int64_t channels, int64_t height, int64_t width) {
  return at::empty({like.size(0), channels, height, width}, like.options(),
                   at::MemoryFormat::ChannelsLast);
}

bool is_half(const Tensor& image) { return image.scalar_type() == at::kBFloat16; }

Pitched<const void> read(const Tensor& image) { return {image.data_ptr(), image.size(1)}; }

Pitched<void> written(const Tensor& image) { return {image.data_ptr(), image.size(1)}; }

// --- Pointwise: a weight is a matrix [O, I], perhaps the corner of a wider one

Pitched<const float> matrix(const Tensor& weight) {
  return {weight.const_data_ptr<float>(), weight.stride(0)};
}

Tensor with_dense_rows(const Tensor& weight) {
  return weight.stride(1) == 1 ? weight : weight.contiguous();
}

Tensor pointwise(const Tensor& x, const Tensor& weight) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  Tensor y = empty_image(x, outputs, x.size(2), x.size(3));
  if (is_half(x)) {
    const Tensor dense = with_dense_rows(weight);
    pointwise_kernels().forward({pixels(x), inputs, outputs}, read(x), matrix(dense), written(y));
  } else {
    Tensor result = rows(y);
    at::mm_out(result, rows(x), weight.t());
  }
  return y;
}

Tensor pointwise_grad_input(const Tensor& grad, const Tensor& weight) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  Tensor grad_x = empty_image(grad, inputs, grad.size(2), grad.size(3));
  if (is_half(grad)) {
    const Tensor dense = with_dense_rows(weight);
    pointwise_kernels().grad_input({pixels(grad), inputs, outputs}, read(grad), matrix(dense),
                                   written(grad_x));
  } else {
    Tensor result = rows(grad_x);
    at::mm_out(result, rows(grad), weight);
  }
  return grad_x;
}

void add_pointwise_grad_weight(const Tensor& grad, const Tensor& x, Tensor into) {
  const bool is_dense = into.stride(1) == 1 || into.size(1) == 1;
  if (!is_dense || into.scalar_type() != vector_dtype(x)) {
    const Tensor found = at::zeros(into.sizes(), into.options().dtype(vector_dtype(x)));
    add_pointwise_grad_weight(grad, x, found);
    into.add_(found);
  } else if (is_half(x)) {
    pointwise_kernels().grad_weight({pixels(x), into.size(1), into.size(0)}, read(grad), read(x),
                                    {into.mutable_data_ptr<float>(), into.stride(0)}, true);
  } else {
    at::addmm_out(into, into, rows(grad).t(), rows(x));
  }
}

// --- Depthwise

cpu::Depthwise depthwise_of(const Convolution& conv, const Tensor& x) {
  return {x.size(0),
          x.size(1),
          x.size(2),
          x.size(3),
          static_cast<int>(conv.kernel[0]),
          static_cast<int>(conv.stride[0]),
          dtype_of(x)};
}

// --- Gathered: a pointwise product with the pixels of every window

cpu::Windows windows_of(const Convolution& conv, at::IntArrayRef sizes, const Tensor& like) {
  return {sizes[0],         sizes[1],         sizes[2],       sizes[3],        conv.kernel[0],
          conv.kernel[1],   conv.stride[0],   conv.stride[1], conv.padding[0], conv.padding[1],
          conv.dilation[0], conv.dilation[1], dtype_of(like)};
}

Tensor gather(const Convolution& conv, const Tensor& x) {
  const cpu::Windows windows = windows_of(conv, x.sizes(), x);
  Tensor image = empty_image(x, conv.kernel[0] * conv.kernel[1] * x.size(1), windows.rows(),
                             windows.columns());
  nodes::gather_windows(windows, read(x), image.data_ptr());
  return image;
}

// [O, C, kh, kw] -> [O, kh kw C]
Tensor taps(const Tensor& weight) { return weight.permute({0, 2, 3, 1}).flatten(1); }

}  // namespace

Products::Products(const Convolution& conv, at::IntArrayRef sizes)
    : conv_(conv), way_(way_of(conv, sizes)) {}

Tensor Products::cut(const Tensor& weight, at::IntArrayRef widths) const {
  const auto sizes = weight.sizes(), strides = weight.strides();
  const int64_t outputs = widths.empty() ? sizes[0] : widths[0];
  const int64_t inputs = widths.size() < 2 ? sizes[1] : widths[1];
  TORCH_CHECK(outputs <= sizes[0] && inputs <= sizes[1], "widths ", widths, " of a weight ", sizes);
  if (way_ == Way::pointwise) return weight.as_strided({outputs, inputs}, {strides[0], strides[1]});
  if (outputs == sizes[0] && inputs == sizes[1]) return weight;
  return weight.as_strided({outputs, inputs, sizes[2], sizes[3]}, strides);
}

std::optional<std::array<int64_t, 4>> Products::output_sizes(const Tensor& x,
                                                             const Tensor& weight) const {
  const bool has_inputs = conv_.depthwise ? weight.size(0) == x.size(1) && weight.size(1) == 1
                                          : weight.size(1) == x.size(1);
  std::array<int64_t, 4> sizes{x.size(0), weight.size(0)};
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t window = conv_.dilation[axis] * (conv_.kernel[axis] - 1) + 1;
    const int64_t rest = x.size(2 + axis) + 2 * conv_.padding[axis] - window;
    const bool has_kernel = way_ == Way::pointwise || weight.size(2 + axis) == conv_.kernel[axis];
    if (!has_inputs || !has_kernel || rest < 0) return std::nullopt;
    sizes[2 + axis] = rest / conv_.stride[axis] + 1;
  }
  return sizes;
}

Tensor Products::output(const Tensor& x, const Tensor& weight) const {
  switch (way_) {
    case Way::pointwise:
      return pointwise(x, weight);
    case Way::depthwise: {
      const cpu::Depthwise conv = depthwise_of(conv_, x);
      const Tensor dense = weight.contiguous();
      Tensor y = empty_image(x, x.size(1), conv.out_height(), conv.out_width());
      depthwise_kernels(dtype_of(x)).forward(conv, read(x), dense.data_ptr(), written(y));
      return y;
    }
    case Way::gathered:
      return pointwise(gather(conv_, x), taps(weight));
    case Way::torch:
      return at::conv2d(x, weight.to(x.scalar_type()), {}, conv_.stride, conv_.padding,
                        conv_.dilation, conv_.depthwise ? x.size(1) : 1)
          .contiguous(at::MemoryFormat::ChannelsLast);
  }
  TORCH_INTERNAL_ASSERT(false);
}

Tensor Products::grad_input(const Tensor& grad, const Tensor& weight, at::IntArrayRef sizes) const {
  switch (way_) {
    case Way::pointwise:
      return pointwise_grad_input(grad, weight);
    case Way::depthwise: {
      const Tensor dense = weight.contiguous();
      Tensor grad_x = empty_image(grad, sizes[1], sizes[2], sizes[3]);
      depthwise_kernels(dtype_of(grad))
          .grad_input(depthwise_of(conv_, grad_x), read(grad), dense.data_ptr(), written(grad_x));
      return grad_x;
    }
    case Way::gathered: {
      const Tensor windows = pointwise_grad_input(grad, taps(weight));
      Tensor grad_x = empty_image(grad, sizes[1], sizes[2], sizes[3]);
      nodes::scatter_windows(windows_of(conv_, sizes, grad), windows.data_ptr(), grad_x.data_ptr());
      return grad_x;
    }
    case Way::torch: {
      // Of x, only the layout is looked at; memory that nobody touches costs nothing.
      const Tensor x = empty_image(grad, sizes[1], sizes[2], sizes[3]);
      return std::get<0>(at::convolution_backward(
          grad, x, weight.to(grad.scalar_type()), at::OptionalIntArrayRef(), conv_.stride,
          conv_.padding, conv_.dilation, false, {0, 0}, conv_.depthwise ? sizes[1] : 1,
          {true, false, false}));
    }
  }
  TORCH_INTERNAL_ASSERT(false);
}

void Products::add_grad_weight(const Tensor& grad, const Tensor& x, const Tensor& weight,
                               const Tensor& into) const {
  switch (way_) {
    case Way::pointwise:
      return add_pointwise_grad_weight(grad, x, into);
    case Way::depthwise: {
      const Tensor found = at::empty(into.sizes(), into.options().dtype(vector_dtype(x)));
      depthwise_kernels(dtype_of(x))
          .grad_weight(depthwise_of(conv_, x), read(grad), read(x), found.data_ptr());
      into.add_(found);
      return;
    }
    case Way::gathered: {
      const auto sizes = into.sizes();
      const Tensor found = at::zeros({sizes[0], sizes[2] * sizes[3] * sizes[1]},
                                     into.options().dtype(vector_dtype(x)));
      add_pointwise_grad_weight(grad, gather(conv_, x), found);
      into.add_(found.view({sizes[0], sizes[2], sizes[3], sizes[1]}).permute({0, 3, 1, 2}));
      return;
    }
    case Way::torch:
      into.add_(std::get<1>(
          at::convolution_backward(grad, x, weight.to(x.scalar_type()), at::OptionalIntArrayRef(),
                                   conv_.stride, conv_.padding, conv_.dilation, false, {0, 0},
                                   conv_.depthwise ? x.size(1) : 1, {false, true, false})));
  }
}

}  // namespace dmcp::nodes
