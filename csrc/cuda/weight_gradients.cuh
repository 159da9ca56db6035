// Gradients of the parameters: sums of outer products of rows, in one fixed order.
#pragma once

#include "../common/kernels.h"

namespace mimnet_fast::cuda {

// out[m, n] = sum over r < rows of left[r, m] right[r, n], both float32 with contiguous rows.
// Without `left`: out[n] = sum of right[r, n].
struct OuterSum {
  const float* left;
  const float* right;
  int64_t left_stride, right_stride;  // elements between rows
  int64_t rows;
  int m, n;
  View out;  // [m, n], or [n] without left; empty: not wanted

  // With `factor` the right operand is made of rows (r, q), q < terms:
  // right'[r, (i, j)] = sum over q of factor[(r, q), i] right[(r, q), j], with j < width.
  const float* factor = nullptr;
  int64_t factor_stride = 0;
  int terms = 1;
  int width = 0;
};

// One launch for all of them (up to 20); one more where there are so many rows that blocks share a
// sum.
void outer_sums(const Stream& stream, const OuterSum* sums, int count);

// out[m, n] = sum over p < parts of partial[p, m, n], in this order
struct PartialSum {
  const float* partial;
  int parts;
  int64_t m;
  int n;
  View out;  // [m, n], or [n] with m = 1
};

// One launch for all of them (up to 20).
void add_parts(const Stream& stream, const PartialSum* sums, int count);

}  // namespace mimnet_fast::cuda
