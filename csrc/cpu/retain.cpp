#include "cpu/retain.h"

#include <stdexcept>
#include <string>

#include "common/retain.h"

namespace dmcp::cpu {
namespace {

// Below this many positions a parallel region costs more than the work in it.
constexpr int64_t kParallelTotal = 16384;

void check_offsets(const int32_t* offsets, int64_t chains, int64_t total) {
  bool valid = offsets[0] == 0 && offsets[chains] == total;
  for (int64_t u = 0; u < chains; ++u) valid = valid && offsets[u] <= offsets[u + 1];
  if (!valid)
    throw std::invalid_argument("offsets must ascend from 0 to the length of alpha, " +
                                std::to_string(total));
}

}  // namespace

template <typename T>
void retain(const T* alpha, const int32_t* offsets, T* q, int64_t chains, int64_t total) {
  check_offsets(offsets, chains, total);
#pragma omp parallel for schedule(static) if (total >= kParallelTotal)
  for (int64_t u = 0; u < chains; ++u) {
    double product = 1.0;
    for (int64_t k = offsets[u]; k < offsets[u + 1]; ++k) {
      product *= transition(alpha[k]);
      q[k] = static_cast<T>(product);
    }
  }
}

template <typename T>
void retain_backward(const T* grad_q, const T* alpha, const T* q, const int32_t* offsets,
                     T* grad_alpha, int64_t chains, int64_t total) {
  check_offsets(offsets, chains, total);
#pragma omp parallel for schedule(static) if (total >= kParallelTotal)
  for (int64_t u = 0; u < chains; ++u) {
    double sum = 0.0;
    for (int64_t k = int64_t{offsets[u + 1]} - 1; k >= offsets[u]; --k) {
      sum += static_cast<double>(q[k]) * grad_q[k];
      grad_alpha[k] = static_cast<T>(stop(alpha[k]) * sum);
    }
  }
}

template void retain(const float*, const int32_t*, float*, int64_t, int64_t);
template void retain(const double*, const int32_t*, double*, int64_t, int64_t);
template void retain_backward(const float*, const float*, const float*, const int32_t*, float*,
                              int64_t, int64_t);
template void retain_backward(const double*, const double*, const double*, const int32_t*, double*,
                              int64_t, int64_t);

}  // namespace dmcp::cpu
