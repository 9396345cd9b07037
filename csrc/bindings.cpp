// The Python face of the kernels: addresses and streams as integers, sizes in elements, no torch.
// `itemsize` tells float (4) from double (8). Shapes, dtypes and devices are checked in dmcp/ops.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/depthwise.h"
#include "cpu/expected_cost.h"
#include "cpu/isa.h"
#include "cpu/norm_act.h"
#include "cpu/pointwise.h"
#include "cpu/retain.h"
#include "cpu/table.h"
#include "cpu/windows.h"
#ifdef DMCP_WITH_CUDA
#include "cuda/expected_cost.h"
#include "cuda/norm_act.h"
#include "cuda/retain.h"
#endif

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <typename Call>
void with_real(int itemsize, Call call) {
  if (itemsize == 4) return call(float{});
  if (itemsize == 8) return call(double{});
  throw std::invalid_argument("itemsize must be 4 or 8, got " + std::to_string(itemsize));
}

void retain_cpu(Address alpha, Address offsets, Address q, int64_t chains, int64_t total,
                int itemsize) {
  with_real(itemsize, [&](auto zero) {
    using T = decltype(zero);
    dmcp::cpu::retain(at<const T>(alpha), at<const int32_t>(offsets), at<T>(q), chains, total);
  });
}

void retain_backward_cpu(Address grad_q, Address alpha, Address q, Address offsets,
                         Address grad_alpha, int64_t chains, int64_t total, int itemsize) {
  with_real(itemsize, [&](auto zero) {
    using T = decltype(zero);
    dmcp::cpu::retain_backward(at<const T>(grad_q), at<const T>(alpha), at<const T>(q),
                               at<const int32_t>(offsets), at<T>(grad_alpha), chains, total);
  });
}

dmcp::CostTable cost_table(Address offsets, Address ends, Address coefficients, int64_t units,
                           int64_t groups, int64_t channels, int64_t metrics) {
  return {at<const int32_t>(offsets),
          at<const int32_t>(ends),
          at<const double>(coefficients),
          units,
          groups,
          channels,
          metrics};
}

template <typename T>
dmcp::ExpectedCost<T> expected_cost_at(Address q, Address scale, Address moments, Address cost,
                                       Address variance, Address saved) {
  return {at<T>(q),         at<T>(scale),         at<double>(moments),
          at<double>(cost), at<double>(variance), at<double>(saved)};
}

template <typename T>
dmcp::ExpectedCostGrad<T> expected_cost_grad_at(Address q, Address scale, Address moments,
                                                Address cost, Address variance) {
  return {at<const T>(q), at<const T>(scale), at<const double>(moments), at<const double>(cost),
          at<const double>(variance)};
}

void expected_cost_cpu(Address alpha, Address offsets, Address ends, Address coefficients,
                       Address q, Address scale, Address moments, Address cost, Address variance,
                       Address saved, int64_t units, int64_t groups, int64_t channels,
                       int64_t metrics, int itemsize) {
  with_real(itemsize, [&](auto zero) {
    using T = decltype(zero);
    dmcp::cpu::expected_cost(
        cost_table(offsets, ends, coefficients, units, groups, channels, metrics),
        at<const T>(alpha), expected_cost_at<T>(q, scale, moments, cost, variance, saved));
  });
}

void expected_cost_backward_cpu(Address grad_q, Address grad_scale, Address grad_moments,
                                Address grad_cost, Address grad_variance, Address saved,
                                Address offsets, Address ends, Address grad_alpha, int64_t units,
                                int64_t groups, int64_t channels, int64_t metrics, int itemsize) {
  with_real(itemsize, [&](auto zero) {
    using T = decltype(zero);
    dmcp::cpu::expected_cost_backward(
        cost_table(offsets, ends, 0, units, groups, channels, metrics),
        expected_cost_grad_at<T>(grad_q, grad_scale, grad_moments, grad_cost, grad_variance),
        at<const double>(saved), at<T>(grad_alpha));
  });
}

// Activations of norm_act, as common/norm_act.h describes them.
dmcp::Shape shape_of(int64_t batch, int64_t channels, int64_t pixels, bool channels_last,
                     int dtype) {
  return {batch, channels, pixels, channels_last, static_cast<dmcp::DType>(dtype)};
}

dmcp::Affine affine_of(Address mean, Address var, Address weight, Address bias, Address scale,
                       double eps) {
  return {at<const void>(mean), at<const void>(var),   at<const void>(weight),
          at<const void>(bias), at<const void>(scale), eps};
}

dmcp::Pitched<const void> input(Address data, int64_t pitch) {
  return {at<const void>(data), pitch};
}

dmcp::Pitched<void> output(Address data, int64_t pitch) { return {at<void>(data), pitch}; }

void norm_stats_cpu(int64_t batch, int64_t channels, int64_t pixels, bool channels_last, int dtype,
                    Address x, int64_t x_pitch, Address mean, Address var, Address running_mean,
                    Address running_var, double momentum, const std::string& isa) {
  const dmcp::Shape shape = shape_of(batch, channels, pixels, channels_last, dtype);
  dmcp::cpu::norm_act_kernels(isa, shape.dtype)
      .stats(shape, input(x, x_pitch), at<void>(mean), at<void>(var), at<void>(running_mean),
             at<void>(running_var), momentum);
}

void norm_act_cpu(int64_t batch, int64_t channels, int64_t pixels, bool channels_last, int dtype,
                  Address mean, Address var, Address weight, Address bias, Address scale,
                  double eps, int act, int residual_kind, Address x, int64_t x_pitch,
                  Address residual, int64_t residual_pitch, Address y, int64_t y_pitch,
                  const std::string& isa) {
  const dmcp::Shape shape = shape_of(batch, channels, pixels, channels_last, dtype);
  dmcp::cpu::norm_act_kernels(isa, shape.dtype)
      .forward(shape, affine_of(mean, var, weight, bias, scale, eps), static_cast<dmcp::Act>(act),
               static_cast<dmcp::Residual>(residual_kind), input(x, x_pitch),
               input(residual, residual_pitch), output(y, y_pitch));
}

// norm_stats_cpu and norm_act_cpu in one call: on a small layer a call costs as much as a kernel.
void norm_act_train_cpu(int64_t batch, int64_t channels, int64_t pixels, bool channels_last,
                        int dtype, Address mean, Address var, Address running_mean,
                        Address running_var, double momentum, Address weight, Address bias,
                        Address scale, double eps, int act, int residual_kind, Address x,
                        int64_t x_pitch, Address residual, int64_t residual_pitch, Address y,
                        int64_t y_pitch, const std::string& isa) {
  const dmcp::Shape shape = shape_of(batch, channels, pixels, channels_last, dtype);
  const dmcp::cpu::NormActKernels& kernels = dmcp::cpu::norm_act_kernels(isa, shape.dtype);
  kernels.stats(shape, input(x, x_pitch), at<void>(mean), at<void>(var), at<void>(running_mean),
                at<void>(running_var), momentum);
  kernels.forward(shape, affine_of(mean, var, weight, bias, scale, eps),
                  static_cast<dmcp::Act>(act), static_cast<dmcp::Residual>(residual_kind),
                  input(x, x_pitch), input(residual, residual_pitch), output(y, y_pitch));
}

void norm_act_sums_cpu(int64_t batch, int64_t channels, int64_t pixels, bool channels_last,
                       int dtype, Address mean, Address var, Address weight, Address bias,
                       Address scale, double eps, int act, Address grad, int64_t grad_pitch,
                       Address x, int64_t x_pitch, Address residual, int64_t residual_pitch,
                       Address grad_residual, int64_t grad_residual_pitch, Address sums,
                       const std::string& isa) {
  const dmcp::Shape shape = shape_of(batch, channels, pixels, channels_last, dtype);
  dmcp::cpu::norm_act_kernels(isa, shape.dtype)
      .sums(shape, affine_of(mean, var, weight, bias, scale, eps), static_cast<dmcp::Act>(act),
            input(grad, grad_pitch), input(x, x_pitch), input(residual, residual_pitch),
            output(grad_residual, grad_residual_pitch), at<void>(sums));
}

void norm_act_grad_cpu(int64_t batch, int64_t channels, int64_t pixels, bool channels_last,
                       int dtype, Address mean, Address var, Address weight, Address bias,
                       Address scale, double eps, int act, Address sums, double count, Address grad,
                       int64_t grad_pitch, Address x, int64_t x_pitch, Address grad_x,
                       int64_t grad_x_pitch, const std::string& isa) {
  const dmcp::Shape shape = shape_of(batch, channels, pixels, channels_last, dtype);
  dmcp::cpu::norm_act_kernels(isa, shape.dtype)
      .grad(shape, affine_of(mean, var, weight, bias, scale, eps), static_cast<dmcp::Act>(act),
            at<const void>(sums), count, input(grad, grad_pitch), input(x, x_pitch),
            output(grad_x, grad_x_pitch));
}

template <typename S>
void add_to(Address target, const void* terms, int64_t count) {
  if (!target) return;
  for (int64_t i = 0; i < count; ++i) at<S>(target)[i] += static_cast<const S*>(terms)[i];
}

// norm_act_sums_cpu and norm_act_grad_cpu in one call, without a residual before the activation. The
// gradients of weight and bias are added to `add_weight` and `add_bias`, where those are given.
void norm_act_train_backward_cpu(int64_t batch, int64_t channels, int64_t pixels,
                                 bool channels_last, int dtype, Address mean, Address var,
                                 Address weight, Address bias, Address scale, double eps, int act,
                                 Address grad, int64_t grad_pitch, Address x, int64_t x_pitch,
                                 Address grad_x, int64_t grad_x_pitch, Address sums,
                                 Address add_weight, Address add_bias, const std::string& isa) {
  const dmcp::Shape shape = shape_of(batch, channels, pixels, channels_last, dtype);
  const dmcp::Affine affine = affine_of(mean, var, weight, bias, scale, eps);
  const dmcp::cpu::NormActKernels& kernels = dmcp::cpu::norm_act_kernels(isa, shape.dtype);
  kernels.sums(shape, affine, static_cast<dmcp::Act>(act), input(grad, grad_pitch),
               input(x, x_pitch), {}, {}, at<void>(sums));
  kernels.grad(shape, affine, static_cast<dmcp::Act>(act), at<const void>(sums),
               static_cast<double>(shape.count()), input(grad, grad_pitch), input(x, x_pitch),
               output(grad_x, grad_x_pitch));
  with_real(shape.dtype == dmcp::DType::float64 ? 8 : 4, [&](auto zero) {
    using S = decltype(zero);
    add_to<S>(add_bias, at<S>(sums), channels);
    add_to<S>(add_weight, at<S>(sums) + channels, channels);
  });
}

dmcp::cpu::Depthwise depthwise_of(int64_t batch, int64_t channels, int64_t height, int64_t width,
                                  int kernel, int stride, int dtype) {
  return {batch, channels, height, width, kernel, stride, static_cast<dmcp::DType>(dtype)};
}

void depthwise_cpu(int64_t batch, int64_t channels, int64_t height, int64_t width, int kernel,
                   int stride, int dtype, Address x, int64_t x_pitch, Address weight, Address y,
                   int64_t y_pitch, const std::string& isa) {
  const dmcp::cpu::Depthwise conv =
      depthwise_of(batch, channels, height, width, kernel, stride, dtype);
  dmcp::cpu::depthwise_kernels(isa, conv.dtype)
      .forward(conv, input(x, x_pitch), at<const void>(weight), output(y, y_pitch));
}

void depthwise_grad_input_cpu(int64_t batch, int64_t channels, int64_t height, int64_t width,
                              int kernel, int stride, int dtype, Address grad, int64_t grad_pitch,
                              Address weight, Address grad_x, int64_t grad_x_pitch,
                              const std::string& isa) {
  const dmcp::cpu::Depthwise conv =
      depthwise_of(batch, channels, height, width, kernel, stride, dtype);
  dmcp::cpu::depthwise_kernels(isa, conv.dtype)
      .grad_input(conv, input(grad, grad_pitch), at<const void>(weight),
                  output(grad_x, grad_x_pitch));
}

void depthwise_grad_weight_cpu(int64_t batch, int64_t channels, int64_t height, int64_t width,
                               int kernel, int stride, int dtype, Address grad, int64_t grad_pitch,
                               Address x, int64_t x_pitch, Address grad_weight,
                               const std::string& isa) {
  const dmcp::cpu::Depthwise conv =
      depthwise_of(batch, channels, height, width, kernel, stride, dtype);
  dmcp::cpu::depthwise_kernels(isa, conv.dtype)
      .grad_weight(conv, input(grad, grad_pitch), input(x, x_pitch), at<void>(grad_weight));
}

void pointwise_cpu(int64_t rows, int64_t inputs, int64_t outputs, Address x, int64_t x_pitch,
                   Address weight, int64_t weight_pitch, Address y, int64_t y_pitch,
                   const std::string& isa) {
  dmcp::cpu::pointwise_kernels(isa).forward({rows, inputs, outputs}, input(x, x_pitch),
                                            {at<const float>(weight), weight_pitch},
                                            output(y, y_pitch));
}

void pointwise_grad_input_cpu(int64_t rows, int64_t inputs, int64_t outputs, Address grad,
                              int64_t grad_pitch, Address weight, int64_t weight_pitch,
                              Address grad_x, int64_t grad_x_pitch, const std::string& isa) {
  dmcp::cpu::pointwise_kernels(isa).grad_input({rows, inputs, outputs}, input(grad, grad_pitch),
                                               {at<const float>(weight), weight_pitch},
                                               output(grad_x, grad_x_pitch));
}

void pointwise_grad_weight_cpu(int64_t rows, int64_t inputs, int64_t outputs, Address grad,
                               int64_t grad_pitch, Address x, int64_t x_pitch, Address into,
                               int64_t into_pitch, bool add, const std::string& isa) {
  dmcp::cpu::pointwise_kernels(isa).grad_weight({rows, inputs, outputs}, input(grad, grad_pitch),
                                                input(x, x_pitch), {at<float>(into), into_pitch},
                                                add);
}

using Pair = std::array<int64_t, 2>;

dmcp::cpu::Windows windows_of(const std::array<int64_t, 4>& shape, Pair kernel, Pair stride,
                              Pair padding, Pair dilation, int dtype) {
  return {shape[0],   shape[1],   shape[2],    shape[3],    kernel[0],
          kernel[1],  stride[0],  stride[1],   padding[0],  padding[1],
          dilation[0], dilation[1], static_cast<dmcp::DType>(dtype)};
}

void gather_windows_cpu(const std::array<int64_t, 4>& shape, Pair kernel, Pair stride, Pair padding,
                        Pair dilation, int dtype, Address images, int64_t pitch, Address matrix) {
  dmcp::cpu::gather_windows(windows_of(shape, kernel, stride, padding, dilation, dtype),
                            input(images, pitch), at<void>(matrix));
}

void scatter_windows_cpu(const std::array<int64_t, 4>& shape, Pair kernel, Pair stride,
                         Pair padding, Pair dilation, int dtype, Address matrix, Address images) {
  dmcp::cpu::scatter_windows(windows_of(shape, kernel, stride, padding, dilation, dtype),
                             at<const void>(matrix), at<void>(images));
}

#ifdef DMCP_WITH_CUDA
cudaStream_t stream_at(Address stream) { return reinterpret_cast<cudaStream_t>(stream); }

void retain_cuda(Address alpha, Address offsets, Address q, int64_t chains, int64_t total,
                 int itemsize, Address stream) {
  with_real(itemsize, [&](auto zero) {
    using T = decltype(zero);
    dmcp::cuda::retain(at<const T>(alpha), at<const int32_t>(offsets), at<T>(q), chains, total,
                       stream_at(stream));
  });
}

void retain_backward_cuda(Address grad_q, Address alpha, Address q, Address offsets,
                          Address grad_alpha, int64_t chains, int64_t total, int itemsize,
                          Address stream) {
  with_real(itemsize, [&](auto zero) {
    using T = decltype(zero);
    dmcp::cuda::retain_backward(at<const T>(grad_q), at<const T>(alpha), at<const T>(q),
                                at<const int32_t>(offsets), at<T>(grad_alpha), chains, total,
                                stream_at(stream));
  });
}

void expected_cost_cuda(Address alpha, Address offsets, Address ends, Address coefficients,
                        Address q, Address scale, Address moments, Address cost, Address variance,
                        Address saved, int64_t units, int64_t groups, int64_t channels,
                        int64_t metrics, int itemsize, Address stream) {
  with_real(itemsize, [&](auto zero) {
    using T = decltype(zero);
    dmcp::cuda::expected_cost(
        cost_table(offsets, ends, coefficients, units, groups, channels, metrics),
        at<const T>(alpha), expected_cost_at<T>(q, scale, moments, cost, variance, saved),
        stream_at(stream));
  });
}

void expected_cost_backward_cuda(Address grad_q, Address grad_scale, Address grad_moments,
                                 Address grad_cost, Address grad_variance, Address saved,
                                 Address offsets, Address ends, Address grad_alpha, int64_t units,
                                 int64_t groups, int64_t channels, int64_t metrics, int itemsize,
                                 Address stream) {
  with_real(itemsize, [&](auto zero) {
    using T = decltype(zero);
    dmcp::cuda::expected_cost_backward(
        cost_table(offsets, ends, 0, units, groups, channels, metrics),
        expected_cost_grad_at<T>(grad_q, grad_scale, grad_moments, grad_cost, grad_variance),
        at<const double>(saved), at<T>(grad_alpha), stream_at(stream));
  });
}

int64_t norm_workspace_cuda(int64_t batch, int64_t channels, int64_t pixels, bool channels_last,
                            int dtype) {
  return dmcp::cuda::norm_workspace(shape_of(batch, channels, pixels, channels_last, dtype));
}

void norm_stats_cuda(int64_t batch, int64_t channels, int64_t pixels, bool channels_last, int dtype,
                     Address x, int64_t x_pitch, Address mean, Address var, Address running_mean,
                     Address running_var, double momentum, Address workspace, Address stream) {
  dmcp::cuda::norm_stats(shape_of(batch, channels, pixels, channels_last, dtype), input(x, x_pitch),
                         at<void>(mean), at<void>(var), at<void>(running_mean),
                         at<void>(running_var), momentum, at<void>(workspace), stream_at(stream));
}

void norm_act_cuda(int64_t batch, int64_t channels, int64_t pixels, bool channels_last, int dtype,
                   Address mean, Address var, Address weight, Address bias, Address scale,
                   double eps, int act, int residual_kind, Address x, int64_t x_pitch,
                   Address residual, int64_t residual_pitch, Address y, int64_t y_pitch,
                   Address stream) {
  dmcp::cuda::norm_act(shape_of(batch, channels, pixels, channels_last, dtype),
                       affine_of(mean, var, weight, bias, scale, eps), static_cast<dmcp::Act>(act),
                       static_cast<dmcp::Residual>(residual_kind), input(x, x_pitch),
                       input(residual, residual_pitch), output(y, y_pitch), stream_at(stream));
}

void norm_act_sums_cuda(int64_t batch, int64_t channels, int64_t pixels, bool channels_last,
                        int dtype, Address mean, Address var, Address weight, Address bias,
                        Address scale, double eps, int act, Address grad, int64_t grad_pitch,
                        Address x, int64_t x_pitch, Address residual, int64_t residual_pitch,
                        Address grad_residual, int64_t grad_residual_pitch, Address sums,
                        Address workspace, Address stream) {
  dmcp::cuda::norm_act_sums(shape_of(batch, channels, pixels, channels_last, dtype),
                            affine_of(mean, var, weight, bias, scale, eps),
                            static_cast<dmcp::Act>(act), input(grad, grad_pitch), input(x, x_pitch),
                            input(residual, residual_pitch),
                            output(grad_residual, grad_residual_pitch), at<void>(sums),
                            at<void>(workspace), stream_at(stream));
}

void norm_act_grad_cuda(int64_t batch, int64_t channels, int64_t pixels, bool channels_last,
                        int dtype, Address mean, Address var, Address weight, Address bias,
                        Address scale, double eps, int act, Address sums, double count,
                        Address grad, int64_t grad_pitch, Address x, int64_t x_pitch,
                        Address grad_x, int64_t grad_x_pitch, Address stream) {
  dmcp::cuda::norm_act_grad(shape_of(batch, channels, pixels, channels_last, dtype),
                            affine_of(mean, var, weight, bias, scale, eps),
                            static_cast<dmcp::Act>(act), at<const void>(sums), count,
                            input(grad, grad_pitch), input(x, x_pitch),
                            output(grad_x, grad_x_pitch), stream_at(stream));
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("retain_cpu", &retain_cpu, no_gil);
  m.def("retain_backward_cpu", &retain_backward_cpu, no_gil);
  m.def("expected_cost_cpu", &expected_cost_cpu, no_gil);
  m.def("expected_cost_backward_cpu", &expected_cost_backward_cpu, no_gil);
  m.def("cpu_isas", &dmcp::cpu::isas);
  m.def("cpu_kernels", [] {
    return std::make_pair(reinterpret_cast<Address>(&dmcp::cpu::table()), dmcp::cpu::kTableVersion);
  });
  m.def("norm_stats_cpu", &norm_stats_cpu, no_gil);
  m.def("norm_act_cpu", &norm_act_cpu, no_gil);
  m.def("norm_act_sums_cpu", &norm_act_sums_cpu, no_gil);
  m.def("norm_act_grad_cpu", &norm_act_grad_cpu, no_gil);
  m.def("norm_act_train_cpu", &norm_act_train_cpu, no_gil);
  m.def("norm_act_train_backward_cpu", &norm_act_train_backward_cpu, no_gil);
  m.def("depthwise_cpu", &depthwise_cpu, no_gil);
  m.def("depthwise_grad_input_cpu", &depthwise_grad_input_cpu, no_gil);
  m.def("depthwise_grad_weight_cpu", &depthwise_grad_weight_cpu, no_gil);
  m.def("gather_windows_cpu", &gather_windows_cpu, no_gil);
  m.def("scatter_windows_cpu", &scatter_windows_cpu, no_gil);
  m.def("pointwise_cpu", &pointwise_cpu, no_gil);
  m.def("pointwise_grad_input_cpu", &pointwise_grad_input_cpu, no_gil);
  m.def("pointwise_grad_weight_cpu", &pointwise_grad_weight_cpu, no_gil);
#ifdef DMCP_WITH_CUDA
  m.def("retain_cuda", &retain_cuda, no_gil);
  m.def("retain_backward_cuda", &retain_backward_cuda, no_gil);
  m.def("expected_cost_cuda", &expected_cost_cuda, no_gil);
  m.def("expected_cost_backward_cuda", &expected_cost_backward_cuda, no_gil);
  m.def("norm_workspace_cuda", &norm_workspace_cuda, no_gil);
  m.def("norm_stats_cuda", &norm_stats_cuda, no_gil);
  m.def("norm_act_cuda", &norm_act_cuda, no_gil);
  m.def("norm_act_sums_cuda", &norm_act_sums_cuda, no_gil);
  m.def("norm_act_grad_cuda", &norm_act_grad_cuda, no_gil);
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}
