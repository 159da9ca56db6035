// Small matrix products over lanes. A "matrix" is any arrangement of vectors, given by strides
// counted in vectors; C[m, n] (+)= sum_r A[m, r] B[r, n].
#pragma once

#include "lanes.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {

// Products accumulate in this many rows and columns of registers.
#if defined(__AVX512F__)
constexpr int kTileM = 4;
#else
constexpr int kTileM = 2;
#endif
constexpr int kTileN = 6;

template <class T>
struct LaneMatrix {
  Vec<T>* data;
  int64_t row;
  int64_t column;
};

template <class T>
struct ConstLaneMatrix {
  const Vec<T>* data;
  int64_t row;
  int64_t column;
};

// One matrix for all users: B[r, n] = data[r * row + (n % kTileN) * column + (n / kTileN) * tile].
template <class T>
struct SharedMatrix {
  const T* data;
  int64_t row;
  int64_t column;
  int64_t tile;

  SharedMatrix(const T* d, int64_t row_stride, int64_t column_stride)
      : data(d), row(row_stride), column(column_stride), tile(kTileN * column_stride) {}
  SharedMatrix(const T* d, int64_t row_stride, int64_t column_stride, int64_t tile_stride)
      : data(d), row(row_stride), column(column_stride), tile(tile_stride) {}
};

// Every user has matrices of their own.
template <class T>
void multiply(LaneMatrix<T> c, ConstLaneMatrix<T> a, ConstLaneMatrix<T> b, int64_t m, int64_t n,
              int64_t r, bool accumulate);

// B is shared by all users.
template <class T>
void multiply(LaneMatrix<T> c, ConstLaneMatrix<T> a, SharedMatrix<T> b, int64_t m, int64_t n,
              int64_t r, bool accumulate);

// C[m, n] = relu(bias[n] + sum_r A[m, r] B[r, n])
template <class T>
void multiply_relu(LaneMatrix<T> c, ConstLaneMatrix<T> a, SharedMatrix<T> b, const T* bias,
                   int64_t m, int64_t n, int64_t r);

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
