// The arithmetic of normalise-activate-mask, shared by the CPU and the CUDA kernels.
//
//   v = weight (x - mean) / sqrt(var + eps) + bias            per channel
//   y = scale act(v) + residual
//   y = act(scale v + residual)                               where the residual comes first
//
// Functions of activations are templates over V, one number or a SIMD vector of them. Whoever uses
// another V than float or double declares exponential(V), and faster versions of others if it has
// them, before it includes this header.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"
#include "common/tensors.h"

namespace dmcp {

enum class Act : int { identity, relu, relu6, hardswish, silu };

enum class Residual : int { none, before, after };

// act(q v) = q act(v) for q >= 0: the scale may be folded into weight and bias.
DMCP_HOST_DEVICE constexpr bool homogeneous(Act act) {
  return act == Act::identity || act == Act::relu;
}

// The activations of one call: [batch, channels, pixels].
struct Shape {
  int64_t batch, channels, pixels;
  bool channels_last;
  DType dtype;

  int64_t count() const { return batch * pixels; }  // values per channel
};

// Per-channel arrays, float (double for DType::float64); nullptr: weight 1, bias 0, scale 1.
struct Affine {
  const void *mean, *var, *weight, *bias, *scale;
  double eps;
};

// What one channel needs to know.
template <typename S>
struct Channel {
  S mean;
  S gain;   // weight / sqrt(var + eps), times the scale where that is folded
  S shift;  // bias, times the scale where that is folded
  S scale;  // of the activation; 1 where it is folded
};

template <typename S>
DMCP_HOST_DEVICE S value_or(const void* array, int64_t c, S otherwise) {
  return array ? static_cast<const S*>(array)[c] : otherwise;
}

template <typename S>
DMCP_HOST_DEVICE S inverse_std(const Affine& affine, int64_t c) {
  return static_cast<S>(
      1.0 / sqrt(static_cast<double>(static_cast<const S*>(affine.var)[c]) + affine.eps));
}

template <typename S>
DMCP_HOST_DEVICE Channel<S> channel_of(const Affine& affine, int64_t c, bool fold) {
  const S scale = value_or<S>(affine.scale, c, 1);
  const S folded = fold ? scale : S(1);
  return {static_cast<const S*>(affine.mean)[c],
          value_or<S>(affine.weight, c, 1) * inverse_std<S>(affine, c) * folded,
          value_or<S>(affine.bias, c, 0) * folded, fold ? S(1) : scale};
}

// Activations. A NaN stays one: comparisons are written so that it takes the branch of u itself.

#ifdef __CUDACC__
DMCP_HOST_DEVICE float exponential(float u) { return expf(u); }
DMCP_HOST_DEVICE double exponential(double u) { return exp(u); }

// Within 2 units of rounding; the exact division takes more instructions than all the rest.
template <typename S>
static __device__ __forceinline__ float sigmoid(float u) {
  return __fdividef(1.0f, 1.0f + expf(-u));
}
#endif

template <typename V, typename S>
DMCP_HOST_DEVICE V at_least(V u, S low) {
  return u < low ? V{} + low : u;
}

template <typename V, typename S>
DMCP_HOST_DEVICE V at_most(V u, S high) {
  return u > high ? V{} + high : u;
}

template <typename S, typename V>
DMCP_HOST_DEVICE V sigmoid(V u) {
  return S(1) / (S(1) + exponential(-u));
}

template <Act act, typename S, typename V>
DMCP_HOST_DEVICE V activate(V u) {
  if constexpr (act == Act::identity) return u;
  if constexpr (act == Act::relu) return at_least(u, S(0));
  if constexpr (act == Act::relu6) return at_most(at_least(u, S(0)), S(6));
  if constexpr (act == Act::hardswish)
    return u * at_most(at_least(u + S(3), S(0)), S(6)) * S(1.0 / 6.0);
  if constexpr (act == Act::silu) return u * sigmoid<S>(u);
}

// g act'(u), with PyTorch's choices at the kinks.
template <Act act, typename S, typename V>
DMCP_HOST_DEVICE V times_slope(V g, V u) {
  if constexpr (act == Act::identity) return g;
  if constexpr (act == Act::relu) return u <= S(0) ? V{} : g;
  if constexpr (act == Act::relu6) {
    const V below = u >= S(6) ? V{} : g;
    return u <= S(0) ? V{} : below;
  }
  if constexpr (act == Act::hardswish) {
    const V inside = g * (u * S(1.0 / 3.0) + S(0.5));
    const V below = u >= S(3) ? g : inside;
    return u <= S(-3) ? V{} : below;
  }
  if constexpr (act == Act::silu) {
    const V s = sigmoid<S>(u);
    return g * (s + u * s * (S(1) - s));
  }
}

// Forward. `residual` is read only where there is one.
template <Act act, Residual kind, typename S, typename V>
DMCP_HOST_DEVICE V norm_act(V x, V mean, V gain, V shift, V scale, V residual) {
  const V v = (x - mean) * gain + shift;
  if constexpr (kind == Residual::before) return activate<act, S>(v + residual);
  const V y = activate<act, S>(v) * scale;
  if constexpr (kind == Residual::after) return y + residual;
  return y;
}

// Backward. With g = dy act'(u), where u is what the activation saw, the sums over a channel are
//   s0 = sum g,  s1 = sum g (x - mean),  s2 = sum dy act(u)
// and the gradients, q the scale and r = 1 / sqrt(var + eps):
//   d bias = q s0,  d weight = q r s1
//   d q = s2, or weight r s1 + bias s0 where the scale is folded
//   dx = weight r (q g - d bias / M - r (x - mean) d weight / M)
// with the two means over the M values of a channel only where mean and var are the batch's.
template <typename V>
struct Terms {
  V s0, s1, s2;
};

// What one value adds to the sums. With a residual (before the activation), s0 is also its
// gradient. s2 is left 0 where the scale is folded.
template <Act act, bool before, typename S, typename V>
DMCP_HOST_DEVICE Terms<V> terms_of(V grad, V x, V mean, V gain, V shift, V residual) {
  const V centred = x - mean;
  V u = centred * gain + shift;
  if constexpr (before) u += residual;
  const V g = times_slope<act, S>(grad, u);
  if constexpr (before || homogeneous(act)) return {g, g * centred, V{}};
  return {g, g * centred, grad * activate<act, S>(u)};
}

template <typename S>
struct Gradients {
  S bias, weight, scale;
};

template <typename S>
DMCP_HOST_DEVICE Gradients<S> gradients_of(const Affine& affine, int64_t c, double s0, double s1,
                                           double s2, bool fold) {
  const double q = value_or<S>(affine.scale, c, 1);
  const double centred = s1 * inverse_std<S>(affine, c);
  const double folded =
      value_or<S>(affine.weight, c, 1) * centred + value_or<S>(affine.bias, c, 0) * s0;
  return {static_cast<S>(q * s0), static_cast<S>(q * centred), static_cast<S>(fold ? folded : s2)};
}

// dx = g by_gradient - constant - (x - mean) by_input
template <typename S>
struct InputGradient {
  S by_gradient, constant, by_input;
};

// `sums` holds d bias and d weight of all channels [>= 2, channels], nullptr where mean and var do
// not depend on x.
template <typename S>
DMCP_HOST_DEVICE InputGradient<S> input_gradient_of(const Affine& affine, const S* sums, int64_t c,
                                                    int64_t channels, double count) {
  const double r = inverse_std<S>(affine, c);
  const double gain = value_or<S>(affine.weight, c, 1) * r;
  const double by_gradient = gain * value_or<S>(affine.scale, c, 1);
  if (!sums) return {static_cast<S>(by_gradient), S(0), S(0)};
  return {static_cast<S>(by_gradient), static_cast<S>(gain * sums[c] / count),
          static_cast<S>(gain * r * sums[channels + c] / count)};
}

template <Act act, typename S, typename V>
DMCP_HOST_DEVICE V grad_input(V grad, V x, V mean, V gain, V shift, V by_gradient, V constant,
                              V by_input) {
  const V centred = x - mean;
  const V g = times_slope<act, S>(grad, centred * gain + shift);
  return g * by_gradient - constant - centred * by_input;
}

// Statistics from sums of d = x - origin over the M values of a channel. The origin, the mean of a
// few values of the channel, keeps s2 / M - (s1 / M)^2 from cancelling.
constexpr int kOriginSamples = 16;

template <typename S>
struct Moments {
  S mean, var;
};

template <typename S>
DMCP_HOST_DEVICE Moments<S> moments_of(double origin, double s1, double s2, double count) {
  const double off = s1 / count;
  const double var = s2 / count - off * off;
  return {static_cast<S>(origin + off), static_cast<S>(var < 0.0 ? 0.0 : var)};
}

// As nn.BatchNorm2d: the running variance is the unbiased one.
template <typename S>
DMCP_HOST_DEVICE void update_running(S* running_mean, S* running_var, int64_t c, Moments<S> batch,
                                     double count, double momentum) {
  const double unbiased = batch.var * (count / (count - 1.0));
  running_mean[c] = static_cast<S>(running_mean[c] * (1.0 - momentum) + batch.mean * momentum);
  running_var[c] = static_cast<S>(running_var[c] * (1.0 - momentum) + unbiased * momentum);
}

}  // namespace dmcp
