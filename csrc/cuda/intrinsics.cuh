// What the kernels ask of the hardware: everything that is not plain C++ stands in this file, so
// that another implementation of it runs the same kernels elsewhere.
//
// Global memory is read and written through `load` and `store` alone. A kernel is a function
// `MIMNET_FAST_KERNEL(threads, blocks) name(Args args)`, started by `launch`.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../common/execution.h"

namespace mimnet_fast::cuda {

#define MIMNET_FAST_DEVICE __device__ __forceinline__
// At most `threads` per block, of which `blocks` shall fit on a multiprocessor.
#define MIMNET_FAST_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// Of a kernel's arguments: they stay where the launch put them.
#define MIMNET_FAST_ARGUMENTS const __grid_constant__

constexpr int kWarp = 32;

// Position

MIMNET_FAST_DEVICE int thread_index() { return int(threadIdx.x); }
MIMNET_FAST_DEVICE int block_threads() { return int(blockDim.x); }
MIMNET_FAST_DEVICE int64_t block_index() { return int64_t(blockIdx.x); }
MIMNET_FAST_DEVICE int64_t grid_blocks() { return int64_t(gridDim.x); }

// Shared memory of the block, 16-byte aligned, of the size given at the launch.
MIMNET_FAST_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// Barriers; all threads of the block or warp must come.

MIMNET_FAST_DEVICE void sync_block() { __syncthreads(); }
MIMNET_FAST_DEVICE void sync_warp() { __syncwarp(); }

// Arithmetic

MIMNET_FAST_DEVICE float bits_as_float(uint32_t bits) { return __uint_as_float(bits); }
MIMNET_FAST_DEVICE uint32_t float_as_bits(float x) { return __float_as_uint(x); }
// NaN where one of them is, unlike fmaxf: a relu must not hide it.
MIMNET_FAST_DEVICE float maximum(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
MIMNET_FAST_DEVICE float square_root(float x) { return sqrtf(x); }
MIMNET_FAST_DEVICE float power(float x, float exponent) { return powf(x, exponent); }
MIMNET_FAST_DEVICE float exponential(float x) { return expf(x); }

// Storage types

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

MIMNET_FAST_DEVICE float widen(float x) { return x; }
MIMNET_FAST_DEVICE float widen(BFloat16 x) { return bits_as_float(uint32_t(x.bits) << 16); }
MIMNET_FAST_DEVICE float widen(Float16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}

template <class S>
MIMNET_FAST_DEVICE S narrow(float x);
template <>
MIMNET_FAST_DEVICE float narrow<float>(float x) {
  return x;
}
template <>
MIMNET_FAST_DEVICE BFloat16 narrow<BFloat16>(float x) {
  BFloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
}
template <>
MIMNET_FAST_DEVICE Float16 narrow<Float16>(float x) {
  Float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
}

// Two floats as bfloat16, the first in the low half.
MIMNET_FAST_DEVICE uint32_t narrow_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Global memory

// Sixteen bytes that travel together; the address is a multiple of 16.
struct alignas(16) Pack {
  uint32_t words[4];
};

template <class T>
MIMNET_FAST_DEVICE T load(const T* address) {
  return *address;
}
template <class T>
MIMNET_FAST_DEVICE void store(T* address, T value) {
  *address = value;
}
// Read once: leave the first-level cache to others.
MIMNET_FAST_DEVICE Pack load_pack(const void* address) {
  Pack p;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(p.words[0]), "=r"(p.words[1]), "=r"(p.words[2]), "=r"(p.words[3])
               : "l"(address));
  return p;
}
MIMNET_FAST_DEVICE void store_pack(void* address, Pack p) { *static_cast<Pack*>(address) = p; }

// Exchange within a warp, all of whose lanes take part

template <class T>
MIMNET_FAST_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
MIMNET_FAST_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Matrices of 16-bit numbers held by a warp, as PTX lays them out

// Four 8x8 matrices; lanes 8i to 8i+7 give the addresses of the rows of matrix i, in shared memory.
MIMNET_FAST_DEVICE void load_matrices(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row))));
}
MIMNET_FAST_DEVICE void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row))));
}
// The transpose of one 8x8 matrix.
MIMNET_FAST_DEVICE uint32_t transpose_matrix(uint32_t m) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(m));
  return transposed;
}

// c[16,8] += a[16,16] b[16,8] of bfloat16 on the tensor cores, summed in float32.
MIMNET_FAST_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The device and its launches

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("mimnet_fast: ") + what + ": " + cudaGetErrorString(status));
}

struct DeviceLimits {
  int multiprocessors;
  int shared_memory;  // bytes per block
};

// Of the current device.
inline DeviceLimits device_limits() {
  int device = 0;
  DeviceLimits limits{};
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&limits.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                               device),
        "cudaDeviceGetAttribute");
  return limits;
}

template <class Args>
void launch(void (*kernel)(Args), int64_t blocks, int threads, int64_t shared_bytes,
            const Stream& stream, const Args& args) {
  if (blocks == 0) return;
  constexpr int64_t without_asking = 48 * 1024;
  if (shared_bytes > without_asking) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(shared_bytes)),
          "cudaFuncSetAttribute");
  }
  kernel<<<dim3(unsigned(blocks)), dim3(unsigned(threads)), size_t(shared_bytes),
           static_cast<cudaStream_t>(stream.handle)>>>(args);
  check(cudaGetLastError(), "kernel launch");
}

}  // namespace mimnet_fast::cuda
