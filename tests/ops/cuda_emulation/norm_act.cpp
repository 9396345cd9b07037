// csrc/cuda/norm_act.cu for the CPU, with entries for ctypes.
#include "cuda/launch.h"
// After it, because that declares what CUDA would.
#include "cuda/norm_act.cu"

#include <utility>

using dmcp::Act;
using dmcp::Affine;
using dmcp::DType;
using dmcp::Pitched;
using dmcp::Residual;
using dmcp::Shape;

using In = const void*;

extern "C" {

void set_emulation(int64_t multiprocessors, int64_t backwards) {
  dmcp::emulation::multiprocessors = static_cast<int>(multiprocessors);
  dmcp::emulation::backwards = backwards != 0;
}

// What the last calls did that a device would not have done; nullptr if nothing.
const char* take_failure() { return std::exchange(dmcp::emulation::failure, nullptr); }

int64_t norm_workspace(int64_t batch, int64_t channels, int64_t pixels, int64_t last,
                       int64_t dtype) {
  return dmcp::cuda::norm_workspace({batch, channels, pixels, last != 0, DType(dtype)});
}

void norm_stats(int64_t batch, int64_t channels, int64_t pixels, int64_t last, int64_t dtype, In x,
                int64_t x_pitch, void* mean, void* var, void* running_mean, void* running_var,
                double momentum, void* workspace) {
  const Shape shape = {batch, channels, pixels, last != 0, DType(dtype)};
  dmcp::cuda::norm_stats(shape, {x, x_pitch}, mean, var, running_mean, running_var, momentum,
                         workspace, nullptr);
}

void norm_act(int64_t batch, int64_t channels, int64_t pixels, int64_t last, int64_t dtype, In mean,
              In var, In weight, In bias, In scale, double eps, int64_t act, int64_t kind, In x,
              int64_t x_pitch, In residual, int64_t residual_pitch, void* y, int64_t y_pitch) {
  const Shape shape = {batch, channels, pixels, last != 0, DType(dtype)};
  const Affine affine = {mean, var, weight, bias, scale, eps};
  dmcp::cuda::norm_act(shape, affine, Act(act), Residual(kind), {x, x_pitch},
                       {residual, residual_pitch}, {y, y_pitch}, nullptr);
}

void norm_act_sums(int64_t batch, int64_t channels, int64_t pixels, int64_t last, int64_t dtype,
                   In mean, In var, In weight, In bias, In scale, double eps, int64_t act, In grad,
                   int64_t grad_pitch, In x, int64_t x_pitch, In residual, int64_t residual_pitch,
                   void* grad_residual, int64_t grad_residual_pitch, void* sums, void* workspace) {
  const Shape shape = {batch, channels, pixels, last != 0, DType(dtype)};
  const Affine affine = {mean, var, weight, bias, scale, eps};
  dmcp::cuda::norm_act_sums(shape, affine, Act(act), {grad, grad_pitch}, {x, x_pitch},
                            {residual, residual_pitch}, {grad_residual, grad_residual_pitch}, sums,
                            workspace, nullptr);
}

void norm_act_grad(int64_t batch, int64_t channels, int64_t pixels, int64_t last, int64_t dtype,
                   In mean, In var, In weight, In bias, In scale, double eps, int64_t act, In sums,
                   double count, In grad, int64_t grad_pitch, In x, int64_t x_pitch, void* grad_x,
                   int64_t grad_x_pitch) {
  const Shape shape = {batch, channels, pixels, last != 0, DType(dtype)};
  const Affine affine = {mean, var, weight, bias, scale, eps};
  dmcp::cuda::norm_act_grad(shape, affine, Act(act), sums, count, {grad, grad_pitch}, {x, x_pitch},
                            {grad_x, grad_x_pitch}, nullptr);
}
}
