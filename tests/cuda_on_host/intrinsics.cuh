// csrc/cuda/intrinsics.cuh for the host: the same interface on the executor's threads, with every
// access and meeting checked. The layouts of matrices are those of the PTX ISA.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/execution.h"
#include "executor.h"

namespace mimnet_fast::cuda {

#define MIMNET_FAST_DEVICE inline
#define MIMNET_FAST_ARGUMENTS const
#define MIMNET_FAST_KERNEL(threads, blocks) void

constexpr int kWarp = host::kLanes;

// Position

MIMNET_FAST_DEVICE int thread_index() { return host::position.thread; }
MIMNET_FAST_DEVICE int block_threads() { return host::position.threads; }
MIMNET_FAST_DEVICE int64_t block_index() { return host::position.block; }
MIMNET_FAST_DEVICE int64_t grid_blocks() { return host::position.blocks; }

MIMNET_FAST_DEVICE char* shared_memory() { return host::position.shared; }

// Barriers

namespace host {

// What the lanes of a warp brought to a meeting.
template <class T>
class Brought {
 public:
  Brought(const char* operation, const T& mine, const Site& site)
      : operands_(meet(operation, &mine, sizeof(T), site)) {
    static_assert(sizeof(T) <= sizeof(Operand) && std::is_trivially_copyable_v<T>);
  }
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, operands_[lane].data(), sizeof(T));
    return value;
  }

 private:
  const Operand* operands_;
};

inline int lane() { return position.thread % kLanes; }

}  // namespace host

MIMNET_FAST_DEVICE void sync_block(host::Site site = host::Site::current()) {
  host::sync_block(site);
}
MIMNET_FAST_DEVICE void sync_warp(host::Site site = host::Site::current()) {
  host::Brought<char>("sync_warp", 0, site);
}

// Arithmetic

MIMNET_FAST_DEVICE float bits_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
MIMNET_FAST_DEVICE uint32_t float_as_bits(float x) { return std::bit_cast<uint32_t>(x); }
MIMNET_FAST_DEVICE float maximum(float a, float b) { return a > b || a != a ? a : b; }
MIMNET_FAST_DEVICE float square_root(float x) { return std::sqrt(x); }
MIMNET_FAST_DEVICE float power(float x, float exponent) { return std::pow(x, exponent); }
MIMNET_FAST_DEVICE float exponential(float x) { return std::exp(x); }

// Storage types

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

MIMNET_FAST_DEVICE float widen(float x) { return x; }
MIMNET_FAST_DEVICE float widen(BFloat16 x) { return bits_as_float(uint32_t(x.bits) << 16); }
MIMNET_FAST_DEVICE float widen(Float16 x) { return c10::detail::fp16_ieee_to_fp32_value(x.bits); }

template <class S>
MIMNET_FAST_DEVICE S narrow(float x);
template <>
MIMNET_FAST_DEVICE float narrow<float>(float x) {
  return x;
}
template <>
MIMNET_FAST_DEVICE BFloat16 narrow<BFloat16>(float x) {
  return {c10::detail::round_to_nearest_even(x)};
}
template <>
MIMNET_FAST_DEVICE Float16 narrow<Float16>(float x) {
  return {c10::detail::fp16_ieee_from_fp32_value(x)};
}

MIMNET_FAST_DEVICE uint32_t narrow_pair(float low, float high) {
  return narrow<BFloat16>(low).bits | uint32_t(narrow<BFloat16>(high).bits) << 16;
}

// Global memory

struct alignas(16) Pack {
  uint32_t words[4];
};

template <class T>
MIMNET_FAST_DEVICE T load(const T* address, host::Site site = host::Site::current()) {
  host::check_access(address, false, site);
  return *address;
}
template <class T>
MIMNET_FAST_DEVICE void store(T* address, T value, host::Site site = host::Site::current()) {
  host::check_access(address, true, site);
  *address = value;
}
MIMNET_FAST_DEVICE Pack load_pack(const void* address, host::Site site = host::Site::current()) {
  return load(static_cast<const Pack*>(address), site);
}
MIMNET_FAST_DEVICE void store_pack(void* address, Pack p, host::Site site = host::Site::current()) {
  store(static_cast<Pack*>(address), p, site);
}

// Exchange within a warp

template <class T>
MIMNET_FAST_DEVICE T shuffle(T value, int lane, host::Site site = host::Site::current()) {
  return host::Brought<T>("shuffle", value, site)[lane % kWarp];
}
template <class T>
MIMNET_FAST_DEVICE T shuffle_xor(T value, int mask, host::Site site = host::Site::current()) {
  return host::Brought<T>("shuffle_xor", value, site)[(host::lane() ^ mask) % kWarp];
}

// Matrices of 16-bit numbers. A lane holds two neighbouring elements of an 8x8 matrix: in row
// lane / 4, columns lane % 4 * 2 and the one after.

namespace host {

inline uint32_t two(uint16_t low, uint16_t high) { return low | uint32_t(high) << 16; }
inline uint16_t half(uint32_t word, int i) { return uint16_t(word >> 16 * i); }
inline float brain(uint32_t word, int i) { return widen(BFloat16{half(word, i)}); }

inline const uint16_t* shared_row(const void* row, const Site& site) {
  const char* address = static_cast<const char*>(row);
  if (address < position.shared || address + 16 > position.shared + position.shared_bytes) {
    fail("a row of a matrix outside of shared memory", site);
  }
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("a row of a matrix is not aligned", site);
  return static_cast<const uint16_t*>(row);
}

}  // namespace host

MIMNET_FAST_DEVICE void load_matrices(uint32_t (&m)[4], const void* row,
                                      host::Site site = host::Site::current()) {
  const host::Brought<const uint16_t*> rows("load_matrices", host::shared_row(row, site), site);
  const int i = host::lane() / 4, j = host::lane() % 4 * 2;
  for (int n = 0; n < 4; ++n) m[n] = host::two(rows[8 * n + i][j], rows[8 * n + i][j + 1]);
}
MIMNET_FAST_DEVICE void load_matrices_transposed(uint32_t (&m)[4], const void* row,
                                                 host::Site site = host::Site::current()) {
  const host::Brought<const uint16_t*> rows("load_matrices_transposed", host::shared_row(row, site),
                                            site);
  const int i = host::lane() / 4, j = host::lane() % 4 * 2;
  for (int n = 0; n < 4; ++n) m[n] = host::two(rows[8 * n + j][i], rows[8 * n + j + 1][i]);
}
MIMNET_FAST_DEVICE uint32_t transpose_matrix(uint32_t m, host::Site site = host::Site::current()) {
  const host::Brought<uint32_t> words("transpose_matrix", m, site);
  const int i = host::lane() / 4, j = host::lane() % 4 * 2;
  const auto element = [&](int row, int column) {
    return host::half(words[row * 4 + column / 2], column % 2);
  };
  return host::two(element(j, i), element(j + 1, i));
}

// a: the 8x8 matrices top left, bottom left, top right, bottom right; b: the transposes of top and
// bottom; c: two neighbouring elements of the top half and two of the bottom half.
MIMNET_FAST_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                     host::Site site = host::Site::current()) {
  struct Factors {
    uint32_t a[4], b[2];
  };
  const host::Brought<Factors> lanes("multiply_add", {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}},
                                     site);
  const int i = host::lane() / 4, j = host::lane() % 4 * 2;
  for (int k = 0; k < 16; ++k) {
    const int pair = k % 8 / 2, right = k / 8;
    const Factors left = lanes[i * 4 + pair];
    const float top = host::brain(left.a[2 * right], k % 2);
    const float bottom = host::brain(left.a[2 * right + 1], k % 2);
    for (int n = 0; n < 2; ++n) {
      const float factor = host::brain(lanes[(j + n) * 4 + pair].b[right], k % 2);
      c[n] += top * factor;
      c[2 + n] += bottom * factor;
    }
  }
}

// The device and its launches

struct DeviceLimits {
  int multiprocessors;
  int shared_memory;
};

// Few multiprocessors, so that small inputs have more blocks than those run at once.
inline DeviceLimits device_limits() { return {4, host::kSharedMemory}; }

template <class Args>
void launch(void (*kernel)(Args), int64_t blocks, int threads, int64_t shared_bytes,
            const Stream& /*stream*/, const Args& args, host::Site site = host::Site::current()) {
  host::launch([&] { kernel(args); }, blocks, threads, shared_bytes, site);
}

}  // namespace mimnet_fast::cuda
