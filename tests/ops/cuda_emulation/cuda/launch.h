// Stands in for csrc/cuda/launch.h where a host compiler builds a CUDA source: the kernels run on
// the CPU, one block after the other. The threads of a block are fibers that switch where they wait
// for each other, at __syncthreads() and in the functions of a warp, so that a block has a defined
// order, forwards or backwards; results must not depend on it.
//
// Enough for kernels without atomics and dynamic shared memory. Blocks are whole warps where a
// kernel calls functions of a warp; these take all lanes.
#pragma once

#undef _FORTIFY_SOURCE  // takes a _longjmp() to another stack for an error

#include <cuda_runtime_api.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
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

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint64_t{a} * b >> 32; }
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

namespace dmcp::emulation {

inline int multiprocessors = 2;
inline bool backwards = false;
inline const char* failure = nullptr;  // what a device would not have done, the first time

inline void fail(const char* what) {
  if (!failure) failure = what;
}

template <typename T>
void check_alignment(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) fail("misaligned address");
}

}  // namespace dmcp::emulation

template <typename T>
T __ldg(const T* from) {
  dmcp::emulation::check_alignment(from);
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <typename T>
void __stwb(T* to, T value) {
  dmcp::emulation::check_alignment(to);
  std::memcpy(to, &value, sizeof value);
}

namespace dmcp {

inline float exponential(float u) { return std::exp(u); }
inline double exponential(double u) { return std::exp(u); }

namespace emulation {

constexpr unsigned kWarp = 32;

enum class Wait { none, warp, block, end };  // what for

// One thread of a block, kept for the next block. setcontext() starts it; later switches go through
// _longjmp(), which unlike swapcontext() asks nothing of the operating system.
struct Fiber {
  static constexpr size_t kStack = 1 << 16;

  uint3 index;
  bool started = false;
  Wait wait;
  double shared;  // with the other lanes
  ucontext_t context;
  jmp_buf resume;
  std::vector<char> stack = std::vector<char>(kStack);
};

inline std::vector<Fiber> fibers(1024);  // of the block
inline jmp_buf scheduler;
inline Fiber* running;
inline const std::function<void()>* kernel_of_block;

inline void wait_for(Wait others) {
  running->wait = others;
  if (_setjmp(running->resume) == 0) _longjmp(scheduler, 1);
}

inline void run_fiber() {
  for (;;) {
    (*kernel_of_block)();
    wait_for(Wait::end);
  }
}

inline void resume(Fiber& fiber) {
  running = &fiber;
  threadIdx = fiber.index;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = Fiber::kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
  setcontext(&fiber.context);
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
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    fibers[i].wait = Wait::none;
  }
  while (!meet(Wait::end, 0, threads)) {
    bool ran = meet(Wait::block, 0, threads);
    for (unsigned i = 0; i + kWarp <= threads; i += kWarp) ran |= meet(Wait::warp, i, i + kWarp);
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = fibers[backwards ? threads - 1 - i : i];
      if (fiber.wait != Wait::none) continue;
      resume(fiber);
      ran = true;
    }
    if (!ran) {
      fail("some threads wait for others that returned or wait elsewhere");
      for (Fiber& fiber : fibers) fiber.started = false;
      return;
    }
  }
}

inline unsigned lane() { return (running - fibers.data()) % kWarp; }

// The value of the lane `from`, this lane's own where there is no such lane.
inline double lane_value(double value, unsigned from) {
  Fiber* const own = running;
  own->shared = value;
  wait_for(Wait::warp);
  if (from < kWarp) value = fibers[(own - fibers.data()) / kWarp * kWarp + from].shared;
  wait_for(Wait::warp);
  return value;
}

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

inline int multiprocessors(const char*) { return emulation::multiprocessors; }

}  // namespace cuda
}  // namespace dmcp

inline void __syncthreads() { dmcp::emulation::wait_for(dmcp::emulation::Wait::block); }
inline void __syncwarp() { dmcp::emulation::wait_for(dmcp::emulation::Wait::warp); }
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
