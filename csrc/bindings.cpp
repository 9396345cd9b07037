// The Python face of the kernels: addresses and streams as integers, sizes in elements, no torch.
// `itemsize` tells float (4) from double (8). Shapes, dtypes and devices are checked in dmcp/ops.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/retain.h"
#ifdef DMCP_WITH_CUDA
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
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("retain_cpu", &retain_cpu, no_gil);
  m.def("retain_backward_cpu", &retain_backward_cpu, no_gil);
#ifdef DMCP_WITH_CUDA
  m.def("retain_cuda", &retain_cuda, no_gil);
  m.def("retain_backward_cuda", &retain_backward_cuda, no_gil);
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}
