// squash of csrc/common/squash.h with one scalar per thread.
#pragma once

#include <intrinsics.cuh>

#include "../common/squash.h"

namespace mimnet_fast::cuda {

struct ScalarMath {
  using Value = float;
  using Scalar = float;
  static MIMNET_FAST_DEVICE float sqrt(float x) { return square_root(x); }
  static MIMNET_FAST_DEVICE float power(float x, float exponent) {
    return cuda::power(x, exponent);
  }
  static MIMNET_FAST_DEVICE float select(bool condition, float yes, float no) {
    return condition ? yes : no;
  }
};

MIMNET_FAST_DEVICE SquashFactor<float> squash_factor(float norm2, const Squash& squash) {
  return mimnet_fast::squash_factor<ScalarMath>(norm2, squash);
}

}  // namespace mimnet_fast::cuda
