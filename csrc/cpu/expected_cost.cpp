#include "cpu/expected_cost.h"

#include <algorithm>
#include <stdexcept>

namespace dmcp::cpu {
namespace {

void check_table(const CostTable& table) {
  bool valid = table.offsets[0] == 0 && table.offsets[table.units] == table.groups;
  for (int64_t u = 0; u < table.units; ++u)
    valid = valid && table.offsets[u] <= table.offsets[u + 1];
  int32_t last = 0;
  for (int64_t i = 0; i < table.groups + table.units; ++i) {
    valid = valid && last <= table.ends[i];
    last = table.ends[i];
  }
  if (!valid || last != table.channels)
    throw std::invalid_argument(
        "offsets must ascend from 0 to the length of alpha, ends to the number of channels");
}

// q and stop of one chain, its channels' scales and its width's moments about 0.
template <typename T>
void walk_chain(const CostTable& table, int64_t u, const T* alpha, const ExpectedCost<T>& out) {
  const Choices unit = choices_of(table, u);
  double* saved_q = saved_row(out.saved, table, 0) + unit.begin;
  double* saved_stop = saved_row(out.saved, table, 1) + unit.begin;
  double moments[kMoments] = {};
  double lower = width_at(unit, 0), product = 1.0;
  add_power_steps(0.0, lower, 1.0, moments);
  std::fill(out.scale + unit.first, out.scale + unit.ends[0], T{1});
  for (int64_t k = 0; k < unit.groups; ++k) {
    const Transition transition = transition_of(alpha[unit.begin + k]);
    product *= transition.keep;
    saved_q[k] = product;
    saved_stop[k] = transition.stop;
    const T q = static_cast<T>(product);
    out.q[unit.begin + k] = q;
    std::fill(out.scale + unit.ends[k], out.scale + unit.ends[k + 1], q);
    const double upper = width_at(unit, k + 1);
    add_power_steps(lower, upper, product, moments);
    lower = upper;
  }
  for (int j = 0; j < kMoments; ++j) out.moments[j * table.units + u] = moments[j];
}

// Calls visit(P, d) for every choice of a unit, d counted from `mean`.
template <typename Visit>
void for_each_choice(const CostTable& table, const Choices& unit, double* saved, double mean,
                     Visit visit) {
  const double* q = saved_row(saved, table, 0) + unit.begin;
  const double* stop = saved_row(saved, table, 1) + unit.begin;
  double reached = 1.0;
  for (int64_t k = 0; k < unit.groups; ++k) {
    visit(reached * stop[k], width_at(unit, k) - mean);
    reached = q[k];
  }
  visit(reached, width_at(unit, unit.groups) - mean);
}

void central_moments(const CostTable& table, int64_t u, double mean, double* saved) {
  double v = 0.0, third = 0.0;
  for_each_choice(table, choices_of(table, u), saved, mean, [&](double probability, double d) {
    const double square = probability * d * d;
    v += square;
    third += square * d;
  });
  saved_row(saved, table, 0)[table.groups + u] = v;
  saved_row(saved, table, 1)[table.groups + u] = third;
}

// Mean and variance of one cost, and their derivatives with respect to q.
template <typename T>
void cost_of(const CostTable& table, int64_t metric, const ExpectedCost<T>& out) {
  const int64_t units = table.units, order = 1 + units;
  const double* coefficients = table.coefficients + metric * order * order;
  const double* m = out.moments;
  const double* v = saved_row(out.saved, table, 0) + table.groups;
  const double* third = saved_row(out.saved, table, 1) + table.groups;
  double* mean_slopes = saved_row(out.saved, table, 2 + metric);
  double* variance_slopes = saved_row(out.saved, table, 2 + table.metrics + metric);
  double* s = mean_slopes + table.groups;
  double* h = variance_slopes + table.groups;

  double mean = coefficients[0], variance = 0.0;
  for (int64_t u = 0; u < units; ++u) {
    const double* row = coefficients + (1 + u) * order;
    const double square = row[1 + u];
    double slope = row[0] + square * m[u];
#pragma omp simd reduction(+ : slope)
    for (int64_t j = 0; j < units; ++j) slope += row[1 + j] * m[j];
    s[u] = slope;
    h[u] = 2.0 * (slope * v[u] + square * third[u]);
    mean += 0.5 * m[u] * (row[0] + slope) + square * v[u];
  }
  for (int64_t u = 0; u < units; ++u) {
    const double* row = coefficients + (1 + u) * order + 1;
    double r = 0.0, t = 0.0;
    const auto add_units = [&](int64_t begin, int64_t end) {
#pragma omp simd reduction(+ : r, t)
      for (int64_t j = begin; j < end; ++j) {
        r += row[j] * row[j] * v[j];
        t += row[j] * h[j];
      }
    };
    add_units(0, u);
    add_units(u + 1, units);
    variance += 0.5 * v[u] * r;
    const Choices unit = choices_of(table, u);
    const Deviation f = {s[u], row[u], v[u]};
    for_each_choice(table, unit, out.saved, m[u], [&](double probability, double d) {
      const double deviation = deviation_at(f, d);
      variance += probability * deviation * deviation;
    });
    for (int64_t k = 0; k < unit.groups; ++k) {
      const double lower = width_at(unit, k) - m[u], upper = width_at(unit, k + 1) - m[u];
      const CostSlopes slopes = cost_slopes(f, r, t, lower, upper);
      mean_slopes[unit.begin + k] = slopes.mean;
      variance_slopes[unit.begin + k] = slopes.variance;
    }
  }
  out.cost[metric] = mean;
  out.variance[metric] = variance;
}

template <typename T>
double sum(const T* values, int64_t begin, int64_t end) {
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = begin; i < end; ++i) total += values[i];
  return total;
}

}  // namespace

template <typename T>
void expected_cost(const CostTable& table, const T* alpha, const ExpectedCost<T>& out) {
  check_table(table);
  for (int64_t u = 0; u < table.units; ++u) {
    walk_chain(table, u, alpha, out);
    central_moments(table, u, out.moments[u], out.saved);
  }
  for (int64_t metric = 0; metric < table.metrics; ++metric) cost_of(table, metric, out);
}

template <typename T>
void expected_cost_backward(const CostTable& table, const ExpectedCostGrad<T>& grad,
                            const double* saved, T* grad_alpha) {
  check_table(table);
  const int64_t pitch = table.groups + table.units;
  const double *q = saved, *stop = saved + pitch;
  const double* mean_slopes = saved + 2 * pitch;
  const double* variance_slopes = mean_slopes + table.metrics * pitch;
  for (int64_t u = 0; u < table.units; ++u) {
    const Choices unit = choices_of(table, u);
    double tail = 0.0;
    for (int64_t i = unit.groups; i > 0; --i) {
      const int64_t k = unit.begin + i - 1;
      double g = grad.q ? grad.q[k] : 0.0;
      if (grad.scale) g += sum(grad.scale, unit.ends[i - 1], unit.ends[i]);
      if (grad.moments) {
        double steps[kMoments] = {};
        add_power_steps(width_at(unit, i - 1), width_at(unit, i), 1.0, steps);
        for (int j = 0; j < kMoments; ++j) g += grad.moments[j * table.units + u] * steps[j];
      }
      for (int64_t b = 0; b < table.metrics; ++b) {
        if (grad.cost) g += grad.cost[b] * mean_slopes[b * pitch + k];
        if (grad.variance) g += grad.variance[b] * variance_slopes[b * pitch + k];
      }
      tail += q[k] * g;
      grad_alpha[k] = static_cast<T>(stop[k] * tail);
    }
  }
}

template void expected_cost(const CostTable&, const float*, const ExpectedCost<float>&);
template void expected_cost(const CostTable&, const double*, const ExpectedCost<double>&);
template void expected_cost_backward(const CostTable&, const ExpectedCostGrad<float>&,
                                     const double*, float*);
template void expected_cost_backward(const CostTable&, const ExpectedCostGrad<double>&,
                                     const double*, double*);

}  // namespace dmcp::cpu
