// What the sources share that CMake compiles once per instruction set, each time with its own name
// for the table at the end of the source, DMCP_KERNELS; where a set adds instructions for bfloat16
// alone, with DMCP_BFLOAT16_ONLY, as what it serves. To keep code of one set out of the others,
// everything but the table has internal linkage, and no template of the standard library is used.
#pragma once

#include "cpu/simd.h"

#include <cstdlib>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "common/tensors.h"

// Before a loop: its iterations do not meet in memory, which its pointers do not tell.
#ifdef __clang__
#define DMCP_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define DMCP_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace dmcp {
namespace {

// --- Blocks of work
// -------------------------------------------------------------------------------

// Below this many elements a parallel region costs more than it saves.
constexpr int64_t kParallelElements = 32768;

// Bodies capture by value: a store could change what is captured by reference, as far as the
// compiler can tell, and it would read that again after each.
//
// A second pass goes backwards: what the first one read last is still in the cache of its thread.
enum class Direction { forwards, backwards };

template <typename Body>
void for_blocks(int64_t blocks, int64_t elements, Direction direction, const Body& body) {
#ifdef _OPENMP
#pragma omp parallel if (blocks > 1 && elements >= kParallelElements)
#endif
  {
#ifdef _OPENMP
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
#else
    const int64_t threads = 1, thread = 0;
#endif
    const int64_t begin = blocks * thread / threads, end = blocks * (thread + 1) / threads;
    for (int64_t i = begin; i < end; ++i)
      body(direction == Direction::forwards ? i : begin + end - 1 - i);
  }
}

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t blocks_of(int64_t items, int64_t per_block) {
  return (items + per_block - 1) / per_block;
}

// Memory that a thread keeps for its next call; a call takes all it needs at once.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  template <typename S>
  S* take(int64_t elements) {
    const size_t bytes = static_cast<size_t>(elements) * sizeof(S);
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(64, size_);
      if (!data_) std::abort();
    }
    return static_cast<S*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// --- A vector, or the part of one that is left at the end of a row
// --------------------------------

struct Whole {};
struct Part {
  int lanes;
};

template <typename T>
DMCP_HOST_DEVICE auto load(const T* p, Whole) {
  return load(p);
}
template <typename T>
DMCP_HOST_DEVICE auto load(const T* p, Part part) {
  return load(p, part.lanes);
}
template <typename T, typename V>
DMCP_HOST_DEVICE void store(T* p, V v, Whole) {
  store(p, v);
}
template <typename T, typename V>
DMCP_HOST_DEVICE void store(T* p, V v, Part part) {
  store(p, v, part.lanes);
}

// What may be summed: lanes that hold no value are 0.
template <typename S>
DMCP_HOST_DEVICE Vector<S> valid(Vector<S> v, Whole) {
  return v;
}
template <typename S>
DMCP_HOST_DEVICE Vector<S> valid(Vector<S> v, Part part) {
  for (int lane = part.lanes; lane < kLanes<S>; ++lane) v[lane] = S(0);
  return v;
}

// --- From run time to compile time
// ----------------------------------------------------------------

template <int64_t count>
struct Count {
  static constexpr int64_t value = count;
};

template <typename T>
struct Type {
  using type = T;
};

template <typename Call>
void with_dtype(DType dtype, const Call& call) {
#ifdef DMCP_BFLOAT16_ONLY
  (void)dtype;
  return call(Type<BFloat16>{});
#else
  switch (dtype) {
    case DType::float32:
      return call(Type<float>{});
    case DType::bfloat16:
      return call(Type<BFloat16>{});
    case DType::float16:
      return call(Type<Float16>{});
    case DType::float64:
      return call(Type<double>{});
  }
#endif
}

template <typename T>
Pitched<const T> of(Pitched<const void> tensor) {
  return {static_cast<const T*>(tensor.data), tensor.pitch};
}
template <typename T>
Pitched<T> of(Pitched<void> tensor) {
  return {static_cast<T*>(tensor.data), tensor.pitch};
}

}  // namespace
}  // namespace dmcp
