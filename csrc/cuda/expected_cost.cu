#include "cuda/expected_cost.h"

#include "cuda/launch.h"

namespace dmcp::cuda {
namespace {

// The forward is one block, because every cost needs every unit: one warp walks a chain, or sums a
// row of coefficients, and the block meets in between. Sums have a fixed order.
constexpr int kWarp = 32;
constexpr int kForwardWarps = 16;
constexpr unsigned kAllLanes = 0xffffffffu;

// The backward is one block per unit: the units need nothing from each other any more.
constexpr int kBackwardWarps = 4;

__device__ double sum_lanes(double value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

template <typename T>
__device__ void walk_chain(const CostTable& table, int64_t u, const T* alpha,
                           const ExpectedCost<T>& out) {
  const int lane = threadIdx.x;
  const Choices unit = choices_of(table, u);
  double* saved_q = saved_row(out.saved, table, 0) + unit.begin;
  double* saved_stop = saved_row(out.saved, table, 1) + unit.begin;
  double moments[kMoments] = {};
  if (lane == 0) add_power_steps(0.0, width_at(unit, 0), 1.0, moments);
  for (int32_t c = unit.first + lane; c < unit.ends[0]; c += kWarp) out.scale[c] = T{1};
  double before = 1.0;  // the product of all earlier tiles
  for (int64_t tile = 0; tile < unit.groups; tile += kWarp) {
    const int64_t k = tile + lane;
    const bool inside = k < unit.groups;
    const Transition transition = transition_of(inside ? double{alpha[unit.begin + k]} : 0.0);
    double product = inside ? transition.keep : 1.0;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const double left = __shfl_up_sync(kAllLanes, product, distance);
      if (lane >= distance) product *= left;
    }
    product *= before;
    before = __shfl_sync(kAllLanes, product, kWarp - 1);
    if (inside) {
      out.q[unit.begin + k] = static_cast<T>(product);
      saved_q[k] = product;
      saved_stop[k] = transition.stop;
      add_power_steps(width_at(unit, k), width_at(unit, k + 1), product, moments);
    }
    for (int i = 0; i < kWarp && tile + i < unit.groups; ++i) {
      const T q = static_cast<T>(__shfl_sync(kAllLanes, product, i));
      const int32_t end = unit.ends[tile + i + 1];
      for (int32_t c = unit.ends[tile + i] + lane; c < end; c += kWarp) out.scale[c] = q;
    }
  }
  for (int j = 0; j < kMoments; ++j) {
    const double moment = sum_lanes(moments[j]);
    if (lane == 0) out.moments[j * table.units + u] = moment;
  }
  __syncwarp();  // the lanes read each other's q and stop next
}

// The probability of one choice of a unit.
__device__ double probability_of(const CostTable& table, const Choices& unit, double* saved,
                                 int64_t choice) {
  const double* q = saved_row(saved, table, 0) + unit.begin;
  const double* stop = saved_row(saved, table, 1) + unit.begin;
  return (choice > 0 ? q[choice - 1] : 1.0) * (choice < unit.groups ? stop[choice] : 1.0);
}

__device__ void central_moments(const CostTable& table, int64_t u, double mean, double* saved) {
  const int lane = threadIdx.x;
  const Choices unit = choices_of(table, u);
  double v = 0.0, third = 0.0;
  for (int64_t i = lane; i <= unit.groups; i += kWarp) {
    const double d = width_at(unit, i) - mean;
    const double square = probability_of(table, unit, saved, i) * d * d;
    v += square;
    third += square * d;
  }
  v = sum_lanes(v);
  third = sum_lanes(third);
  if (lane == 0) {
    saved_row(saved, table, 0)[table.groups + u] = v;
    saved_row(saved, table, 1)[table.groups + u] = third;
  }
}

// s and h of one unit; returns its part of the mean.
template <typename T>
__device__ double mean_of(const CostTable& table, int64_t metric, int64_t u,
                          const ExpectedCost<T>& out) {
  const int64_t order = 1 + table.units;
  const double* row = table.coefficients + (metric * order + 1 + u) * order;
  const double* m = out.moments;
  const double v = saved_row(out.saved, table, 0)[table.groups + u];
  const double third = saved_row(out.saved, table, 1)[table.groups + u];
  const double square = row[1 + u];
  double slope = 0.0;
  for (int64_t j = threadIdx.x; j < table.units; j += kWarp) slope += row[1 + j] * m[j];
  slope = sum_lanes(slope) + row[0] + square * m[u];
  if (threadIdx.x == 0) {
    saved_row(out.saved, table, 2 + metric)[table.groups + u] = slope;
    saved_row(out.saved, table, 2 + table.metrics + metric)[table.groups + u] =
        2.0 * (slope * v + square * third);
  }
  return 0.5 * m[u] * (row[0] + slope) + square * v;
}

// The derivatives with respect to the q of one unit; returns its part of the variance.
template <typename T>
__device__ double variance_of(const CostTable& table, int64_t metric, int64_t u,
                              const ExpectedCost<T>& out) {
  const int lane = threadIdx.x;
  const int64_t order = 1 + table.units;
  const double* row = table.coefficients + (metric * order + 1 + u) * order + 1;
  const double* v = saved_row(out.saved, table, 0) + table.groups;
  double* mean_slopes = saved_row(out.saved, table, 2 + metric);
  double* variance_slopes = saved_row(out.saved, table, 2 + table.metrics + metric);
  const double* h = variance_slopes + table.groups;
  double r = 0.0, t = 0.0;
  for (int64_t j = lane; j < table.units; j += kWarp) {
    if (j == u) continue;
    r += row[j] * row[j] * v[j];
    t += row[j] * h[j];
  }
  r = sum_lanes(r);
  t = sum_lanes(t);
  const Choices unit = choices_of(table, u);
  const double mean = out.moments[u];
  const Deviation f = {mean_slopes[table.groups + u], row[u], v[u]};
  double variance = 0.0;
  for (int64_t i = lane; i <= unit.groups; i += kWarp) {
    const double upper = width_at(unit, i) - mean;
    const double deviation = deviation_at(f, upper);
    variance += probability_of(table, unit, out.saved, i) * deviation * deviation;
    if (i == 0) continue;
    const CostSlopes slopes = cost_slopes(f, r, t, width_at(unit, i - 1) - mean, upper);
    mean_slopes[unit.begin + i - 1] = slopes.mean;
    variance_slopes[unit.begin + i - 1] = slopes.variance;
  }
  return sum_lanes(variance) + 0.5 * v[u] * r;
}

template <typename T>
__global__ void __launch_bounds__(kWarp* kForwardWarps)
    expected_cost_kernel(CostTable table, const T* __restrict__ alpha, ExpectedCost<T> out) {
  __shared__ double means[kForwardWarps], variances[kForwardWarps];
  const int warp = threadIdx.y;
  const bool first_thread = threadIdx.x == 0 && warp == 0;
  for (int64_t u = warp; u < table.units; u += kForwardWarps) {
    walk_chain(table, u, alpha, out);
    central_moments(table, u, out.moments[u], out.saved);
  }
  for (int64_t metric = 0; metric < table.metrics; ++metric) {
    __syncthreads();  // m and v of every unit; thread 0 is done with the last metric's sums
    double mean = 0.0, variance = 0.0;
    for (int64_t u = warp; u < table.units; u += kForwardWarps)
      mean += mean_of(table, metric, u, out);
    __syncthreads();  // h of every unit
    for (int64_t u = warp; u < table.units; u += kForwardWarps)
      variance += variance_of(table, metric, u, out);
    if (threadIdx.x == 0) {
      means[warp] = mean;
      variances[warp] = variance;
    }
    __syncthreads();
    if (!first_thread) continue;
    mean = table.coefficients[metric * (1 + table.units) * (1 + table.units)];
    variance = 0.0;
    for (int i = 0; i < kForwardWarps; ++i) {
      mean += means[i];
      variance += variances[i];
    }
    out.cost[metric] = mean;
    out.variance[metric] = variance;
  }
}

// The derivative with respect to the retain probability of group i - 1, but for that of its scales.
template <typename T>
__device__ double group_gradient(const CostTable& table, int64_t u, const Choices& unit, int64_t i,
                                 const ExpectedCostGrad<T>& grad, const double* saved) {
  const int64_t pitch = table.groups + table.units, k = unit.begin + i - 1;
  const double* mean_slopes = saved + 2 * pitch;
  const double* variance_slopes = mean_slopes + table.metrics * pitch;
  double g = grad.q ? double{grad.q[k]} : 0.0;
  if (grad.moments) {
    double steps[kMoments] = {};
    add_power_steps(width_at(unit, i - 1), width_at(unit, i), 1.0, steps);
    for (int j = 0; j < kMoments; ++j) g += grad.moments[j * table.units + u] * steps[j];
  }
  for (int64_t b = 0; b < table.metrics; ++b) {
    if (grad.cost) g += grad.cost[b] * mean_slopes[b * pitch + k];
    if (grad.variance) g += grad.variance[b] * variance_slopes[b * pitch + k];
  }
  return g;
}

template <typename T>
__global__ void __launch_bounds__(kWarp* kBackwardWarps, 1)
    expected_cost_backward_kernel(CostTable table, ExpectedCostGrad<T> grad,
                                  const double* __restrict__ saved, T* __restrict__ grad_alpha) {
  __shared__ double scales[kWarp];  // per group of the tile, the sum over its channels
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int64_t u = blockIdx.x, pitch = table.groups + table.units;
  const Choices unit = choices_of(table, u);
  double after = 0.0;  // the sum of all later tiles
  for (int64_t tile = unit.groups; tile > 0; tile -= kWarp) {
    for (int slot = warp; slot < kWarp; slot += kBackwardWarps) {
      const int64_t i = tile - kWarp + 1 + slot;
      double total = 0.0;
      if (grad.scale && i > 0) {
        for (int32_t c = unit.ends[i - 1] + lane; c < unit.ends[i]; c += kWarp)
          total += grad.scale[c];
        total = sum_lanes(total);
      }
      if (lane == 0) scales[slot] = total;
    }
    __syncthreads();
    if (warp == 0) {
      const int64_t i = tile - kWarp + 1 + lane, k = unit.begin + i - 1;
      double tail = 0.0;
      if (i > 0) tail = saved[k] * (scales[lane] + group_gradient(table, u, unit, i, grad, saved));
      for (int distance = 1; distance < kWarp; distance *= 2) {
        const double right = __shfl_down_sync(kAllLanes, tail, distance);
        if (lane + distance < kWarp) tail += right;
      }
      tail += after;
      if (i > 0) grad_alpha[k] = static_cast<T>(saved[pitch + k] * tail);
      after = __shfl_sync(kAllLanes, tail, 0);
    }
    __syncthreads();  // warp 0 is done with the sums of this tile
  }
}

}  // namespace

template <typename T>
void expected_cost(const CostTable& table, const T* alpha, const ExpectedCost<T>& out,
                   cudaStream_t stream) {
  const dim3 block(kWarp, kForwardWarps);
  launch("expected_cost", expected_cost_kernel<T>, dim3(1), block, stream, table, alpha, out);
}

template <typename T>
void expected_cost_backward(const CostTable& table, const ExpectedCostGrad<T>& grad,
                            const double* saved, T* grad_alpha, cudaStream_t stream) {
  if (table.units == 0) return;
  const dim3 grid(static_cast<unsigned>(table.units)), block(kWarp, kBackwardWarps);
  launch("expected_cost_backward", expected_cost_backward_kernel<T>, grid, block, stream, table,
         grad, saved, grad_alpha);
}

template void expected_cost(const CostTable&, const float*, const ExpectedCost<float>&,
                            cudaStream_t);
template void expected_cost(const CostTable&, const double*, const ExpectedCost<double>&,
                            cudaStream_t);
template void expected_cost_backward(const CostTable&, const ExpectedCostGrad<float>&,
                                     const double*, float*, cudaStream_t);
template void expected_cost_backward(const CostTable&, const ExpectedCostGrad<double>&,
                                     const double*, double*, cudaStream_t);

}  // namespace dmcp::cuda
