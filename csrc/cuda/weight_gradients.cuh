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
  View out;  // [m, n], or [n] without left
};

// One launch for all of them; one more where there are so many rows that blocks share a sum.
void outer_sums(const Stream& stream, const OuterSum* sums, int count);

}  // namespace mimnet_fast::cuda
