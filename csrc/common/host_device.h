// Functions that the CPU and the CUDA kernels share.
#pragma once

// Internal linkage and always inlined: a source compiled for several instruction sets must not
// leave a copy of such a function for the linker to share between them.
#ifdef __CUDACC__
#define DMCP_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define DMCP_HOST_DEVICE static inline __attribute__((always_inline))
#endif
