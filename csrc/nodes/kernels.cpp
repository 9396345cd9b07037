#include "nodes/kernels.h"

#include <torch/library.h>

namespace dmcp::nodes {

namespace {

const cpu::Table* given = nullptr;

void use_kernels(int64_t address, int64_t version) {
  TORCH_CHECK(version == cpu::kTableVersion, "built for other kernels: install dmcp again");
  given = reinterpret_cast<const cpu::Table*>(address);
}

const cpu::Table& table() {
  TORCH_CHECK(given, "dmcp::use_kernels was not called");
  return *given;
}

}  // namespace

const cpu::NormActKernels& norm_act_kernels(DType dtype) {
  return table().norm_act(table().isa, dtype);
}

const cpu::DepthwiseKernels& depthwise_kernels(DType dtype) {
  return table().depthwise(table().isa, dtype);
}

const cpu::PointwiseKernels& pointwise_kernels() { return table().pointwise(table().isa); }

void gather_windows(const cpu::Windows& windows, Pitched<const void> images, void* matrix) {
  table().gather(windows, images, matrix);
}

void scatter_windows(const cpu::Windows& windows, const void* matrix, void* images) {
  table().scatter(windows, matrix, images);
}

bool has_kernels(const at::Tensor& x) {
  const at::ScalarType dtype = x.scalar_type();
  return x.is_cpu() && (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kDouble);
}

DType dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kDouble:
      return DType::float64;
    default:
      return DType::float32;
  }
}

at::ScalarType vector_dtype(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// What dmcp._native.cpu_kernels() says; called once, when both modules are loaded.
TORCH_LIBRARY_FRAGMENT(dmcp, library) {
  library.def("use_kernels(int address, int version) -> ()", &use_kernels);
}

}  // namespace dmcp::nodes
