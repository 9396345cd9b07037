#pragma once

#include <cstdint>

namespace dmcp::cpu {

// Chain u is the positions offsets[u] <= k < offsets[u + 1] of the arrays of length `total`;
// `offsets` has chains + 1 entries. T is float or double. Throws std::invalid_argument when the
// offsets do not partition the arrays.

// q[k] = product of transition(alpha[j]) over the chain's positions j <= k.
template <typename T>
void retain(const T* alpha, const int32_t* offsets, T* q, int64_t chains, int64_t total);

// grad_alpha[k] = stop(alpha[k]) * sum of q[j] * grad_q[j] over the chain's positions j >= k.
template <typename T>
void retain_backward(const T* grad_q, const T* alpha, const T* q, const int32_t* offsets,
                     T* grad_alpha, int64_t chains, int64_t total);

}  // namespace dmcp::cpu
