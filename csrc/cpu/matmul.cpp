#include "matmul.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {
namespace {

template <class T>
MIMNET_FAST_INLINE Vec<T> value(const Vec<T>* p) {
  return *p;
}
template <class T>
MIMNET_FAST_INLINE Vec<T> value(const T* p) {
  return splat(*p);
}

// One register tile: MR x NR sums over r. With a bias C becomes relu(sum + bias).
template <class T, class B, int MR, int NR>
void tile(Vec<T>* c, int64_t c_row, int64_t c_column, const Vec<T>* a, int64_t a_row,
          int64_t a_column, const B* b, int64_t b_row, int64_t b_column, int64_t r, bool accumulate,
          const T* bias) {
  Vec<T> sum[MR][NR];
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 6
    for (int n = 0; n < NR; ++n) sum[m][n] = Vec<T>{};
  }
  for (int64_t i = 0; i < r; ++i) {
    Vec<T> left[MR];
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) left[m] = a[m * a_row];
#pragma GCC unroll 6
    for (int n = 0; n < NR; ++n) {
      const Vec<T> right = value<T>(b + n * b_column);
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m) sum[m][n] += left[m] * right;
    }
    a += a_column;
    b += b_row;
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 6
    for (int n = 0; n < NR; ++n) {
      Vec<T>& to = c[m * c_row + n * c_column];
      if (bias != nullptr) {
        to = maximum(sum[m][n] + bias[n], Vec<T>{});
      } else {  // C joins last: beside a large C every term would be rounded to its precision
        to = accumulate ? to + sum[m][n] : sum[m][n];
      }
    }
  }
}

template <class T, class B>
using Tile = void (*)(Vec<T>*, int64_t, int64_t, const Vec<T>*, int64_t, int64_t, const B*, int64_t,
                      int64_t, int64_t, bool, const T*);

template <class T, class B, int MR>
constexpr Tile<T, B> kRow[kTileN] = {tile<T, B, MR, 1>, tile<T, B, MR, 2>, tile<T, B, MR, 3>,
                                     tile<T, B, MR, 4>, tile<T, B, MR, 5>, tile<T, B, MR, 6>};

template <class T, class B>
void run(LaneMatrix<T> c, ConstLaneMatrix<T> a, const B* b, int64_t b_row, int64_t b_column,
         int64_t b_tile, int64_t m, int64_t n, int64_t r, bool accumulate,
         const T* bias = nullptr) {
#if defined(__AVX512F__)
  static constexpr const Tile<T, B>* tiles[] = {kRow<T, B, 1>, kRow<T, B, 2>, kRow<T, B, 3>,
                                                kRow<T, B, 4>};
#else
  static constexpr const Tile<T, B>* tiles[] = {kRow<T, B, 1>, kRow<T, B, 2>};
#endif
  for (int64_t j = 0; j < n; j += kTileN, b += b_tile) {
    const int64_t columns = n - j < kTileN ? n - j : kTileN;
    for (int64_t i = 0; i < m; i += kTileM) {
      const int64_t rows = m - i < kTileM ? m - i : kTileM;
      tiles[rows - 1][columns - 1](c.data + i * c.row + j * c.column, c.row, c.column,
                                   a.data + i * a.row, a.row, a.column, b, b_row, b_column, r,
                                   accumulate, bias == nullptr ? nullptr : bias + j);
    }
  }
}

}  // namespace

template <class T>
void multiply(LaneMatrix<T> c, ConstLaneMatrix<T> a, ConstLaneMatrix<T> b, int64_t m, int64_t n,
              int64_t r, bool accumulate) {
  run<T, Vec<T>>(c, a, b.data, b.row, b.column, kTileN * b.column, m, n, r, accumulate);
}

template <class T>
void multiply(LaneMatrix<T> c, ConstLaneMatrix<T> a, SharedMatrix<T> b, int64_t m, int64_t n,
              int64_t r, bool accumulate) {
  run<T, T>(c, a, b.data, b.row, b.column, b.tile, m, n, r, accumulate);
}

template <class T>
void multiply_relu(LaneMatrix<T> c, ConstLaneMatrix<T> a, SharedMatrix<T> b, const T* bias,
                   int64_t m, int64_t n, int64_t r) {
  run<T, T>(c, a, b.data, b.row, b.column, b.tile, m, n, r, false, bias);
}

#define MIMNET_FAST_INSTANTIATE(T)                                                                \
  template void multiply<T>(LaneMatrix<T>, ConstLaneMatrix<T>, ConstLaneMatrix<T>, int64_t,       \
                            int64_t, int64_t, bool);                                              \
  template void multiply<T>(LaneMatrix<T>, ConstLaneMatrix<T>, SharedMatrix<T>, int64_t, int64_t, \
                            int64_t, bool);                                                       \
  template void multiply_relu<T>(LaneMatrix<T>, ConstLaneMatrix<T>, SharedMatrix<T>, const T*,    \
                                 int64_t, int64_t, int64_t);
MIMNET_FAST_INSTANTIATE(float)
MIMNET_FAST_INSTANTIATE(double)

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
