// The windows of a convolution as rows of a matrix, and back: what turns it into matrix products.
#pragma once

#include <cstdint>

#include "common/tensors.h"

namespace dmcp::cpu {

// A convolution of channels-last images. Zeros pad them.
struct Windows {
  int64_t batch, channels, height, width;  // of the images
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t padding_height, padding_width;
  int64_t dilation_height, dilation_width;
  DType dtype;

  int64_t rows() const {
    return fit(height + 2 * padding_height, dilation_height * (kernel_height - 1) + 1,
               stride_height);
  }
  int64_t columns() const {
    return fit(width + 2 * padding_width, dilation_width * (kernel_width - 1) + 1, stride_width);
  }

 private:
  static int64_t fit(int64_t size, int64_t window, int64_t stride) {
    return size < window ? 0 : (size - window) / stride + 1;
  }
};

// matrix [batch rows() columns(), kernel_height kernel_width channels], dense: the pixels of every
// window, one after the other.
void gather_windows(const Windows& windows, Pitched<const void> images, void* matrix);

// images, dense: for every pixel the sum over the windows that hold it, in the order of the kernel.
// float32, float64 and bfloat16; throws std::invalid_argument otherwise.
void scatter_windows(const Windows& windows, const void* matrix, void* images);

}  // namespace dmcp::cpu
