// Functions that host and device compile alike.
#pragma once

// Code that several instruction sets share must not exist out of line: the linker would keep one
// copy, perhaps the one that the processor at hand cannot run.
#if defined(__CUDACC__)
#define MIMNET_FAST_INLINE __host__ __device__ __forceinline__
#else
#define MIMNET_FAST_INLINE inline __attribute__((always_inline))
#endif
