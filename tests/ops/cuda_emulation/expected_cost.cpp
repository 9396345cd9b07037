// csrc/cuda/expected_cost.cu for the CPU, with entries for ctypes.
#include "cuda/launch.h"
// After it, because that declares what CUDA would.
#include "cuda/expected_cost.cu"

using Address = uintptr_t;

namespace {

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
void forward(const dmcp::CostTable& table, Address alpha, const Address* outputs) {
  dmcp::cuda::expected_cost<T>(table, at<const T>(alpha),
                               {at<T>(outputs[0]), at<T>(outputs[1]), at<double>(outputs[2]),
                                at<double>(outputs[3]), at<double>(outputs[4]),
                                at<double>(outputs[5])},
                               nullptr);
}

template <typename T>
void backward(const dmcp::CostTable& table, const Address* grads, Address saved,
              Address grad_alpha) {
  dmcp::cuda::expected_cost_backward<T>(
      table,
      {at<const T>(grads[0]), at<const T>(grads[1]), at<const double>(grads[2]),
       at<const double>(grads[3]), at<const double>(grads[4])},
      at<const double>(saved), at<T>(grad_alpha), nullptr);
}

}  // namespace

extern "C" {

void set_backwards(int64_t backwards) { dmcp::emulation::backwards = backwards != 0; }

void expected_cost(Address alpha, Address offsets, Address ends, Address coefficients, Address q,
                   Address scale, Address moments, Address cost, Address variance, Address saved,
                   int64_t units, int64_t groups, int64_t channels, int64_t metrics,
                   int64_t itemsize) {
  const dmcp::CostTable table = {at<const int32_t>(offsets), at<const int32_t>(ends),
                                 at<const double>(coefficients), units, groups, channels, metrics};
  const Address outputs[] = {q, scale, moments, cost, variance, saved};
  itemsize == 4 ? forward<float>(table, alpha, outputs) : forward<double>(table, alpha, outputs);
}

void expected_cost_backward(Address grad_q, Address grad_scale, Address grad_moments,
                            Address grad_cost, Address grad_variance, Address saved,
                            Address offsets, Address ends, Address grad_alpha, int64_t units,
                            int64_t groups, int64_t channels, int64_t metrics, int64_t itemsize) {
  const dmcp::CostTable table = {at<const int32_t>(offsets), at<const int32_t>(ends), nullptr,
                                 units, groups, channels, metrics};
  const Address grads[] = {grad_q, grad_scale, grad_moments, grad_cost, grad_variance};
  itemsize == 4 ? backward<float>(table, grads, saved, grad_alpha)
                : backward<double>(table, grads, saved, grad_alpha);
}
}
