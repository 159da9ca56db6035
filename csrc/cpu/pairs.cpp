#include "pairs.h"

#if defined(__AVX512F__)

#define MIMNET_FAST_BF16 __attribute__((target("avx512bf16")))

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {
namespace {

MIMNET_FAST_BF16 inline PairVec pack(Vec<float> first, Vec<float> second) {
  const auto low = __builtin_convertvector((Halves)_mm512_cvtneps_pbh((__m512)first), Words);
  const auto high = __builtin_convertvector((Halves)_mm512_cvtneps_pbh((__m512)second), Words);
  return (PairVec)(low | high << 16);
}

// One register tile: MR x NR sums over r.
template <int MR, int NR>
MIMNET_FAST_BF16 void tile(Vec<float>* c, int64_t c_row, int64_t c_column, const PairVec* a,
                           int64_t a_row, int64_t a_column, const int32_t* b, int64_t b_row,
                           int64_t b_column, int64_t pairs, bool accumulate) {
  __m512 sum[MR][NR];
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 6
    for (int n = 0; n < NR; ++n) sum[m][n] = _mm512_setzero_ps();
  }
  for (int64_t i = 0; i < pairs; ++i) {
    __m512bh left[MR];
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) left[m] = (__m512bh)a[m * a_row];
#pragma GCC unroll 6
    for (int n = 0; n < NR; ++n) {
      const __m512bh right = (__m512bh)_mm512_set1_epi32(b[n * b_column]);
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], left[m], right);
    }
    a += a_column;
    b += b_row;
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 6
    for (int n = 0; n < NR; ++n) {
      Vec<float>& to = c[m * c_row + n * c_column];
      to = accumulate ? to + (Vec<float>)sum[m][n] : (Vec<float>)sum[m][n];
    }
  }
}

using Tile = void (*)(Vec<float>*, int64_t, int64_t, const PairVec*, int64_t, int64_t,
                      const int32_t*, int64_t, int64_t, int64_t, bool);

template <int MR>
constexpr Tile kRow[kTileN] = {tile<MR, 1>, tile<MR, 2>, tile<MR, 3>,
                               tile<MR, 4>, tile<MR, 5>, tile<MR, 6>};
constexpr const Tile* kTiles[kTileM] = {kRow<1>, kRow<2>, kRow<3>, kRow<4>};

}  // namespace

bool cpu_has_pairs() {
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
}

MIMNET_FAST_BF16 void pack_pairs(PairVec* to, const Vec<float>* from, int64_t terms) {
  for (int64_t r = 0; r < terms / 2; ++r) to[r] = pack(from[2 * r], from[2 * r + 1]);
  if (terms % 2 != 0) to[terms / 2] = pack(from[terms - 1], Vec<float>{});
}

MIMNET_FAST_BF16 void pack_pairs(PairVec* to, const Vec<float>* first, const Vec<float>* second,
                                 int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = pack(first[i], second == nullptr ? Vec<float>{} : second[i]);
  }
}

void multiply_pairs(LaneMatrix<float> c, PairMatrix a, SharedMatrix<int32_t> b, int64_t m,
                    int64_t n, int64_t pairs, bool accumulate) {
  const int32_t* columns = b.data;
  for (int64_t j = 0; j < n; j += kTileN, columns += b.tile) {
    const int64_t width = n - j < kTileN ? n - j : kTileN;
    for (int64_t i = 0; i < m; i += kTileM) {
      const int64_t rows = m - i < kTileM ? m - i : kTileM;
      kTiles[rows - 1][width - 1](c.data + i * c.row + j * c.column, c.row, c.column,
                                  a.data + i * a.row, a.row, a.column, columns, b.row, b.column,
                                  pairs, accumulate);
    }
  }
}

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA

#endif
