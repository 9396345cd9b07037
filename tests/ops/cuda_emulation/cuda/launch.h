// Stands in for csrc/cuda/launch.h where a host compiler builds a CUDA source: the kernels run on
// the CPU, one block after the other. The threads of a block are fibers that switch where they wait
// for each other, at __syncthreads() and in the functions of a warp, so that a block has a defined
// order, forwards or backwards; results must not depend on it.
//
// Enough for kernels without atomics and dynamic shared memory. Blocks are whole warps where a
// kernel calls functions of a warp; these take all lanes.
#pragma once

#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static  // blocks run one at a time

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

using std::max;
using std::min;

inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return uint64_t{a} * b >> 32;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <typename T>
T __ldg(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T)) std::abort();  // as the device would
  return *from;
}
template <typename T>
void __stwb(T* to, T value) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(T)) std::abort();
  *to = value;
}

namespace dmcp {

inline float exponential(float u) {
  return std::exp(u);
}
inline double exponential(double u) {
  return std::exp(u);
}

namespace emulation {

inline int multiprocessors = 2;
inline bool backwards = false;

constexpr unsigned kWarp = 32;

enum class Wait { none, warp, block, end };  // what for

struct Fiber {
  static constexpr size_t kStack = 1 << 16;

  uint3 index;
  Wait wait;
  double shared;  // with the other lanes
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers(1024);  // of the block
inline Fiber* running;
inline const std::function<void()>* kernel_of_block;

inline void wait_for(Wait others) {
  running->wait = others;
  swapcontext(&running->context, &scheduler);
}

inline void run_fiber() {
  (*kernel_of_block)();
  wait_for(Wait::end);
}

inline void start(Fiber& fiber, unsigned thread) {
  fiber.index = {thread % blockDim.x, thread / blockDim.x % blockDim.y,
                 thread / (blockDim.x * blockDim.y)};
  fiber.wait = Wait::none;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = Fiber::kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
}

// Lets the fibers begin ... end - 1 go on if all of them wait for the same; says whether they do.
inline bool meet(Wait others, unsigned begin, unsigned end) {
  for (unsigned i = begin; i < end; ++i)
    if (fibers[i].wait != others) return false;
  for (unsigned i = begin; i < end; ++i) fibers[i].wait = Wait::none;
  return true;
}

inline void run_block(const std::function<void()>& kernel) {
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  kernel_of_block = &kernel;
  for (unsigned i = 0; i < threads; ++i) start(fibers[i], i);
  while (!meet(Wait::end, 0, threads)) {
    bool ran = meet(Wait::block, 0, threads);
    for (unsigned i = 0; i + kWarp <= threads; i += kWarp) ran |= meet(Wait::warp, i, i + kWarp);
    for (unsigned i = 0; i < threads; ++i) {
      running = &fibers[backwards ? threads - 1 - i : i];
      if (running->wait != Wait::none) continue;
      threadIdx = running->index;
      swapcontext(&scheduler, &running->context);
      ran = true;
    }
    if (!ran) {
      std::fputs("some threads wait for others that returned or wait for something else\n", stderr);
      std::abort();
    }
  }
}

// The value of the lane `from` (its own where there is no such lane).
inline double lane_value(double value, unsigned from) {
  running->shared = value;
  wait_for(Wait::warp);
  if (from < kWarp) value = fibers[(running - fibers.data()) / kWarp * kWarp + from].shared;
  wait_for(Wait::warp);
  return value;
}

inline unsigned lane() { return (running - fibers.data()) % kWarp; }

}  // namespace emulation

namespace cuda {

template <typename... Parameters, typename... Arguments>
void launch(const char*, void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t,
            const Arguments&... arguments) {
  gridDim = grid;
  blockDim = block;
  for (unsigned i = 0; i < grid.x; ++i) {
    blockIdx = {emulation::backwards ? grid.x - 1 - i : i, 0, 0};
    emulation::run_block([&] { kernel(arguments...); });
  }
}

inline int multiprocessors(const char*) {
  return emulation::multiprocessors;
}

}  // namespace cuda
}  // namespace dmcp

inline void __syncthreads() {
  dmcp::emulation::wait_for(dmcp::emulation::Wait::block);
}
inline void __syncwarp() {
  dmcp::emulation::wait_for(dmcp::emulation::Wait::warp);
}
inline double __shfl_sync(unsigned, double value, unsigned from) {
  return dmcp::emulation::lane_value(value, from);
}
inline double __shfl_xor_sync(unsigned, double value, unsigned mask) {
  return dmcp::emulation::lane_value(value, dmcp::emulation::lane() ^ mask);
}
inline double __shfl_up_sync(unsigned, double value, unsigned distance) {
  return dmcp::emulation::lane_value(value, dmcp::emulation::lane() - distance);
}
inline double __shfl_down_sync(unsigned, double value, unsigned distance) {
  return dmcp::emulation::lane_value(value, dmcp::emulation::lane() + distance);
}
