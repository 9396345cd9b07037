#include "cuda/retain.h"

#include "common/retain.h"
#include "cuda/launch.h"

namespace dmcp::cuda {
namespace {

// One warp per chain: a chain has about ten positions, so a warp reads it in one go and scans it
// with shuffles. Longer chains go through the warp 32 positions at a time.
constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Chain {
  int64_t begin, end;
};

__device__ Chain chain_of(const int32_t* offsets, int64_t u, int64_t total) {
  const int64_t begin = max(int64_t{offsets[u]}, int64_t{0});
  return {begin, min(int64_t{offsets[u + 1]}, total)};
}

template <typename T>
__global__ void retain_kernel(const T* __restrict__ alpha, const int32_t* __restrict__ offsets,
                              T* __restrict__ q, int64_t chains, int64_t total) {
  const int64_t u = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.y;
  if (u >= chains) return;
  const int lane = threadIdx.x;
  const Chain chain = chain_of(offsets, u, total);
  double before = 1.0;  // the product of all earlier tiles
  for (int64_t tile = chain.begin; tile < chain.end; tile += kWarp) {
    const int64_t k = tile + lane;
    double product = k < chain.end ? transition(alpha[k]) : 1.0;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const double left = __shfl_up_sync(kAllLanes, product, distance);
      if (lane >= distance) product *= left;
    }
    product *= before;
    if (k < chain.end) q[k] = static_cast<T>(product);
    before = __shfl_sync(kAllLanes, product, kWarp - 1);
  }
}

template <typename T>
__global__ void retain_backward_kernel(const T* __restrict__ grad_q, const T* __restrict__ alpha,
                                       const T* __restrict__ q, const int32_t* __restrict__ offsets,
                                       T* __restrict__ grad_alpha, int64_t chains, int64_t total) {
  const int64_t u = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.y;
  if (u >= chains) return;
  const int lane = threadIdx.x;
  const Chain chain = chain_of(offsets, u, total);
  double after = 0.0;  // the sum of all later tiles
  for (int64_t tile = chain.end; tile > chain.begin; tile -= kWarp) {
    const int64_t k = tile - kWarp + lane;
    double sum = k >= chain.begin ? static_cast<double>(q[k]) * grad_q[k] : 0.0;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const double right = __shfl_down_sync(kAllLanes, sum, distance);
      if (lane + distance < kWarp) sum += right;
    }
    sum += after;
    if (k >= chain.begin) grad_alpha[k] = static_cast<T>(stop(alpha[k]) * sum);
    after = __shfl_sync(kAllLanes, sum, 0);
  }
}

unsigned blocks_for(int64_t chains) {
  return static_cast<unsigned>((chains + kWarpsPerBlock - 1) / kWarpsPerBlock);
}

}  // namespace

template <typename T>
void retain(const T* alpha, const int32_t* offsets, T* q, int64_t chains, int64_t total,
            cudaStream_t stream) {
  if (chains == 0) return;
  const dim3 block(kWarp, kWarpsPerBlock);
  retain_kernel<<<blocks_for(chains), block, 0, stream>>>(alpha, offsets, q, chains, total);
  check_launch("retain");
}

template <typename T>
void retain_backward(const T* grad_q, const T* alpha, const T* q, const int32_t* offsets,
                     T* grad_alpha, int64_t chains, int64_t total, cudaStream_t stream) {
  if (chains == 0) return;
  const dim3 block(kWarp, kWarpsPerBlock);
  retain_backward_kernel<<<blocks_for(chains), block, 0, stream>>>(grad_q, alpha, q, offsets,
                                                                   grad_alpha, chains, total);
  check_launch("retain_backward");
}

template void retain(const float*, const int32_t*, float*, int64_t, int64_t, cudaStream_t);
template void retain(const double*, const int32_t*, double*, int64_t, int64_t, cudaStream_t);
template void retain_backward(const float*, const float*, const float*, const int32_t*, float*,
                              int64_t, int64_t, cudaStream_t);
template void retain_backward(const double*, const double*, const double*, const int32_t*, double*,
                              int64_t, int64_t, cudaStream_t);

}  // namespace dmcp::cuda
