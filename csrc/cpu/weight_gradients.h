// Gradients of the parameters: sums over all users, taken in one fixed order after the users are
// done.
//
// The loop over users leaves the factors as rows of padded row-major buffers; then the threads
// share out the *entries* of the gradients, so that no two threads ever add to the same one. The
// result does not depend on the number of threads, and there is nothing to reduce.
#pragma once

#include "../common/execution.h"
#include "matmul.h"
#include "memory.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {

// A padded row-major buffer.
template <class T>
struct Rows {
  Buffer<T> buffer;
  int64_t width = 0;

  void allocate(int64_t rows, int64_t columns) {
    width = padded<T>(columns);
    buffer = Buffer<T>(rows * width);
  }
  T* get() const { return buffer.get(); }
  View view(int64_t rows, int64_t columns) const {
    return {get(), LaneTypes<T>::dtype, 2, {rows, columns}, {width, 1}};
  }
};

// The matrix of the last two dimensions at an index of those before.
inline View matrix_of(const View& view, int64_t i, int64_t j = 0) {
  View matrix = view;
  matrix.data = at(view, i, j);
  matrix.dims = 2;
  for (int d = 0; d < 2; ++d) {
    matrix.size[d] = view.size[view.dims - 2 + d];
    matrix.stride[d] = view.stride[view.dims - 2 + d];
  }
  return matrix;
}

// Writes sums, m rows of whole vectors, to the entries from (m0, n0) on of a 1-d or 2-d view.
template <class T>
void store_sums(const Vec<T>* sums, int64_t m, int64_t n, const View& out, int64_t m0 = 0,
                int64_t n0 = 0);

// out[m, n] = sum_r a[r, m] g[r, n], for a 1-d or 2-d view `out` of m x n entries.
template <class T>
struct OuterProduct {
  const T* a;
  int64_t a_width;  // 0: the same row for every r
  const T* g;
  int64_t g_width;
  int64_t rows, m, n;
  View out;
};

template <class T>
class WeightGradients {
 public:
  static constexpr int kCapacity = 24;

  void add(OuterProduct<T> product);

  // Column sums of g.
  void add_sum(const T* g, int64_t g_width, int64_t rows, int64_t n, const View& out) {
    static constexpr T one[1] = {T(1)};
    add({one, 0, g, g_width, rows, 1, n, out});
  }

  int64_t units() const;
  void run(int64_t unit) const;
  void run_all() const;
  void run_all(const Parallel& parallel) const;

 private:
  int count_ = 0;
  OuterProduct<T> products_[kCapacity];
};

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
