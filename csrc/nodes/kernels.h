// The kernels that the nodes call; they are those of dmcp._native, which hands over its table.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/table.h"

namespace dmcp::nodes {

const cpu::NormActKernels& norm_act_kernels(DType dtype);
const cpu::DepthwiseKernels& depthwise_kernels(DType dtype);
const cpu::PointwiseKernels& pointwise_kernels();
void gather_windows(const cpu::Windows& windows, Pitched<const void> images, void* matrix);
void scatter_windows(const cpu::Windows& windows, const void* matrix, void* images);

// Whether there are kernels for activations like x.
bool has_kernels(const at::Tensor& x);

// Of such activations.
DType dtype_of(const at::Tensor& x);

// Of the parameters and sums that belong to them: float, or double for double.
at::ScalarType vector_dtype(const at::Tensor& x);

}  // namespace dmcp::nodes
