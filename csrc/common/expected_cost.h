// The arithmetic of the expected cost of independent Markov chains, shared by the CPU and the CUDA
// kernels.
//
// With c_0 = 1, the cost of the widths c is the sum over i <= j of K_ij c_i c_j. Unit u takes the
// widths w_0 < w_1 < ... with the probabilities P_k = q_k - q_{k+1} = q_k stop_{k+1}. Let m = E[c],
// d = c - m, v = E[d^2], and s the gradient of the cost at m. Then
//
//   E[cost]   = cost(m) + sum over u of K_uu v_u            cost(m) = (s_0 + sum of s_u m_u) / 2
//   Var[cost] = sum over u of E[f_u(d_u)^2] + sum over u < j of K_uj^2 v_u v_j
//   f_u(d)    = s_u d + K_uu (d^2 - v_u)
//
// No term of the variance is negative, so none cancels another where chains are almost certain. A
// change of q_k moves probability between the two ends of group k, so every derivative with respect
// to it is a difference between these ends:
//
//   of the mean:      s_u d + K_uu d^2
//   of the variance:  f_u(d)^2 + r_u d^2 + t_u d
//
// with r_u = sum over j != u of K_uj^2 v_j, t_u = sum over j != u of K_uj h_j and
// h_j = 2 E[d_j f_j(d_j)] = 2 (s_j v_j + K_jj E[d_j^3]).
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace dmcp {

// What expected_cost knows about a network besides alpha.
//
// offsets [units + 1]: chain u is the groups offsets[u] <= k < offsets[u + 1].
// ends [groups + units]: of every choice, where its channels end when those of all units stand one
// after the other. The choices of unit u begin at offsets[u] + u, with its base.
// coefficients [metrics, 1 + units, 1 + units]: K, symmetric, K_ij = K_ji being the same number.
struct CostTable {
  const int32_t* offsets;
  const int32_t* ends;
  const double* coefficients;
  int64_t units, groups, channels, metrics;
};

// q [groups], scale [channels], moments [4, units], cost and variance [metrics], and `saved`, what
// the backward needs: see saved_row.
template <typename T>
struct ExpectedCost {
  T *q, *scale;
  double *moments, *cost, *variance, *saved;
};

// The gradients of the outputs of the same names; nullptr stands for zeros.
template <typename T>
struct ExpectedCostGrad {
  const T *q, *scale;
  const double *moments, *cost, *variance;
};

constexpr int kMoments = 4;

// Rows of `saved` [2 + 2 metrics, groups + units]; the columns of the groups come first.
//   row              groups             units
//   0                q                  v
//   1                stop               E[d^3]
//   2 + b            d cost_b / dq      s
//   2 + metrics + b  d variance_b / dq  h
DMCP_HOST_DEVICE double* saved_row(double* saved, const CostTable& table, int64_t row) {
  return saved + row * (table.groups + table.units);
}

// p = sigmoid(alpha), and 1 - p without the cancellation of that subtraction.
struct Transition {
  double keep, stop;
};

// exp() may overflow to infinity: keep is then exactly 0.
DMCP_HOST_DEVICE Transition transition_of(double alpha) {
  const double e = std::exp(-alpha);
  const double keep = 1.0 / (1.0 + e);
  return {keep, alpha > 0.0 ? e * keep : 1.0 - keep};
}

// One unit's choices: `first` is its first channel, `ends` are its own.
struct Choices {
  int64_t begin, groups;
  const int32_t* ends;
  int32_t first;
};

DMCP_HOST_DEVICE Choices choices_of(const CostTable& table, int64_t u) {
  const int64_t begin = table.offsets[u];
  const int32_t* ends = table.ends + begin + u;
  return {begin, table.offsets[u + 1] - begin, ends, u == 0 ? 0 : ends[-1]};
}

DMCP_HOST_DEVICE double width_at(const Choices& unit, int64_t choice) {
  return unit.ends[choice] - unit.first;
}

// Adds weight (upper^j - lower^j), j = 1 ... 4.
DMCP_HOST_DEVICE void add_power_steps(double lower, double upper, double weight,
                                      double moments[kMoments]) {
  double low = 1.0, high = 1.0;
  for (int j = 0; j < kMoments; ++j) {
    low *= lower;
    high *= upper;
    moments[j] += weight * (high - low);
  }
}

// The deviation of the cost that comes from one unit alone: s, K_uu and v of that unit.
struct Deviation {
  double slope, square, v;
};

DMCP_HOST_DEVICE double deviation_at(const Deviation& f, double d) {
  return f.slope * d + f.square * (d * d - f.v);
}

// Derivatives of a cost's mean and variance with respect to the retain probability of the group
// between the widths m + lower and m + upper.
struct CostSlopes {
  double mean, variance;
};

DMCP_HOST_DEVICE CostSlopes cost_slopes(const Deviation& f, double r, double t, double lower,
                                        double upper) {
  const double step = upper - lower, sum = upper + lower;
  const double mean = step * (f.slope + f.square * sum);
  return {mean, mean * (deviation_at(f, lower) + deviation_at(f, upper)) + step * (r * sum + t)};
}

}  // namespace dmcp
