#pragma once

#include "common/expected_cost.h"

namespace dmcp::cpu {

// Writes everything that `out` points to. T is float or double. Throws std::invalid_argument when
// the table does not describe arrays of its own sizes.
template <typename T>
void expected_cost(const CostTable& table, const T* alpha, const ExpectedCost<T>& out);

// grad_alpha[k] = stop[k] * sum of q[j] * g[j] over the chain's groups j >= k, where g[j] is the
// derivative with respect to q[j]. The coefficients of the table are not read.
template <typename T>
void expected_cost_backward(const CostTable& table, const ExpectedCostGrad<T>& grad,
                            const double* saved, T* grad_alpha);

}  // namespace dmcp::cpu
