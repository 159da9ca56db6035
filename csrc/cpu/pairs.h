// Sums of products of bfloat16 on CPUs that add two of them at a time (AVX512-BF16): terms 2r and
// 2r + 1 share the 32 bits of a lane, and a sum is over pairs.
#pragma once

#include "matmul.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {

// Whether code for this instruction set has sums of pairs that end in a T ...
template <class T>
#if defined(__AVX512F__)
constexpr bool kPairs = std::is_same_v<T, float>;
#else
constexpr bool kPairs = false;
#endif

// ... and this CPU too.
bool cpu_has_pairs();

using PairVec = Int<float>;

struct PairMatrix {
  const PairVec* data;
  int64_t row;
  int64_t column;
};

MIMNET_FAST_INLINE int64_t pairs_of(int64_t terms) { return (terms + 1) / 2; }

MIMNET_FAST_INLINE int32_t pair_of(float first, float second) {
  return int32_t(uint32_t(narrow<BFloat16>(second).bits) << 16 | narrow<BFloat16>(first).bits);
}

// to[r] = (from[2r], from[2r + 1]), rounded; what an odd number of terms lacks is 0.
void pack_pairs(PairVec* to, const Vec<float>* from, int64_t terms);

// to[i] = (first[i], second[i]), rounded; without a second, 0.
void pack_pairs(PairVec* to, const Vec<float>* first, const Vec<float>* second, int64_t count);

// C[m, n] (+)= sum_r A[m, r] B[r, n]. B is shared by all users.
void multiply_pairs(LaneMatrix<float> c, PairMatrix a, SharedMatrix<int32_t> b, int64_t m,
                    int64_t n, int64_t pairs, bool accumulate);

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
